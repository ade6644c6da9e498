"""The KV cache: what a pass leaves for the next one.

Shape letters: B batch, T new tokens, C cache slots, K key/value heads, H head dim, S router slots,
L layers.
"""

import flax.struct
import jax
import jax.numpy as jnp

from safemoe_jax.parallel.sharding import named_axes


class Cache(flax.struct.PyTreeNode):
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


# Logical names of its leaves' axes.
CACHE_AXES = Cache(
    k_LBKCH=named_axes("layers", "batch", "kv_heads", "cache", "head_dim"),
    v_LBKCH=named_axes("layers", "batch", "kv_heads", "cache", "head_dim"),
    router_sum_LBS=named_axes("layers", "batch", "slot"),
    prompt_B=named_axes("batch"),
    length_B=named_axes("batch"),
)


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
