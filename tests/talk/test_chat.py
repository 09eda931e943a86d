"""`ossature chat`: sessions with a model that says what the test wants, on the real engine."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ossature.cli import main
from ossature.data.conversations import conversation
from ossature.data.harmony import Conversation, Rendering
from ossature.sample.command import stop_ids
from ossature.sample.engine import Engine
from ossature.sample.options import SamplingOptions
from ossature.talk.answer import Answer
from ossature.talk.chat import converse
from ossature.talk.history import History
from ossature.talk.session import Session
from ossature.talk.tools import Program, read_tools
from tests.golden import ROOT
from tests.talk.scripted import CALL, FINAL, THINK, Scripted, answer, last_question, tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "chat_tools.py"


def session(says: Callable[[str], str], each=lambda: None, **fields) -> Session:
    ends = tuple(sorted(stop_ids(tokenizer().special, None)))
    engine = Engine(Scripted(says, each), max_batch=1, max_tokens=800, tokenizer=tokenizer())
    return Session(
        engine, tokenizer(), fields.pop("chat", Conversation(())), Rendering("2025-06-28"),
        SamplingOptions(temperature=0.0, max_new_tokens=fields.pop("most", 100), stop_ids=ends),
        800,
        **fields,
    )  # fmt: skip


def said(talk: Session) -> list[tuple[str, str]]:
    return [(m.channel or m.role, m.text) for m in talk.chat.messages]


def test_the_next_question_comes_without_earlier_analysis(capsys):
    prompts = []

    def says(prompt: str) -> str:
        prompts.append(prompt)
        return answer(f"to {last_question(prompt)}", "secret")

    talk = session(says)
    talk.ask("one")
    talk.ask("two")

    assert capsys.readouterr().out == "analysis: secret\nto one\nanalysis: secret\nto two\n"
    assert "<|start|>assistant<|channel|>final<|message|>to one<|end|>" in prompts[-1]
    assert "secret" not in prompts[-1]
    assert said(talk) == [
        ("user", "one"), ("analysis", "secret"), ("final", "to one"),
        ("user", "two"), ("analysis", "secret"), ("final", "to two"),
    ]  # fmt: skip


def test_analysis_can_be_hidden(capsys):
    talk = session(lambda prompt: answer("yes", "secret"))
    talk.screen.analysis = False
    talk.ask("one")

    assert capsys.readouterr().out == "analysis ...\nyes\n"


def test_nothing_the_model_writes_drives_the_terminal(capsys):
    talk = session(lambda prompt: answer("a\x1b[31mb\x07\r\x9bc\u202ed\te"))
    talk.ask("one")

    out = capsys.readouterr().out
    assert out.endswith("a\\x1b[31mb\\x07\\r\\x9bc\\u202ed\te\n")


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys):
    count = 0

    def press() -> None:
        nonlocal count
        count += 1
        if count == 100:
            os.kill(os.getpid(), signal.SIGINT)

    talk = session(lambda prompt: answer("word " * 200, "h"), press, most=700)
    before = signal.getsignal(signal.SIGINT)
    talk.ask("one")

    out = capsys.readouterr().out
    assert out.endswith("\n[stopped]\n") and 0 < out.count("word") < 100
    assert signal.getsignal(signal.SIGINT) is before and not talk.engine.busy
    assert said(talk)[-1][0] == "final" and said(talk)[-1][1].startswith("word")
    talk.engine.models[""].says = lambda prompt: answer("again")  # type: ignore[assignment]
    talk.ask("two")
    assert said(talk)[-1] == ("final", "again")


def test_a_question_without_an_answer_is_taken_back(capsys):
    talk = session(lambda prompt: THINK.format("on and on " * 30), most=20)
    talk.ask("one")

    assert talk.chat.messages == ()
    out = capsys.readouterr().out
    assert "[cut: the answer has as many tokens as it may]" in out
    assert out.endswith("[there is no answer; your question is taken back]\n")


def test_the_model_does_not_speak_for_the_user(capsys):
    mine = "<|channel|>final<|message|>me<|end|>"
    talk = session(lambda prompt: mine + "<|start|>user<|message|>and you?<|end|>" * 9)
    talk.ask("one")

    assert said(talk) == [("user", "one"), ("final", "me")]
    assert "and you" not in capsys.readouterr().out


def with_tools(prompt: str) -> str:
    if "functions.calculate to=assistant" in prompt:
        result = prompt.rpartition("commentary<|message|>")[2].partition("<|end|>")[0]
        return answer(f"It is {result}.")
    return THINK.format("count") + CALL.format("calculate", '{"expression": "3 * (4 + 5)"}')


def tools_file(folder: Path) -> Path:
    import subprocess

    file = folder / "tools.json"
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, check=True)
    file.write_bytes(done.stdout)
    return file


def test_a_program_runs_the_tools(tmp_path, capsys):
    tools = read_tools(tools_file(tmp_path))
    program = Program(f"{sys.executable} {EXAMPLE}", tools)
    history = History(tmp_path / "chats.jsonl")
    talk = session(with_tools, chat=Conversation((), tools), program=program, history=history)
    talk.ask("3 * (4 + 5)?")

    assert capsys.readouterr().out == (
        'analysis: count\ncall functions.calculate {"expression": "3 * (4 + 5)"}\n'
        "result of functions.calculate 27\nanalysis: hm\nIt is 27.\n"
    )
    assert program.run("functions.weekday", '{"date": "2025-06-28"}') == "Saturday"
    assert program.run("functions.rm", "{}") == "error: there is no tool rm"
    assert "not a sum" in program.run("functions.calculate", '{"expression": "open(1)"}')
    assert history.last() == talk.chat  # and it can be trained on:
    assert json.loads(history.file.read_text())["messages"][1]["tool_calls"]


def test_results_of_tools_can_be_typed(tmp_path, capsys, monkeypatch):
    tools = read_tools(tools_file(tmp_path))
    monkeypatch.setattr("builtins.input", lambda prompt: "twenty-seven")
    talk = session(with_tools, chat=Conversation((), tools))
    talk.ask("3 * (4 + 5)?")

    assert said(talk)[-1] == ("final", 'It is "twenty-seven".')


def test_a_chat_is_kept_and_resumed_and_others_stay(tmp_path):
    file = tmp_path / "chats.jsonl"
    talk = session(lambda prompt: answer("to " + last_question(prompt)), history=History(file))
    talk.ask("one")
    talk.start()
    talk.ask("two")
    file.write_text(file.read_text() + '{"messages": "of another program"}\n')
    talk.ask("three")
    first, second, other = file.read_text().splitlines()
    file.write_text(first + "\n" + second + "\n")

    history = History(file)
    again = session(lambda prompt: answer("yes"), chat=history.last(), history=history)
    again.ask("four")
    lines = file.read_text().splitlines()
    chats = [conversation(json.loads(line), "messages", frozenset()) for line in lines]

    assert other == '{"messages": "of another program"}' and lines[0] == first
    assert [[m.text for m in chat.messages if m.role == "user"] for chat in chats] == [
        ["one"], ["two", "three", "four"],
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [file]


def test_a_question_that_is_taken_back_is_not_in_the_history(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": "of another program"}\n')
    talk = session(lambda prompt: answer("yes"), history=History(file))
    talk.ask("one")
    talk.undo()

    assert file.read_text() == '{"messages": "of another program"}\n'
    talk.ask("two")
    assert History(file).last() == talk.chat and "one" not in file.read_text()


def test_a_history_keeps_its_link_and_its_mode(tmp_path):
    file, link = tmp_path / "kept.jsonl", tmp_path / "link.jsonl"
    file.touch(mode=0o600)
    link.symlink_to(file)
    session(lambda prompt: answer("yes"), history=History(link)).ask("one")

    assert link.is_symlink() and '"one"' in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600


def test_an_answer_that_cannot_be_saved_is_still_part_of_the_chat(tmp_path, capsys):
    folder = tmp_path / "gone"
    folder.mkdir()
    talk = session(lambda prompt: answer("yes"), history=History(folder / "chats.jsonl"))
    folder.rmdir()
    talk.ask("one")

    assert "[not saved: " in capsys.readouterr().out and said(talk)[-1] == ("final", "yes")
    folder.mkdir()
    talk.ask("two")
    assert History(folder / "chats.jsonl").last() == talk.chat


CHILD = """
from types import SimpleNamespace
from ossature.talk import chat, terminal
chat.obey = lambda session, line: print(ascii(line), flush=True)
chat.converse(SimpleNamespace(screen=terminal.Screen()))
"""


def test_bytes_that_are_no_text_cost_their_own_line_only():
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=b"one\ncaf\xe9\ntwo\n", capture_output=True, cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, timeout=60,
    )  # fmt: skip

    assert b"'one'" in done.stdout and b"'two'" in done.stdout and not done.returncode
    assert b"error: what was entered is no utf-8 text; nothing is sent" in done.stdout


def test_several_lines_that_are_pasted_are_one_question():
    pytest.importorskip("readline")
    terminal, inner = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=inner, stdout=inner, stderr=inner, cwd=ROOT,
        env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(inner)
    try:
        shown = b""
        while b"> " not in shown:
            shown += os.read(terminal, 1000)
        os.write(terminal, b"\x1b[200~one\rtwo\x1b[201~\r")
        while b"> " not in shown.partition(b"'")[2].partition(b"'")[2]:
            shown += os.read(terminal, 1000)
        os.write(terminal, b"\x04")
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait()
        os.close(terminal)
    assert b"'one\\ntwo'" in shown


def test_commands(capsys, monkeypatch):
    lines = iter([
        "one \\", "more", "/undo", "/effort high", "/instructions Be brief.", "/analysis hide",
        "two", "/again", "/nothing", "/effort much", "/new", "/undo", "/analysis dim",
    ])  # fmt: skip

    def read(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    prompts = []

    def says(prompt: str) -> str:
        prompts.append(prompt)
        return answer("to " + last_question(prompt).replace("\n", "/"))

    talk = session(says)
    converse(talk)

    assert "to one /more" in (out := capsys.readouterr().out)
    assert "Reasoning: high" in prompts[-1] and "Be brief." in prompts[-1]
    assert "one" not in prompts[-1]
    assert "error: /nothing: no such command; /help lists them" in out
    assert "error: /effort: say low, medium, high" in out
    assert "error: nothing was asked yet" in out
    assert out.count("to two") == 2 and said(talk) == [("developer", "Be brief.")]


def test_a_conversation_that_leaves_no_room_is_refused_and_nothing_lost():
    talk = session(lambda prompt: answer("yes"))
    talk.ask("one")
    before = talk.chat
    with pytest.raises(ValueError, match="leaves no room for an answer in a context of 800"):
        talk.ask("what? " * 900)
    assert talk.chat == before


def test_seeds_go_on_from_answer_to_answer():
    talk = session(lambda prompt: FINAL.format("a"))
    talk.sampling = replace(talk.sampling, temperature=1.0, seed=5)
    seeds = []
    submit = talk.engine.submit
    talk.engine.submit = lambda request: (  # type: ignore[method-assign]
        seeds.append(request.options.seed) or submit(request)
    )
    talk.ask("one")
    talk.ask("two")
    assert seeds == [5, 6]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--resume"], "say with --history which file"),
        (["--run-tools", "x"], "say with --tools which functions"),
        (["--date", "soon"], "date (soon) must be a day, as YYYY-MM-DD"),
        (["--history", "nowhere/chats.jsonl"], "no such folder as nowhere"),
        (["--history", "/"], "/: a folder, and no file"),
        (["--tools", "none.json"], "none.json: No such file or directory"),
        ([], "no-model: no such folder"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["chat", "no-model", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_answer_that_was_left_is_not_heard_in_the_next() -> None:
    chat = session(lambda text: FINAL.format(last_question(text)))

    def asked(question: str) -> Answer:
        record = {"messages": [{"role": "user", "content": question}]}
        messages = conversation(record, "messages", frozenset(), answered=False)
        return Answer(
            chat.engine, chat.tokenizer, messages, chat.rendering, chat.sampling, chat.context
        )

    left = asked("the first").pieces(lambda: False)
    assert next(left).channel == "final"
    left.close()  # as a second Ctrl-C does
    assert "".join(piece.text for piece in asked("another").pieces(lambda: False)) == "another"


@pytest.mark.parametrize("read", [lambda file: History(file).last(), read_tools])
def test_a_file_that_is_nested_too_deep_is_refused(read, tmp_path: Path) -> None:
    file = tmp_path / "deep.json"
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json"):
        read(file)
