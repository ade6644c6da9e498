"""How far other models are from a gated one, where it speaks: on its own answers.

Shape letters: B rows, T tokens, M answer tokens at most, V vocabulary, L layers, E experts.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.inference.engine import bucket
from safemoe_jax.inference.sampler import Generation
from safemoe_jax.model.lora import Routing
from safemoe_jax.model.precision import at_least_float32
from safemoe_jax.model.transformer import Transformer, forward, logits
from safemoe_jax.parallel.hosts import to_host
from safemoe_jax.parallel.sharding import whole_rows
from safemoe_jax.progress import track


class Mixture(NamedTuple):
    """What speaks: a model, its collections, and how experts are mixed in."""

    model: Transformer
    variables: dict[str, Any]
    routing: Routing


class Answer(NamedTuple):
    """A prompt's and its answer's token ids; the end-of-turn token is the answer's, if it came."""

    prompt: list[int]
    response: list[int]


def answers(
    prompts: Sequence[list[int]], generations: Sequence[Generation], end_of_turn: int
) -> list[Answer]:
    """What a sampler answered to prompts, with the end of a finished answer."""
    return [
        Answer(prompt, generation.tokens + [end_of_turn] * generation.finished)
        for prompt, generation in zip(prompts, generations, strict=True)
    ]


def mean_gates(mixture: Mixture, spoken: Sequence[Answer]) -> np.ndarray:
    """Mean gates [L, E] with which the answers' tokens were predicted."""
    width, total, count = _width(spoken), np.zeros(()), 0
    for answer in track(spoken, total=len(spoken), description="mean gates"):
        _, gates_LME = _predictions(*mixture, *_row(answer, width))
        total = total + to_host(gates_LME)[:, : len(answer.response)].sum(axis=1, dtype=np.float64)
        count += len(answer.response)
    return total / count


def kl_per_token(
    gated: Mixture, others: Mapping[str, Mixture], spoken: Sequence[Answer]
) -> dict[str, float]:
    """KL(gated || other), in nats, averaged over the answers' tokens.

    At each of them the two distributions over the vocabulary, given the same text before it, are
    compared.
    """
    width, totals, count = _width(spoken), dict.fromkeys(others, 0.0), 0
    for answer in track(spoken, total=len(spoken), description="divergence"):
        row = _row(answer, width)
        gated_MV, _ = _predictions(*gated, *row)
        for name, other in others.items():
            other_MV, _ = _predictions(*other, *row)
            totals[name] += float(to_host(_kl(gated_MV, other_MV, len(answer.response))))
        count += len(answer.response)
    return {name: total / count for name, total in totals.items()}


def _width(spoken: Sequence[Answer]) -> int:
    return max(len(answer.response) for answer in spoken)


def _row(answer: Answer, width: int):
    """Tokens and positions of one conversation, and which M positions predict its answer."""
    tokens = [*answer.prompt, *answer.response[:-1]]
    # The rows that a mesh needs beside the first repeat it.
    shape = whole_rows(1), bucket(len(tokens))
    tokens_BT = np.zeros(shape, np.int32)
    tokens_BT[:, : len(tokens)] = tokens
    places_M = np.minimum(len(answer.prompt) - 1 + np.arange(width), len(tokens) - 1)
    return tokens_BT, np.int32(len(tokens)), np.int32(len(answer.prompt)), places_M


@functools.partial(jax.jit, static_argnums=0)
def _predictions(model, variables, routing, tokens_BT, length, prompt_length, places_M):
    """Log-probabilities [M, V] and gates [L, M, E] (or None) at the places that predict."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    out = forward(
        model,
        variables,
        tokens_BT,
        positions_BT,
        (positions_BT < length).astype(jnp.int32),
        positions_BT < prompt_length,
        routing,
    )
    logits_MV = at_least_float32(logits(out.hidden_BTD[0, places_M], out.head))
    gates = out.gates_LBTE
    return jax.nn.log_softmax(logits_MV), None if gates is None else gates[:, 0, places_M]


@jax.jit
def _kl(p_MV: jax.Array, q_MV: jax.Array, count: int) -> jax.Array:
    """KL of log-probabilities, summed over the first `count` places."""
    kl_M = jnp.sum(jnp.exp(p_MV) * (p_MV - q_MV), axis=-1)
    return jnp.sum(jnp.where(jnp.arange(len(kl_M)) < count, kl_M, 0.0))
