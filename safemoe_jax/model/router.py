"""The router: how much of each expert a token gets, from what the token has seen so far.

    logits = h W + b        gates = activation(logits / temperature)

`h` is the layer's first RMSNorm output; all targets of the layer share the gates. W and b start at
zero. What an untrained router does therefore depends on the activation: "signed" mixes nothing in
(the base alone), "softmax" mixes all experts evenly, "softmax_null" the same with one share for no
expert, "sigmoid" takes half of each.

Shape letters: B batch, T tokens, D model, E experts, S slots (E, or E + 1 with the null slot).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from safemoe_jax.config import RouterConfig
from safemoe_jax.model.attention import at_least_float32


def num_slots(config: RouterConfig, num_experts: int) -> int:
    """Logits per token: one per expert, and one for "no expert" where the activation has it."""
    return num_experts + (config.activation == "softmax_null")


def gates_from_logits(logits_BTS: jax.Array, config: RouterConfig, num_experts: int) -> jax.Array:
    """The activation and the top-k rule.

    Args:
      logits_BTS: float32 router logits.
      config: activation, temperature and top_k. Of a top-k choice the softmax forms are
        renormalised over what is kept; the others just lose the rest.
      num_experts: E.

    Returns:
      gates [B, T, E]: in [0, 1] with sum <= 1 (softmax forms), in [0, 1] (sigmoid) or [-1, 1]
      (signed).
    """
    logits_BTS = logits_BTS / config.temperature
    if config.activation in ("softmax", "softmax_null"):
        # The null slot always takes part: choosing k experts must not force using them.
        kept_BTS = _largest(logits_BTS[..., :num_experts], config.top_k)
        null_BTS = jnp.ones_like(logits_BTS[..., num_experts:], bool)
        kept_BTS = jnp.concatenate([kept_BTS, null_BTS], axis=-1)
        logits_BTS = jnp.where(kept_BTS, logits_BTS, -jnp.inf)
        return jax.nn.softmax(logits_BTS, axis=-1)[..., :num_experts]
    gates_BTE = (
        jax.nn.sigmoid(logits_BTS) if config.activation == "sigmoid" else jnp.tanh(logits_BTS)
    )
    return jnp.where(_largest(jnp.abs(gates_BTE), config.top_k), gates_BTE, 0.0)


def _largest(values_BTE: jax.Array, k: int) -> jax.Array:
    """True for the k largest of the last axis; all of them if k is 0. Ties go to the first."""
    if k == 0:
        return jnp.ones_like(values_BTE, bool)
    _, chosen_BTk = jax.lax.top_k(values_BTE, k)
    return jax.nn.one_hot(chosen_BTk, values_BTE.shape[-1], dtype=bool).any(axis=-2)


class Router(nn.Module):
    """Linear router in float32, zero at the start.

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
        kernel_DS = self._leaf("kernel", (h_BTD.shape[-1], slots), ("embed", "slot"))
        bias_S = self._leaf("bias", (slots,), ("slot",))
        logits_BTS = jnp.einsum("BTD,DS->BTS", at_least_float32(h_BTD), kernel_DS)
        sum_BS = past_sum_BS + jnp.einsum("BT,BTS->BS", prompt_mask_BT, logits_BTS)
        if self.config.granularity == "sequence":
            sum_BTS = past_sum_BS[:, None] + jnp.einsum("BTs,BsS->BTS", prefix_BTT, logits_BTS)
            logits_BTS = sum_BTS / jnp.maximum(count_BT, 1.0)[..., None]
        logits_BTS += jnp.broadcast_to(bias_S, logits_BTS.shape)
        return gates_from_logits(logits_BTS, self.config, self.num_experts), sum_BS

    def _leaf(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        return self.variable(
            "router", name, lambda: init(self.make_rng("router"), shape, jnp.float32)
        ).value
