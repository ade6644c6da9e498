import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.config import MeshConfig
from safemoe_jax.model.attention import (
    attention,
    choose_kernel,
    fused_attention,
    rotary,
    rotation,
    splash_attention,
)
from safemoe_jax.parallel.mesh import make_mesh

B, T, C, N, K, H = 2, 5, 4, 4, 2, 6


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, K, C, H), (B, K, C, H)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def reference(q, k, v, mask):
    """One query after the other; each pair of query heads shares one key head."""
    out = np.zeros(q.shape)
    for row, token, head in np.ndindex(q.shape[:3]):
        seen = mask[row, token]
        scores = k[row, seen, head // (N // K)] @ q[row, token, head] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[row, token, head] = weights / weights.sum() @ v[row, seen, head // (N // K)]
    return out


def test_grouped_causal_attention():
    q, k, v, _, _ = arrays()
    mask = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    np.testing.assert_allclose(
        attention(q, k, v, mask, None), reference(q, k, v, mask), rtol=0, atol=1e-5
    )


def test_new_tokens_see_the_filled_slots_of_the_cache_and_no_others():
    q, k, v, past_k, past_v = arrays()
    mask = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    filled = np.array([[True, True, True, False], [True, False, False, False]])
    found = attention(q, k, v, mask, (past_k, past_v, filled))
    whole_mask = np.concatenate([np.repeat(filled[:, None], T, axis=1), mask], axis=2)
    expected = reference(
        q,
        np.concatenate([past_k.swapaxes(1, 2), k], axis=1),
        np.concatenate([past_v.swapaxes(1, 2), v], axis=1),
        whole_mask,
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_token_that_sees_nothing_is_finite():
    q, k, v, _, _ = arrays()
    assert np.isfinite(attention(q, k, v, np.zeros((B, T, T), bool), None)).all()


def test_scores_of_low_precision_are_computed_in_float32():
    q, k, v, _, _ = (jnp.asarray(x, jnp.bfloat16) for x in arrays())
    mask = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    found = attention(q, k, v, mask, None)
    assert found.dtype == jnp.bfloat16
    expected = reference(*(np.asarray(x, np.float32) for x in (q, k, v)), mask)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0, atol=0.03)


TILE = 128


@pytest.fixture(scope="module")
def segmented():
    """q, k, v of one whole tile, with three segments and padding; and their mask."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(4, TILE, n, 8)).astype(np.float32) for n in (4, 2, 2))
    ids = np.zeros((4, TILE), np.int32)
    ids[0, :50], ids[0, 50:120], ids[1:, :90] = 1, 2, 1
    same = (ids[:, :, None] == ids[:, None]) & (ids > 0)[:, None]
    return q, k, v, ids, same & np.tril(np.ones((TILE, TILE), bool))


def sum_of_tokens(attend, q, k, v, ids):
    """Something of every output that counts, and of nothing else."""
    return (jnp.sin(attend(q, k, v)) * (ids > 0)[..., None, None]).sum()


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=1, tensor=2, context=2)])
def test_splash_attention_and_its_gradient_are_the_references(segmented, mesh):
    q, k, v, ids, mask = segmented

    def value_and_gradient(attend):
        loss = lambda *arrays: sum_of_tokens(attend, *arrays, ids)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    expected = value_and_gradient(lambda *arrays: attention(*arrays, mask, None))
    splash = lambda *arrays: splash_attention(*arrays, jnp.asarray(ids), interpret=True)  # noqa: E731
    if mesh is None:
        found = value_and_gradient(splash)
    else:
        with jax.set_mesh(make_mesh(mesh)):
            found = value_and_gradient(splash)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, expected
    )


def test_what_cudnn_is_asked_for_is_the_reference(segmented, monkeypatch):
    q, k, v, ids, mask = segmented
    asked = jax.nn.dot_product_attention

    def by_xla(*arrays, mask, implementation):
        assert implementation == "cudnn"
        return asked(*arrays, mask=mask, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    found = fused_attention("cudnn", q, k, v, mask, ids)
    expected = attention(q, k, v, mask, None)
    np.testing.assert_allclose(found[ids > 0], expected[ids > 0], rtol=0, atol=1e-5)


def test_rows_that_are_no_whole_tiles_go_through_the_reference():
    q, k, v, _, _ = arrays()
    ids = np.ones((B, T), np.int32)
    mask = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    found = fused_attention("splash", q, k, v, mask, ids)
    np.testing.assert_array_equal(found, attention(q, k, v, mask, None))


def test_each_platform_has_its_kernel():
    kinds = [("cpu", "float32"), ("gpu", "float32"), ("gpu", "bfloat16"), ("tpu", "float32")]
    chosen = [choose_kernel(platform, jnp.dtype(kind)) for platform, kind in kinds]
    assert chosen == ["reference", "reference", "cudnn", "splash"]


def test_rotary_turns_pairs_of_halves_by_the_position():
    x = np.zeros((1, 3, 1, 4), np.float32)
    x[..., 0], x[..., 1] = 1.0, 1.0
    found = np.asarray(rotary(x, rotation(np.array([[0, 1, 7]]), 4, 100.0)))[0, :, 0]
    # Pairs are (0, 2) and (1, 3); their frequencies 1 and 100 ** -1/2.
    expected = [[np.cos(p), np.cos(p / 10), np.sin(p), np.sin(p / 10)] for p in (0, 1, 7)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_scores_after_rotary_depend_on_the_distance_alone():
    q, k, _, _, _ = arrays()

    def scores(shift):
        turn = rotation(np.arange(T)[None] + shift, H, 50.0)
        turned = [np.asarray(rotary(x, turn)) for x in (q[:1, :, :K], k[:1])]
        return np.einsum("BTKH,BSKH->BKTS", *turned)

    np.testing.assert_allclose(scores(0), scores(9), rtol=0, atol=1e-4)
