"""Clients of an OpenAI-compatible server: what they ask, how they misbehave, and what came of it.

Used by soak.py. All is drawn from a seed; nothing here knows whose server it is.
"""

import asyncio
import json
import math
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

CHAT = "/v1/chat/completions"
SECONDS_BETWEEN_SAMPLES = 2
# How many of 100 requests are what.
MIXTURE = {"whole": 50, "stream": 30, "leave": 12, "garbage": 8}


class Question(NamedTuple):
    """A user's turn, and how many tokens its answer may have."""

    text: str
    max_tokens: int

    def body(self, model: str, *, stream: bool) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.text}]
        settings = {"temperature": 0, "max_tokens": self.max_tokens, "stream": stream}
        return {"model": model, "messages": messages, **settings}


class Answer(NamedTuple):
    """What is said, why it ends ("stop" or "length"), and how many tokens it has."""

    text: str
    finish: str | None
    tokens: int


class Record(NamedTuple):
    """One request.

    Attributes:
      kind: a key of `MIXTURE`.
      question: its index; -1 of garbage.
      began: seconds on the clock of `time.monotonic`.
      seconds: until the answer's end.
      first: seconds until a stream's first text, NaN of all else.
      said: text and reason of the end; None where there is no whole answer.
      status: of HTTP; 0 where the connection broke.
    """

    kind: str
    question: int
    began: float
    seconds: float
    first: float
    said: tuple[str, str | None] | None
    status: int


class Load(NamedTuple):
    """What a server was put to: all requests, and (seconds, bytes) of its resident memory."""

    records: list[Record]
    memory: list[tuple[float, int]]
    seconds: float


async def ask_alone(url: str, model: str, questions: Sequence[Question]) -> list[Answer]:
    """Each question, one after the other."""
    answers = []
    async with _http(url) as http:
        for question in questions:
            response = await http.post(CHAT, json=question.body(model, stream=False))
            response.raise_for_status()
            whole = response.json()
            answers.append(Answer(*_said(whole), whole["usage"]["completion_tokens"]))
    return answers


async def ask_all(url: str, model: str, questions: Sequence[Question], clients: int) -> None:
    """All questions once, many at a time: the server has then met every shape."""
    waiting = list(questions)

    async def client() -> None:
        async with _http(url) as http:
            while waiting:
                question = waiting.pop()
                (await http.post(CHAT, json=question.body(model, stream=False))).raise_for_status()

    await asyncio.gather(*(client() for _ in range(clients)))


async def put_load(
    url: str, pid: int, model: str, questions: Sequence[Question], *, clients: int, seconds: float
) -> Load:
    """Clients that ask without a pause; each ends what it has begun when the time is over.

    Args:
      url: of the server, without a path.
      pid: its process, whose memory is looked at.
      model: as requests name it.
      questions: what each client draws from.
      clients: how many there are at once.
      seconds: for which they go on asking.
    """
    records: list[Record] = []
    memory: list[tuple[float, int]] = []
    began = time.monotonic()

    async def watch() -> None:
        while True:
            memory.append((time.monotonic() - began, resident_bytes(pid)))
            await asyncio.sleep(SECONDS_BETWEEN_SAMPLES)

    async def client(number: int) -> None:
        draw = random.Random(number)
        async with _http(url) as http:
            while time.monotonic() < began + seconds:
                records.append(await _one(http, model, questions, draw))

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(client(number) for number in range(clients)))
    watching.cancel()
    return Load(records, memory, time.monotonic() - began)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _http(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=None, trust_env=False)


async def _one(
    http: httpx.AsyncClient, model: str, questions: Sequence[Question], draw: random.Random
) -> Record:
    (kind,) = draw.choices(list(MIXTURE), list(MIXTURE.values()))
    index, began = draw.randrange(len(questions)), time.monotonic()
    said, first, status = None, math.nan, 0
    try:
        if kind == "whole":
            response = await http.post(CHAT, json=questions[index].body(model, stream=False))
            status = response.status_code
            said = _said(response.json()) if status == 200 else None
        elif kind == "stream":
            status, said, first = await _stream(http, questions[index].body(model, stream=True))
        elif kind == "leave":
            await _leave(http, questions[index], model, draw)
        else:
            index = -1
            status = (await _post(http, _garbage(model, draw))).status_code
    except httpx.TransportError:
        status = 0
    return Record(kind, index, began, time.monotonic() - began, first, said, status)


async def _stream(
    http: httpx.AsyncClient, body: dict[str, Any], most_pieces: float = math.inf
) -> tuple[int, tuple[str, str | None] | None, float]:
    """A stream to its end, or until so many pieces have come."""
    began, first, pieces = time.monotonic(), math.nan, 0
    text, finish = "", None
    async with http.stream("POST", CHAT, json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: ")).get("choices", ()):
                if new := choice["delta"].get("content"):
                    text, pieces = text + new, pieces + 1
                    first = time.monotonic() - began if math.isnan(first) else first
                finish = choice.get("finish_reason") or finish
            if pieces >= most_pieces:
                break
    return response.status_code, (text, finish) if finish else None, first


async def _leave(
    http: httpx.AsyncClient, question: Question, model: str, draw: random.Random
) -> None:
    """Goes before the answer has ended: out of a stream, or while waiting for the whole."""
    if draw.random() < 0.5:
        await _stream(http, question.body(model, stream=True), draw.randint(1, 5))
        return
    try:
        async with asyncio.timeout(draw.uniform(0.0, 2.0)):
            await http.post(CHAT, json=question.body(model, stream=False))
    except TimeoutError:
        pass


def _garbage(model: str, draw: random.Random) -> bytes:
    """A body that is no request for any server."""
    body = Question("Hello?", 8).body(model, stream=False)
    whole = json.dumps(body).encode()
    wrong = {"messages": 3, "model": ["?"], "temperature": "hot"}
    key = draw.choice(list(wrong))
    return draw.choice(
        [
            draw.randbytes(draw.randint(0, 200)),
            whole[: draw.randrange(len(whole))],
            json.dumps({**body, key: wrong[key]}).encode(),
            b"[" * draw.randint(1, 5000),
            b'{"messages": "' + b"a" * 100_000,
        ]
    )


async def _post(http: httpx.AsyncClient, content: bytes) -> httpx.Response:
    return await http.post(CHAT, content=content, headers={"Content-Type": "application/json"})


def _said(whole: dict[str, Any]) -> tuple[str, str | None]:
    (choice,) = whole["choices"]
    return choice["message"]["content"], choice["finish_reason"]
