"""Tools that a model may call in a chat: what it is told of them, and a program that runs them."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ossature.data.conversations import conversation
from ossature.data.harmony import Message

SECONDS = 60
"""A program that takes longer is ended, and the model is told so."""


def read_tools(file: Path) -> tuple[dict[str, Any], ...]:
    """Functions of a JSON file, a list as in a request to OpenAI's API.

    Raises:
        ValueError, OSError: the file is not there, or not that.
    """
    try:
        tools = json.loads(file.read_text("utf-8"))
        user = [{"role": "user", "content": ""}]
        record = {"messages": user, "tools": tools}
        return conversation(record, "messages", frozenset(), answered=False).tools
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None


def result(name: str, text: str) -> Message:
    """The message with a tool's result: JSON if the text is that, else text."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        value = text
    if isinstance(value, str):
        return Message("tool", text, author=name, content_type="text")
    return Message("tool", json.dumps(value, ensure_ascii=False), author=name)


class Program:
    """Runs a command for every call: `COMMAND NAME`, arguments on its input, result on its output.

    No shell takes part, and only tools that the model was told of are run.

    Raises:
        ValueError: there is no such command.
    """

    def __init__(self, command: str, tools: Sequence[dict[str, Any]]) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"run_tools: {command}: {error}") from None
        if not self._words or shutil.which(self._words[0]) is None:
            raise ValueError(f"run_tools: {command}: no such command")
        self._names = {tool["name"] for tool in tools}

    def run(self, recipient: str, arguments: str) -> str:
        """The result, or in words for the model why there is none."""
        name = recipient.removeprefix("functions.")
        if name not in self._names:
            return f"error: there is no tool {name}"
        try:
            done = subprocess.run(
                [*self._words, name], input=arguments, capture_output=True, timeout=SECONDS,
                encoding="utf-8", errors="replace", check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"error: no result after {SECONDS} seconds"
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            return f"error: exit status {done.returncode}: {last}"
        return done.stdout.strip()
