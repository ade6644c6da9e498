import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import ADAMW

from safemoe_jax.training.state import (
    init_expert_state,
    init_router_state,
    keep_best,
    make_optimizer,
)

PLAIN = dataclasses.replace(ADAMW, learning_rate=0.8, weight_decay=0.0, clip_norm=1e6)


def rates(config, steps):
    """Adam's update under a constant gradient of one is minus the learning rate."""
    tx = make_optimizer(config, steps)
    params = jnp.zeros(())
    opt_state, found = tx.init(params), []
    for _ in range(steps):
        update, opt_state = tx.update(jnp.ones(()), opt_state, params)
        found.append(-float(update))
    return found


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "expected"),
    [
        ("constant", 0, [0.8] * 6),
        ("constant", 2, [0.0, 0.4, 0.8, 0.8, 0.8, 0.8]),
        ("linear", 0, [0.8 * (1 - n / 6) for n in range(6)]),
        ("linear", 2, [0.0, 0.4, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", 0, [0.4 * (1 + np.cos(np.pi * n / 6)) for n in range(6)]),
        ("cosine", 2, [0.0, 0.4, *(0.4 * (1 + np.cos(np.pi * n / 4)) for n in range(4))]),
    ],
)
def test_schedules(schedule, warmup_steps, expected):
    config = dataclasses.replace(PLAIN, schedule=schedule, warmup_steps=warmup_steps)
    np.testing.assert_allclose(rates(config, 6), expected, rtol=0, atol=1e-5)


def test_weights_decay_apart_from_the_gradient():
    tx = make_optimizer(dataclasses.replace(PLAIN, weight_decay=0.5), steps=3)
    weight = jnp.full((), 2.0)
    update, _ = tx.update(jnp.zeros(()), tx.init(weight), weight)
    np.testing.assert_allclose(update, -0.8 * 0.5 * 2.0, rtol=1e-6)


def test_gradients_are_clipped_by_their_common_norm():
    tx = make_optimizer(dataclasses.replace(PLAIN, clip_norm=0.5, b1=0.0), steps=3)
    weights = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    gradient = {"a": jnp.full((), 3.0), "b": jnp.full((), 4.0)}
    _, opt_state = tx.update(gradient, tx.init(weights), weights)
    (moment,) = (
        state.mu
        for state in jax.tree.leaves(opt_state, is_leaf=lambda node: hasattr(node, "mu"))
        if hasattr(state, "mu")
    )
    np.testing.assert_allclose([moment["a"], moment["b"]], [0.3, 0.4], rtol=1e-6)


def experts(value):
    return {"a": jnp.full((2, 3, 4, 1), value), "b": jnp.full((2, 3, 1, 5), value)}


def test_each_expert_keeps_its_own_best():
    tx = make_optimizer(PLAIN, steps=3)
    state = init_expert_state(experts(0.0), tx)
    for step, loss in enumerate([[3.0, 3.0, 3.0], [2.0, 4.0, np.nan], [2.5, 1.0, 3.0]], start=1):
        state = state.replace(step=jnp.int32(step), trainable=experts(float(step)))
        state = keep_best(state, jnp.array(loss))
    np.testing.assert_array_equal(state.best.loss, [2.0, 1.0, 3.0])
    np.testing.assert_array_equal(state.best.step, [2, 3, 1])
    for leaf in jax.tree.leaves(state.best.trainable):
        for expert, step in enumerate([2, 3, 1]):
            np.testing.assert_array_equal(leaf[:, expert], step)
    for leaf in jax.tree.leaves(state.trainable):
        np.testing.assert_array_equal(leaf, 3.0)


@pytest.mark.parametrize(("second", "kept"), [(0.5, 2.0), (1.0, 1.0), (1.5, 1.0), (np.nan, 1.0)])
def test_the_router_keeps_its_best(second, kept):
    tx = make_optimizer(PLAIN, steps=3)
    state = init_router_state({"kernel": jnp.zeros((4, 3))}, tx)
    for step, loss in enumerate([1.0, second], start=1):
        trainable = {"kernel": jnp.full((4, 3), float(step))}
        state = keep_best(state.replace(step=jnp.int32(step), trainable=trainable), jnp.array(loss))
    np.testing.assert_array_equal(state.best.trainable["kernel"], kept)
    assert int(state.best.step) == int(kept)


def test_every_expert_has_an_optimizer_of_its_own():
    state = init_expert_state(experts(0.0), make_optimizer(PLAIN, steps=3))
    leading = {leaf.shape[0] for leaf in jax.tree.leaves(state.opt_state)}
    assert leading == {3}
    assert np.isinf(state.best.loss).all() and state.best.loss.shape == (3,)
