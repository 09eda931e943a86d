"""`ossature VERB ...`: finds the function of a verb, calls it, and says what went wrong in a line.

Nothing is imported before its verb is known, so that help and typos answer at once.  A verb is a
function of its own stage's folder, from a list of arguments to an exit status.

Exit status: 0 done; 1 done, and the answer is no (`verify`); 2 a mistake in what was given;
130 interrupted; 141 the reader of the output went away.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import signal
import sys
from typing import NoReturn

# Per stage: verb, "module:function", one line.
STAGES: dict[str, list[tuple[str, str, str]]] = {
    "Data": [
        ("data build", "ossature.data.build:build", "turn text into shards of tokens"),
        ("data chat", "ossature.data.chat:chat", "turn conversations into packed rows with masks"),
        ("data show", "ossature.data.show:main", "show a row, and what of it is learnt"),
    ],
    "Training": [
        ("train", "ossature.train.command:main", "train a model; the same under torchrun"),
        ("launch", "ossature.parallel.nodes:main", "start another command on all ranks of a node"),
        ("plan", "ossature.train.plan_command:main", "say what a run takes, and which layouts fit"),
        ("prove", "ossature.train.prove_command:main", "compare a layout with one process"),
        ("report", "ossature.train.report:main", "write a run's curves and samples as one page"),
    ],
    "Checkpoints": [
        ("convert", "ossature.convert.command:convert", "write a checkpoint in another format"),
        ("verify", "ossature.convert.verify:main", "compare two checkpoints, tensor by tensor"),
        ("merge", "ossature.convert.merge_command:merge", "write a base with an adapter merged in"),
        ("info", "ossature.convert.info:main", "say what a checkpoint holds, and what is odd"),
    ],
    "Sampling": [
        ("sample", "ossature.sample.command:main", "continue prompts"),
        ("chat", "ossature.talk.chat:main", "talk to a model in harmony, on the terminal"),
        ("serve", "ossature.talk.serve:main", "put a model behind OpenAI's API"),
        ("eval", "ossature.eval.command:main", "ask questions and count; compare two results"),
    ],
}
VERBS = {verb: target for rows in STAGES.values() for verb, target, _ in rows}


def main(argv: list[str] | None = None) -> int:
    """Run one command line, without the program's name; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # what it cannot show is spelled out
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = run(argv)
        sys.stdout.flush()  # a closed pipe shows here, not at exit
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What is still in the buffer has no reader either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except mistakes() as error:
        if os.environ.get("OSSATURE_TRACEBACK") == "1":
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        # A connection that was lost is no mistake: `ossature launch` may start the ranks again.
        return 1 if isinstance(error, ConnectionError) else 2


def run(argv: list[str]) -> int:
    if not argv:
        print(overview(), file=sys.stderr)
        return 2
    if argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"ossature {version('ossature')}")
        return 0
    for words in (2, 1):
        verb = " ".join(argv[:words])
        if verb in VERBS:
            # Let everything that cleans up after itself do so when the process is told to end.
            signal.signal(signal.SIGTERM, terminate)
            if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it
                signal.signal(signal.SIGHUP, terminate)
            module, function = VERBS[verb].split(":")
            return getattr(importlib.import_module(module), function)(argv[words:])
    raise ValueError(unknown(argv))


def terminate(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def unknown(argv: list[str]) -> str:
    """What to say of a command line whose verb there is not."""
    group = [verb for verb in VERBS if verb.startswith(f"{argv[0]} ")]
    if group and (len(argv) == 1 or argv[1].startswith("-")):
        return f"{argv[0]}: say which: {', '.join(group)}"
    typed = " ".join(argv[:2]) if group else argv[0]
    near = difflib.get_close_matches(typed, VERBS, n=1)
    near = near or difflib.get_close_matches(" ".join(argv[:2]), VERBS, n=1)
    hint = f"did you mean {near[0]}?" if near else "`ossature --help` lists the commands"
    return f"unknown command {typed}; {hint}"


def overview() -> str:
    width = max(map(len, VERBS))
    lines = ["usage: ossature COMMAND ...", "", "Train gpt-oss models, from text to text."]
    for stage, rows in STAGES.items():
        lines += ["", f"{stage}:", *(f"  {verb:<{width}}  {line}" for verb, _, line in rows)]
    lines += ["", "`ossature COMMAND --help` shows the options of a command.", VARIABLES]
    return "\n".join(lines)


VARIABLES = "OSSATURE_TRACEBACK=1 shows where an error comes from."


def mistakes() -> tuple[type[Exception], ...]:
    """Errors in what the user gave; all others are ours and keep their traceback.

    Asked for only once there is an error: the names module needs torch.
    """
    names = sys.modules.get("ossature.convert.names")
    return (ValueError, OSError, *([] if names is None else [names.UnknownTensor]))


def describe(error: Exception) -> str:
    """The error in one line."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        files = [os.fsdecode(f) for f in (error.filename, error.filename2) if f is not None]
        text = f"{' -> '.join(files)}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__
