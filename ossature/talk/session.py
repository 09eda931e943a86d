"""A chat that goes on: questions, answers, calls of tools, and what of them is kept."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ossature.data.conversations import conversation
from ossature.data.harmony import Conversation, Message, Rendering
from ossature.data.tokenizer import Tokenizer
from ossature.sample.engine import Engine
from ossature.sample.options import SamplingOptions
from ossature.talk.answer import Answer
from ossature.talk.history import History
from ossature.talk.terminal import Screen, enter
from ossature.talk.tools import Program, result

CALLS = 16
"""Of tools in one answer; then the model is stopped."""


@dataclass
class Session:
    """One chat at a time.  A question that gets no answer is taken back, so that what is kept is
    always a conversation."""

    engine: Engine
    tokenizer: Tokenizer
    chat: Conversation
    rendering: Rendering
    sampling: SamplingOptions
    context: int
    """Tokens of the conversation and an answer together."""
    screen: Screen = field(default_factory=Screen)
    history: History | None = None
    program: Program | None = None
    """Runs tools; without one, results are asked for."""
    answers: int = 0
    """So far, each drawn with the next seed."""

    def ask(self, text: str) -> None:
        """A question, or whatever the user says, and its answer on the screen."""
        asked = {"messages": [{"role": "user", "content": text}]}
        (message,) = conversation(asked, "messages", frozenset(), answered=False).messages
        self._turn((*self.chat.messages, message))

    def again(self) -> None:
        """Answer the last question anew."""
        self._turn(self.chat.messages[: self._last_question() + 1])

    def undo(self) -> None:
        """Take the last question and its answer back."""
        self._keep(self.chat.messages[: self._last_question()])

    def instruct(self, text: str) -> None:
        """Give other instructions, from the beginning of the chat on; none if empty."""
        self.chat = instructed(self.chat, text)

    def start(self) -> None:
        """Another chat with the same instructions and tools."""
        instructions = [m for m in self.chat.messages if m.role == "developer"]
        self.chat = replace(self.chat, messages=tuple(instructions))
        if self.history is not None:
            self.history.start()

    def _last_question(self) -> int:
        found = [n for n, message in enumerate(self.chat.messages) if message.role == "user"]
        if not found:
            raise ValueError("nothing was asked yet")
        return found[-1]

    def _turn(self, messages: tuple[Message, ...]) -> None:
        """Let the model speak until its turn ends, running tools on its way."""
        for _ in range(CALLS):
            answer = self._answer(messages)
            said = answer.messages
            if answer.ended == "call":
                call = said[-1]
                text = self._result(call)
                if text is not None:
                    messages = (*messages, *said, result(call.recipient, text))
                    continue
                self._note("stopped")
            elif said and said[-1].recipient:
                said = said[:-1]  # a call that was not written to its end
            break
        else:
            self._note(f"stopped after {CALLS} calls of tools")
            said = []
        if any(message.channel == "final" and message.text for message in said):
            self._keep((*messages, *said))
        else:
            self._note("there is no answer; your question is taken back")

    def _answer(self, messages: tuple[Message, ...]) -> Answer:
        sampling = self.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + self.answers)
        self.answers += 1
        chat = replace(self.chat, messages=messages)
        answer = Answer(
            self.engine, self.tokenizer, chat, self.rendering, sampling, self.context
        )  # fmt: skip
        with interrupted() as stopped:
            for piece in answer.pieces(stopped):
                self.screen.show(piece)
        if answer.ended == "stopped":
            self._note("stopped")
        elif answer.ended == "length":
            self._note("cut: the answer has as many tokens as it may")
        elif answer.ended == "role":
            self._note("stopped: the model went on to write what others say")
        elif answer.problem:
            self._note(f"not harmony: {answer.problem}")
        return answer

    def _result(self, call: Message) -> str | None:
        """Of a call of a tool; None if the user wants none."""
        if self.program is not None:
            with interrupted() as stopped:
                text = self.program.run(call.recipient, call.text)
                if stopped():
                    return None
            self.screen.result(call.recipient, text)
            return text
        try:
            return enter("result> ")
        except (KeyboardInterrupt, EOFError):
            print()
            return None

    def _keep(self, messages: tuple[Message, ...]) -> None:
        chat = replace(self.chat, messages=messages)
        if self.history is not None:
            try:
                if any(message.role == "user" for message in messages):
                    self.history.save(chat)
                else:
                    self.history.remove()
            except OSError as error:  # the chat goes on; the next answer may be saved with it
                self._note(f"not saved: {error}")
        self.chat = chat

    def _note(self, text: str) -> None:
        self.screen.note(text)


def instructed(chat: Conversation, text: str) -> Conversation:
    """The chat with other instructions."""
    rest = tuple(message for message in chat.messages if message.role != "developer")
    first = (Message("developer", text),) if text else ()
    return replace(chat, messages=(*first, *rest))


@contextmanager
def interrupted() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed meanwhile; pressed again it interrupts the program."""
    pressed = False

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
