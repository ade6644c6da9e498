"""The base transformer with LoRA experts and a router, in three variable collections.

    forward(model, {"params": base, "experts": experts, "router": router}, ...)

`params` is the frozen base, `experts` the stacked LoRA experts, `router` the router. A base alone
needs only the first. One causal pass computes everything, so a KV cache stays valid with the router
on.

Shape letters: B batch, T tokens, C cache slots, D model, N query heads, K key/value heads, H head
dim, F mlp, V vocabulary, E experts, S router slots, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.config import Config, ExpertsConfig, RouterConfig
from safemoe_jax.errors import UserError
from safemoe_jax.model.attention import (
    Kernel,
    Scores,
    attention,
    by_cudnn,
    capped,
    choose_kernel,
    fused_attention,
    rotary,
    rotation,
    why_not,
)
from safemoe_jax.model.cache import CACHE_AXES, Cache
from safemoe_jax.model.lora import PROJECTED, Gates, Projection, Routed, Routing, kept
from safemoe_jax.model.precision import at_least_float32, bits, floats, project
from safemoe_jax.model.quantization import (
    PARAM_DTYPES,
    Matrix,
    ParamDtype,
    Table,
    dequantized,
    of_vectors,
)
from safemoe_jax.model.router import Router, num_slots
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.parallel.sharding import constrain, named_init

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
}
_NO_WINDOW = np.iinfo(np.int32).max
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(PROJECTED), by_cudnn
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Head(flax.struct.PyTreeNode):
    """What makes logits of hidden states; frozen.

    Attributes:
      kernel_VD: the output head, or the embedding where they are tied.
      softcap: the logits' bound, or None.
    """

    kernel_VD: Matrix
    softcap: float | None = flax.struct.field(pytree_node=False)


class Output(flax.struct.PyTreeNode):
    """What a forward pass returns.

    Attributes:
      hidden_BTD: after the last norm; `logits` of it are formed only where they are needed.
      head: the output head.
      gates_LBTE: the gates in use, or None for the base alone and for stage one.
      cache: `new` keys, values and sums of this pass, T slots long; see `cache.extend`.
    """

    hidden_BTD: jax.Array
    head: Head
    gates_LBTE: jax.Array | None
    cache: Cache


def logits(hidden: jax.Array, head: Head) -> jax.Array:
    """Next-token logits [..., V] in float32 of hidden states [B, D] or [B, T, D]."""
    kernel_VD = dequantized(head.kernel_VD, hidden.dtype)
    hidden_BTD = hidden if hidden.ndim == 3 else hidden[None]
    logits_BTV = capped(project("BTD,VD->BTV", hidden_BTD, kernel_VD), head.softcap)
    return logits_BTV if hidden.ndim == 3 else logits_BTV[0]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (arXiv 1910.07467), in float32."""

    spec: ModelSpec
    param_dtype: ParamDtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = (
            nn.initializers.zeros if self.spec.traits.zero_centered_norms else nn.initializers.ones
        )
        init = named_init(start, ("norm",))
        scale_D = self.param("scale", init, (x.shape[-1],), of_vectors(self.param_dtype))
        x32 = at_least_float32(x)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.spec.norm_eps)
        scale_D = scale_D.astype(x32.dtype) + float(self.spec.traits.zero_centered_norms)
        return (x32 * scale_D.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Context(flax.struct.PyTreeNode):
    """What all layers share in one pass: positions and masks.

    Attributes:
      turns: cosine and sine of the positions, as `rotary` takes them, for each kind of layers.
      window_K: the windows of the kinds of layers; None where none has one.
      positions_BT: position within the segment.
      mask_BTT: true where token t may see token s, windows apart.
      segment_ids_BT: 0 is padding.
      prompt_mask_BT: 1.0 at prompt tokens.
      prefix_BTT: `mask_BTT` towards prompt tokens alone, 1.0 or 0.0.
      prompt_count_BT: prompt tokens up to t, those in the cache included.
      filled_BC: which slots of the cache hold a token; None without a cache.
    """

    turns: tuple[jax.Array, jax.Array]
    window_K: jax.Array | None
    positions_BT: jax.Array
    mask_BTT: jax.Array
    segment_ids_BT: jax.Array
    prompt_mask_BT: jax.Array
    prefix_BTT: jax.Array
    prompt_count_BT: jax.Array
    filled_BC: jax.Array | None

    def masks(self, kind: jax.Array | int) -> tuple[jax.Array, jax.Array | None]:
        """What new tokens see in a layer of this kind: one another [B, T, T], and slots [B, T, C]
        ([B, 1, C] where there is no window)."""
        mask_BTT = self.mask_BTT
        seen_BTC = None if self.filled_BC is None else self.filled_BC[:, None]
        if self.window_K is None:
            return mask_BTT, seen_BTC
        window, position_BT1 = self.window_K[kind], self.positions_BT[..., None]
        # Positions of a segment follow one another: in it, distances in position are in tokens.
        mask_BTT = mask_BTT & (position_BT1 - position_BT1.swapaxes(1, 2) < window)
        if seen_BTC is not None:
            slot_C = jnp.arange(seen_BTC.shape[-1])  # is the position of the token that it holds
            seen_BTC = seen_BTC & (position_BT1 - slot_C[None, None] < window)
        return mask_BTT, seen_BTC


class Attention(nn.Module):
    """Queries, keys and values, attention by the layer's kind, and the output projection."""

    spec: ModelSpec
    kernel: Kernel
    projection: dict[str, Any]

    @nn.compact
    def __call__(self, h_BTD, kind: jax.Array | int, context: Context, past, routing):
        spec, traits = self.spec, self.spec.traits

        def project(name, heads, axis):
            features = Projection(
                heads * spec.head_dim,
                ("embed", axis),
                bias=traits.qkv_bias,
                name=name,
                **self.projection,
            )
            x = features(h_BTD, routing)
            x = x.reshape(*x.shape[:-1], -1, spec.head_dim)
            if traits.qk_norm and name != "v":
                x = RMSNorm(spec, self.projection["param_dtype"], name=f"{name}_norm")(x)
            return x

        turn = jax.tree.map(lambda of_kinds: of_kinds[kind], context.turns)
        q_BTNH = rotary(project("q", spec.num_heads, "heads"), turn)
        k_BTKH = rotary(project("k", spec.num_kv_heads, "kv_heads"), turn)
        v_BTKH = project("v", spec.num_kv_heads, "kv_heads")
        # Queries stay where their tokens are; keys and values are gathered over `length`.
        k_BTKH, v_BTKH = (constrain(x, "batch", None, "kv_heads", None) for x in (k_BTKH, v_BTKH))
        form = Scores((spec.query_scalar or spec.head_dim) ** -0.5, spec.attention_softcap)
        mask_BTT, seen_BTC = context.masks(kind)
        new = (q_BTNH, k_BTKH, v_BTKH, mask_BTT)
        if past is None:
            windows = tuple(of_kind.window for of_kind in spec.layer_kinds)
            mixed_BTNH = fused_attention(
                self.kernel, *new, context.segment_ids_BT, windows, kind, form
            )
        else:
            assert seen_BTC is not None  # of the cache that the past lies in
            past_k_BKCH, past_v_BKCH = map(floats, past)
            mixed_BTNH = attention(*new, (past_k_BKCH, past_v_BKCH, seen_BTC), form)
        mixed_BTO = mixed_BTNH.reshape(*mixed_BTNH.shape[:-2], -1)
        out = Projection(spec.embed_dim, ("heads", "embed"), name="o", **self.projection)
        to_cache = (bits(x_BTKH.swapaxes(1, 2)) for x_BTKH in (k_BTKH, v_BTKH))
        return out(mixed_BTO, routing), *to_cache


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """activation(gate) * up, computed in float32 and rounded once."""
    return (ACTIVATIONS[activation](at_least_float32(gate)) * at_least_float32(up)).astype(up.dtype)


class MLP(nn.Module):
    spec: ModelSpec
    projection: dict[str, Any]

    @nn.compact
    def __call__(self, h_BTD, routing):
        width = self.spec.mlp_dim
        gate = Projection(width, ("embed", "mlp"), name="gate", **self.projection)(h_BTD, routing)
        up = Projection(width, ("embed", "mlp"), name="up", **self.projection)(h_BTD, routing)
        down = Projection(self.spec.embed_dim, ("mlp", "embed"), name="down", **self.projection)
        return down(gated(gate, up, self.spec.traits.activation), routing)


class Block(nn.Module):
    """One layer; scanned over L. The cache is read here and written once, after the scan."""

    spec: ModelSpec
    experts: ExpertsConfig
    router: RouterConfig
    num_experts: int
    param_dtype: ParamDtype
    kernel: Kernel

    @nn.compact
    def __call__(self, x_BTD, of_layer, context: Context, routing: Routing):
        projection = dict(
            experts=self.experts, num_experts=self.num_experts, param_dtype=self.param_dtype
        )
        norm = functools.partial(RMSNorm, self.spec, self.param_dtype)
        kind, past_kv, past_sum_BS = of_layer
        kind = 0 if kind is None else kind

        x_BTD = kept(x_BTD)  # else remat keeps a block's input as it is, and not its bits
        h_BTD = norm(name="attention_norm")(x_BTD)
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
            h_BTD, kind, context, past_kv, routing
        )
        if self.spec.traits.post_norms:
            mixed_BTD = norm(name="attention_post_norm")(mixed_BTD)
        x_BTD += mixed_BTD
        h_BTD = norm(name="mlp_norm")(x_BTD)
        mixed_BTD = MLP(self.spec, projection, name="mlp")(h_BTD, routing)
        if self.spec.traits.post_norms:
            mixed_BTD = norm(name="mlp_post_norm")(mixed_BTD)
        x_BTD += mixed_BTD
        x_BTD = constrain(x_BTD, "batch", "length", "activation")
        return x_BTD, (k_BKTH, v_BKTH, sum_BS, gates_BTE)


class Transformer(nn.Module):
    """A decoder whose projections carry experts and whose layers carry a router."""

    spec: ModelSpec
    experts: ExpertsConfig
    router: RouterConfig
    num_experts: int
    param_dtype: ParamDtype = jnp.float32
    compute_dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    kernel: Kernel = "reference"

    @classmethod
    def from_config(
        cls,
        config: Config,
        spec: ModelSpec,
        platform: str = "",
        rests: ParamDtype | None = None,
        attention: Kernel | Literal["auto"] | None = None,
    ) -> "Transformer":
        """The model of an experiment: one expert for each of its domains.

        Args:
          config: the experiment.
          spec: its base.
          platform: "cpu", "gpu" or "tpu", that of the devices that it will run on, on which the
            attention kernel depends; where not given, that of this process's.
          rests: how the base does, where the config alone does not say it.
          attention: in place of the config's, which is no property of the weights.

        Raises:
          UserError: where the kernel that is named cannot compute the base's attention there.
        """
        compute_dtype = jnp.dtype(config.model.compute_dtype)
        named = attention or config.model.attention
        heads = (
            platform or jax.default_backend(),
            compute_dtype,
            spec.head_dim,
            spec.attention_softcap,
        )
        kernel = choose_kernel(*heads) if named == "auto" else named
        if reason := why_not(kernel, *heads):
            raise UserError(
                f"config.model.attention is {kernel!r}, which {reason}; set 'auto' or 'reference'"
            )
        return cls(
            spec=spec,
            experts=config.experts,
            router=config.router,
            num_experts=len(config.data.domains),
            param_dtype=PARAM_DTYPES[config.model.param_dtype] if rests is None else rests,
            compute_dtype=compute_dtype,
            remat=config.model.remat,
            kernel=kernel,
        )

    def with_experts(self, count: int, experts: ExpertsConfig | None = None) -> "Transformer":
        """The same model with `count` experts, of their size or of another's.

        Of fewer experts than `top_k` all are kept.
        """
        router = dataclasses.replace(self.router, top_k=min(self.router.top_k, count))
        return self.clone(num_experts=count, router=router, experts=experts or self.experts)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache with room for `slots` tokens in each of `batch` rows, holding none."""
        spec, layers = self.spec, self.spec.num_layers
        shape = (layers, batch, spec.num_kv_heads, slots, spec.head_dim)
        kv = bits(jnp.zeros(shape, self.compute_dtype))
        sums = jnp.zeros((layers, batch, num_slots(self.router, self.num_experts)), jnp.float32)
        none = jnp.zeros(batch, jnp.int32)
        empty = Cache(kv, kv, sums, prompt_B=none, length_B=none)
        return jax.tree.map(lambda leaf, axes: constrain(leaf, *axes), empty, CACHE_AXES)

    def initial(self, key: jax.Array) -> Any:
        """The three collections as they begin, their leaves boxed with logical axis names.

        The base is random, as only tests and shapes want it.
        """
        one_BT = jnp.ones((1, 1), jnp.int32)
        keys = dict(zip(("params", "experts", "router"), jax.random.split(key, 3), strict=True))
        return self.init(keys, one_BT, one_BT, one_BT, one_BT, Routed())

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
        shape = (spec.vocab_size, spec.embed_dim)
        embedding_VD = Table("embedding", shape, self.param_dtype, name="embed")()
        # Each device looks its own columns up for all of fsdp's rows: tokens travel, no table does.
        tokens_BT = constrain(tokens_BT, "gathered_batch", "length")
        x_BTD = jax.tree.map(
            lambda part: constrain(part[tokens_BT], "gathered_batch", "length", "embed"),
            embedding_VD,
        )
        x_BTD = dequantized(x_BTD, self.compute_dtype)
        x_BTD = constrain(x_BTD, "batch", "length", "activation")
        if spec.traits.scaled_embedding:
            x_BTD *= jnp.asarray(spec.embed_dim**0.5, x_BTD.dtype)

        of_layer, context = self._context(positions_BT, segment_ids_BT, prompt_mask_BT, cache)
        block = Block
        if not self.is_initializing():  # the base may lie as `bits`
            block = nn.map_variables(Block, "params", functools.partial(jax.tree.map, floats))
        if self.remat != "none":
            # The scan already keeps the backward pass from merging layers with the forward pass.
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        per_layer = self.router.scope == "layer"
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "experts": 0, **({"router": 0} if per_layer else {})},
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
        x_BTD, (k, v, router_sum, gates_LBTE) = layers(x_BTD, of_layer, context, routing)

        hidden_BTD = RMSNorm(spec, self.param_dtype, name="final_norm")(x_BTD)
        head_VD = embedding_VD
        if not spec.tie_embeddings:
            head_VD = Table("kernel", shape, self.param_dtype, name="head")()
        new = Cache(
            k,
            v,
            router_sum,
            prompt_B=prompt_mask_BT.sum(axis=1, dtype=jnp.int32),
            length_B=(segment_ids_BT > 0).sum(axis=1, dtype=jnp.int32),
        )
        return Output(hidden_BTD, Head(head_VD, spec.logit_softcap), gates_LBTE, new)

    def _context(self, positions_BT, segment_ids_BT, prompt_mask_BT, cache):
        """What each layer has of its own, [L, ...], and what all share: masks and rotations."""
        batch, length = segment_ids_BT.shape
        same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
        causal_TT = jnp.tril(jnp.ones((length, length), bool))
        mask_BTT = same_BTT & causal_TT[None] & (segment_ids_BT > 0)[:, None, :]
        prompt_mask_BT = prompt_mask_BT.astype(jnp.float32)
        prefix_BTT = mask_BTT * prompt_mask_BT[:, None, :]
        count_BT = prefix_BTT.sum(axis=-1)
        kinds = self.spec.layer_kinds
        kind_L = jnp.array(self.spec.kind_of_layer) if len(kinds) > 1 else None
        windows = [kind.window for kind in kinds]
        if cache is None:
            slots = num_slots(self.router, self.num_experts)
            sums = jnp.zeros((self.spec.num_layers, batch, slots), jnp.float32)
            past, filled_BC = None, None
        else:
            past, sums = (cache.k_LBKCH, cache.v_LBKCH), cache.router_sum_LBS
            slot_C = jnp.arange(cache.k_LBKCH.shape[3])
            filled_BC = slot_C[None, :] < cache.length_B[:, None]
            count_BT += cache.prompt_B[:, None]
        return (kind_L, past, sums), Context(
            turns=rotation(positions_BT, self.spec.head_dim, kinds),
            window_K=jnp.array([window or _NO_WINDOW for window in windows])
            if any(windows)
            else None,
            positions_BT=positions_BT,
            mask_BTT=mask_BTT,
            segment_ids_BT=segment_ids_BT,
            prompt_mask_BT=prompt_mask_BT,
            prefix_BTT=prefix_BTT,
            prompt_count_BT=count_BT,
            filled_BC=filled_BC,
        )


def forward(model: Transformer, variables: Mapping[str, Any], *inputs: Any) -> Output:
    """One pass of the model over inputs, those of its `__call__`, with these collections."""
    out = model.apply(variables, *inputs)
    assert isinstance(out, Output)  # and not a pair: no collection is mutable
    return out
