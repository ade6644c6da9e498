"""Tiny models, weights, batches and corpora that the tests share.

Nothing is compiled here: weights are drawn by numpy into the shapes of the model's collections.
"""

import functools
import zlib
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.config import AdamWConfig, ExpertsConfig, RouterConfig
from safemoe_jax.data.packing import plan
from safemoe_jax.data.pipeline import PackedCorpus, empty_tokens, write_segment
from safemoe_jax.model.lora import Routed
from safemoe_jax.model.quantization import Format, of_matrix, quantize
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.model.transformer import Transformer, logits
from safemoe_jax.weights.layout import Tensor, Weights, leaf_shapes

SPEC = ModelSpec(
    vocab_size=61,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=40,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_positions=128,
)
EXPERTS = ExpertsConfig(("q", "k", "v", "o", "gate", "up", "down"), rank=2, alpha=3.0)
ROUTER = RouterConfig("layer", "token", "signed", top_k=0, temperature=1.0)
ADAMW = AdamWConfig(
    learning_rate=0.01,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.1,
    clip_norm=1.0,
    b1=0.9,
    b2=0.99,
)


def toy_model(
    *,
    spec: ModelSpec = SPEC,
    experts: ExpertsConfig = EXPERTS,
    router: RouterConfig = ROUTER,
    num_experts: int = 3,
    **precision,
) -> Transformer:
    return Transformer(spec, experts, router, num_experts, **precision)


def initial(model: Transformer, *, unbox: bool = True):
    """All three collections as training starts with them; to be traced."""
    one_BT = jnp.ones((1, 1), jnp.int32)
    keys = {name: jax.random.key(0) for name in ("params", "experts", "router")}
    boxed = model.init(keys, one_BT, one_BT, one_BT, one_BT, Routed())
    return nn.unbox(boxed) if unbox else boxed


@functools.cache
def shapes(model: Transformer):
    return jax.eval_shape(lambda: initial(model))


def toy_variables(model: Transformer, seed: int = 0):
    """Weights under which everything matters: experts and router are as strong as the base."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if path[-1].key == "scale":
            values = 1 + 0.1 * values
        elif path[-1].key in ("kernel", "a", "b"):
            # The base's lie [D_out, D_in], experts' and router's [D_in, D_out].
            values *= leaf.shape[-1 if path[0].key == "params" else -2] ** -0.5
        return jnp.asarray(values.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, shapes(model))


def quantized(variables, format: Format):
    """The same experts and router over the base in a format."""

    def of(path, leaf):
        if path[-1].key not in ("kernel", "embedding"):
            return leaf
        return quantize(leaf, of_matrix("/".join(key.key for key in path), format))

    return variables | {"params": jax.tree_util.tree_map_with_path(of, variables["params"])}


def toy_weights(spec: ModelSpec) -> Weights:
    """A drawn base as a checkpoint whose tensors are named like leaves, with the layer behind."""
    names, tensors = {}, {}
    for leaf, shape in leaf_shapes(spec).items():
        values = np.random.default_rng(zlib.crc32(leaf.encode())).normal(size=shape)
        values = (values * shape[-1] ** -0.5).astype(np.float32)
        layered = leaf.startswith("layers/")
        names[leaf] = f"{leaf}/{{}}" if layered else leaf
        for layer, own in enumerate(values if layered else [values]):
            tensors[names[leaf].format(layer)] = Tensor(own.shape, own.__getitem__)
    return Weights(spec, names, tensors)


def toy_batch(
    rows: Sequence[Sequence[tuple[int, int]]],
    length: int,
    *,
    expert_ids: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Packed rows; each is a list of (prompt tokens, response tokens)."""
    rng = np.random.default_rng(seed)
    batch = empty_tokens((len(rows), length))
    for index, segments in enumerate(rows):
        row, start = {key: values[index] for key, values in batch.items()}, 0
        for number, (prompt, response) in enumerate(segments, start=1):
            tokens = rng.integers(1, SPEC.vocab_size, prompt + response)
            start = write_segment(row, start, number, tokens, prompt)
    batch["expert_ids_B"] = np.array(expert_ids or [0] * len(rows), np.int32)
    return batch


def toy_corpus(streams: Sequence[str], per_stream: int, length: int, seed: int = 0) -> PackedCorpus:
    """Examples of 4 to 9 tokens; in stream i the answers count upwards in steps of i + 1."""
    rng = np.random.default_rng(seed)
    items, starts, stream_ids = [], [], []
    for stream in range(len(streams)):
        for _ in range(per_stream):
            prompt, response = rng.integers(2, 5, 2)
            first = rng.integers(1, SPEC.vocab_size)
            counted = first + (stream + 1) * np.arange(prompt + response)
            items.append(1 + counted % (SPEC.vocab_size - 1))
            starts.append(prompt)
            stream_ids.append(stream)
    lengths = np.array([len(item) for item in items])
    return PackedCorpus(
        streams=tuple(streams),
        sequence_length=length,
        flat_tokens=np.concatenate(items).astype(np.int32),
        offsets=np.cumsum([0, *lengths]),
        response_starts=np.array(starts, np.int32),
        example_ids=100 + np.arange(len(items), dtype=np.int32),
        plan=plan(lengths, np.array(stream_ids), length, seed),
        counts={"examples": len(items)},
        fingerprint="toy",
    )


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Transformer, variables, batch, routing):
    """The training forward pass -> logits [B, T, V], gates [L, B, T, E] or None."""
    out = model.apply(
        variables,
        batch["tokens_BT"],
        batch["positions_BT"],
        batch["segment_ids_BT"],
        batch["prompt_mask_BT"],
        routing,
    )
    return logits(out.hidden_BTD, out.head), out.gates_LBTE


def leaves_equal(left, right) -> bool:
    """Whether two trees have the same structure, types and bits."""
    same = jax.tree.map(
        lambda x, y: x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)),
        left,
        right,
    )
    return all(jax.tree.leaves(same))
