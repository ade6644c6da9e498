import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from toys import ADAMW, SPEC, leaves_equal, toy_batch, toy_model, toy_variables

from safemoe_jax.config import ExpertsConfig
from safemoe_jax.model.lora import OwnExpert
from safemoe_jax.training import steps
from safemoe_jax.training.losses import batch_nll
from safemoe_jax.training.state import init_expert_state, init_router_state, make_optimizer
from safemoe_jax.training.steps import expert_train_step, gate_train_step

STEPS = 20
EXPERTS = ExpertsConfig(("v", "down"), rank=2, alpha=3.0)
MODEL = toy_model(experts=EXPERTS)
TX = make_optimizer(dataclasses.replace(ADAMW, learning_rate=0.05, weight_decay=0.0), STEPS)
# Six rows for three experts with unequal numbers of tokens; all tests share what is compiled.
ROWS = [[(2, 5)], [(3, 2), (1, 3)], [(2, 1)], [(4, 2)], [(1, 8)], [(2, 6)]]
EXPERT_IDS = [0, 0, 1, 1, 2, 2]
TOKENS = [5 + 2 + 3, 1 + 2, 8 + 6]


@functools.cache
def jitted(step, model, tx, accumulation=1):
    step = functools.partial(step, model=model, tx=tx, accumulation=accumulation)
    return jax.jit(step)


def expert_slice(tree, expert):
    return jax.tree.map(lambda leaf: leaf[:, expert : expert + 1], tree)


class TestIndependence:
    """Training all experts together gives each the trajectory that it has alone."""

    TX = make_optimizer(
        dataclasses.replace(ADAMW, schedule="cosine", warmup_steps=3, clip_norm=0.5), STEPS
    )
    ABSENT = ((1, (0, 4, 5, 11)), (2, (7,)))  # experts, and the steps in which they have no token

    def model(self, num_experts):
        return toy_model(
            experts=EXPERTS,
            num_experts=num_experts,
            param_dtype=jnp.float64,
            compute_dtype=jnp.float64,
        )

    def variables(self):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), toy_variables(self.model(3)))

    def batch(self, step):
        batch = toy_batch(ROWS, 10, expert_ids=EXPERT_IDS, seed=step)
        for expert, absent in self.ABSENT:
            if step in absent:
                batch["loss_mask_BT"][batch["expert_ids_B"] == expert] = 0.0
        return batch

    def train(self, step, experts, rows=slice(None)):
        """Final state and the metrics of each step."""
        frozen = {"params": self.variables()["params"]}
        state, history = init_expert_state(experts, self.TX), []
        for index in range(STEPS):
            batch = {key: value[rows] for key, value in self.batch(index).items()}
            batch["expert_ids_B"] = batch["expert_ids_B"] - batch["expert_ids_B"].min()
            state, metrics = step(state, frozen, batch)
            history.append(metrics)
        return state, jax.tree.map(lambda *leaves: np.stack(leaves), *history)

    def test_together_is_as_alone_and_however_the_step_is_cut(self, float64):
        experts = self.variables()["experts"]
        together, metrics = self.train(jitted(expert_train_step, self.model(3), self.TX), experts)
        assert (metrics["gradient_norm"][metrics["tokens"] > 0] > 0.5).mean() > 0.9, "no clipping"
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-9)

        alone_step = jitted(expert_train_step, self.model(1), self.TX)
        for expert in range(3):
            rows = slice(2 * expert, 2 * expert + 2)
            alone, own = self.train(alone_step, expert_slice(experts, expert), rows)
            jax.tree.map(close, expert_slice(together.trainable, expert), alone.trainable)
            for key in ("loss", "tokens", "gradient_norm"):
                close(metrics[key][:, expert], own[key][:, 0])

        cut, cut_metrics = self.train(
            jitted(expert_train_step, self.model(3), self.TX, accumulation=2), experts
        )
        jax.tree.map(close, cut.trainable, together.trainable)
        jax.tree.map(close, cut_metrics, metrics)


def test_an_expert_without_tokens_stays_bit_identical():
    variables = toy_variables(MODEL)
    frozen = {"params": variables["params"]}
    step = jitted(expert_train_step, MODEL, TX)
    batch = toy_batch(ROWS, 10, expert_ids=EXPERT_IDS)
    before, _ = step(init_expert_state(variables["experts"], TX), frozen, batch)
    batch["loss_mask_BT"][2:4] = 0.0
    after, metrics = step(before, frozen, batch)
    np.testing.assert_array_equal(metrics["tokens"], [TOKENS[0], 0, TOKENS[2]])
    assert metrics["loss"][1] == 0.0

    def of(state, expert):
        own = jax.tree.map(lambda leaf: leaf[expert], state.opt_state)
        return expert_slice(state.trainable, expert), own

    assert leaves_equal(of(after, 1), of(before, 1))
    for expert in (0, 2):
        same = jax.tree.map(np.array_equal, of(after, expert), of(before, expert))
        assert not any(jax.tree.leaves(same))


def test_the_loss_of_an_expert_is_its_mean_over_tokens():
    variables = toy_variables(MODEL)
    batch = toy_batch(ROWS, 10, expert_ids=EXPERT_IDS)
    nll_BT, _ = jax.jit(batch_nll, static_argnums=0)(
        MODEL, variables, batch, OwnExpert(batch["expert_ids_B"])
    )
    nll_E = np.asarray(nll_BT).reshape(3, -1).sum(axis=1)
    _, metrics = jitted(expert_train_step, MODEL, TX)(
        init_expert_state(variables["experts"], TX), {"params": variables["params"]}, batch
    )
    np.testing.assert_allclose(metrics["loss"], nll_E / TOKENS, rtol=1e-5)


def all_shapes(jaxpr):
    """Shapes of everything that a jaxpr computes, those within it included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from all_shapes(inner)


def stacked(tree):
    """Shapes of the matrices that all layers share one leaf for."""
    return {leaf.shape for leaf in jax.tree.leaves(tree["layers"]) if leaf.ndim > 2}


@pytest.mark.parametrize("stage", ["experts", "router"])
def test_nothing_frozen_has_a_gradient(stage, monkeypatch):
    variables = toy_variables(MODEL)
    batch = toy_batch(ROWS, 10, expert_ids=EXPERT_IDS)
    trained = variables[stage]
    if stage == "experts":
        step, state = expert_train_step, init_expert_state(trained, TX)
        frozen = {"params": variables["params"]}
    else:
        step, state = gate_train_step, init_router_state(trained, TX)
        frozen = {"params": variables["params"], "experts": variables["experts"]}

    gradients = []
    accumulate = steps._accumulate

    def spy(*args):
        out = accumulate(*args)
        gradients.append(out[0])
        return out

    monkeypatch.setattr(steps, "_accumulate", spy)
    step = functools.partial(step, model=MODEL, tx=TX, accumulation=1)
    jaxpr = jax.make_jaxpr(step)(state, frozen, batch).jaxpr
    (gradient,) = gradients
    assert jax.tree.structure(gradient) == jax.tree.structure(trained)
    computed = set(all_shapes(jaxpr))
    assert stacked(trained) <= computed, "the walk finds what is trained"
    for name, tree in frozen.items():
        # A gradient, or a copy, of a leaf that layers are scanned over would have its shape.
        assert not stacked(tree) & computed, name


def test_gate_training_leaves_base_and_experts_bit_identical_and_learns():
    variables = toy_variables(MODEL)
    frozen = {"params": variables["params"], "experts": variables["experts"]}
    before = jax.tree.map(np.array, frozen)
    router = jax.tree.map(jnp.zeros_like, variables["router"])
    batch = toy_batch(ROWS, 10)
    state, losses = init_router_state(router, TX), []
    for _ in range(30):
        state, metrics = jitted(gate_train_step, MODEL, TX)(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert leaves_equal(frozen, before)
    assert losses[-1] < 0.7 * losses[0]
    assert metrics["tokens"] == sum(TOKENS)
    assert int(state.step) == 30


def test_gates_are_averaged_over_layers_and_tokens_that_are_no_padding():
    variables = toy_variables(MODEL)
    router = jax.tree.map(jnp.zeros_like, variables["router"])
    bias_LE = np.array([[0.1, 0.2, -0.3], [0.5, 0.0, 1.0]], np.float32)
    router["layers"]["router"]["bias"] = jnp.asarray(bias_LE)
    frozen = {"params": variables["params"], "experts": variables["experts"]}
    batch = toy_batch(ROWS, 10)
    (whole, metrics), (cut, cut_metrics) = (
        jitted(gate_train_step, MODEL, TX, accumulation)(
            init_router_state(router, TX), frozen, batch
        )
        for accumulation in (1, 2)
    )
    gates_LE = np.tanh(bias_LE)
    np.testing.assert_allclose(metrics["gates"], gates_LE.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(metrics["gates_std"], gates_LE.std(axis=0), rtol=1e-4)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, cut_metrics, metrics)
    jax.tree.map(close, cut.opt_state, whole.opt_state)


def test_experts_learn():
    variables = toy_variables(MODEL)
    experts = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if path[-1].key == "b" else leaf,
        variables["experts"],
    )
    batch = toy_batch(ROWS, 10, expert_ids=EXPERT_IDS)
    state, losses = init_expert_state(experts, TX), []
    for _ in range(30):
        state, metrics = jitted(expert_train_step, MODEL, TX)(
            state, {"params": variables["params"]}, batch
        )
        losses.append(np.asarray(metrics["loss"]))
    assert (losses[-1] < 0.5 * losses[0]).all()


def test_remat_changes_memory_and_nothing_else():
    spec = dataclasses.replace(SPEC, num_layers=6)
    batch = jax.tree.map(jnp.asarray, toy_batch([[(20, 40)]] * 4, 64))
    found, temp_bytes = {}, {}
    for remat in ("none", "dots", "full"):
        model = toy_model(spec=spec, experts=EXPERTS, remat=remat)
        variables = toy_variables(model)

        def loss(experts, params, model=model):
            variables = {"params": params, "experts": experts}
            return batch_nll(model, variables, batch, OwnExpert(batch["expert_ids_B"]))[0].mean()

        compiled = (
            jax.jit(jax.value_and_grad(loss))
            .lower(variables["experts"], variables["params"])
            .compile()
        )
        found[remat] = compiled(variables["experts"], variables["params"])
        temp_bytes[remat] = compiled.memory_analysis().temp_size_in_bytes
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6),
            found[remat],
            found["none"],
        )
    assert temp_bytes["full"] < 0.7 * temp_bytes["dots"], temp_bytes
    assert temp_bytes["dots"] < 0.9 * temp_bytes["none"], temp_bytes
