"""Answers in pieces, against the parser that reads them whole."""

import pytest

from ossature.data import vocabulary
from ossature.data.tokenizer import Tokenizer, load
from ossature.talk.reading import Piece, Reader


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer(
        vocabulary.train(["what is the answer to a question? 1 2 3"] * 9, 400), "small"
    )


ANSWER = (
    "<|channel|>analysis<|message|>the 🙂 é<|end|><|start|>assistant<|channel|>commentary"
    "<|message|>I ask.<|end|><|start|>assistant to=functions.f<|channel|>commentary json"
    '<|message|>{"a": "€"}<|call|>'
)


def pieces(small: Tokenizer, text: str) -> tuple[list[Piece], Reader]:
    reader = Reader(small)
    found = [reader.push(token) for token in small.encode(text, special=True)]
    return [piece for piece in [*found, reader.close()] if piece is not None], reader


def test_pieces_add_up_to_the_messages(small):
    found, reader = pieces(small, ANSWER)
    texts: list[list[str]] = []
    for piece in found:
        if piece.begins:
            texts.append([piece.channel, piece.recipient, ""])
        texts[-1][2] += piece.text

    assert texts == [
        ["analysis", "", "the 🙂 é"],
        ["commentary", "", "I ask."],
        ["commentary", "functions.f", '{"a": "€"}'],
    ]
    assert texts == [[m.channel, m.recipient, m.text] for m in reader.messages]
    assert [piece.ends for piece in found].count(True) == 3
    assert reader.parser.ended == "<|call|>" and not reader.parser.problem


def test_no_piece_has_half_a_character(small):
    found, _ = pieces(small, ANSWER)

    assert sum(len(piece.text) for piece in found) == len("the 🙂 éI ask.") + len('{"a": "€"}')
    assert not any("\ufffd" in piece.text for piece in found)


def test_an_answer_that_is_cut_gives_what_it_held_back(small):
    text = "<|channel|>final<|message|>a"
    reader = Reader(small)
    for token in [*small.encode(text, special=True), *small.encode("🙂")[:-1]]:
        reader.push(token)

    assert reader.close() == Piece("final", "", "\ufffd", ends=True)
    assert reader.messages[0].text == "a\ufffd"


def test_a_header_in_the_prompt_counts(small):
    header = small.encode("<|channel|>final<|message|>", special=True)
    reader = Reader(small, header)

    assert reader.push(small.encode("a")[0]) == Piece("final", "", "a")


def test_the_cost_of_a_token_does_not_grow_with_the_text(small):
    """By the tokens that are decoded, and not by a clock."""
    decoded = 0
    decode = small.decode

    class Counting(Tokenizer):
        def decode(self, ids):
            nonlocal decoded
            decoded += len(ids)
            return decode(ids)

    reader = Reader(Counting(small.inner, "counting"))
    for token in small.encode("<|channel|>final<|message|>", special=True):
        reader.push(token)
    body = small.encode("the answer is é " * 300)
    for token in body:
        reader.push(token)

    assert decoded < 3 * len(body)


TEXTS = (
    ANSWER,
    "<|channel|>final<|message|>🙂é漢字 the end\n\n<|return|>",
    "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
    "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>a<|return|>",
)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_those_of_openais_parser(text):
    """Token by token, on the published vocabulary."""
    harmony = pytest.importorskip("openai_harmony")
    try:
        o200k = load("o200k_harmony")
        encoding = harmony.load_harmony_encoding("HarmonyGptOss")
    except Exception as absent:  # the vocabulary, which is not in the package
        pytest.skip(str(absent))
    theirs = harmony.StreamableParser(encoding, harmony.Role.ASSISTANT)
    ours = Reader(o200k)
    for token in o200k.encode(text, special=True):
        before = len(theirs.messages)
        theirs.process(token)
        piece = ours.push(token)
        ended = len(theirs.messages) > before
        assert bool(piece and piece.ends) == ended
        if piece is not None and not piece.ends:
            assert piece.text == (theirs.last_content_delta or "")
            assert piece.channel == theirs.current_channel
            assert piece.recipient == (theirs.current_recipient or "")
        elif piece is None:
            assert not theirs.last_content_delta
    assert [(m.channel, m.recipient or "", m.content[0].text) for m in theirs.messages] == [
        (m.channel, m.recipient, m.text) for m in ours.messages
    ]
