"""What the server does with a request, apart from HTTP: prompts in, pieces of answers out."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import jax

from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.errors import UserError
from safemoe_jax.inference.engine import Engine, Event, Request
from safemoe_jax.loaded import Loaded
from safemoe_jax.model.lora import Routed
from safemoe_jax.serving.protocol import ChatBody, CompletionBody, Refused
from safemoe_jax.serving.text import TextStream
from safemoe_jax.serving.worker import Worker

_GATE_DIGITS = 4


class Limits(NamedTuple):
    """What one server takes.

    Attributes:
      slots: answers decoded at once.
      max_queue: answers that may wait for a slot.
      max_length: tokens of a prompt and its answer.
      max_tokens: tokens of an answer.
    """

    slots: int
    max_queue: int
    max_length: int
    max_tokens: int


class Piece(NamedTuple):
    """What one decode step adds to an answer.

    Attributes:
      choice: which of the request's answers.
      text: new text, perhaps none.
      gates: of the token, mean over layers, by domain; None where they were not asked for.
      finish: "stop" or "length" with the last piece.
    """

    choice: int
    text: str
    gates: dict[str, Any] | None
    finish: str | None


class Service:
    """A bundle that answers, gated by its own router and by nothing else."""

    def __init__(self, loaded: Loaded, domains: Sequence[str], limits: Limits) -> None:
        self.chat, self.domains, self.limits = ChatFormat(loaded.base.tokenizer), domains, limits
        self.draining = False
        self.worker = Worker(lambda serve: _work(loaded, limits, serve))

    def chat_requests(self, body: ChatBody) -> list[Request]:
        """Requests for `n` answers to a conversation.

        Raises:
          Refused: where it cannot be served, now or ever.
        """
        try:
            prompt = self.chat.prompt_ids([message.turn() for message in body.messages])
        except UserError as error:
            raise Refused(400, str(error), code="invalid_value", param="messages") from error
        given = body.max_completion_tokens or body.max_tokens
        return self._requests(body, [prompt], given)

    def completion_requests(self, body: CompletionBody) -> list[Request]:
        """Requests for `n` answers to each of the prompts, which go in without a template.

        Raises:
          Refused: where they cannot be served, now or ever.
        """
        size = len(self.chat.tokenizer)
        prompts = []
        for prompt in body.prompts():
            ids = self.chat.text_ids(prompt) if isinstance(prompt, str) else prompt
            if not all(0 <= token < size for token in ids):
                raise Refused(
                    400, f"token ids go from 0 to {size - 1}", code="invalid_value", param="prompt"
                )
            prompts.append(ids)
        return self._requests(body, prompts, body.max_tokens)

    def _requests(self, body, prompts, given: int | None) -> list[Request]:
        limits = self.limits
        for prompt in prompts:
            most = min(limits.max_tokens, limits.max_length - len(prompt))
            if not prompt:
                raise Refused(400, "the prompt is empty", code="invalid_value", param="prompt")
            if given is not None and given > limits.max_tokens:
                raise Refused(
                    400,
                    f"{given} new tokens are asked for; this server gives {limits.max_tokens}",
                    code="invalid_value",
                    param="max_tokens",
                )
            if most < (given or 1):
                raise Refused(
                    400,
                    f"the prompt has {len(prompt)} tokens, which with {given or 1} new ones are "
                    f"more than the {limits.max_length} that this server takes together",
                    code="context_length_exceeded",
                )
        asked, at_most = len(prompts) * body.n, limits.slots + limits.max_queue
        if not 0 < asked <= at_most:
            raise Refused(
                400, f"{asked} answers are asked for; at most {at_most}", code="invalid_value"
            )
        if self.draining or self.worker.failed:
            raise Refused(503, "the server is shutting down", code="shutting_down")
        if self.worker.outstanding + asked > at_most:
            raise Refused(
                429,
                f"{self.worker.outstanding} answers are running or waiting, of {at_most} at most; "
                "try again",
                code="queue_full",
            )
        seed = secrets.randbits(32) if body.seed is None else body.seed
        return [
            Request(
                prompt,
                self.chat.ends,
                given or min(limits.max_tokens, limits.max_length - len(prompt)),
                body.temperature,
                body.top_p,
                seed,
                index,
            )
            for index, prompt in enumerate(p for p in prompts for _ in range(body.n))
        ]

    def call(self, requests: Sequence[Request], body: ChatBody | CompletionBody) -> "Call":
        """Hands requests to the engine, to be used as a context."""
        return Call(self, requests, body)


class Call:
    """The answers that one HTTP request asks for; on leaving, those that have not ended are
    cancelled."""

    def __init__(
        self, service: Service, requests: Sequence[Request], body: ChatBody | CompletionBody
    ) -> None:
        self._service, self._gates = service, body.gates
        self._open = {request: index for index, request in enumerate(requests)}
        self._texts = [TextStream(service.chat.text, body.stop) for _ in requests]
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._prompt_tokens = sum(len(request.prompt) for request in requests[:: body.n])
        self._tokens, self.count = 0, len(requests)
        for request in requests:
            service.worker.submit(request, self._events)

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *_: object) -> None:
        for request in self._open:
            self._service.worker.drop(request)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all answers, as they come.

        Raises:
          EngineFailed: where the engine ends by an error.
        """
        while self._open:
            event = await self._events.get()
            if event is None:
                self._service.worker.check()
            elif event.request in self._open:
                piece = self._piece(self._open[event.request], event)
                if piece.finish:
                    del self._open[event.request]
                    self._service.worker.drop(event.request)
                yield piece
                # Pieces that wait already would else be sent at one go, also to who has left.
                await asyncio.sleep(0)

    def usage(self) -> dict[str, int]:
        """Tokens so far, as the API counts them."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
        }

    def _piece(self, choice: int, event: Event) -> Piece:
        text, said, finish, gates = self._texts[choice], "", event.finish, None
        if event.token is not None:
            self._tokens += 1
            said = text.add(event.token)
            if self._gates:
                assert event.gates_LE is not None  # the router's, by which all is gated
                gates = {
                    "domains": list(self._service.domains),
                    "tokens": [self._service.chat.text([event.token])],
                    "values": [event.gates_LE.mean(axis=0).round(_GATE_DIGITS).tolist()],
                }
        if finish and not text.stopped:
            said += text.end()
        if text.stopped:
            finish = "stop"
        return Piece(choice, said, gates, finish)


def _work(loaded: Loaded, limits: Limits, serve: Callable[[Engine], None]) -> None:
    """In the worker's thread: an engine that has read the longest prompts, as many as it ever reads
    together, so that what does not fit into memory is known before anybody waits; then one of them,
    and the shortest."""
    longest = limits.max_length - 1
    with jax.set_mesh(loaded.mesh):
        engine = Engine(loaded.model, loaded.variables, Routed(), limits.slots)
        numbers = sorted({engine.together(longest), 1}, reverse=True)
        for number, length in (*((number, longest) for number in numbers), (1, 1)):
            for _ in range(number):
                engine.submit(Request([0] * length, frozenset(), 1))
            while engine.busy:
                engine.step()
        serve(engine)
