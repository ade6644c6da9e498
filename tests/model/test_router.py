import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import ROUTER, shapes, toy_batch, toy_model

from safemoe_jax.model.router import Router, gates_from_logits, num_slots

LOGITS = np.log([2.0, 0.25, 1.0])  # of three experts
NULL = np.log(3.0)  # of the null slot, where there is one


def config(**changes):
    return dataclasses.replace(ROUTER, **changes)


def gates(logits_S, router, num_experts=3):
    logits_BTS = jnp.asarray(logits_S, jnp.float32)[None, None]
    return np.asarray(gates_from_logits(logits_BTS, router, num_experts))[0, 0]


@pytest.mark.parametrize(
    ("activation", "temperature", "top_k", "expected"),
    [
        # exp(logits) is 2, 1/4, 1 at temperature 1 and 4, 1/16, 1 at 1/2; the null slot's 3 and 9.
        ("softmax", 1.0, 0, [8 / 13, 1 / 13, 4 / 13]),
        ("softmax", 1.0, 1, [8 / 13, 0, 0]),
        ("softmax", 1.0, 2, [8 / 13, 0, 4 / 13]),
        ("softmax", 1.0, 3, [8 / 13, 1 / 13, 4 / 13]),
        ("softmax", 0.5, 0, [64 / 81, 1 / 81, 16 / 81]),
        ("softmax", 0.5, 1, [64 / 81, 0, 0]),
        ("softmax", 0.5, 2, [64 / 81, 0, 16 / 81]),
        ("softmax_null", 1.0, 0, [8 / 25, 1 / 25, 4 / 25]),
        ("softmax_null", 1.0, 1, [8 / 25, 0, 0]),
        ("softmax_null", 1.0, 2, [8 / 25, 0, 4 / 25]),
        ("softmax_null", 0.5, 0, [64 / 225, 1 / 225, 16 / 225]),
        ("softmax_null", 0.5, 1, [64 / 225, 0, 0]),
        ("softmax_null", 0.5, 2, [64 / 225, 0, 16 / 225]),
        # exp(l) / (1 + exp(l))
        ("sigmoid", 1.0, 0, [2 / 3, 1 / 5, 1 / 2]),
        ("sigmoid", 1.0, 1, [2 / 3, 0, 0]),
        ("sigmoid", 1.0, 2, [2 / 3, 0, 1 / 2]),
        ("sigmoid", 0.5, 0, [4 / 5, 1 / 17, 1 / 2]),
        ("sigmoid", 0.5, 1, [4 / 5, 0, 0]),
        ("sigmoid", 0.5, 2, [4 / 5, 0, 1 / 2]),
        # tanh(l) = (exp(2l) - 1) / (exp(2l) + 1); the second, subtracted, is the strongest.
        ("signed", 1.0, 0, [3 / 5, -15 / 17, 0]),
        ("signed", 1.0, 1, [0, -15 / 17, 0]),
        ("signed", 1.0, 2, [3 / 5, -15 / 17, 0]),
        ("signed", 0.5, 0, [15 / 17, -255 / 257, 0]),
        ("signed", 0.5, 1, [0, -255 / 257, 0]),
    ],
)
def test_gates_of_known_logits(activation, temperature, top_k, expected):
    logits_S = [*LOGITS, NULL] if activation == "softmax_null" else LOGITS
    router = config(activation=activation, temperature=temperature, top_k=top_k)
    np.testing.assert_allclose(gates(logits_S, router), expected, rtol=0, atol=1e-6)


def test_top_k_never_forces_the_use_of_an_expert_where_there_is_a_null_slot():
    router = config(activation="softmax_null", top_k=1)
    assert gates([1.0, 2.0, 3.0, 40.0], router).max() < 1e-15
    share = 1 / (1 + np.exp(-1.0) + np.exp(-2.0))
    np.testing.assert_allclose(gates([1.0, 2.0, 3.0, -40.0], router), [0, 0, share], atol=1e-6)


def test_only_softmax_null_has_a_slot_more_than_experts():
    slots = {
        activation: num_slots(config(activation=activation), 3)
        for activation in ("softmax", "softmax_null", "sigmoid", "signed")
    }
    assert slots == {"softmax": 3, "softmax_null": 4, "sigmoid": 3, "signed": 3}


@pytest.mark.parametrize("activation", ["softmax", "softmax_null", "sigmoid", "signed"])
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_the_router_learns_through_every_gate_that_is_kept(activation, top_k):
    router = config(activation=activation, top_k=top_k)
    logits_S = jnp.asarray([0.3, -0.1, 0.5, 0.2][: num_slots(router, 3)])
    weight_E = jnp.array([1.0, 2.0, 4.0])

    def loss(logits_S):
        return (gates_from_logits(logits_S[None, None], router, 3)[0, 0] * weight_E).sum()

    gradient_S = np.asarray(jax.grad(loss)(logits_S))
    assert np.isfinite(gradient_S).all()
    if activation.startswith("softmax"):
        # A lost expert's logit still divides the shares of those that are kept.
        assert np.abs(gradient_S).min() > 0.01
    else:
        lost = {0: [], 1: [0, 1], 2: [1]}[top_k]
        np.testing.assert_array_equal(np.flatnonzero(gradient_S == 0), lost)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [("signed", 0.0), ("softmax", 1 / 3), ("softmax_null", 1 / 4), ("sigmoid", 1 / 2)],
)
def test_what_an_untrained_router_does(activation, expected):
    h_BTD = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    router = Router(config(activation=activation), 3)
    slots = num_slots(router.config, 3)
    none = (np.zeros((2, 5), np.float32), np.zeros((2, 5, 5), np.float32))
    past = (np.zeros((2, slots), np.float32), np.zeros((2, 5), np.float32))
    start = jax.jit(router.init_with_output)
    (gates_BTE, _), _ = start({"router": jax.random.key(0)}, h_BTD, *none, *past)
    np.testing.assert_allclose(gates_BTE, np.full((2, 5, 3), expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("activation", ["softmax", "softmax_null", "sigmoid", "signed"])
def test_with_top_k_every_expert_is_tried_from_the_start(activation):
    """From zero all gates are equal, and the first k would be kept at every token for ever."""
    num_experts, top_k = 5, 2
    h_BTD = np.random.default_rng(0).normal(size=(4, 50, 16)).astype(np.float32)
    router = Router(config(activation=activation, top_k=top_k), num_experts)
    slots = num_slots(router.config, num_experts)
    none = (np.zeros((4, 50), np.float32), np.zeros((4, 50, 50), np.float32))
    past = (np.zeros((4, slots), np.float32), np.zeros((4, 50), np.float32))
    pull_E = np.linspace(1.0, 2.0, num_experts, dtype=np.float32)

    @jax.jit
    def first_step():
        variables = router.init({"router": jax.random.key(0)}, h_BTD, *none, *past)

        def loss(variables):
            gates_BTE, _ = router.apply(variables, h_BTD, *none, *past)
            return jnp.einsum("BTE,E->", gates_BTE, pull_E), gates_BTE

        return jax.grad(loss, has_aux=True)(nn.unbox(variables))

    gradient, gates_BTE = first_step()
    kept_BTE = np.asarray(gates_BTE) != 0
    assert (kept_BTE.sum(axis=-1) == top_k).all()
    assert kept_BTE.mean(axis=(0, 1)).min() > 0.1
    assert np.abs(gradient["router"]["kernel"][:, :num_experts]).max(axis=0).min() > 0.1
    untrained = {"signed": 0.0, "softmax": 1 / 5, "softmax_null": 1 / 6, "sigmoid": 1 / 2}
    difference_BTE = np.asarray(gates_BTE) - untrained[activation]
    assert np.abs(difference_BTE[kept_BTE]).max() < 0.05


def test_scope_decides_whether_layers_share_the_weights():
    def leaves(**changes):
        tree = shapes(toy_model(router=config(**changes)))["router"]
        return jax.tree.map(lambda leaf: leaf.shape, tree["layers"]["router"])

    assert leaves(scope="layer") == {"kernel": (2, 32, 3), "bias": (2, 3)}
    assert leaves(scope="shared") == {"kernel": (32, 3), "bias": (3,)}
    assert leaves(activation="softmax_null") == {"kernel": (2, 32, 4), "bias": (2, 4)}


def context(batch):
    """What the transformer tells the router: [b, t, s] is 1 where s is an earlier prompt token."""
    segment, prompt = batch["segment_ids_BT"], batch["prompt_mask_BT"]
    same = segment[:, :, None] == segment[:, None, :]
    prefix = np.tril(same & prompt[:, None, :]).astype(np.float32)
    return prompt.astype(np.float32), prefix


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_what_a_token_is_routed_by(granularity):
    rng = np.random.default_rng(0)
    batch = toy_batch([[(3, 2), (2, 3)], [(1, 4)]], 10)
    kernel, bias = rng.normal(size=(8, 3)), rng.normal(size=3)
    h_BTD = rng.normal(size=(2, 10, 8)).astype(np.float32)
    prompt_mask_BT, prefix_BTT = context(batch)
    router = Router(config(granularity=granularity), 3)
    weights = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
    gates_BTE, sum_BS = jax.jit(router.apply)(
        {"router": weights},
        h_BTD,
        prompt_mask_BT,
        prefix_BTT,
        np.zeros((2, 3), np.float32),
        prefix_BTT.sum(axis=-1),
    )
    for row, token in zip(*np.nonzero(batch["segment_ids_BT"]), strict=True):
        seen = h_BTD[row, token]
        if granularity == "sequence":
            segment = batch["segment_ids_BT"][row] == batch["segment_ids_BT"][row, token]
            earlier = np.arange(10) <= token
            seen = h_BTD[row, segment & earlier & batch["prompt_mask_BT"][row]].mean(axis=0)
        expected = np.tanh(seen @ kernel + bias)
        np.testing.assert_allclose(gates_BTE[row, token], expected, rtol=0, atol=1e-5)
    expected = [h_BTD[row][batch["prompt_mask_BT"][row]].sum(axis=0) @ kernel for row in range(2)]
    np.testing.assert_allclose(sum_BS, expected, rtol=0, atol=1e-5)


def test_the_running_mean_goes_on_from_the_cache():
    rng = np.random.default_rng(1)
    weights = {
        "kernel": rng.normal(size=(8, 3)).astype(np.float32),
        "bias": rng.normal(size=3).astype(np.float32),
    }
    h_BTD = rng.normal(size=(1, 6, 8)).astype(np.float32)
    router = Router(config(granularity="sequence"), 3)
    prompt_mask_BT = np.ones((1, 6), np.float32)
    prefix_BTT = np.tril(np.ones((1, 6, 6), np.float32))

    def run(part, past_sum_BS, past_count):
        prefix = prefix_BTT[:, part, part]
        return router.apply(
            {"router": weights},
            h_BTD[:, part],
            prompt_mask_BT[:, part],
            prefix,
            past_sum_BS,
            prefix.sum(axis=-1) + past_count,
        )

    whole_BTE, whole_sum_BS = run(slice(0, 6), np.zeros((1, 3), np.float32), 0)
    first_BTE, first_sum_BS = run(slice(0, 4), np.zeros((1, 3), np.float32), 0)
    second_BTE, second_sum_BS = run(slice(4, 6), first_sum_BS, 4)
    halves_BTE = np.concatenate([first_BTE, second_BTE], axis=1)
    np.testing.assert_allclose(halves_BTE, whole_BTE, rtol=0, atol=1e-6)
    np.testing.assert_allclose(second_sum_BS, whole_sum_BS, rtol=0, atol=1e-5)
