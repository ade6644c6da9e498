"""Log-likelihood of given answers under a system.

Shape letters: B batch, T tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from safemoe_jax.data.chat import ChatFormat, Encoded, Messages
from safemoe_jax.inference.sampler import bucket
from safemoe_jax.model.lora import Routing
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.progress import track
from safemoe_jax.training.losses import batch_nll

_TOKENS_AT_ONCE = 4096


class Scorer:
    """Callable: (messages, response) pairs -> log-likelihood of every token of each response."""

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
        batches = _batches([len(item.tokens) for item in items])
        scores: dict[int, np.ndarray] = {}
        for length, indices in track(batches, total=len(batches), description=description):
            rows = max(1, _TOKENS_AT_ONCE // length)
            batch = _batch([items[index] for index in indices], rows, length)
            nll_BT = np.asarray(_nll(self._model, self._variables, batch, self._routing))
            for row, index in enumerate(indices):
                item = items[index]
                stop = len(item.tokens) - 1
                scores[index] = -nll_BT[row, item.response_start - 1 : stop]
        return [scores[index] for index in range(len(items))]


@functools.partial(jax.jit, static_argnums=0)
def _nll(model, variables, batch, routing) -> jax.Array:
    return batch_nll(model, variables, batch, routing)[0]


def _batches(lengths: list[int]) -> list[tuple[int, list[int]]]:
    """Groups rows by padded length -> (padded length, row indices), few enough to fit at once."""
    by_bucket: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_bucket.setdefault(bucket(length), []).append(index)
    return [
        (length, indices[start : start + max(1, _TOKENS_AT_ONCE // length)])
        for length, indices in sorted(by_bucket.items())
        for start in range(0, len(indices), max(1, _TOKENS_AT_ONCE // length))
    ]


def _batch(items: list[Encoded], rows: int, length: int) -> dict[str, np.ndarray]:
    """One conversation per row, right-padded; rows beyond the items are padding."""
    tokens_BT = np.zeros((rows, length), np.int32)
    length_B, start_B = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for row, item in enumerate(items):
        tokens_BT[row, : len(item.tokens)] = item.tokens
        length_B[row], start_B[row] = len(item.tokens), item.response_start
    place_T = np.arange(length)[None]
    held_BT = place_T < length_B[:, None]
    return {
        "tokens_BT": tokens_BT,
        "targets_BT": np.pad(tokens_BT[:, 1:], [(0, 0), (0, 1)]),
        "loss_mask_BT": np.float32(
            (place_T >= start_B[:, None] - 1) & (place_T < length_B[:, None] - 1)
        ),
        "prompt_mask_BT": place_T < start_B[:, None],
        "positions_BT": np.where(held_BT, place_T, 0).astype(np.int32),
        "segment_ids_BT": held_BT.astype(np.int32),
    }
