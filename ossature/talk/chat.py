"""`ossature chat FOLDER`: a conversation with a model in harmony, on the terminal."""

from __future__ import annotations

import contextlib
import datetime
import io
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from ossature.config import ParallelConfig, parse
from ossature.data.conversations import EFFORTS

if TYPE_CHECKING:
    from ossature.talk.session import Session


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Talk to a model that was trained on conversations in harmony.

    Ctrl-C stops an answer, Ctrl-D ends the program, /help lists the commands.
    """

    folder: tyro.conf.Positional[Path]
    """Checkpoint in any format, or the folder of a run (its newest checkpoint)."""
    effort: Literal["", "low", "medium", "high"] = ""
    """How much the model is told to think; empty: medium, or as the resumed chat has it."""
    instructions: str = ""
    """What the model is told to do throughout: harmony's developer message."""
    analysis: Literal["dim", "hide"] = "dim"
    """Whether the model's thinking is shown."""
    tools: str = ""
    """JSON file with the functions that the model may call, as in a request to OpenAI's API."""
    run_tools: str = ""
    """Command that runs a tool: gets its name as the last word and its arguments, as JSON, on its
    input; what it prints is the result.  Empty: you type the results."""
    history: str = ""
    """JSONL file that the chat is kept in, a line a chat, which `ossature data chat` reads too."""
    resume: bool = False
    """Go on with the last chat of --history."""
    temperature: float = 1.0
    """0 always takes the most probable token."""
    top_p: float = 1.0
    """Draw among the most probable tokens that reach this probability together."""
    seed: int | None = None
    """Of the draws of the first answer, one more for each next; none: another chat every time."""
    max_new_tokens: int = 2048
    """Tokens of one answer, thinking included, at most."""
    context: int = 8192
    """Tokens that the conversation and the answer may have together; memory is kept for them."""
    date: str = ""
    """Today's date as the model is told it, YYYY-MM-DD; empty: the day this is."""
    tokenizer: str = ""
    """Tokenizer of a folder that holds none: a tokenizer.json, a folder or a Hugging Face id."""
    device: str = ""
    """Such as "cpu" or "cuda:0"; empty takes a GPU if there is one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of weights and computation."""
    experts: Literal["plain", "mxfp4"] = "plain"
    """"mxfp4" keeps the experts of a folder that has them so packed: a quarter of the memory."""
    adapter: str = ""
    """Folder of an adapter that is put on the model."""

    def __post_init__(self) -> None:
        if self.resume and not self.history:
            raise ValueError("resume: say with --history which file to resume from")
        if self.run_tools and not self.tools and not self.resume:
            raise ValueError("run_tools: say with --tools which functions the model may call")
        if self.context < 1:
            raise ValueError(f"context ({self.context}) must be 1 or more")
        if self.date:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f"date ({self.date}) must be a day, as YYYY-MM-DD") from None


HELP = """\
/effort low|medium|high   how much the model is told to think
/instructions TEXT        what it is told throughout; without a text: none
/analysis dim|hide        show its thinking, or only that there is some
/again                    answer the last question anew
/undo                     take the last question and its answer back
/new                      begin another chat
/quit                     end, as Ctrl-D does
A line that ends in \\ goes on in the next.  Ctrl-C stops an answer."""


def main(argv: list[str]) -> int:
    options = parse(ChatOptions, argv, prog="ossature chat")
    from ossature.data.harmony import Conversation, Rendering
    from ossature.parallel.environment import environment
    from ossature.talk.history import History
    from ossature.talk.terminal import Screen
    from ossature.talk.tools import Program, read_tools

    if sys.stdin is None:
        raise ValueError("chat: there is no input to read from")
    if environment().world > 1:
        raise ValueError("chat: runs on one process; `ossature serve` runs on several ranks")
    # All that can be wrong is read before the weights are.
    history = History(Path(options.history)) if options.history else None
    if history is not None and not history.file.absolute().parent.is_dir():
        raise ValueError(f"{history.file}: no such folder as {history.file.parent}")
    if history is not None and history.file.is_dir():
        raise ValueError(f"{history.file}: a folder, and no file that chats can be kept in")
    chat = history.last() if history is not None and options.resume else Conversation(())
    if options.effort:
        chat = replace(chat, reasoning_effort=options.effort)
    if options.tools:
        chat = replace(chat, tools=read_tools(Path(options.tools)))
    program = Program(options.run_tools, chat.tools) if options.run_tools else None

    from ossature.convert.model import load_adapter
    from ossature.parallel.launch import launched
    from ossature.sample.command import stop_ids
    from ossature.sample.engine import Engine
    from ossature.sample.options import SamplingOptions
    from ossature.talk.opening import find_tokenizer, open_to_talk
    from ossature.talk.session import Session, instructed

    tokenizer = find_tokenizer(options.folder, options.tokenizer)
    if options.instructions:
        chat = instructed(chat, options.instructions)
    sampling = SamplingOptions(
        temperature=options.temperature, top_p=options.top_p, seed=options.seed,
        max_new_tokens=options.max_new_tokens,
    )  # fmt: skip
    date = options.date or datetime.date.today().isoformat()
    with launched() as ranks:
        model = open_to_talk(
            options.folder, ParallelConfig(), options.dtype, ranks, options.device,
            options.experts, bool(options.adapter),
        )  # fmt: skip
        if options.adapter:
            load_adapter(model, options.adapter)
            model.eval()
        ends = tuple(sorted(stop_ids(tokenizer.special, model.config.eos_token_id)))
        session = Session(
            Engine(model, max_batch=1, max_tokens=options.context, tokenizer=tokenizer),
            tokenizer, chat, Rendering(date), replace(sampling, stop_ids=ends), options.context,
            Screen(options.analysis == "dim"), history, program,
        )  # fmt: skip
        for message in chat.messages:
            if message.role == "user":
                session.screen.write(f"> {message.text}\n")
            elif message.channel == "final":
                session.screen.write(f"{message.text}\n")
        converse(session)
    return 0


def converse(session: Session) -> None:
    """Read lines until there are no more, and do what each says."""
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # input() then edits lines and remembers them

        # Python turns it off: a text of several lines that is pasted would be so many questions.
        readline.parse_and_bind("set enable-bracketed-paste on")
    if isinstance(sys.stdin, io.TextIOWrapper):  # one wrong byte would lose all that follows it
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = read()
            if line.strip() in ("/quit", "/exit"):
                return
            if line.strip():
                obey(session, line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except (ValueError, OSError) as error:  # the chat goes on
            session.screen.write(f"error: {error}\n")


def read() -> str:
    """What the user enters: a line, and those after it while they end in a backslash."""
    from ossature.talk.terminal import enter

    lines = [enter("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(enter("  "))
    return "\n".join(lines)


def obey(session: Session, line: str) -> None:
    """A command, or something to say to the model."""
    word, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if not word.startswith("/"):
        session.ask(line)
    elif word == "/effort":
        if rest not in EFFORTS:
            raise ValueError(f"/effort: say {', '.join(EFFORTS)}")
        session.chat = replace(session.chat, reasoning_effort=rest)
    elif word == "/instructions":
        session.instruct(rest)
    elif word == "/analysis":
        if rest not in ("dim", "hide"):
            raise ValueError("/analysis: say dim or hide")
        session.screen.analysis = rest == "dim"
    elif word in ("/again", "/undo", "/new") and not rest:
        {"/again": session.again, "/undo": session.undo, "/new": session.start}[word]()
    elif word == "/help":
        print(HELP)
    else:
        raise ValueError(f"{line.strip()}: no such command; /help lists them")
