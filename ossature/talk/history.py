"""Chats in a file of JSON lines, one record a chat, as `ossature data chat` reads them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ossature.data.conversations import conversation
from ossature.data.harmony import Conversation
from ossature.data.records import record


class History:
    """Keeps one chat in a line of a file; the other lines stay as they are."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._line = ""  # as this chat was last written

    def last(self) -> Conversation:
        """The chat in the last line, which `save` goes on with.

        Raises:
            ValueError: there is none, or it is no record of a chat.
        """
        lines = self._lines()
        if not lines:
            raise ValueError(f"{self.file}: no chat in it to resume")
        place = f"{self.file}: line {len(lines)}"
        try:
            written = json.loads(lines[-1])
            if not isinstance(written, dict):
                raise ValueError("not an object")
            chat = conversation(written, "messages", frozenset())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {error}") from None
        self._line = lines[-1]
        return chat

    def start(self) -> None:
        """The next chat that is saved is another one."""
        self._line = ""

    def save(self, chat: Conversation) -> None:
        """Write the chat in its line, or in a new one; the file is there whole at any time.

        Raises:
            ValueError: the chat could not be read back.
        """
        written = record(chat)
        conversation(written, "messages", frozenset())
        line = json.dumps(written, ensure_ascii=False)
        lines = self._lines()
        if self._line and self._line in lines:  # another program may have added lines
            lines[len(lines) - 1 - lines[::-1].index(self._line)] = line
        else:
            lines.append(line)
        self._write(lines)
        self._line = line

    def remove(self) -> None:
        """Of this chat nothing is left."""
        lines = self._lines()
        if self._line and self._line in lines:
            del lines[len(lines) - 1 - lines[::-1].index(self._line)]
            self._write(lines)
        self._line = ""

    def _write(self, lines: list[str]) -> None:
        file = self.file.resolve()  # a link stays one
        partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
        try:
            with partial.open("w", encoding="utf-8") as out:
                if file.exists():  # chats that nobody else may read stay so
                    shutil.copymode(file, partial)
                out.write("".join(f"{line}\n" for line in lines))
                out.flush()
                os.fsync(out.fileno())
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)

    def _lines(self) -> list[str]:
        if not self.file.is_file():
            return []
        try:
            text = self.file.read_text("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.file}: not a text file") from None
        return [line for line in text.split("\n") if line.strip()]
