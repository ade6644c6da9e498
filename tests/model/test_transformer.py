import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import ROUTER, SPEC, forward, toy_batch, toy_model, toy_variables

from safemoe_jax.inference.engine import decode_step, prefill
from safemoe_jax.model.lora import Gates, Routed, rounded
from safemoe_jax.model.transformer import Head, logits

EVERY_FORM = pytest.mark.parametrize(
    ("granularity", "scope", "activation", "top_k"),
    [
        ("token", "layer", "signed", 0),
        ("token", "shared", "softmax_null", 2),
        ("sequence", "layer", "softmax", 0),
        ("sequence", "shared", "sigmoid", 2),
    ],
)


# Its first layer hides nothing from what comes after it, its second has a window.
WINDOWED = dataclasses.replace(SPEC, pattern=("global", "local"), window=4)


@functools.cache
def setup(granularity, scope, activation, top_k):
    model = toy_model(
        spec=WINDOWED if (granularity, scope) == ("sequence", "shared") else SPEC,
        router=dataclasses.replace(
            ROUTER, granularity=granularity, scope=scope, activation=activation, top_k=top_k
        ),
    )
    return model, toy_variables(model)


@EVERY_FORM
def test_no_gate_and_no_state_sees_a_later_token_or_another_segment(
    granularity, scope, activation, top_k
):
    model, variables = setup(granularity, scope, activation, top_k)
    batch = toy_batch([[(3, 2), (2, 3)]], 10)
    batch["tokens_BT"][:] = 1 + np.arange(10)  # position s has an embedding of its own: row 1 + s

    @jax.jit
    @jax.jacrev
    def sensitivity(embedding_VD):
        params = variables["params"] | {"embed": {"embedding": embedding_VD}}
        out = model.apply(
            variables | {"params": params},
            batch["tokens_BT"],
            batch["positions_BT"],
            batch["segment_ids_BT"],
            batch["prompt_mask_BT"],
            Routed(),
        )
        # Weights that differ keep effects on experts, layers and channels from cancelling.
        rng = np.random.default_rng(0)
        gates_weight = rng.normal(size=(*out.gates_LBTE.shape[::2], 3))[:, None]
        hidden_weight = rng.normal(size=SPEC.embed_dim)
        gates_T = (out.gates_LBTE * gates_weight).sum(axis=(0, 1, 3))
        return gates_T, out.hidden_BTD[0] @ hidden_weight

    by_token = [
        np.abs(np.asarray(jacobian)[:, 1:11]).max(axis=-1)
        for jacobian in sensitivity(variables["params"]["embed"]["embedding"])
    ]
    segment = batch["segment_ids_BT"][0]
    may_see = np.tril(segment[:, None] == segment[None])
    for jacobian_TT in by_token:
        np.testing.assert_array_equal(jacobian_TT[~may_see], 0.0)
    gates_TT, hidden_TT = by_token
    assert (hidden_TT[may_see] > 0).all()
    if granularity == "sequence":
        may_see &= batch["prompt_mask_BT"]
        np.testing.assert_array_equal(gates_TT[~may_see], 0.0)
    assert (gates_TT[may_see] > 0).all()


@EVERY_FORM
def test_a_packed_row_equals_its_conversations_apart(granularity, scope, activation, top_k):
    model, variables = setup(granularity, scope, activation, top_k)
    packed = toy_batch([[(3, 4), (5, 2), (1, 3)], [], []], 20)
    starts = (0, 7, 14, 18)
    apart = toy_batch([[(3, 4)], [(5, 2)], [(1, 3)]], 20)
    for row, (start, stop) in enumerate(itertools.pairwise(starts)):
        apart["tokens_BT"][row, : stop - start] = packed["tokens_BT"][0, start:stop]
    packed_logits, packed_gates = forward(model, variables, packed, Routed())
    apart_logits, apart_gates = forward(model, variables, apart, Routed())
    for row, (start, stop) in enumerate(itertools.pairwise(starts)):
        own, held = slice(start, stop), slice(0, stop - start)
        np.testing.assert_allclose(
            packed_logits[0, own], apart_logits[row, held], rtol=0, atol=1e-4
        )
        np.testing.assert_allclose(
            packed_gates[:, 0, own], apart_gates[:, row, held], rtol=0, atol=1e-5
        )
    if granularity == "sequence":
        for row, (prompt, length) in enumerate([(3, 7), (5, 7), (1, 4)]):
            answer = apart_gates[:, row, prompt - 1 : length]
            np.testing.assert_array_equal(answer, np.broadcast_to(answer[:, :1], answer.shape))


@EVERY_FORM
def test_cached_decoding_equals_the_training_forward_pass(granularity, scope, activation, top_k):
    model, variables = setup(granularity, scope, activation, top_k)
    prompt_B, response = np.array([3, 8, 5]), 6
    batch = toy_batch([[(prompt, response)] for prompt in prompt_B], 20)
    tokens_BT = batch["tokens_BT"]
    prompts_BT = np.where(np.arange(8) < prompt_B[:, None], tokens_BT[:, :8], 0)
    forced_SB = np.stack([tokens_BT[np.arange(3), prompt_B + step] for step in range(response)])

    @jax.jit
    def decode(variables, prompts_BT, forced_SB):
        cache = model.empty_cache(3, 8 + response)
        cache, first_BV = prefill(model, variables, Routed(), prompts_BT, prompt_B, cache)

        def step(cache, token_B):
            cache, logits_BV, gates_LBE = decode_step(model, variables, Routed(), token_B, cache)
            return cache, (logits_BV, gates_LBE)

        cache, (rest_SBV, gates_SLBE) = jax.lax.scan(step, cache, forced_SB)
        return jnp.concatenate([first_BV[None], rest_SBV]), gates_SLBE, cache.length_B

    decoded_SBV, gates_SLBE, length_B = decode(variables, prompts_BT, forced_SB)
    logits_BTV, gates_LBTE = forward(model, variables, batch, Routed())
    np.testing.assert_array_equal(length_B, prompt_B + response)
    for row, prompt in enumerate(prompt_B):
        np.testing.assert_allclose(
            decoded_SBV[:, row],
            logits_BTV[row, prompt - 1 : prompt + response],
            rtol=0,
            atol=1e-4,
        )
        np.testing.assert_allclose(
            gates_SLBE[:, :, row].swapaxes(0, 1),
            gates_LBTE[:, row, prompt : prompt + response],
            rtol=0,
            atol=1e-5,
        )


def test_gates_that_are_given_are_used_as_they_are():
    model, variables = setup("token", "layer", "signed", 0)
    batch = toy_batch([[(3, 4)]], 8)
    none, used_LBTE = forward(model, variables, batch, Gates(jnp.zeros(3)))
    base, no_gates = forward(model, variables, batch, None)
    np.testing.assert_allclose(none, base, rtol=0, atol=1e-5)
    assert no_gates is None
    np.testing.assert_array_equal(used_LBTE, np.zeros((2, 1, 8, 3)))


def test_padding_changes_nothing():
    model, variables = setup("sequence", "layer", "softmax", 0)
    batch = toy_batch([[(3, 4)], [(2, 2)], []], 20)
    noisy = {key: value.copy() for key, value in batch.items()}
    noisy["tokens_BT"][batch["segment_ids_BT"] == 0] = 7
    held = batch["segment_ids_BT"] > 0
    clean_logits, clean_gates = forward(model, variables, batch, Routed())
    noisy_logits, noisy_gates = forward(model, variables, noisy, Routed())
    np.testing.assert_array_equal(clean_logits[held], noisy_logits[held])
    np.testing.assert_array_equal(clean_gates[:, held], noisy_gates[:, held])
    assert np.isfinite(noisy_logits).all()


def test_logits_of_low_precision_states_are_float32():
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32)), jnp.bfloat16)
    head = jnp.asarray(np.random.default_rng(1).normal(size=(61, 32)), jnp.float32)
    found = logits(hidden, Head(head, None))
    assert found.dtype == jnp.float32
    rounded = np.asarray(head.astype(jnp.bfloat16), np.float32)
    np.testing.assert_allclose(found, np.asarray(hidden, np.float32) @ rounded.T, atol=1e-4)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_experts_that_were_rounded_once_answer_bit_by_bit_as_before(compute_dtype):
    model = toy_model(compute_dtype=jnp.dtype(compute_dtype))
    variables = toy_variables(model)
    once = variables | {"experts": rounded(variables["experts"], model.compute_dtype)}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(once["experts"]))
    before = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["experts"]))
    assert size == before * model.compute_dtype.itemsize // 4
    batch = toy_batch([[(3, 4)]], 8)
    expected, found = (forward(model, leaves, batch, Routed()) for leaves in (variables, once))
    np.testing.assert_array_equal(found[0], expected[0])
