"""`safemoe serve`: a bundle behind an OpenAI-compatible HTTP API, gated, on loopback by default.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /health

No request and no option lets an expert speak without the router.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import uvicorn
from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from safemoe_jax.errors import UserError
from safemoe_jax.loaded import on_devices
from safemoe_jax.progress import console
from safemoe_jax.remote import is_loopback
from safemoe_jax.serving.door import Door
from safemoe_jax.serving.protocol import (
    Answers,
    ChatBody,
    CompletionBody,
    Refused,
    error_body,
    error_response,
    event,
    invalid,
)
from safemoe_jax.serving.service import Call, Limits, Service
from safemoe_jax.serving.worker import EngineFailed
from safemoe_jax.weights.bundle import read_bundle

KEY_VARIABLE = "SAFEMOE_API_KEY"
_SHORTEST_KEY = 16
# No prompt that fits needs more bytes a token than this, JSON's escapes included.
_BYTES_PER_TOKEN = 64
_SMALLEST_BODY_LIMIT = 64 * 1024
_SECONDS_TO_TAKE_ANSWER = 10  # that a client has, once all answers have ended and all shuts down


def serve(directory: Path, *, host: str, port: int, name: str, limits: Limits) -> None:
    """Serves a bundle until SIGTERM or Ctrl-C; then running answers end, and new ones get 503.

    Args:
      directory: the bundle.
      host: address; any but loopback needs an API key, in the environment.
      port: 0 takes a free one.
      name: of the model, as clients give it.
      limits: what it takes.

    Raises:
      UserError: on a bundle that is refused, bad limits, an address that is taken, or open to
        others without a key.
    """
    key = _key(host)
    bundle = read_bundle(directory, None)
    limits = _checked(limits, bundle.spec.max_positions)
    if jax.process_count() > 1:
        raise UserError("serve runs on one host; start it there alone")
    with _bound(host, port) as listener:
        loaded = on_devices(directory, bundle)
        service = Service(loaded, bundle.config.data.domains, limits)
        place = f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        app = make_app(service, name, key, None if key else host)
        server = Server(app, service, listener)
        ready = f"serving {directory} as {name!r} on http://{place}/v1; gates are its router's"
        asyncio.run(_until_signal(server, ready))


class Server:
    """uvicorn, but that it goes on answering (with 503) until the last answer has ended."""

    def __init__(self, app: FastAPI, service: Service, listener: socket.socket) -> None:
        self._service, self._listener = service, listener
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_SECONDS_TO_TAKE_ANSWER,
            )
        )

    async def run(self, ready: Callable[[], object]) -> None:
        """Serves until `stop`; calls `ready` once requests are answered.

        Raises whatever has ended the engine.
        """
        worker = self._service.worker
        await worker.start()
        if not worker.failed:
            serving = asyncio.create_task(self._uvicorn.serve([self._listener]))
            while not (self._uvicorn.started or serving.done()):
                await asyncio.sleep(0.01)
            ready()
            while not (self._over() or serving.done()):
                await asyncio.sleep(0.05)
            self._uvicorn.should_exit = True
            await serving
        await worker.close()

    def stop(self) -> None:
        """Takes no more requests, and ends with the running ones; called again, cuts them off."""
        if self._service.draining:
            self._uvicorn.force_exit = True
        self._service.draining = True

    def _over(self) -> bool:
        worker = self._service.worker
        done = self._service.draining and not worker.outstanding
        return done or worker.failed or self._uvicorn.force_exit


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):
        yield  # signals are `_until_signal`'s


async def _until_signal(server: Server, ready: str) -> None:
    def begin() -> None:
        # From here on only: what comes earlier ends the verb at once.
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
        console.print(ready, markup=False)

    await server.run(begin)


async def _until_sent() -> AsyncIterator[contextlib.ExitStack]:
    """What is entered here is left once the response has been sent, or cannot be."""
    with contextlib.ExitStack() as stack:
        yield stack


Until = Annotated[contextlib.ExitStack, Depends(_until_sent)]


def make_app(service: Service, name: str, key: str | None, only_host: str | None) -> Any:
    """The API as an ASGI application.

    Args:
      service: answers.
      name: of the model.
      key: what clients must send as bearer token, if any.
      only_host: where there is no key, the loopback address that a browser must have been sent to.
    """
    app = FastAPI(title="SafeMoE", docs_url=None, redoc_url=None)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http: HttpRequest, until_sent: Until) -> Response:
        _check_model(body.model, name)
        call = until_sent.enter_context(service.call(service.chat_requests(body), body))
        return await _answer(call, body, http, chat=True)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http: HttpRequest, until_sent: Until) -> Response:
        _check_model(body.model, name)
        call = until_sent.enter_context(service.call(service.completion_requests(body), body))
        return await _answer(call, body, http, chat=False)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, name)]}

    @app.get("/v1/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        _check_model(model, name)
        return _model(service, name)

    @app.get("/health")
    async def health() -> JSONResponse:
        well = not (service.draining or service.worker.failed)
        body = {"status": "ok" if well else "ending", "outstanding": service.worker.outstanding}
        return JSONResponse(body, 200 if well else 503)

    @app.exception_handler(Refused)
    async def refused(http: HttpRequest, error: Refused) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def misformed(http: HttpRequest, error: RequestValidationError) -> Response:
        return error_response(invalid(error))

    @app.exception_handler(StarletteHTTPException)
    async def not_found(http: HttpRequest, error: StarletteHTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        return error_response(Refused(error.status_code, str(error.detail), code=code))

    @app.exception_handler(EngineFailed)
    async def failed(http: HttpRequest, error: EngineFailed) -> Response:
        return error_response(_failure(error))

    return Door(app, key, only_host, _body_limit(service.limits))


async def _answer(call: Call, body: Any, http: HttpRequest, *, chat: bool) -> Response:
    answers = Answers(body.model, secrets.token_hex(12), chat=chat)
    if body.stream:
        events = _events(call, answers, body.stream_options.include_usage, role=chat)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
    collected, gone = asyncio.create_task(_collect(call, answers)), asyncio.create_task(_gone(http))
    try:
        await asyncio.wait((collected, gone), return_when=asyncio.FIRST_COMPLETED)
        if collected.done():
            return JSONResponse(collected.result())
        return Response(status_code=499)  # nobody reads it
    finally:
        for task in (collected, gone):
            task.cancel()
        await asyncio.gather(collected, gone, return_exceptions=True)


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _collect(call: Call, answers: Answers) -> dict[str, Any]:
    texts = [""] * call.count
    finishes: list[str | None] = [""] * call.count
    gates: list[dict[str, Any] | None] = [None] * call.count
    async for piece in call.pieces():
        texts[piece.choice] += piece.text
        finishes[piece.choice] = piece.finish
        gates[piece.choice] = _joined(gates[piece.choice], piece.gates)
    said = zip(texts, finishes, gates, strict=True)
    return answers.whole([answers.choice(i, *one) for i, one in enumerate(said)], call.usage())


def _joined(before: dict[str, Any] | None, new: dict[str, Any] | None) -> dict[str, Any] | None:
    if before is None or new is None:
        return before or new
    return {**new, **{key: before[key] + new[key] for key in ("tokens", "values")}}


async def _events(
    call: Call, answers: Answers, include_usage: bool, *, role: bool
) -> AsyncIterator[str]:
    """Server-sent events; `role` says first whose words they are."""
    try:
        for choice in range(call.count if role else 0):
            yield answers.chunk([answers.choice(choice, "", None, None, delta=True)])
        async for piece in call.pieces():
            if piece.text or piece.gates or piece.finish:
                said = piece.text, piece.finish, piece.gates
                yield answers.chunk([answers.choice(piece.choice, *said, delta=True)])
    except EngineFailed as error:
        yield event(error_body(_failure(error)))
        return
    if include_usage:
        yield answers.chunk([], usage=call.usage())
    yield "data: [DONE]\n\n"


def _failure(error: EngineFailed) -> Refused:
    return Refused(500, str(error), code="engine_failed")


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "safemoe",
        "max_model_len": service.limits.max_length,
        "domains": list(service.domains),
    }


def _check_model(given: str, name: str) -> None:
    if given != name:
        raise Refused(
            404, f"there is no such model here; there is {name!r}", code="model_not_found"
        )


def _body_limit(limits: Limits) -> int:
    return max(_SMALLEST_BODY_LIMIT, _BYTES_PER_TOKEN * limits.max_length)


def _checked(limits: Limits, max_positions: int) -> Limits:
    """The limits, lowered to what the base takes."""
    if limits.slots < 1 or limits.max_queue < 0 or limits.max_length < 2 or limits.max_tokens < 1:
        raise UserError(
            f"--slots is {limits.slots}, --max-queue {limits.max_queue}, --max-length "
            f"{limits.max_length}, --max-tokens {limits.max_tokens}; they must be at least 1, 0, 2 "
            "and 1"
        )
    length = min(limits.max_length, max_positions)
    return limits._replace(max_length=length, max_tokens=min(limits.max_tokens, length - 1))


def _key(host: str) -> str | None:
    """The API key, if one is set; it must be where others than this machine can connect."""
    key = os.environ.get(KEY_VARIABLE)
    if key is None and not is_loopback(host):
        raise UserError(
            f"--host {host} lets others in; set {KEY_VARIABLE} to a key that clients must send, or "
            "serve on 127.0.0.1"
        )
    if key is not None and (len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable()):
        raise UserError(
            f"{KEY_VARIABLE} has {len(key)} characters; give it {_SHORTEST_KEY} printable ASCII "
            "ones or more, as `openssl rand -hex 16` makes them"
        )
    return key


def _bound(host: str, port: int) -> socket.socket:
    """A socket on the address, taken before anything is loaded; uvicorn listens on it."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}; ports go from 0, which takes a free one, to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise UserError(f"cannot serve on {host}:{port} ({error}); give another") from error
