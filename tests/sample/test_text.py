import random

import pytest

from ossature.sample.text import Continuation


def decode(tokens: list[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(tokens).decode("utf-8", errors="replace")


def pieces(text: str | bytes, stops: tuple[str, ...] = ()) -> tuple[list[str], Continuation]:
    row = Continuation(decode, stops)
    data = text.encode() if isinstance(text, str) else text
    return [*(row.feed(byte) for byte in data), row.finish()], row


def test_a_character_is_shown_once_all_its_bytes_are_there():
    shown, _ = pieces("aé€🙂z")

    assert shown == ["a", "", "é", "", "", "€", "", "", "", "🙂", "z", ""]


def test_bytes_that_are_no_character_do_not_hold_the_text_up():
    shown, row = pieces(b"a\xffb\xffc")

    assert "".join(shown) == row.text == "a\ufffdb\ufffdc"
    assert shown[4] == "\ufffdc"


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_at_all_come_out_as_they_are_read_whole(seed: int):
    """Long runs of what is no text among them, with parts of characters inside."""
    draw = random.Random(seed)
    parts = ["é".encode(), "€🙂".encode(), b"\x80", b"\xff", b"\xf0\x9f", b"\xe2\x82", b"a",
             "\ufffd".encode(), b"\xed\xa0", b"\xf4\x90"]  # fmt: skip
    data = b"".join(draw.choice(parts[draw.choice((0, 2)) :]) for _ in range(300))
    data += b"\x80" * draw.randint(0, 40) + "🙂".encode()[: draw.randint(0, 4)]

    shown, row = pieces(data)

    assert "".join(shown) == row.text == decode(list(data))


def test_the_cost_of_bytes_that_are_no_text_does_not_grow():
    """By the tokens that are decoded, and not by a clock."""
    counted = 0

    def counting(tokens: list[int]) -> str:
        nonlocal counted
        counted += len(tokens)
        return decode(tokens)

    row = Continuation(counting)
    shown = "".join(row.feed(0x80) for _ in range(2000))

    assert shown + row.finish() == "\ufffd" * 2000 and counted < 20 * 2000


def test_an_unfinished_character_is_shown_at_the_end():
    shown, row = pieces("a€".encode()[:-1])

    assert shown[-1] == "\ufffd"
    assert row.text == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("one\ntwo", ("\n\n",), "one\ntwo"),
        ("aab", ("ab",), "a"),
        ("xEND", ("END", "xE"), ""),
        ("EN", ("END",), "EN"),
        ("abc", ("", "c"), "ab"),
        ("é€€", ("€€",), "é"),
    ],
)
def test_a_stop_string_ends_the_text_and_is_no_part_of_it(
    text: str, stops: tuple[str, ...], left: str
):
    shown, row = pieces(text, stops)

    assert "".join(shown) == row.text == left
    assert row.stopped == (left != text)


def test_nothing_is_shown_that_a_stop_string_takes_back():
    shown, _ = pieces("a<en<end>b", ("<end>",))

    assert shown[:6] == ["a", "", "", "", "<en", ""]
    assert "".join(shown) == "a<en"
