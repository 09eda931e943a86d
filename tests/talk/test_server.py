"""Who is let in, what becomes of those who go away, and how a server ends."""

import concurrent.futures
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from ossature.cli import main
from ossature.talk.running import listen
from tests.golden import ROOT
from tests.talk.scripted import Scripted, answer, last_question
from tests.talk.serving import KEY, released, serving, serving_model, until

USER = [{"role": "user", "content": "one"}]
BODY = {"model": "toy", "messages": USER}
PATH = "/v1/chat/completions"


def endless(prompt: str) -> str:
    return "<|channel|>final<|message|>" + "word " * 100


def test_the_key_is_wanted():
    with serving(lambda prompt: answer("yes")) as there:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Basic {KEY}"}):
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                found = httpx.get(there.url + path, headers=headers)
                assert found.status_code == 401 and "API key" in found.json()["error"]["message"]
        assert httpx.get(there.url + "/health").json() == {"status": "ok"}
        assert httpx.head(there.url + "/health").status_code == 200
        assert there.client.models.list().data
        with pytest.raises(openai.AuthenticationError):
            there.client.with_options(api_key="other").models.list()


def test_bodies_are_bounded_and_must_be_json():
    with serving(lambda prompt: answer("yes"), max_body_bytes=2000) as there, there.http() as http:
        long = b'{"model": "' + b"a" * 2000

        def parts():
            yield long
            yield b"more"

        json = {"Content-Type": "application/json"}
        assert http.post(PATH, content=long, headers=json).status_code == 413
        assert http.post(PATH, content=parts(), headers=json).status_code == 413
        assert http.post(PATH, content=b"{}", headers={}).status_code == 415
        for body in (
            b"{", b"[]", b"\xff", b"[" * 1500, b'{"a": NaN', b'{"a": NaN}', b'{"a": [1e400]}',
            b'{"a": "\\ud800"}',
        ):  # fmt: skip
            found = http.post(PATH, content=body, headers=json)
            assert found.status_code == 400, body
            assert "not" in found.json()["error"]["message"]
        assert http.get("/v1/nothing").status_code == 404
        assert http.get(PATH).status_code == 405
        assert http.post(PATH, json=BODY).status_code == 200  # and it goes on


def test_a_client_that_goes_away_in_its_body_is_no_mistake_of_the_server(capfd):
    with serving(lambda prompt: answer("yes")) as there:
        place = there.url.removeprefix("http://").split(":")
        with socket.create_connection((place[0], int(place[1]))) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
                b"Authorization: Bearer the key\r\nContent-Type: APPLICATION/json\r\n\r\n{"
            )
            until(lambda: there.gate.inside == 1)
        until(lambda: there.gate.gone == 1)
        assert there.service.metrics.gone._value.get() == 1
    assert "Traceback" not in capfd.readouterr().err


def test_too_many_are_told_to_come_back():
    go = threading.Event()
    with (
        serving(lambda p: answer("yes"), go.wait, max_batch=1, max_queue=1) as there,
        concurrent.futures.ThreadPoolExecutor() as pool,
        released(go),
    ):

        def ask():
            return there.client.chat.completions.create(model="toy", messages=USER)

        first = [pool.submit(ask) for _ in range(2)]
        until(lambda: there.service.worker.load == 2)
        with there.http() as http:
            found = http.post(PATH, json=BODY)
        assert found.status_code == 429 and int(found.headers["Retry-After"]) > 0
        with pytest.raises(openai.RateLimitError):
            ask()
        go.set()
        assert [f.result().choices[0].message.content for f in first] == ["yes", "yes"]
        # The client's own patience is enough.
        again = there.client.with_options(max_retries=2).chat.completions.create(
            model="toy", messages=USER
        )
        assert again.choices[0].message.content == "yes"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(stream):
    with serving(endless, lambda: time.sleep(0.001), max_batch=1, context=30_000) as there:
        with there.http() as http:
            if stream:
                with http.stream("POST", PATH, json=BODY | {"stream": True}) as answer_:
                    parts = answer_.iter_bytes()  # kept: the connection closes with it
                    next(parts)
                    assert there.service.worker.load == 1
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post(PATH, json=BODY, timeout=0.3)
        there.idle()
        engine = there.service.worker.engine
        until(lambda: engine.used_tokens == 0 and engine.running == 0)
        assert engine.models[""].passes < 20_000  # it was not written to its end
        assert there.service.metrics.gone._value.get() == 1
        until(lambda: there.gate.inside == 0)
        assert (there.gate.answered, there.gate.gone) == (0, 1)
        with there.http() as http:
            assert f'ossature_requests_total{{path="{PATH}",status="499"}} 1.0' in (
                page := http.get("/metrics").text
            )
            assert 'status="200"' not in page


def test_a_stream_that_is_closed_by_openais_client_frees_its_place():
    with serving(endless, lambda: time.sleep(0.001), max_batch=1, context=30_000) as there:
        stream = there.client.chat.completions.create(model="toy", messages=USER, stream=True)
        for _, _chunk in zip(range(5), stream, strict=False):
            pass
        stream.close()
        there.idle()


def test_a_failed_engine_is_told_and_nothing_hangs(capfd):
    count = 0

    def fail() -> None:
        nonlocal count
        count += 1
        if count == 12:
            raise RuntimeError("out of memory")

    with (
        serving(endless, fail, context=5000) as there,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):

        def ask():
            return there.client.chat.completions.create(model="toy", messages=USER)

        for asked in [pool.submit(ask) for _ in range(3)]:
            with pytest.raises(openai.InternalServerError, match="out of memory"):
                asked.result()
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            ask()
        health = httpx.get(there.url + "/health")
        assert health.status_code == 503 and health.json()["status"] == "failed"
    assert "RuntimeError: out of memory" in capfd.readouterr().err


def test_a_failure_ends_a_stream_with_an_error(capfd):
    count = 0

    def fail() -> None:
        nonlocal count
        count += 1
        if count == 12:
            raise RuntimeError("out of memory")

    with serving(endless, fail, context=5000) as there:
        stream = there.client.chat.completions.create(model="toy", messages=USER, stream=True)
        with pytest.raises(openai.APIError, match="out of memory"):
            for _ in stream:
                pass
    capfd.readouterr()


def test_a_server_that_ends_answers_whom_it_let_in_and_nobody_else():
    go = threading.Event()
    with (
        serving(lambda p: answer("yes"), go.wait) as there,
        concurrent.futures.ThreadPoolExecutor() as pool,
        released(go),
    ):
        first = pool.submit(
            lambda: there.client.chat.completions.create(model="toy", messages=USER)
        )
        until(lambda: there.service.worker.load == 1)
        there.server.handle_exit(15, None)
        late = httpx.post(there.url + PATH, json=BODY, headers={"Authorization": f"Bearer {KEY}"})
        assert late.status_code == 503 and int(late.headers["Retry-After"]) > 0
        assert httpx.get(there.url + "/health").json() == {"status": "draining"}
        go.set()
        assert first.result().choices[0].message.content == "yes"
        until(lambda: there.server.should_exit)
        assert there.gate.answered == 1 and there.gate.left == 0


def test_everybody_gets_the_own_answer():
    def says(prompt: str) -> str:
        return answer("to " + last_question(prompt))

    with (
        serving(says, max_batch=3, max_queue=50) as there,
        concurrent.futures.ThreadPoolExecutor(24) as pool,
    ):

        def ask(n: int) -> str:
            found = there.client.chat.completions.create(
                model="toy", messages=[{"role": "user", "content": f"question {n}"}]
            )
            return found.choices[0].message.content

        assert list(pool.map(ask, range(24))) == [f"to question {n}" for n in range(24)]
        until(lambda: there.gate.answered == 24)


SERVER = """
import time
from ossature.talk.running import run
from tests.talk.scripted import Scripted, answer, last_question
from tests.talk.serving import scripted_service
model = Scripted(lambda p: answer("to " + last_question(p)), lambda: time.sleep(0.004))
raise SystemExit(run(scripted_service(model, max_queue=64), "127.0.0.1", 0, "", 40_000, 60))
"""


def test_sigterm_under_load_loses_nobody():
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split(" at ")[1].strip()
        outcomes: list[str] = []

        def ask(client: openai.OpenAI, n: int) -> str:
            question = [{"role": "user", "content": f"question {n}"}]
            try:
                if n % 2:
                    found = client.chat.completions.create(model="toy", messages=question)
                    text = found.choices[0].message.content
                else:
                    stream = client.chat.completions.create(
                        model="toy", messages=question, stream=True
                    )
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            except openai.InternalServerError as error:
                assert error.status_code == 503
                return "refused"
            except openai.APIConnectionError:
                return "closed"  # the server listens no more: it never had the request
            assert text == f"to question {n}"
            return "answered"

        with (
            openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=60) as client,
            concurrent.futures.ThreadPoolExecutor(16) as pool,
        ):
            asked = [pool.submit(ask, client, n) for n in range(60)]
            until(lambda: sum(f.done() for f in asked) >= 5, 30)
            server.terminate()
            outcomes = [f.result() for f in asked]
        _, err = server.communicate(timeout=30)
    finally:
        server.kill()
        server.wait()
    answered = outcomes.count("answered")
    assert server.returncode == 0, err
    assert f"answered {answered} requests, left 0" in err
    assert answered >= 16 and answered < 60, outcomes


def test_a_second_signal_ends_it_at_once_and_counts_who_was_left():
    slow = SERVER.replace(
        'answer("to " + last_question(p))', '"<|channel|>final<|message|>" + "a " * 900'
    )
    server = subprocess.Popen(
        [sys.executable, "-c", slow], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split(" at ")[1].strip()
        with (
            openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=60) as client,
            concurrent.futures.ThreadPoolExecutor() as pool,
        ):
            stream = client.chat.completions.create(model="toy", messages=USER, stream=True)
            next(stream)
            whole = pool.submit(client.chat.completions.create, model="toy", messages=USER)
            until(lambda: "texts_in_flight 2.0" in httpx.get(url[:-3] + "/metrics").text)
            server.terminate()
            until(lambda: httpx.get(url[:-3] + "/health").json() == {"status": "draining"})
            assert server.poll() is None
            server.terminate()
            with pytest.raises((httpx.HTTPError, openai.APIConnectionError)):
                list(stream)
            with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
                whole.result()
        _, err = server.communicate(timeout=30)
    finally:
        server.kill()
        server.wait()
    assert server.returncode == 1
    assert "left 2" in err and "Traceback" not in err, err


def test_adapters_are_models_by_name():
    base, other = Scripted(lambda p: answer("base")), Scripted(lambda p: answer("other"))
    with serving_model(base, adapters={"tuned": other}) as there:
        create = there.client.chat.completions.create
        found = {name: create(model=name, messages=USER) for name in ("toy", "tuned")}

        assert {n: (f.model, f.choices[0].message.content) for n, f in found.items()} == {
            "toy": ("toy", "base"), "tuned": ("tuned", "other"),
        }  # fmt: skip
        assert [model.id for model in there.client.models.list()] == ["toy", "tuned"]
        response = there.client.responses.create(model="tuned", input="one")
        assert (response.model, response.output_text) == ("tuned", "other")


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "no-model: no such folder"),
        (["--context", "0"], "context (0) must be 1 or more"),
        (["--port", "70000"], "port (70000) must be between 0 and 65535"),
        (["--adapter", "a"], "adapter (a) must be NAME=FOLDER"),
        (["--adapter", "no-model=x"], "no-model is the name of the model itself"),
        (["--max-tokens", "5"], "max_tokens (5) must be at least context (8192)"),
    ],
)
def test_mistakes_at_the_start_are_one_line(words, message, capsys):
    assert main(["serve", "no-model", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_port_that_is_taken_is_told():
    with serving(lambda p: answer("yes")) as there:
        port = int(there.url.rpartition(":")[2])
        with pytest.raises(OSError, match=f"127.0.0.1:{port}: cannot listen there"):
            listen("127.0.0.1", port)
