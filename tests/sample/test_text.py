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
