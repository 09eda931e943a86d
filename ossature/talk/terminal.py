"""Answers on a terminal: channels told apart, and nothing in them that drives the terminal."""

from __future__ import annotations

import os
import sys

from ossature.data.picture import visible
from ossature.talk.reading import Piece

DIM, CYAN, RESET = "\x1b[2m", "\x1b[36m", "\x1b[0m"


def enter(prompt: str) -> str:
    """A line that the user enters.

    Raises:
        ValueError: it is no text in the terminal's encoding.
        EOFError: there are no more.
    """
    line = input(prompt)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"what was entered is no {sys.stdin.encoding} text; nothing is sent"
        ) from None
    return line


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
        text = visible(text)
        print(f"{style}{text}{RESET}" if style and self._coloured else text, end="", flush=True)
