"""Generation: prefill in bucketed lengths, then one jitted decode loop with early stop.

One causal pass computes the gates with everything else, so the KV cache stays valid with the
router on.

Shape letters: B batch, T prompt tokens, M new tokens at most, V vocabulary, L layers, E experts.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.errors import UserError
from safemoe_jax.model.lora import Routing
from safemoe_jax.model.transformer import Cache, Transformer, extend, logits
from safemoe_jax.parallel.hosts import to_host
from safemoe_jax.parallel.sharding import constrain, whole_rows
from safemoe_jax.progress import track

_SMALLEST_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
      tokens: ids, without the end-of-turn token.
      finished: whether the model ended its turn within the limit.
      gates_TLE: the gates with which each of these tokens was processed; None for the base alone.
    """

    tokens: list[int]
    finished: bool
    gates_TLE: np.ndarray | None


@flax.struct.dataclass
class _Decoding:
    """What the decode loop carries."""

    step: jax.Array
    cache: Cache
    logits_BV: jax.Array
    done_B: jax.Array
    tokens_BM: jax.Array
    gates_MLBE: jax.Array | None


def bucket(length: int) -> int:
    """The padded length for `length` tokens, so that few shapes are compiled.

    Four lengths from a power of two to the next, where powers alone would do: every padded token
    costs prefill, and every padded slot is read again for each new token.
    """
    step = max(_SMALLEST_BUCKET, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


class Sampler:
    """Generates with one system: a model, its collections, and a routing."""

    def __init__(
        self, model: Transformer, variables: dict[str, Any], routing: Routing, end_of_turn: int
    ) -> None:
        """Keeps references; nothing is compiled yet.

        Args:
          model: the transformer.
          variables: its collections; `experts` and `router` may be absent if routing needs none.
          routing: how experts are mixed in; `None` is the base alone.
          end_of_turn: the token that ends an answer.
        """
        self._model, self._variables, self._routing = model, variables, routing
        self._end_of_turn = end_of_turn

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        batch_size: int,
        description: str = "generate",
    ) -> list[Generation]:
        """Answers prompts, longest first in batches of similar length.

        Args:
          prompts: token ids that end with the generation prompt; lengths may differ.
          max_new_tokens: longest answer in tokens.
          temperature: 0 decodes greedily.
          top_p: share of probability that sampling keeps (arXiv 1904.09751).
          seed: of the sampling; an answer depends on it and on its prompt's index alone.
          batch_size: answers decoded at once.
          description: shown with the progress.

        Raises:
          UserError: where a prompt is empty or leaves no room for the answer.
        """
        room = self._model.spec.max_positions - max_new_tokens
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= room:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens; with {max_new_tokens} new ones it "
                    f"must have between 1 and {room}, the base's limit being "
                    f"{self._model.spec.max_positions}"
                )
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        answers: dict[int, Generation] = {}
        for indices in track(batches, total=len(batches), description=description):
            decoded = self._generate_batch(
                [prompts[index] for index in indices],
                np.array(indices),
                whole_rows(batch_size if len(prompts) > batch_size else len(indices)),
                max_new_tokens,
                temperature,
                top_p,
                seed,
            )
            answers.update(zip(indices, decoded, strict=True))
        return [answers[index] for index in range(len(prompts))]

    def _generate_batch(
        self, prompts, indices_B, rows, max_new_tokens, temperature, top_p, seed
    ) -> list[Generation]:
        length = min(bucket(max(map(len, prompts))), self._model.spec.max_positions)
        tokens_BT = np.zeros((rows, length), np.int32)
        length_B = np.ones(rows, np.int32)  # rows that only fill the batch hold one token
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
            length_B[row] = len(prompt)
        indices_B = np.pad(indices_B, (0, rows - len(indices_B)))
        done_B = np.arange(rows) >= len(prompts)
        decoded = _generate(
            self._model,
            max_new_tokens,
            temperature == 0,
            self._variables,
            self._routing,
            tokens_BT,
            length_B,
            done_B,
            indices_B,
            jax.random.key(seed),
            np.float32(temperature),
            np.float32(top_p),
            np.int32(self._end_of_turn),
        )
        decoded = to_host((decoded.tokens_BM, decoded.gates_MLBE))
        return [self._answer(row, *decoded) for row in range(len(prompts))]

    def _answer(self, row: int, tokens_BM, gates_MLBE) -> Generation:
        tokens = tokens_BM[row]
        (ends,) = np.nonzero(tokens == self._end_of_turn)
        length = int(ends[0]) if len(ends) else len(tokens)
        gates_TLE = None if gates_MLBE is None else gates_MLBE[:length, :, row]
        return Generation(tokens[:length].tolist(), bool(len(ends)), gates_TLE)


def prefill(
    model: Transformer, variables: Any, routing: Routing, tokens_BT, length_B, cache: Cache
) -> tuple[Cache, jax.Array]:
    """Reads right-padded prompts into an empty cache -> the cache, next-token logits [B, V]."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    held_BT = positions_BT < length_B[:, None]
    out = model.apply(
        variables, tokens_BT, positions_BT, held_BT.astype(jnp.int32), held_BT, routing
    )
    last_B1D = jnp.take_along_axis(out.hidden_BTD, length_B[:, None, None] - 1, axis=1)
    return extend(cache, out.cache), logits(last_B1D[:, 0], out.head)


def decode_step(
    model: Transformer, variables: Any, routing: Routing, token_B: jax.Array, cache: Cache
) -> tuple[Cache, jax.Array, jax.Array | None]:
    """Processes one more token per row -> the cache, logits [B, V], gates [L, B, E] or None."""
    out = model.apply(
        variables,
        token_B[:, None],
        cache.length_B[:, None],
        jnp.ones_like(token_B)[:, None],
        jnp.zeros_like(token_B, bool)[:, None],
        routing,
        cache,
    )
    gates_LBE = None if out.gates_LBTE is None else out.gates_LBTE[:, :, 0]
    return extend(cache, out.cache), logits(out.hidden_BTD[:, 0], out.head), gates_LBE


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    model,
    max_new_tokens,
    greedy,
    variables,
    routing,
    tokens_BT,
    length_B,
    done_B,
    indices_B,
    key,
    temperature,
    top_p,
    end_of_turn,
) -> _Decoding:
    tokens_BT, length_B, done_B = (
        constrain(x, *("batch", None)[: x.ndim]) for x in (tokens_BT, length_B, done_B)
    )
    batch, length = tokens_BT.shape
    key_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices_B)

    def choose(logits_BV, step):
        if greedy:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        logits_BV = _nucleus(logits_BV / temperature, top_p)
        step_key_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, step)
        return jax.vmap(jax.random.categorical)(step_key_B, logits_BV).astype(jnp.int32)

    def one_more(at: _Decoding) -> _Decoding:
        token_B = jnp.where(at.done_B, end_of_turn, choose(at.logits_BV, at.step))
        cache, logits_BV, gates_LBE = decode_step(model, variables, routing, token_B, at.cache)
        gates = at.gates_MLBE
        return _Decoding(
            step=at.step + 1,
            cache=cache,
            logits_BV=logits_BV,
            done_B=at.done_B | (token_B == end_of_turn),
            tokens_BM=at.tokens_BM.at[:, at.step].set(token_B),
            gates_MLBE=None if gates is None else gates.at[at.step].set(gates_LBE),
        )

    cache = model.empty_cache(batch, length + max_new_tokens)
    cache, logits_BV = prefill(model, variables, routing, tokens_BT, length_B, cache)
    shape = jax.eval_shape(
        lambda: decode_step(model, variables, routing, jnp.zeros(batch, jnp.int32), cache)[2]
    )
    gates = None if shape is None else jnp.zeros((max_new_tokens, *shape.shape), shape.dtype)
    start = _Decoding(
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        logits_BV=logits_BV,
        done_B=done_B,
        tokens_BM=jnp.full((batch, max_new_tokens), end_of_turn, jnp.int32),
        gates_MLBE=gates,
    )
    return jax.lax.while_loop(
        lambda at: (at.step < max_new_tokens) & ~at.done_B.all(), one_more, start
    )


def _nucleus(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """-inf outside the smallest set of tokens whose probability reaches top_p."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token is in the set if what is likelier than it has not reached top_p yet.
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
