"""Answers on a terminal: channels told apart, and nothing in them that drives the terminal."""

from __future__ import annotations

import os
import re
import sys

from ossature.talk.reading import Piece

DIM, BOLD, CYAN, RESET = "\x1b[2m", "\x1b[1m", "\x1b[36m", "\x1b[0m"
# Controls but line feed and tab, lone surrogates, and what changes the direction of writing.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def escaped(text: str) -> str:
    """The text with characters that a terminal would obey spelled out, as in Python."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Screen:
    """Prints an answer as it comes.

    Args:
        analysis: whether the text of the channel analysis is shown, dimmed; otherwise only that
            there is some.
    """

    def __init__(self, analysis: bool = True) -> None:
        self.analysis = analysis
        coloured = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._coloured = coloured and not os.environ.get("NO_COLOR")

    def show(self, piece: Piece) -> None:
        thinking = piece.channel == "analysis" and not piece.recipient
        if piece.begins:
            if thinking:
                self.write("analysis: " if self.analysis else "analysis ...", DIM)
            elif piece.recipient:
                self.write(f"call {piece.recipient} ", CYAN)
        if piece.text and (self.analysis or not thinking):
            style = DIM if thinking else CYAN if piece.recipient else ""
            self.write(piece.text, style)
        if piece.ends:
            print(flush=True)

    def result(self, name: str, text: str) -> None:
        self.write(f"result of {name} ", CYAN)
        self.write(text, CYAN)
        print(flush=True)

    def note(self, text: str) -> None:
        """Of the program's own, on a line of its own."""
        self.write(f"[{text}]", DIM)
        print(flush=True)

    def write(self, text: str, style: str = "") -> None:
        text = escaped(text)
        print(f"{style}{text}{RESET}" if style and self._coloured else text, end="", flush=True)
