"""The router: how much of each expert a token gets, from what the token has seen so far.

    logits = h W + b        gates = activation(logits / temperature)

`h` is the layer's first RMSNorm output; all targets of the layer share the gates. W and b start at
zero. What an untrained router does therefore depends on the activation: "signed" mixes nothing in
(the base alone), "softmax" mixes all experts evenly, "softmax_null" the same with one share for no
expert, "sigmoid" takes half of each.

Where only the top k are kept, W starts off zero, by little: equal gates would keep the first k
experts at every token, and the others, never used, would never learn.

Shape letters: B batch, T tokens, D model, E experts, S slots (E, or E + 1 with the null slot).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from safemoe_jax.config import RouterConfig
from safemoe_jax.model.precision import at_least_float32
from safemoe_jax.parallel.sharding import named_init

# Logits of about a hundredth of h's scale: enough to choose by, and still next to no mixture.
_off_zero = nn.initializers.variance_scaling(1e-4, "fan_in", "normal")


def num_slots(config: RouterConfig, num_experts: int) -> int:
    """Logits per token: one per expert, and one for "no expert" where the activation has it."""
    return num_experts + (config.activation == "softmax_null")


def gates_from_logits(logits_BTS: jax.Array, config: RouterConfig, num_experts: int) -> jax.Array:
    """The activation, then the top-k rule.

    A kept gate is what it was among all: the softmax forms are not renormalised over what is kept,
    which with k = 1 would make every gate 1 and leave the router no gradient (Switch Transformer,
    arXiv 2101.03961, equation 2).

    Args:
      logits_BTS: float32 router logits.
      config: activation, temperature and top_k.
      num_experts: E.

    Returns:
      gates [B, T, E]: in [0, 1] with sum <= 1 (softmax forms), in [0, 1] (sigmoid) or [-1, 1]
      (signed).
    """
    activation = {
        "softmax": jax.nn.softmax,
        "softmax_null": jax.nn.softmax,
        "sigmoid": jax.nn.sigmoid,
        "signed": jnp.tanh,
    }[config.activation]
    gates_BTE = activation(logits_BTS / config.temperature)[..., :num_experts]
    return jnp.where(_largest(jnp.abs(gates_BTE), config.top_k), gates_BTE, 0.0)


def _largest(values_BTE: jax.Array, k: int) -> jax.Array:
    """True for the k largest of the last axis; all of them if k is 0. Ties go to the first."""
    if k == 0:
        return jnp.ones_like(values_BTE, bool)
    _, chosen_BTk = jax.lax.top_k(values_BTE, k)
    return jax.nn.one_hot(chosen_BTk, values_BTE.shape[-1], dtype=bool).any(axis=-2)


class Router(nn.Module):
    """Linear router in float32, at the start zero, or near it where only the top k are kept.

    Granularity "token" routes each token by its own h. "sequence" routes by the mean of h over the
    prompt tokens of the token's segment so far, which stays as it is once the prompt is over. The
    router is linear, so the mean of its logits is the logits of the mean: only S numbers per layer
    need be remembered in the cache, not D.
    """

    config: RouterConfig
    num_experts: int

    @nn.compact
    def __call__(
        self,
        h_BTD: jax.Array,
        prompt_mask_BT: jax.Array,
        prefix_BTT: jax.Array,
        past_sum_BS: jax.Array,
        count_BT: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes gates.

        Args:
          h_BTD: the layer's first RMSNorm output.
          prompt_mask_BT: 1.0 at prompt tokens.
          prefix_BTT: [b, t, s] is 1.0 where s is a prompt token, not after t, of t's segment.
          past_sum_BS: sum of logits over prompt tokens that are in the cache already.
          count_BT: prompt tokens up to t, those in the cache included.

        Returns:
          gates [B, T, E], and the sum of logits over the row's prompt tokens, past ones included,
          [B, S].
        """
        slots = num_slots(self.config, self.num_experts)
        start = _off_zero if self.config.top_k else nn.initializers.zeros
        kernel_DS = self._leaf("kernel", start, (h_BTD.shape[-1], slots), ("embed", "slot"))
        bias_S = self._leaf("bias", nn.initializers.zeros, (slots,), ("slot",))
        logits_BTS = jnp.einsum("BTD,DS->BTS", at_least_float32(h_BTD), kernel_DS)
        sum_BS = past_sum_BS + jnp.einsum("BT,BTS->BS", prompt_mask_BT, logits_BTS)
        if self.config.granularity == "sequence":
            sum_BTS = past_sum_BS[:, None] + jnp.einsum("BTs,BsS->BTS", prefix_BTT, logits_BTS)
            logits_BTS = sum_BTS / jnp.maximum(count_BT, 1.0)[..., None]
        logits_BTS += jnp.broadcast_to(bias_S, logits_BTS.shape)
        return gates_from_logits(logits_BTS, self.config, self.num_experts), sum_BS

    def _leaf(
        self,
        name: str,
        start: nn.initializers.Initializer,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
    ) -> jax.Array:
        init = named_init(start, axes)
        return self.variable(
            "router", name, lambda: init(self.make_rng("router"), shape, jnp.float32)
        ).value
