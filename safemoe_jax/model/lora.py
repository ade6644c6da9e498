"""LoRA experts over a frozen projection, and the two forms of their mixture.

    y = x W  +  scale * sum_e  gates[e] * (x A_e) B_e                                          (1)

after "Dialectics of Alignment" (arXiv 2606.00686, of which the abstract alone is public: the form
of the gates and of the mixing is our choice).

Stage one trains experts: every row belongs to one expert, so each row gathers its own A and B and
the cost does not grow with E. Stage two and inference mix: two dense matmuls of width E*R around
one multiply by the gates. `tests/model/test_lora.py` holds the two forms equal.

Shape letters: B batch, T tokens, D input width, O output width, E experts, R rank.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from safemoe_jax.config import ExpertsConfig
from safemoe_jax.model.precision import bits, contract, floats, project
from safemoe_jax.model.quantization import (
    Matrix,
    ParamDtype,
    dequantized,
    frozen_matrix,
    of_vectors,
)
from safemoe_jax.parallel.sharding import constrain, named_init

# The name by which a remat policy finds what `kept` was called with. A policy that looks for
# matmuls does not see those inside `frozen_dot` and `contract`.
PROJECTED = "projected"


class OwnExpert(flax.struct.PyTreeNode):
    """Stage one: row b passes through expert `ids_B[b]` alone, with gate 1."""

    ids_B: jax.Array


class Gates(flax.struct.PyTreeNode):
    """A given mixture: `gates_BTE` for each token, or `gates_E` for all of them."""

    gates: jax.Array


class Routed(flax.struct.PyTreeNode):
    """The router decides, layer by layer and token by token."""


# `None` stands for the base alone.
Routing = OwnExpert | Gates | Routed | None


def gathered_mixture(
    x_BTD: jax.Array,
    a_EDR: jax.Array,
    b_ERO: jax.Array,
    ids_B: jax.Array,
    axes: tuple[str | None, str | None],
) -> jax.Array:
    """(1) where row b has gate 1 for expert ids_B[b] and 0 for all others -> [B, T, O].

    `axes` are the logical names of D and O.
    """

    def own(leaf, *axes):
        # Cast row by row: an expert's gradient is then summed over rows in the leaf's own type.
        rows = leaf[ids_B].astype(x_BTD.dtype)
        if "embed" in axes:
            # As in the embedding: each device gathers its part of an expert for all of fsdp's
            # rows, and only then a row's expert comes to where the row is.
            rows = leaf[constrain(ids_B, "gathered_batch")].astype(x_BTD.dtype)
            rows = constrain(rows, "gathered_batch", *axes)
        return constrain(rows, "batch", *axes)

    z_BTR = contract("BTD,BDR->BTR", x_BTD, own(a_EDR, axes[0], "rank")).astype(x_BTD.dtype)
    return contract("BTR,BRO->BTO", z_BTR, own(b_ERO, "rank", axes[1]))


def dense_mixture(
    x_BTD: jax.Array, a_EDR: jax.Array, b_ERO: jax.Array, gates_BTE: jax.Array
) -> jax.Array:
    """(1) for any gates -> [B, T, O]."""
    a_EDR, b_ERO = a_EDR.astype(x_BTD.dtype), b_ERO.astype(x_BTD.dtype)
    z_BTER = project("BTD,EDR->BTER", x_BTD, a_EDR) * gates_BTE[..., None]
    return contract("BTER,ERO->BTO", z_BTER.astype(x_BTD.dtype), b_ERO)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def frozen_dot(x_BTD: jax.Array, kernel_OD: Matrix, axes: tuple[str, str]) -> jax.Array:
    """x W in the type of x, for a W that is never trained and lies transposed.

    A W cast or dequantized inside the layer scan would be kept for the backward pass, a full copy
    of the base; here the backward pass repeats it, and no gradient of W exists. The same holds for
    W gathered over fsdp. It is gathered as it rests, and before it is used: left to itself, XLA
    multiplies it part by part and adds the products in memory, each as large as the result in
    float32.

    Args:
      x_BTD: what is projected.
      kernel_OD: W.
      axes: logical names of O and D.
    """
    floats_OD = dequantized(_gathered(kernel_OD, axes), x_BTD.dtype)
    return project("BTD,OD->BTO", x_BTD, floats_OD).astype(x_BTD.dtype)


def _frozen_dot_forward(x_BTD, kernel_OD, axes):
    return frozen_dot(x_BTD, kernel_OD, axes), kernel_OD


def _frozen_dot_backward(axes, kernel_OD, grad_BTO):
    dtype = grad_BTO.dtype
    floats_OD = dequantized(_gathered(kernel_OD, axes), dtype)
    return contract("BTO,OD->BTD", grad_BTO, floats_OD).astype(dtype), None


frozen_dot.defvjp(_frozen_dot_forward, _frozen_dot_backward)


def _gathered(kernel_OD: Matrix, axes: tuple[str, str]) -> Matrix:
    whole = ["activation" if axis == "embed" else axis for axis in axes]
    return jax.tree.map(lambda part: constrain(part, *whole), kernel_OD)


def kept(x: jax.Array) -> jax.Array:
    """x, for remat policies to keep, stacked over layers; of bfloat16 its `bits` are kept."""
    if x.dtype != jnp.bfloat16:
        return checkpoint_name(x, PROJECTED)
    return _gradient_of(x, floats(checkpoint_name(bits(jax.lax.stop_gradient(x)), PROJECTED)))


@jax.custom_jvp
def _gradient_of(x: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, whose gradient goes to x: bits carry none."""
    return value


@_gradient_of.defjvp
def _(primals, tangents):
    return primals[1], tangents[0]


class Projection(nn.Module):
    """A frozen matmul from D to O with E LoRA experts beside it, if its name is among the targets.

    The base is in collection `params`, [O, D] as checkpoints hold it, with a bias [O] in some
    families; it may be quantized. The experts are in `experts`:
    A [E, D, R], drawn with variance 1 / D, and B [E, R, O], zero, so that an untrained expert
    changes nothing.
    """

    features: int
    axes: tuple[str, str]  # logical names of D and O
    experts: ExpertsConfig
    num_experts: int
    param_dtype: ParamDtype
    bias: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array, routing: OwnExpert | Gates | None) -> jax.Array:
        in_axis, out_axis = self.axes
        width = x_BTD.shape[-1]
        init = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        axes, shape = (out_axis, in_axis), (self.features, width)
        kernel_OD = frozen_matrix(self, "kernel", init, shape, axes, self.param_dtype)
        y_BTO = frozen_dot(x_BTD, kernel_OD, axes)
        if self.bias:
            start = named_init(nn.initializers.zeros, (out_axis,))
            bias_O = self.param("bias", start, (self.features,), of_vectors(self.param_dtype))
            y_BTO += bias_O.astype(y_BTO.dtype)[None, None]
        if routing is None or self.name not in self.experts.targets:
            return kept(y_BTO)

        a_EDR = expert_leaf(
            self,
            "a",
            nn.initializers.normal(width**-0.5),
            (self.num_experts, width, self.experts.rank),
            ("expert", in_axis, "rank"),
        )
        b_ERO = expert_leaf(
            self,
            "b",
            nn.initializers.zeros,
            (self.num_experts, self.experts.rank, self.features),
            ("expert", "rank", out_axis),
        )
        if isinstance(routing, OwnExpert):
            mixture_BTO = gathered_mixture(x_BTD, a_EDR, b_ERO, routing.ids_B, self.axes)
        else:
            mixture_BTO = dense_mixture(x_BTD, a_EDR, b_ERO, routing.gates)
        y_BTO += (self.experts.scale * mixture_BTO).astype(y_BTO.dtype)
        return kept(y_BTO)


def expert_leaf(module: nn.Module, name: str, init, shape, axes) -> jax.Array:
    """A leaf of collection `experts`, with logical axis names: float32, or what `rounded` made."""
    init = named_init(init, axes)
    leaf = module.variable(
        "experts", name, lambda: init(module.make_rng("experts"), shape, jnp.float32)
    )
    return floats(leaf.value)


def rounded(experts: Any, compute_dtype: jnp.dtype) -> Any:
    """Experts for answering alone, in the type that they are multiplied in, bfloat16 as its `bits`.

    Where they rest in float32 every pass rounds them anew, to the same, and a decode step reads
    twice as much.

    Args:
      experts: the collection, of arrays.
      compute_dtype: the transformer's.
    """
    return jax.tree.map(lambda leaf: bits(leaf.astype(compute_dtype)), experts)
