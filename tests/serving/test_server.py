"""The server as its clients meet it: the `openai` package, plain HTTP, and signals."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import openai
import pytest

from safemoe_jax import cli
from safemoe_jax.inference.engine import Event
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.model.lora import Routed
from safemoe_jax.serving import server as server_module
from safemoe_jax.serving.door import Door
from safemoe_jax.serving.protocol import ChatBody
from safemoe_jax.serving.server import Server, _bound, make_app
from safemoe_jax.serving.service import Limits, Service
from safemoe_jax.serving.worker import EngineFailed, Worker

LIMITS = Limits(slots=3, max_queue=40, max_length=400, max_tokens=300)
DOMAINS = ["cats", "dogs"]
ROOT = Path(__file__).parents[2]


class Running:
    """A server in a thread; `service` is the event loop's, to be looked at only."""

    def __init__(self, loaded):
        self.service = Service(loaded, DOMAINS, LIMITS)
        self.socket = _bound("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.server = Server(
            make_app(self.service, "safemoe", None, "127.0.0.1"), self.service, self.socket
        )
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self):
        self._loop = asyncio.get_running_loop()
        await self.server.run(self._ready.set)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(600)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(600)
        assert not self._thread.is_alive()
        self.socket.close()

    def post(self, path, body, headers=None):
        """Plain HTTP -> status, JSON; a body that is no bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            headers = {"Content-Type": "application/json", **(headers or {})}
            connection.request("POST", path, data, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())


@pytest.fixture(scope="module")
def running(loaded):
    with Running(loaded) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


@pytest.fixture(scope="module")
def offline(loaded, running):
    """What `safemoe generate` says to a prompt: text, its gates, whether the turn ended."""

    def offline(prompt, *, max_new_tokens=24, temperature=0.0, top_p=1.0, seed=0):
        chat = running.service.chat
        sampler = Sampler(loaded.model, loaded.variables, Routed(), chat.ends)
        with jax.set_mesh(loaded.mesh):
            (said,) = sampler.generate(
                [chat.prompt_ids([{"role": "user", "content": prompt}])],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                batch_size=16,
            )
        return chat.text(said.tokens), said

    return offline


def ask(client, prompt, **more):
    settings = {"temperature": 0.0, "max_tokens": 24, **more}
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model="safemoe", messages=messages, **settings)


def until(condition):
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# answers


def test_an_answer_is_the_offline_one(client, offline):
    text, said = offline("What do cats do?")
    answer = ask(client, "What do cats do?")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", text)
    assert choice.finish_reason == ("stop" if said.finished else "length")
    assert answer.usage.completion_tokens == len(said.tokens)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(said.tokens)
    assert not choice.model_extra.get("gates")
    assert answer.model == "safemoe"


def test_many_at_once_get_each_its_own_answer(client, offline):
    prompts = ["cat " * length + str(length) for length in (1, 14, 3, 9, 13, 2, 11, 4, 5, 12)]
    lengths = [4 + 7 * index % 30 for index in range(len(prompts))]
    expected = [offline(p, max_new_tokens=n)[0] for p, n in zip(prompts, lengths, strict=True)]

    def one(index):
        more = {"temperature": 2.0, "seed": index} if index % 4 == 3 else {}
        if index % 2:
            return ask(client, prompts[index], max_tokens=lengths[index], **more).choices[0].message
        chunks = ask(client, prompts[index], max_tokens=lengths[index], stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(one, range(len(prompts))))
    for index, (answer, text) in enumerate(zip(answers, expected, strict=True)):
        if index % 4 != 3:
            assert (answer.content if index % 2 else answer) == text, index


def test_a_stream_ends_with_its_reason_and_then_the_usage(client, offline):
    text, said = offline("Dogs?")
    *chunks, last = ask(client, "Dogs?", stream=True, stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert set(reasons[:-1]) == {None}
    assert reasons[-1] == "length"
    assert (last.choices, last.usage.completion_tokens) == ([], len(said.tokens))


def test_the_gates_of_each_token_are_shown_to_who_asks(client, offline):
    _, said = offline("Dogs?")
    expected = said.gates_TLE.mean(axis=1)
    assert expected.std() > 0.1
    whole = ask(client, "Dogs?", extra_body={"gates": True}).choices[0].model_extra["gates"]
    assert whole["domains"] == DOMAINS
    assert len(whole["tokens"]) == len(said.tokens)
    assert abs(expected - whole["values"]).max() < 1e-3
    chunks = ask(client, "Dogs?", stream=True, extra_body={"gates": True})
    shown = [c.choices[0].model_extra["gates"] for c in chunks if "gates" in c.choices[0].to_dict()]
    assert [one["values"][0] for one in shown] == whole["values"]


def test_a_seed_repeats_an_answer_and_gives_the_offline_one(client, offline):
    hot = {"temperature": 2.0, "top_p": 0.9}
    first, again, other = (
        ask(client, "Cats?", seed=seed, **hot).choices[0].message.content for seed in (5, 5, 6)
    )
    assert first == again == offline("Cats?", seed=5, **hot)[0]
    assert other != first
    unseeded = {ask(client, "Cats?", **hot).choices[0].message.content for _ in range(2)}
    assert len(unseeded) == 2
    both = ask(client, "Cats?", seed=5, n=2, **hot).choices
    assert [choice.index for choice in both] == [0, 1]
    assert both[0].message.content == first != both[1].message.content


def test_a_stop_string_ends_the_answer_before_itself(client, offline):
    text, _ = offline("Cats?")
    stop = text[5:7]
    answer = ask(client, "Cats?", stop=[stop, "never said"])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 24
    chunks = ask(client, "Cats?", stop=stop, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == text[: text.index(stop)]


def test_completions_take_texts_and_tokens_without_a_template(client, running, offline):
    chat = running.service.chat
    ids = chat.prompt_ids([{"role": "user", "content": "Cats?"}])
    settings = {"model": "safemoe", "temperature": 0.0, "max_tokens": 24}
    as_text = chat.tokenizer.decode(ids)
    for prompt in (ids, as_text):
        answer = client.completions.create(prompt=prompt, **settings)
        assert answer.choices[0].text == offline("Cats?")[0]
    assert client.completions.create(model="safemoe", prompt="a").usage.completion_tokens <= 16
    two = client.completions.create(prompt=["a", as_text], n=2, **settings)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[3].text == offline("Cats?")[0]
    assert two.usage.prompt_tokens == 1 + len(ids)


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.model_extra["domains"]) == ("safemoe", DOMAINS)
    assert client.models.retrieve("safemoe").model_extra["max_model_len"] == LIMITS.max_length


# refusals

CHAT = {"model": "safemoe", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


@pytest.mark.parametrize(
    "change",
    [
        {"gates": [1.0, 0.0]},
        {"gates": {"cats": 1.0}},
        {"gates": "uniform"},
        {"routing": "uniform"},
        {"routing": "base"},
        {"experts": ["cats"]},
        {"allow_ungated": True},
        {"model": "cats"},
        {"model": "base"},
    ],
)
def test_no_request_sets_the_gates_or_leaves_the_router_out(running, change):
    for path in ("/v1/chat/completions", "/v1/completions"):
        body = {**CHAT, "prompt": "a", **change}
        del body["prompt" if "chat" in path else "messages"]
        status, answer = running.post(path, body)
        assert status == (404 if "model" in change else 400)
        assert answer["error"]["param"] in (*change, None)


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"{", 400, "the body is no valid JSON"),
        (b"", 400, "Field required"),
        (b"[" * 20_000, 400, "error parsing the body"),
        (b'{"a": "\xff"}', 400, "error parsing the body"),
        (b"[]", 400, "valid dictionary"),
        (b'{"model": "safemoe", "messages": 3}', 400, "messages: Input should be a valid list"),
        ({"model": "x"}, 400, "messages: Field required"),
        (CHAT | {"model": "gpt"}, 404, "there is no such model here; there is 'safemoe'"),
        (CHAT | {"messages": []}, 400, "messages: List should have at least 1 item"),
        (CHAT | {"messages": [{"role": "cat", "content": "a"}]}, 400, "messages.0.role: Input"),
        (CHAT | {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "no valid Unicode"),
        (CHAT | {"stop": "\ud800"}, 400, "stop: the text is no valid Unicode"),
        (CHAT | {"messages": [{"role": "assistant", "content": "a"}]}, 400, "must be the user's"),
        (CHAT | {"temperature": "hot"}, 400, "temperature: Input should be a valid number"),
        (CHAT | {"temperature": float("nan")}, 400, "temperature: Input should be a finite"),
        (CHAT | {"temperature": -1}, 400, "temperature: Input should be greater than or equal"),
        (CHAT | {"top_p": 0}, 400, "top_p: Input should be greater than 0"),
        (CHAT | {"n": 17}, 400, "n: Input should be less than or equal to 16"),
        (CHAT | {"stop": [""]}, 400, "stop: give at most 4 strings of 1 to 256 characters"),
        (CHAT | {"seed": 2**63}, 400, "seed: Input should be less than"),
        (CHAT | {"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
        (CHAT | {"max_tokens": 301}, 400, "301 new tokens are asked for; this server gives 300"),
        (CHAT | {"logprobs": True}, 400, "logprobs is not supported here; leave it out"),
        (CHAT | {"tools": [{}]}, 400, "tools is not supported here; leave it out"),
        (CHAT | {"\x1b\u2028" * 99: 1}, 400, "unknown field \\x1b\\u2028\\x1b"),
        (CHAT | {"\ud800": 1}, 400, "Input should be a valid string"),
        (
            CHAT | {"messages": [{"role": "user", "content": "a" * 500}]},
            400,
            "which with 2 new ones are more than the 400 that this server takes together",
        ),
        (CHAT | {"user": "a" * 70_000}, 413, "a body may have 65536 bytes"),
    ],
)
def test_what_cannot_be_served_is_said_clearly(running, body, status, message):
    found, answer = running.post("/v1/chat/completions", body)
    assert (found, answer.keys()) == (status, {"error"})
    assert message in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 300
    assert answer["error"]["type"] == "invalid_request_error"


def test_fields_that_change_nothing_are_taken(client):
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": None, "user": "me"}
    plain = ask(client, "Cats?").choices[0].message.content
    assert ask(client, "Cats?", **neutral).choices[0].message.content == plain


def test_other_places_and_methods(running):
    assert running.post("/v1/embeddings", CHAT)[0] == 404
    assert running.post("/v1/models", CHAT)[0] == 405
    assert running.post("/v1/completions", {"model": "safemoe", "prompt": [9999]})[0] == 400
    assert running.post("/v1/completions", {"model": "safemoe", "prompt": []})[0] == 400
    assert running.post("/v1/completions", CHAT, {"Content-Type": "text/plain"})[0] == 400
    assert running.post("/v1/chat/completions", CHAT, {"Host": "evil.example"})[0] == 403
    assert running.post("/v1/chat/completions", CHAT, {"Host": "localhost:1"})[0] == 200


def test_a_body_without_a_length_is_counted_too(running):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port)) as connection:
        pieces = iter([b" " * 30_000] * 4)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", pieces, headers, encode_chunked=True)
        assert connection.getresponse().status == 413


def test_a_full_queue_is_a_429(running, client, monkeypatch):
    waiting = {object(): None for _ in range(LIMITS.slots + LIMITS.max_queue)}
    monkeypatch.setattr(running.service.worker, "_queues", waiting)
    with pytest.raises(openai.RateLimitError, match="43 answers are running or waiting, of 43"):
        ask(client, "b")
    waiting.popitem()
    assert ask(client, "b").choices
    with pytest.raises(openai.BadRequestError, match="48 answers are asked for; at most 43"):
        client.completions.create(model="safemoe", prompt=["a"] * 3, n=16)


def test_who_leaves_frees_the_slot(running, client):
    with ask(client, "a", max_tokens=300, n=3, stream=True) as stream:
        next(iter(stream))
    until(lambda: running.service.worker.outstanding == 0)
    with pytest.raises(openai.APITimeoutError):
        ask(client, "a", max_tokens=300, n=16, timeout=0.1)
    until(lambda: running.service.worker.outstanding == 0)


def test_pieces_that_wait_are_not_sent_at_one_go(loaded):
    """The loop turns between two of them, and so hears that a client has left."""

    class Behind:
        outstanding, failed = 0, False

        def submit(self, request, events):
            for finish in (*8 * [None], "length"):
                events.put_nowait(Event(request, 5, None, finish))

        def drop(self, request):
            pass

    service, body = Service(loaded, DOMAINS, LIMITS), ChatBody(**CHAT)
    service.worker = Behind()
    sent, sent_when_heard = [], []

    async def run():
        async for piece in service.call(service.chat_requests(body), body).pieces():
            if not sent:
                asyncio.get_running_loop().call_soon(lambda: sent_when_heard.append(len(sent)))
            sent.append(piece)

    asyncio.run(run())
    assert (len(sent), sent_when_heard) == (9, [1])


# who may come in


def through_door(headers, path="/v1/models", **door):
    """The status with which a Door lets a request pass, or does not."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "path": path,
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }
    asyncio.run(Door(app, body_limit=9, **door)(scope, None, send))
    return sent[0]["status"]


def test_a_key_is_asked_of_everybody():
    door = {"key": "k" * 16, "only_host": None}
    assert through_door({"authorization": f"Bearer {'k' * 16}"}, **door) == 200
    for sent in ({}, {"authorization": "Bearer kkk"}, {"authorization": "k" * 16}):
        assert through_door(sent, **door) == 401
    assert through_door({}, "/health", **door) == 200


def test_without_a_key_only_the_loopback_address_is_answered():
    door = {"key": None, "only_host": "::1"}
    for host, status in [("[::1]:80", 200), ("localhost", 200), ("a.example:80", 403), ("", 403)]:
        assert through_door({"host": host}, **door) == status


@pytest.fixture
def mistake(bundle_path, capsys):
    """The one line with which `safemoe serve` ends."""

    def mistake(*more):
        assert cli.main(["serve", "--bundle", str(bundle_path), *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return mistake


def test_other_addresses_need_a_key(mistake, monkeypatch):
    monkeypatch.delenv(server_module.KEY_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        assert f"--host {host} lets others in; set SAFEMOE_API_KEY" in mistake("--host", host)
    monkeypatch.setenv(server_module.KEY_VARIABLE, "short")
    assert "SAFEMOE_API_KEY has 5 characters; give it 16" in mistake("--host", "0.0.0.0")
    monkeypatch.setenv(server_module.KEY_VARIABLE, "")
    assert "SAFEMOE_API_KEY has 0 characters" in mistake("--host", "0.0.0.0")


def test_bad_options_are_said_before_anything_is_loaded(mistake, running):
    assert f"cannot serve on 127.0.0.1:{running.port}" in mistake("--port", str(running.port))
    assert "--port is 70000; ports go from 0" in mistake("--port", "70000")
    for option in ("slots", "max-length", "max-tokens"):
        line = mistake("--port", "0", f"--{option}", "0")
        assert re.search(f"--{option} (is )?0[,;]", line)


def test_limits_are_at_most_what_the_base_takes():
    found = server_module._checked(Limits(8, 64, 2048, 1024), 512)
    assert found == Limits(8, 64, max_length=512, max_tokens=511)


# endings


def health(address):
    with contextlib.closing(http.client.HTTPConnection(address)) as connection:
        connection.request("GET", "/health")
        return connection.getresponse().status


def test_sigterm_ends_with_the_running_answers(bundle_path):
    """In the middle of long answers: new ones are refused, the running ones whole, the exit 0."""
    command = [sys.executable, "-m", "safemoe_jax.cli", "serve", "--bundle", str(bundle_path)]
    command += ["--port", "0", "--slots", "1", "--max-length", "160"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            url = process.stdout.readline().split("http://")[1].split("/v1")[0]
            with openai.OpenAI(base_url=f"http://{url}/v1", api_key="none", max_retries=0) as to:
                hot = {"temperature": 2.0, "seed": 0, "n": 16, "max_tokens": 100}
                with ask(to, "a", stream=True, **hot) as stream:
                    chunks = iter(stream)
                    next(chunks)
                    process.send_signal(signal.SIGTERM)
                    until(lambda: health(url) == 503)
                    with pytest.raises(openai.InternalServerError) as refused:
                        ask(to, "b")
                    assert refused.value.status_code == 503
                    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
            assert sum(reason is not None for reason in reasons) == 16
            assert process.wait(600) == 0
        finally:
            process.kill()


def test_an_engine_that_fails_tells_all_who_wait():
    class Broken:
        busy = False

        def submit(self, request):
            self.busy = True

        def step(self):
            raise MemoryError("no room")

    async def run():
        worker = Worker(lambda serve: serve(Broken()))
        events = asyncio.Queue()
        await worker.start()
        worker.submit(object(), events)
        assert await events.get() is None
        with pytest.raises(EngineFailed, match="restart the server"):
            worker.submit(object(), events)
        with pytest.raises(MemoryError, match="no room"):
            await worker.close()

    asyncio.run(run())
