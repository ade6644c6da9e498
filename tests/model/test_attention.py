import jax.numpy as jnp
import numpy as np

from safemoe_jax.model.attention import at_least_float32, attention, rotary, rotation

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


def test_at_least_float32_widens_and_never_narrows(float64):
    kinds = {
        kind: at_least_float32(jnp.ones(1, kind)).dtype.name for kind in ("bfloat16", "float64")
    }
    assert kinds == {"bfloat16": "float32", "float64": "float64"}
