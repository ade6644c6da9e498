"""The base transformer with LoRA experts and a router, in three variable collections.

    model.apply({"params": base, "experts": experts, "router": router}, ...)

`params` is the frozen base, `experts` the stacked LoRA experts, `router` the router. A base alone
needs only the first. One causal pass computes everything, so a KV cache stays valid with the router
on.

Shape letters: B batch, T tokens, C cache slots, D model, N query heads, K key/value heads, H head
dim, F mlp, V vocabulary, E experts, S router slots, L layers.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from safemoe_jax.config import Config, ExpertsConfig, RouterConfig
from safemoe_jax.model.attention import (
    Kernel,
    attention,
    choose_kernel,
    fused_attention,
    rotary,
    rotation,
)
from safemoe_jax.model.lora import PROJECTED, Gates, Projection, Routed, Routing
from safemoe_jax.model.precision import at_least_float32
from safemoe_jax.model.router import Router, num_slots
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.parallel.sharding import constrain

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(PROJECTED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class Cache:
    """What earlier tokens left behind; slot c of a row holds the token at position c.

    Attributes:
      k_LBKCH: keys, rotated.
      v_LBKCH: values.
      router_sum_LBS: router logits summed over prompt tokens ("sequence" granularity reads it).
      prompt_B: prompt tokens so far.
      length_B: tokens so far.
    """

    k_LBKCH: jax.Array
    v_LBKCH: jax.Array
    router_sum_LBS: jax.Array
    prompt_B: jax.Array
    length_B: jax.Array


@flax.struct.dataclass
class Output:
    """What a forward pass returns.

    Attributes:
      hidden_BTD: after the last norm; `logits` of it are formed only where they are needed.
      head_VD: the output head.
      gates_LBTE: the gates in use, or None for the base alone and for stage one.
      cache: `new` keys, values and sums of this pass, T slots long; see `extend`.
    """

    hidden_BTD: jax.Array
    head_VD: jax.Array
    gates_LBTE: jax.Array | None
    cache: Cache


# Logical names of its leaves' axes.
CACHE_AXES = Cache(
    k_LBKCH=PartitionSpec("layers", "batch", "kv_heads", "cache", "head_dim"),
    v_LBKCH=PartitionSpec("layers", "batch", "kv_heads", "cache", "head_dim"),
    router_sum_LBS=PartitionSpec("layers", "batch", "slot"),
    prompt_B=PartitionSpec("batch"),
    length_B=PartitionSpec("batch"),
)


def logits(hidden: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Next-token logits [..., V] in float32 of hidden states [..., D]."""
    head_VD = head_VD.astype(hidden.dtype)
    dtype = at_least_float32(hidden).dtype
    return jnp.einsum("...D,VD->...V", hidden, head_VD, preferred_element_type=dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) in float32."""

    epsilon: float
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale_D = self.param("scale", init, (x_BTD.shape[-1],), self.param_dtype)
        x32 = at_least_float32(x_BTD)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * scale_D.astype(x32.dtype)[None, None]).astype(x_BTD.dtype)


@flax.struct.dataclass
class Context:
    """What all layers share in one pass: positions and masks."""

    turn: tuple[jax.Array, jax.Array]  # cosine and sine of the positions, as `rotary` takes them
    mask_BTT: jax.Array
    segment_ids_BT: jax.Array
    prompt_mask_BT: jax.Array
    prefix_BTT: jax.Array
    prompt_count_BT: jax.Array
    filled_BC: jax.Array | None


class Attention(nn.Module):
    spec: ModelSpec
    kernel: Kernel
    projection: dict[str, Any]

    @nn.compact
    def __call__(self, h_BTD, context: Context, past, routing):
        spec = self.spec
        query_dim, kv_dim = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

        def project(name, features, axis):
            x = Projection(features, ("embed", axis), name=name, **self.projection)(h_BTD, routing)
            return x.reshape(*x.shape[:-1], -1, spec.head_dim)

        q_BTNH = rotary(project("q", query_dim, "heads"), context.turn)
        k_BTKH = rotary(project("k", kv_dim, "kv_heads"), context.turn)
        v_BTKH = project("v", kv_dim, "kv_heads")
        # Queries stay where their tokens are; keys and values are gathered over `length`.
        k_BTKH, v_BTKH = (constrain(x, "batch", None, "kv_heads", None) for x in (k_BTKH, v_BTKH))
        new = (q_BTNH, k_BTKH, v_BTKH, context.mask_BTT)
        if past is None:
            mixed_BTNH = fused_attention(self.kernel, *new, context.segment_ids_BT)
        else:
            mixed_BTNH = attention(*new, (*past, context.filled_BC))
        mixed_BTO = mixed_BTNH.reshape(*mixed_BTNH.shape[:-2], -1)
        out = Projection(spec.embed_dim, ("heads", "embed"), name="o", **self.projection)
        to_cache = (x_BTKH.swapaxes(1, 2) for x_BTKH in (k_BTKH, v_BTKH))
        return out(mixed_BTO, routing), *to_cache


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, computed in float32 and rounded once."""
    return (jax.nn.silu(at_least_float32(gate)) * at_least_float32(up)).astype(up.dtype)


class MLP(nn.Module):
    spec: ModelSpec
    projection: dict[str, Any]

    @nn.compact
    def __call__(self, h_BTD, routing):
        width = self.spec.mlp_dim
        gate = Projection(width, ("embed", "mlp"), name="gate", **self.projection)(h_BTD, routing)
        up = Projection(width, ("embed", "mlp"), name="up", **self.projection)(h_BTD, routing)
        down = Projection(self.spec.embed_dim, ("mlp", "embed"), name="down", **self.projection)
        return down(swiglu(gate, up), routing)


class Block(nn.Module):
    """One layer; scanned over L. The cache is read here and written once, after the scan."""

    spec: ModelSpec
    experts: ExpertsConfig
    router: RouterConfig
    num_experts: int
    param_dtype: jnp.dtype
    kernel: Kernel

    @nn.compact
    def __call__(self, x_BTD, past, context: Context, routing: Routing):
        projection = dict(
            experts=self.experts, num_experts=self.num_experts, param_dtype=self.param_dtype
        )
        norm = dict(epsilon=self.spec.norm_eps, param_dtype=self.param_dtype)
        past_kv, past_sum_BS = past

        h_BTD = RMSNorm(name="attention_norm", **norm)(x_BTD)
        gates_BTE, sum_BS = None, past_sum_BS
        if isinstance(routing, Routed):
            router = Router(self.router, self.num_experts, name="router")
            gates_BTE, sum_BS = router(
                h_BTD,
                context.prompt_mask_BT,
                context.prefix_BTT,
                past_sum_BS,
                context.prompt_count_BT,
            )
            routing = Gates(gates_BTE)
        elif isinstance(routing, Gates):
            gates_BTE = jnp.broadcast_to(routing.gates, (*x_BTD.shape[:2], self.num_experts))
            routing = Gates(gates_BTE)

        mixed_BTD, k_BKTH, v_BKTH = Attention(self.spec, self.kernel, projection, name="attention")(
            h_BTD, context, past_kv, routing
        )
        x_BTD += mixed_BTD
        h_BTD = RMSNorm(name="mlp_norm", **norm)(x_BTD)
        x_BTD += MLP(self.spec, projection, name="mlp")(h_BTD, routing)
        x_BTD = constrain(x_BTD, "batch", "length", "activation")
        return x_BTD, (k_BKTH, v_BKTH, sum_BS, gates_BTE)


class Transformer(nn.Module):
    """A Llama-family decoder whose projections carry experts and whose layers carry a router."""

    spec: ModelSpec
    experts: ExpertsConfig
    router: RouterConfig
    num_experts: int
    param_dtype: jnp.dtype = jnp.float32
    compute_dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    kernel: Kernel = "reference"

    @classmethod
    def from_config(
        cls, config: Config, spec: ModelSpec, platform: str | None = None
    ) -> "Transformer":
        """The model of an experiment: one expert for each of its domains.

        Args:
          config: the experiment.
          spec: its base.
          platform: of the devices that it will run on, "cpu", "gpu" or "tpu"; where not given, that
            of this process's devices. The attention kernel depends on it.
        """
        compute_dtype, kernel = jnp.dtype(config.model.compute_dtype), config.model.attention
        if kernel == "auto":
            kernel = choose_kernel(platform or jax.default_backend(), compute_dtype)
        return cls(
            spec=spec,
            experts=config.experts,
            router=config.router,
            num_experts=len(config.data.domains),
            param_dtype=jnp.dtype(config.model.param_dtype),
            compute_dtype=compute_dtype,
            remat=config.model.remat,
            kernel=kernel,
        )

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache with room for `slots` tokens in each of `batch` rows, holding none."""
        spec, layers = self.spec, self.spec.num_layers
        shape = (layers, batch, spec.num_kv_heads, slots, spec.head_dim)
        kv = jnp.zeros(shape, self.compute_dtype)
        sums = jnp.zeros((layers, batch, num_slots(self.router, self.num_experts)), jnp.float32)
        none = jnp.zeros(batch, jnp.int32)
        empty = Cache(kv, kv, sums, prompt_B=none, length_B=none)
        return jax.tree.map(lambda leaf, axes: constrain(leaf, *axes), empty, CACHE_AXES)

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        prompt_mask_BT: jax.Array,
        routing: Routing,
        cache: Cache | None = None,
    ) -> Output:
        """One causal pass.

        Args:
          tokens_BT: token ids.
          positions_BT: position within the segment.
          segment_ids_BT: tokens see only earlier tokens of their segment; 0 is padding.
          prompt_mask_BT: true for prompt tokens ("sequence" granularity pools over them).
          routing: how experts are mixed in; None for the base alone.
          cache: earlier tokens; then each row holds one segment.

        Returns:
          `Output`, whose cache holds the new tokens only.
        """
        spec = self.spec
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        shape = (spec.vocab_size, spec.embed_dim)
        embedding_VD = Table("embedding", init, shape, self.param_dtype, name="embed")()
        # Each device looks its own columns up for all of fsdp's rows: tokens travel, no table does.
        tokens_BT = constrain(tokens_BT, "gathered_batch", "length")
        x_BTD = constrain(embedding_VD[tokens_BT], "gathered_batch", "length", "embed")
        x_BTD = constrain(x_BTD.astype(self.compute_dtype), "batch", "length", "activation")

        past, context = self._context(positions_BT, segment_ids_BT, prompt_mask_BT, cache)
        block = Block
        if self.remat != "none":
            # The scan already keeps the backward pass from merging layers with the forward pass.
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        per_layer = self.router.scope == "layer"
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "experts": 0} | ({"router": 0} if per_layer else {}),
            variable_broadcast=False if per_layer else "router",
            split_rngs={"params": True, "experts": True, "router": per_layer},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=spec.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(
            spec,
            self.experts,
            self.router,
            self.num_experts,
            self.param_dtype,
            self.kernel,
            name="layers",
        )
        x_BTD, (k, v, router_sum, gates_LBTE) = layers(x_BTD, past, context, routing)

        hidden_BTD = RMSNorm(spec.norm_eps, self.param_dtype, name="final_norm")(x_BTD)
        head_VD = embedding_VD
        if not spec.tie_embeddings:
            head_VD = Table("kernel", init, shape, self.param_dtype, name="head")()
        new = Cache(
            k,
            v,
            router_sum,
            prompt_B=prompt_mask_BT.sum(axis=1, dtype=jnp.int32),
            length_B=(segment_ids_BT > 0).sum(axis=1, dtype=jnp.int32),
        )
        return Output(hidden_BTD, head_VD, gates_LBTE, new)

    def _context(self, positions_BT, segment_ids_BT, prompt_mask_BT, cache):
        """Masks of the new tokens among themselves and towards the cache."""
        batch, length = segment_ids_BT.shape
        same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
        causal_TT = jnp.tril(jnp.ones((length, length), bool))
        mask_BTT = same_BTT & causal_TT[None] & (segment_ids_BT > 0)[:, None, :]
        prompt_mask_BT = prompt_mask_BT.astype(jnp.float32)
        prefix_BTT = mask_BTT * prompt_mask_BT[:, None, :]
        count_BT = prefix_BTT.sum(axis=-1)
        if cache is None:
            slots = num_slots(self.router, self.num_experts)
            sums = jnp.zeros((self.spec.num_layers, batch, slots), jnp.float32)
            past, filled_BC = (None, sums), None
        else:
            past = ((cache.k_LBKCH, cache.v_LBKCH), cache.router_sum_LBS)
            slot_C = jnp.arange(cache.k_LBKCH.shape[3])
            filled_BC = slot_C[None, :] < cache.length_B[:, None]
            count_BT += cache.prompt_B[:, None]
        turn = rotation(positions_BT, self.spec.head_dim, self.spec.rope_theta)
        return past, Context(
            turn, mask_BTT, segment_ids_BT, prompt_mask_BT, prefix_BTT, count_BT, filled_BC
        )


class Table(nn.Module):
    """One named array of the base."""

    leaf: str
    initializer: Any
    shape: tuple[int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param(self.leaf, self.initializer, self.shape, self.dtype)


def extend(cache: Cache, new: Cache) -> Cache:
    """Writes the tokens of one pass behind those in the cache, in place where it is donated.

    Row b's new tokens go to slots length_B[b] and on. Padding of the new tokens, at their right
    end, lands in slots that the next write overwrites, or past the end, where it is dropped.
    """
    _, batch, heads, length, _ = new.k_LBKCH.shape
    row_B11 = jnp.arange(batch)[:, None, None]
    head_1K1 = jnp.arange(heads)[None, :, None]
    slot_B1T = (cache.length_B[:, None] + jnp.arange(length)[None])[:, None]

    # One scatter. A dynamic_update_slice mapped over rows is as short, and copies the whole cache
    # to bring the rows to the front: 100 ms a token against 0.2 on a CPU, B = 32, C = 192.
    def append(old_LBKCH, new_LBKTH):
        return old_LBKCH.at[:, row_B11, head_1K1, slot_B1T].set(new_LBKTH)

    return Cache(
        k_LBKCH=append(cache.k_LBKCH, new.k_LBKCH),
        v_LBKCH=append(cache.v_LBKCH, new.v_LBKCH),
        router_sum_LBS=new.router_sum_LBS,
        prompt_B=cache.prompt_B + new.prompt_B,
        length_B=cache.length_B + new.length_B,
    )
