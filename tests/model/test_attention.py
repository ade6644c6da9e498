import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import safemoe_jax.model.attention as attention_module
from safemoe_jax.config import MeshConfig
from safemoe_jax.model.attention import (
    Scores,
    attention,
    by_cudnn,
    choose_kernel,
    frequencies,
    fused_attention,
    rotary,
    rotation,
    splash_attention,
)
from safemoe_jax.model.spec import LayerKind, RopeScaling
from safemoe_jax.parallel.mesh import make_mesh

B, T, C, N, K, H = 2, 5, 4, 4, 2, 6
PLAIN = Scores(H**-0.5, None)


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, K, C, H), (B, K, C, H)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def reference(q, k, v, mask, form=PLAIN):
    """One query after the other; each pair of query heads shares one key head."""
    out = np.zeros(q.shape)
    for row, token, head in np.ndindex(q.shape[:3]):
        seen = mask[row, token]
        scores = form.scale * k[row, seen, head // (N // K)] @ q[row, token, head]
        if form.softcap:
            scores = form.softcap * np.tanh(scores / form.softcap)
        weights = np.exp(scores - scores.max())
        out[row, token, head] = weights / weights.sum() @ v[row, seen, head // (N // K)]
    return out


@pytest.fixture(params=[T, 2], ids=["one block", "blocks of two"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(attention_module, "_block_of_queries", lambda length: request.param)


@pytest.mark.usefixtures("blocks")
def test_grouped_causal_attention():
    q, k, v, _, _ = arrays()
    mask = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    np.testing.assert_allclose(
        attention(q, k, v, mask, None, PLAIN), reference(q, k, v, mask), rtol=0, atol=1e-5
    )


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("each", [1, T], ids=["all tokens alike", "each token for itself"])
def test_new_tokens_see_the_filled_slots_of_the_cache_and_no_others(each):
    q, k, v, past_k, past_v = arrays()
    mask = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    filled = np.array([[True, True, True, False], [True, False, False, False]])
    form = Scores(0.7, 1.5)
    seen = np.repeat(filled[:, None], each, axis=1)
    seen[:, 1:, 0] = False  # of another token: as behind a window
    found = attention(q, k, v, mask, (past_k, past_v, seen), form)
    whole_mask = np.concatenate([np.broadcast_to(seen, (B, T, C)), mask], axis=2)
    expected = reference(
        q,
        np.concatenate([past_k.swapaxes(1, 2), k], axis=1),
        np.concatenate([past_v.swapaxes(1, 2), v], axis=1),
        whole_mask,
        form,
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found - attention(q, k, v, mask, None, form)).max() > 0.1


def test_long_rows_go_in_blocks_and_have_the_gradient_of_one(monkeypatch):
    rng = np.random.default_rng(3)
    q, k, v = (
        rng.normal(size=(1, 300, heads, H)).astype(np.float32) for heads in (N, K, K)
    )  # blocks of 128, 128 and 44
    mask = np.tril(np.ones((1, 300, 300), bool))

    def loss(q, k, v):
        return (attention(q, k, v, mask, None, PLAIN) ** 2).sum()

    def gradients():
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    assert "300,300]" not in str(jax.make_jaxpr(loss)(q, k, v)).replace("bool[1,300,300]", "")
    in_blocks = gradients()
    monkeypatch.setattr(attention_module, "_block_of_queries", lambda length: length)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4), in_blocks, gradients()
    )


def test_a_token_that_sees_nothing_is_finite():
    q, k, v, _, _ = arrays()
    assert np.isfinite(attention(q, k, v, np.zeros((B, T, T), bool), None, PLAIN)).all()


def test_scores_of_low_precision_are_computed_in_float32():
    q, k, v, _, _ = (jnp.asarray(x, jnp.bfloat16) for x in arrays())
    mask = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    found = attention(q, k, v, mask, None, PLAIN)
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


@pytest.mark.parametrize(
    ("mesh", "window", "form"),
    [
        (None, None, Scores(8**-0.5, None)),
        (None, 20, Scores(0.5, 2.0)),
        (MeshConfig(data=2, fsdp=1, tensor=2, context=2), 20, Scores(0.5, None)),
    ],
)
def test_splash_attention_and_its_gradient_are_the_references(segmented, mesh, window, form):
    q, k, v, ids, mask = segmented
    if window:
        mask = mask & ~np.tril(np.ones((TILE, TILE), bool), -window)

    def value_and_gradient(attend):
        loss = lambda *arrays: sum_of_tokens(attend, *arrays, ids)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    expected = value_and_gradient(lambda *arrays: attention(*arrays, mask, None, form))

    def splash(*arrays):
        return splash_attention(*arrays, jnp.asarray(ids), window, form, interpret=True)

    if mesh is None:
        found = value_and_gradient(splash)
    else:
        with jax.set_mesh(make_mesh(mesh)):
            found = value_and_gradient(splash)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, expected
    )


@pytest.mark.parametrize(
    ("mesh", "rows_and_heads"),
    [(None, (4, 4)), (MeshConfig(data=2, fsdp=1, tensor=2, context=2), (2, 2))],
)
def test_what_cudnn_is_asked_for_is_the_reference(segmented, monkeypatch, mesh, rows_and_heads):
    q, k, v, ids, mask = segmented
    asked = jax.nn.dot_product_attention

    def by_xla(q, k, v, implementation, **others):
        assert implementation == "cudnn"
        assert q.shape == (rows_and_heads[0], TILE, rows_and_heads[1], 8)  # of one device
        return asked(q, k, v, implementation="xla", **others)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    form = Scores(0.5, None)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
        found = jax.jit(
            lambda *arrays: fused_attention("cudnn", *arrays, jnp.asarray(ids), (None,), 0, form)
        )(q, k, v, mask)
    expected = attention(q, k, v, mask, None, form)
    np.testing.assert_allclose(found[ids > 0], expected[ids > 0], rtol=0, atol=1e-5)


def test_what_cudnn_made_is_known_by_its_name():
    kept = {
        name: by_cudnn(getattr(fused_attention_stablehlo, f"_dot_product_attention_{name}"))
        for name in ("fwd_p", "fwd_p_wrapper", "bwd_p", "bwd_p_wrapper")
    }
    assert kept == {"fwd_p": True, "fwd_p_wrapper": True, "bwd_p": False, "bwd_p_wrapper": False}


def test_rows_that_are_no_whole_tiles_go_through_the_reference():
    q, k, v, _, _ = arrays()
    ids = np.ones((B, T), np.int32)
    mask = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    found = fused_attention("splash", q, k, v, mask, ids, (None,), 0, PLAIN)
    np.testing.assert_array_equal(found, attention(q, k, v, mask, None, PLAIN))


def test_a_layer_of_each_kind_gets_the_kernel_of_its_window(segmented, monkeypatch):
    q, k, v, ids, mask = segmented
    monkeypatch.setattr(
        attention_module,
        "splash_attention",
        lambda q, k, v, ids, window, form: q * (window or 0),
    )
    of_kind = jax.jit(
        lambda kind: fused_attention(
            "splash", q, k, v, mask, jnp.asarray(ids), (3, None, 3, 7), kind, PLAIN
        )
    )
    for kind, window in enumerate((3, 0, 3, 7)):
        np.testing.assert_array_equal(of_kind(kind), q * window)


def gpu(monkeypatch, compute_capability):
    device = types.SimpleNamespace(compute_capability=compute_capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])


def test_each_platform_has_its_kernel(monkeypatch):
    gpu(monkeypatch, "9.0")
    kinds = [("cpu", "float32"), ("gpu", "float32"), ("gpu", "bfloat16"), ("tpu", "float32")]
    chosen = [choose_kernel(platform, jnp.dtype(kind), 64, None) for platform, kind in kinds]
    assert chosen == ["reference", "reference", "cudnn", "splash"]
    capped = [
        choose_kernel(platform, jnp.dtype("bfloat16"), 64, 50.0) for platform in ("gpu", "tpu")
    ]
    assert capped == ["reference", "splash"]


@pytest.mark.parametrize(
    ("compute_capability", "head_dim", "kernel"),
    [
        ("8.0", 128, "cudnn"),
        ("8.0", 256, "reference"),
        ("9.0", 256, "cudnn"),
        ("12.0", 264, "reference"),
        ("9.0", 100, "reference"),
        ("gfx942", 64, "reference"),  # AMD's
    ],
)
def test_heads_that_cudnn_refuses_go_through_the_reference(
    monkeypatch, compute_capability, head_dim, kernel
):
    gpu(monkeypatch, compute_capability)
    assert choose_kernel("gpu", jnp.dtype("bfloat16"), head_dim, None) == kernel


def test_rows_of_odd_length_do_not_go_to_cudnn():
    q, k, v, _, _ = arrays()
    ids, mask = np.ones((B, T), np.int32), np.tril(np.ones((B, T, T), bool))
    assert T % 2
    found = fused_attention("cudnn", q, k, v, mask, ids, (None,), 0, PLAIN)
    np.testing.assert_array_equal(found, attention(q, k, v, mask, None, PLAIN))


def test_rotary_turns_pairs_of_halves_by_the_position():
    x = np.zeros((1, 3, 1, 4), np.float32)
    x[..., 0], x[..., 1] = 1.0, 1.0
    cos, sin = rotation(
        np.array([[0, 1, 7]]), 4, [LayerKind(None, 100.0, None), LayerKind(None, None, None)]
    )
    found = np.asarray(rotary(x, (cos[0], sin[0])))[0, :, 0]
    # Pairs are (0, 2) and (1, 3); their frequencies 1 and 100 ** -1/2.
    expected = [[np.cos(p), np.cos(p / 10), np.sin(p), np.sin(p / 10)] for p in (0, 1, 7)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(rotary(x, (cos[1], sin[1])), x)  # a kind without rotation


def test_frequencies_are_lowered_as_llama_3_lowers_them():
    scaling = RopeScaling(8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=128)
    plain, lowered = frequencies(16, 100.0, None), frequencies(16, 100.0, scaling)
    turns = 128 * plain / (2 * np.pi)
    assert (turns > 4).any() and ((turns > 1) & (turns < 4)).any() and (turns < 1).any()
    np.testing.assert_allclose(lowered[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(lowered[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    share = (turns[between] - 1) / 3
    np.testing.assert_allclose(
        lowered[between], share * plain[between] + (1 - share) * plain[between] / 8
    )
    np.testing.assert_allclose(frequencies(16, 100.0, RopeScaling(4.0)), plain / 4)


def test_scores_after_rotary_depend_on_the_distance_alone():
    q, k, _, _, _ = arrays()

    def scores(shift):
        kinds = [LayerKind(None, 50.0, None)]
        turn = [x[0] for x in rotation(np.arange(T)[None] + shift, H, kinds)]
        turned = [np.asarray(rotary(x, turn)) for x in (q[:1, :, :K], k[:1])]
        return np.einsum("BTKH,BSKH->BKTS", *turned)

    np.testing.assert_allclose(scores(0), scores(9), rtol=0, atol=1e-4)
