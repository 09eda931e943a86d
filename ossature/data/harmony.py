"""Conversations in harmony, the chat format of gpt-oss: messages -> text with special tokens.

    <|start|>{role}[ to={recipient}][<|channel|>{channel}[ {content type}]]<|message|>{text}{end}

The end is <|end|>; <|call|> after a call of a tool; <|return|> where the model stops for good.

Two renderings are published and differ in small things.  `template` is the chat template in the
model's repository, `openai` the library openai-harmony; both are followed to the letter, and
tests/data/test_harmony.py and test_functions.py hold them to what these gave.  The template is the
default: it drops the analysis of earlier turns, as the history is shown to the model when it is
used.

Source: openai/gpt-oss-20b `chat_template.jinja`; openai/harmony 0.0.8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

from ossature.data.functions import Style, functions
from ossature.data.tokenizer import Tokenizer

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
SPECIAL = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
CHANNELS = ("analysis", "commentary", "final")
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
Loss = Literal["assistant", "final", "last_turn", "all"]


@dataclass(frozen=True)
class Message:
    """One message of a conversation; the system message is made by the renderer."""

    role: Literal["developer", "user", "assistant", "tool"]
    text: str
    channel: str = ""
    """Of the assistant: analysis, commentary or final."""
    recipient: str = ""
    """functions.NAME for a call of a tool."""
    author: str = ""
    """Of a tool's result: functions.NAME."""
    content_type: str = "json"
    """Of a call's arguments; of a tool's result, text or json."""


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """Functions as OpenAI's API describes them: name, description, parameters (JSON schema)."""
    reasoning_effort: str = "medium"
    identity: str = IDENTITY


@dataclass(frozen=True)
class Rendering:
    """How conversations are written down."""

    date: str
    """In the system message: YYYY-MM-DD.  Without one the line is left out (openai)."""
    style: Style = "template"
    analysis: Literal["", "last", "first_final", "all"] = ""
    """Which analysis is kept.  last: of the last answer, and before a tool's call while no answer
    follows (template).  first_final: all from the first answer on, if the last message is one
    (openai).  "" takes that of the style."""


class Piece(NamedTuple):
    """Ordinary text, or one special token."""

    text: str
    special: bool = False
    message: int = -1
    """Place among the messages; -1 for the system message."""
    part: str = ""
    """start, header or body: see `targets`."""


def render(conversation: Conversation, rendering: Rendering, generate: bool = False) -> list[Piece]:
    """The pieces of a conversation.

    Args:
        generate: end with the header that the assistant's next message begins with; no analysis of
            an answer is kept then.
    """
    pieces = [Piece(START, True), Piece("system"), Piece(MESSAGE, True)]
    pieces += [Piece(_system(conversation, rendering)), Piece(END, True)]
    messages = conversation.messages
    instructions = ""
    if messages and messages[0].role == "developer":
        instructions = messages[0].text
    if instructions or conversation.tools:
        text = _developer(instructions, conversation.tools, rendering.style)
        pieces += [Piece(START, True), Piece("developer"), Piece(MESSAGE, True), Piece(text)]
        pieces.append(Piece(END, True))
    shown = list(_shown(messages, rendering, generate))
    for place, number in enumerate(shown):
        if messages[number].role != "developer":
            ends = place == len(shown) - 1 and not generate
            pieces += _message(messages[number], number, rendering.style, ends)
    if generate:
        pieces += [Piece(START, True), Piece("assistant")]
    return pieces


def _shown(messages: Sequence[Message], rendering: Rendering, generate: bool) -> Iterator[int]:
    """Places of the messages that are written; analysis is dropped by the rule of the rendering."""
    rule = rendering.analysis or ("last" if rendering.style == "template" else "first_final")
    answers = [n for n, m in enumerate(messages) if m.channel == "final"]
    last_is_answer = bool(answers) and answers[-1] == len(messages) - 1
    for n, message in enumerate(messages):
        if message.channel == "analysis" and rule != "all":
            if rule == "first_final":
                if last_is_answer and n < answers[0]:
                    continue
            else:
                of_last_answer = last_is_answer and n == len(messages) - 2 and not generate
                if any(answer > n for answer in answers) and not of_last_answer:
                    continue
        yield n


def _message(message: Message, number: int, style: Style, last: bool) -> Iterator[Piece]:
    piece = partial(Piece, message=number)
    yield piece(START, True, part="start")
    if message.role == "tool":
        yield piece(message.author, part="start")
        yield piece(" to=assistant", part="header")
        yield piece(CHANNEL, True, part="header")
        yield piece("commentary", part="header")
    elif message.role == "assistant":
        yield piece("assistant", part="start")
        if message.recipient:
            yield piece(f" to={message.recipient}", part="header")
        yield piece(CHANNEL, True, part="header")
        kind = message.content_type if message.recipient else ""
        if kind and style == "openai":
            yield piece(f"{message.channel} ", part="header")
            yield piece(CONSTRAIN, True, part="header")
            yield piece(kind, part="header")
        else:
            yield piece(f"{message.channel} {kind}".rstrip(), part="header")
    else:
        yield piece(message.role, part="start")
    yield piece(MESSAGE, True, part="header")
    text = message.text
    if message.role == "tool" and message.content_type == "text" and style == "template":
        text = json.dumps(text, ensure_ascii=False)
    if text:
        yield piece(text, part="body")
    end = END
    if message.recipient:
        end = CALL
    elif last and message.channel == "final":
        end = RETURN
    yield piece(end, True, part="body")


def targets(conversation: Conversation, pieces: Sequence[Piece], loss: Loss) -> list[bool]:
    """Which pieces the model learns to write.

    assistant: its messages from <|channel|> (or " to=") through their ends, and the beginning
    <|start|>assistant of one that follows another, which the model writes too; not after a call,
    with which it stops.  final: answers alone, through <|return|>.  last_turn: as assistant, after
    the last message of the user.  all: the assistant's messages whole.
    """
    messages = conversation.messages
    users = [n for n, message in enumerate(messages) if message.role == "user"]
    after = users[-1] if users else -1
    shown = list(dict.fromkeys(piece.message for piece in pieces))
    before = dict(zip(shown[1:], shown, strict=False))
    chosen = []
    for piece in pieces:
        n = piece.message
        mine = n >= 0 and messages[n].role == "assistant"
        if mine and loss == "final":
            mine = messages[n].channel == "final" and piece.part != "start"
        elif mine and loss == "last_turn":
            mine = n > after
        if mine and piece.part == "start" and loss in ("assistant", "last_turn"):
            previous = before.get(n, -1)
            mine = previous >= 0 and messages[previous].role == "assistant"
            mine = mine and not messages[previous].recipient
        chosen.append(mine)
    return chosen


def check(tokenizer: Tokenizer) -> None:
    """Raises ValueError naming the special tokens of harmony that a tokenizer lacks."""
    missing = [token for token in SPECIAL if token not in tokenizer.special]
    if missing:
        raise ValueError(f"the tokenizer lacks special tokens of harmony: {', '.join(missing)}")


def encode(
    pieces: Sequence[Piece], wanted: Sequence[bool], tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Ids of pieces, and for each id whether its piece is wanted.

    Text is ordinary text, whatever it spells: special ids come from the renderer alone.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for piece, want in zip(pieces, wanted, strict=True):
        new = [tokenizer.special[piece.text]] if piece.special else tokenizer.encode(piece.text)
        ids += new
        mask += [want] * len(new)
    return ids, mask


def text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def prompt(conversation: Conversation, rendering: Rendering, tokenizer: Tokenizer) -> list[int]:
    """Ids after which the model writes the assistant's next message."""
    pieces = render(conversation, rendering, generate=True)
    return encode(pieces, [False] * len(pieces), tokenizer)[0]


def _system(conversation: Conversation, rendering: Rendering) -> str:
    lines = [conversation.identity, "Knowledge cutoff: 2024-06"]
    if rendering.date:
        lines.append(f"Current date: {rendering.date}")
    lines += ["", f"Reasoning: {conversation.reasoning_effort}", ""]
    lines.append(
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )
    if conversation.tools:
        lines.append("Calls to these tools must go to the commentary channel: 'functions'.")
    return "\n".join(lines)


def _developer(instructions: str, tools: Sequence[dict[str, Any]], style: Style) -> str:
    parts = [f"# Instructions\n\n{instructions}"] if instructions else []
    if tools:
        parts.append("# Tools\n\n" + functions(tools, style))
    ends = "\n\n" if style == "template" and not tools else ""  # the template leaves them there
    return "\n\n".join(parts) + ends


@dataclass
class Parser:
    """Reads what a model writes in harmony, id by id, on the tokenizer's own special ids.

    After every `push` the fields say where the text stands; whole messages are in `messages`.
    Both orders of recipient and channel are understood, with and without <|constrain|>.
    """

    tokenizer: Tokenizer
    role: str = "assistant"
    """Of the message that is being written."""
    messages: list[Message] = field(default_factory=list)
    channel: str = ""
    recipient: str = ""
    content_type: str = ""
    problem: str = ""
    """The first thing that was not harmony, in words; empty if all was."""
    ended: str = ""
    """<|return|> or <|call|>, once the model has stopped."""
    state: Literal["header", "body", "between"] = "header"
    _header: list[int | str] = field(default_factory=list)
    _body: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(self.tokenizer)
        self._names = {self.tokenizer.special[token]: token for token in SPECIAL}

    def push(self, token: int) -> bool:
        """Take the next id; True if it is text of the message's body."""
        special = self._names.get(token)
        if self.state == "body":
            if special in (END, RETURN, CALL):
                self._finish(special)
                return False
            if special is not None:
                self._note(f"{special} inside a message")
                return False
            self._body.append(token)
            return True
        if self.state == "between":
            if special == START:
                self.state, self.role = "header", ""
            else:
                self._note("text between messages")
            return False
        if special == MESSAGE:
            self._read_header()
            self.state, self._body = "body", []
        elif special in (END, RETURN, CALL, START):
            self._note(f"{special} inside a header")
        else:
            self._header.append(special or token)
        return False

    def body(self) -> str:
        """Text of the message that is being written, so far."""
        return self.tokenizer.decode(self._body)

    def close(self) -> None:
        """The model was stopped: what it was writing counts as a message, and as a problem."""
        if self.state == "body":
            self._finish(END)
            self._note("the last message has no end")
        elif self.state == "header" and (self._header or not self.messages):
            self._note("the last header has no <|message|>")

    def _read_header(self) -> None:
        """role? " to=..."? <|channel|> channel " to=..."? (<|constrain|>? type)?"""
        parts: list[list[int]] = [[]]
        for item in self._header:
            if isinstance(item, str):
                parts.append([])
            else:
                parts[-1].append(item)
        self._header = []
        words = [self.tokenizer.decode(part).split() for part in parts]
        first, rest = words[0], [word for part in words[1:] for word in part]
        self.channel = self.recipient = self.content_type = ""
        if not self.role and first and not first[0].startswith("to="):
            self.role = first.pop(0)
        for word in [*first, *rest]:
            if word.startswith("to="):
                self.recipient = word.removeprefix("to=")
            elif word in CHANNELS and not self.channel:
                self.channel = word
            elif self.channel and not self.content_type:
                self.content_type = word
            else:
                self._note(f"{word!r} in a header")
        if self.role == "assistant" and not self.channel:
            self._note("a message without a channel")

    def _finish(self, end: str) -> None:
        self.messages.append(
            Message(
                "assistant" if self.role == "assistant" else "tool",
                self.body(),
                self.channel,
                self.recipient,
                author="" if self.role == "assistant" else self.role,
                content_type=self.content_type,
            )
        )
        self.ended = end if end != END else ""
        self.state = "between"
        if bool(self.recipient) != (end == CALL) and self.role == "assistant":
            self._note(f"a message to {self.recipient or 'nobody'} ended by {end}")

    def _note(self, problem: str) -> None:
        self.problem = self.problem or problem
