"""Offline generation: all prompts through the slots of one engine.

Shape letters: T tokens of an answer, L layers, E experts.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from safemoe_jax.errors import UserError
from safemoe_jax.inference.engine import Engine, Event, Request
from safemoe_jax.model.lora import Routing
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.progress import track


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
      tokens: ids, without the token that ended it.
      finished: whether the model ended its turn within the limit.
      gates_TLE: the gates with which each of these tokens was processed; None for the base alone.
    """

    tokens: list[int]
    finished: bool
    gates_TLE: np.ndarray | None


class Sampler:
    """Generates with one system: a model, its collections, and a routing."""

    def __init__(
        self,
        model: Transformer,
        variables: dict[str, Any],
        routing: Routing,
        ends: frozenset[int],
    ) -> None:
        """Keeps references; nothing is compiled yet.

        Args:
          model: the transformer.
          variables: its collections; `experts` and `router` may be absent if routing needs none.
          routing: how experts are mixed in; `None` is the base alone.
          ends: the tokens that end an answer.
        """
        self._model, self._variables, self._routing = model, variables, routing
        self._ends = ends

    def generate(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Generation]:
        """Answers prompts, in their order; settings and errors are those of `as_they_end`."""
        answers = dict(self.as_they_end(prompts, **settings))
        return [answers[index] for index in range(len(prompts))]

    def as_they_end(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        batch_size: int,
        description: str = "generate",
    ) -> Iterator[tuple[int, Generation]]:
        """Answers prompts, longest first; an answer that has ended makes room for the next prompt.

        Args:
          prompts: token ids that end with the generation prompt; lengths may differ.
          max_new_tokens: longest answer in tokens.
          temperature: 0 decodes greedily.
          top_p: share of probability that sampling keeps (arXiv 1904.09751).
          seed: of the sampling; an answer depends on it and on its prompt's index alone.
          batch_size: answers decoded at once.
          description: shown with the progress.

        Yields:
          a prompt's index and its answer, once that has ended.

        Raises:
          UserError: where a prompt is empty or leaves no room for the answer.
        """
        room = self._model.spec.max_positions - max_new_tokens
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= room:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens and {max_new_tokens} new ones are "
                    f"asked for; the base reads {self._model.spec.max_positions}: give it one "
                    "token or more, and shorten it or ask for fewer new ones"
                )
        slots = min(batch_size, len(prompts))
        engine = Engine(self._model, self._variables, self._routing, slots)
        said: dict[Request, list[Event]] = {}
        # Prompts of similar length are read together, and the cache shortens as it goes on.
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
            settings = (max_new_tokens, temperature, top_p, seed, index)
            request = Request(prompts[index], self._ends, *settings)
            engine.submit(request)
            said[request] = []
        for request in track(_ended(engine, said), total=len(prompts), description=description):
            yield request.index, _generation(said.pop(request))


def _ended(engine: Engine, said: dict[Request, list[Event]]) -> Iterator[Request]:
    """Works the engine; gives each request once its answer has ended."""
    while engine.busy:
        for event in engine.step():
            said[event.request].append(event)
            if event.finish:
                yield event.request


def _generation(events: Sequence[Event]) -> Generation:
    tokens = [event.token for event in events if event.token is not None]
    gates_TLE = None
    if events[-1].gates_LE is not None:
        gates_TLE = np.array([event.gates_LE for event in events])[: len(tokens)]
    return Generation(tokens, events[-1].finish == "stop", gates_TLE)
