import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.model.transformer import Head
from safemoe_jax.training import losses
from safemoe_jax.training.losses import token_nll

B, T, D, V = 3, 11, 6, 13


def arrays(dtype):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, D)).astype(dtype)
    head = rng.normal(size=(V, D)).astype(dtype)
    mask = rng.random((B, T)) < 0.5
    mask[1] = False  # one row carries no loss, one carries it everywhere
    mask[2] = True
    weight = rng.normal(size=(B, T)).astype(dtype)
    targets = rng.integers(0, V, (B, T), np.int32)
    hidden, head, targets, mask, weight = map(jnp.asarray, (hidden, head, targets, mask, weight))
    return hidden, Head(head, None), targets, mask, weight


def reference(hidden, head, targets, mask):
    logits = jnp.einsum("BTD,VD->BTV", hidden, head.kernel_VD)
    if head.softcap:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    log_probability = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probability, targets[..., None], axis=-1)[..., 0]
    return jnp.where(mask, -chosen, 0.0)


@pytest.mark.parametrize(("chunk", "softcap"), [(1, None), (3, 2.0), (4, None), (T, None)])
def test_value_and_gradient_are_those_of_log_softmax(chunk, softcap, monkeypatch, float64):
    monkeypatch.setitem(losses._LOGITS_AT_ONCE, "cpu", B * V * chunk)
    hidden, head, targets, mask, weight = arrays(np.float64)
    head = head.replace(softcap=softcap)

    def both(function):
        def loss(hidden):
            nll = function(hidden, head, targets, mask)
            return (nll * weight).sum(), nll

        return jax.jit(jax.grad(loss, has_aux=True))(hidden)

    gradient, nll = both(token_nll)
    expected_gradient, expected_nll = both(reference)
    np.testing.assert_allclose(nll, expected_nll, rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-12)
    without_gradient = jax.jit(token_nll)(hidden, head, targets, mask)
    np.testing.assert_allclose(without_gradient, expected_nll, rtol=0, atol=1e-12)


def test_a_mask_of_no_tokens_is_zero_with_zero_gradient():
    hidden, head, targets, mask, _ = arrays(np.float32)
    nothing = jnp.zeros_like(mask)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda hidden: token_nll(hidden, head, targets, nothing).sum())
    )(hidden)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros_like(hidden))


def test_a_low_precision_state_has_a_float32_loss_and_a_gradient_like_itself():
    hidden, head, targets, mask, _ = arrays(np.float32)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    nll, gradient_of = jax.vjp(lambda hidden: token_nll(hidden, head, targets, mask), hidden)
    assert nll.dtype == jnp.float32
    assert gradient_of(jnp.ones_like(nll))[0].dtype == jnp.bfloat16
    expected = reference(hidden.astype(jnp.float32), head, targets, mask)
    np.testing.assert_allclose(nll, expected, rtol=0, atol=0.05)


def test_the_whole_block_of_logits_never_exists(monkeypatch):
    monkeypatch.setitem(losses._LOGITS_AT_ONCE, "cpu", B * V * 2)
    hidden, head, targets, mask, _ = arrays(np.float32)
    jaxpr = jax.make_jaxpr(jax.grad(lambda hidden: token_nll(hidden, head, targets, mask).sum()))(
        hidden
    )
    assert f"[{B},2,{V}]" in str(jaxpr)
    assert f"[{B},{T},{V}]" not in str(jaxpr)
