"""Log-likelihood of given answers under a system.

Shape letters: B batch, T tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from safemoe_jax.data.chat import ChatFormat, Encoded, Messages
from safemoe_jax.data.packing import plan
from safemoe_jax.data.pipeline import empty_tokens, write_segment
from safemoe_jax.inference.engine import tokens_at_once
from safemoe_jax.model.lora import Routing
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.parallel.hosts import to_host
from safemoe_jax.parallel.sharding import whole_rows
from safemoe_jax.progress import track
from safemoe_jax.training.losses import batch_nll


class Scorer:
    """Callable: (messages, response) pairs -> log-likelihood of every token of each response.

    Conversations are packed into rows of one length, so that one program is compiled and hardly a
    token is padding.
    """

    def __init__(
        self,
        model: Transformer,
        variables: dict[str, Any],
        routing: Routing,
        chat: ChatFormat,
        max_length: int,
    ) -> None:
        """Keeps references; nothing is compiled yet.

        Args:
          model: the transformer.
          variables: its collections.
          routing: how experts are mixed in; `None` is the base alone.
          chat: how a conversation becomes tokens.
          max_length: tokens per conversation; longer ones are cut as in training.
        """
        self._model, self._variables, self._routing = model, variables, routing
        self._chat, self._max_length = chat, max_length

    def __call__(
        self, pairs: Sequence[tuple[Messages, str]], *, description: str = "score"
    ) -> list[np.ndarray]:
        """Scores answers.

        Args:
          pairs: messages that end with a user turn, and the answer to them.
          description: shown with the progress.

        Returns:
          For each pair the natural log-likelihoods, float32 [tokens], of the answer's tokens, the
          end-of-turn token included.
        """
        items = [item.cut_to(self._max_length) for item in self._chat.encode_all(list(pairs))]
        lengths = np.array([len(item.tokens) for item in items], np.int64)
        rows = plan(lengths, np.zeros(len(items), np.int64), self._max_length, seed=0)
        # The last batch of a call is padded to full size.
        size = whole_rows(max(1, tokens_at_once() // self._max_length))
        scores: dict[int, np.ndarray] = {}
        starts = range(0, rows.num_rows, size)
        for start in track(starts, total=len(starts), description=description):
            members = [rows.row(r) for r in range(start, min(start + size, rows.num_rows))]
            batch, places = _batch(items, members, size, self._max_length)
            nll_BT = to_host(_nll(self._model, self._variables, batch, self._routing))
            scores.update({index: -nll_BT[place] for index, place in places.items()})
        return [scores[index] for index in range(len(items))]


@functools.partial(jax.jit, static_argnums=0)
def _nll(model, variables, batch, routing) -> jax.Array:
    return batch_nll(model, variables, batch, routing)[0]


def _batch(
    items: Sequence[Encoded], members: Sequence[np.ndarray], rows: int, length: int
) -> tuple[dict[str, np.ndarray], dict[int, tuple[int, slice]]]:
    """Packed rows, and where in them the answers' losses stand."""
    batch, places = empty_tokens((rows, length)), {}
    for index_in_batch, indices in enumerate(members):
        row = {key: values[index_in_batch] for key, values in batch.items()}
        start = 0
        for segment, index in enumerate(indices.tolist(), start=1):
            item = items[index]
            stop = write_segment(row, start, segment, item.tokens, item.response_start)
            places[index] = (index_in_batch, slice(start + item.response_start - 1, stop - 1))
            start = stop
    return batch, places
