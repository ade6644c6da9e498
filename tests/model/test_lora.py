import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import EXPERTS, SPEC, forward, initial, shapes, toy_batch, toy_model, toy_variables

from safemoe_jax.config import ExpertsConfig
from safemoe_jax.experiment import num_params
from safemoe_jax.model import lora
from safemoe_jax.model.lora import (
    Gates,
    OwnExpert,
    Projection,
    dense_mixture,
    frozen_dot,
    gathered_mixture,
)
from safemoe_jax.model.quantization import dequantized

B, T, D, R, OUT, E = 4, 5, 6, 2, 7, 3


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shape = {
        "x": (B, T, D),
        "a": (E, D, R),
        "b": (E, R, OUT),
        "gates": (B, T, E),
        "kernel": (OUT, D),
    }
    return {name: rng.normal(size=size).astype(np.float32) for name, size in shape.items()}


def mixture(x_BTD, a_EDR, b_ERO, gates_BTE):
    """Formula (1), one expert, row and token after the other."""
    out_BTO = np.zeros((B, T, OUT))
    for row, token, expert in np.ndindex(B, T, E):
        own = x_BTD[row, token] @ a_EDR[expert] @ b_ERO[expert]
        out_BTO[row, token] += gates_BTE[row, token, expert] * own
    return out_BTO


def test_dense_mixture_is_formula_1_for_any_gates(arrays):
    x, a, b, gates = (arrays[name] for name in ("x", "a", "b", "gates"))
    np.testing.assert_allclose(
        dense_mixture(x, a, b, gates), mixture(x, a, b, gates), rtol=0, atol=1e-5
    )


def test_gathered_mixture_is_the_dense_one_with_one_hot_gates(arrays):
    ids_B = np.array([2, 0, 2, 1])
    gates_BTE = np.repeat(np.eye(E, dtype=np.float32)[ids_B][:, None], T, axis=1)
    x, a, b = arrays["x"], arrays["a"], arrays["b"]
    gathered = gathered_mixture(x, a, b, ids_B, ("embed", "mlp"))
    np.testing.assert_allclose(gathered, dense_mixture(x, a, b, gates_BTE), rtol=0, atol=1e-5)
    np.testing.assert_allclose(gathered, mixture(x, a, b, gates_BTE), rtol=0, atol=1e-5)


def test_an_experts_gradient_is_summed_over_rows_in_full_precision():
    rng = np.random.default_rng(2)
    rows, ids_B = 64, np.zeros(64, np.int32)
    x = jnp.asarray(rng.normal(size=(rows, T, D)), jnp.bfloat16)
    kernel = np.zeros((OUT, D), np.float32)
    experts = {
        name: rng.normal(size=size).astype(np.float32)
        for name, size in (("a", (1, D, R)), ("b", (1, R, OUT)))
    }
    projection = Projection(
        OUT, ("embed", "heads"), ExpertsConfig(("q",), R, R), 1, jnp.float32, name="q"
    )

    @jax.jit
    @jax.grad
    def gradient(experts, x_BTD, ids_B):
        variables = {"params": {"kernel": kernel}, "experts": experts}
        return jnp.sin(projection.apply(variables, x_BTD, OwnExpert(ids_B))).sum()

    of_all = gradient(experts, x, ids_B)
    by_row = [gradient(experts, x[row, None], ids_B[:1]) for row in range(rows)]
    for name, found in of_all.items():
        each = [of_row[name] for of_row in by_row]
        expected = np.sum(np.asarray(each, np.float64), axis=0)
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_projection_adds_the_mixture_times_alpha_over_rank(arrays, alpha):
    x, a, b, gates, kernel = (arrays[name] for name in ("x", "a", "b", "gates", "kernel"))
    projection = Projection(
        OUT, ("embed", "heads"), ExpertsConfig(("q",), R, alpha), E, jnp.float32, name="q"
    )
    variables = {"params": {"kernel": kernel}, "experts": {"a": a, "b": b}}
    found = jax.jit(projection.apply)(variables, x, Gates(gates))
    expected = x @ kernel.T + alpha / R * mixture(x, a, b, gates)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    base = jax.jit(projection.apply)(variables, x, None)
    np.testing.assert_allclose(base, x @ kernel.T, rtol=0, atol=1e-5)


def test_both_forms_agree_through_the_whole_model():
    model = toy_model()
    variables = toy_variables(model)
    ids_B = np.array([2, 0, 1, 2])
    batch = toy_batch([[(3, 4)], [(2, 2), (1, 3)], [(5, 3)], [(4, 4)]], 8)
    gates_BTE = jnp.repeat(jax.nn.one_hot(ids_B, 3)[:, None], 8, axis=1)
    gathered, _ = forward(model, variables, batch, OwnExpert(ids_B))
    dense, gates_LBTE = forward(model, variables, batch, Gates(gates_BTE))
    base, _ = forward(model, variables, batch, None)
    held = batch["segment_ids_BT"] > 0
    np.testing.assert_allclose(gathered[held], dense[held], rtol=0, atol=1e-4)
    assert np.abs(gathered - base)[held].mean() > 0.1
    np.testing.assert_array_equal(gates_LBTE, np.broadcast_to(gates_BTE, gates_LBTE.shape))


def test_targets_are_chosen_by_name():
    tree = shapes(toy_model(experts=dataclasses.replace(EXPERTS, targets=("q", "down"))))
    found = jax.tree.map(lambda leaf: leaf.shape, tree["experts"])
    assert found == {
        "layers": {
            "attention": {"q": {"a": (2, 3, 32, 2), "b": (2, 3, 2, 24)}},
            "mlp": {"down": {"a": (2, 3, 40, 2), "b": (2, 3, 2, 32)}},
        }
    }
    every = shapes(toy_model())["experts"]["layers"]
    assert {*every["attention"], *every["mlp"]} == {*EXPERTS.targets}


def test_an_untrained_expert_changes_nothing_and_no_two_start_alike():
    model = toy_model()
    variables = toy_variables(model) | {"experts": jax.jit(lambda: initial(model)["experts"])()}
    batch = toy_batch([[(3, 4)], [(2, 2), (1, 3)]], 8)
    with_experts, _ = forward(model, variables, batch, OwnExpert(np.array([0, 2])))
    base, _ = forward(model, variables, batch, None)
    np.testing.assert_array_equal(with_experts, base)
    a_LEDR = np.asarray(variables["experts"]["layers"]["mlp"]["down"]["a"])
    matrices = a_LEDR.reshape(-1, a_LEDR[0, 0].size)
    assert len(np.unique(matrices, axis=0)) == 6
    np.testing.assert_allclose(a_LEDR.var(), 1 / 40, rtol=0.2)


def test_frozen_dot_has_the_gradient_of_a_matmul_for_x_and_none_for_the_kernel(arrays):
    x, kernel = arrays["x"], arrays["kernel"].astype(jnp.bfloat16)
    weight = np.random.default_rng(1).normal(size=(B, T, OUT)).astype(np.float32)

    def plain(x, kernel):
        return jnp.einsum("BTD,OD->BTO", x, kernel.astype(x.dtype))

    def frozen(x, kernel):
        return frozen_dot(x, kernel, ("mlp", "embed"))

    np.testing.assert_array_equal(frozen(x, kernel), plain(x, kernel))

    def loss(dot, x, kernel):
        return (dot(x, kernel) * weight).sum()

    of_x, of_kernel = jax.grad(loss, argnums=(1, 2))(frozen, x, kernel)
    expected = jax.grad(loss, argnums=1)(plain, x, kernel)
    np.testing.assert_allclose(of_x, expected, rtol=0, atol=1e-6)
    assert not of_kernel.any()


@pytest.mark.parametrize("param_dtype", [jnp.float16, "nf4"])
def test_the_backward_pass_keeps_no_full_precision_copy_of_the_base(param_dtype, monkeypatch):
    spec = dataclasses.replace(SPEC, embed_dim=128, mlp_dim=256, head_dim=16, num_layers=8)
    experts = dataclasses.replace(EXPERTS, targets=("q", "v"))
    # Not bfloat16: on CPUs a copy of its bits is made.
    model = toy_model(spec=spec, experts=experts, param_dtype=param_dtype)
    batch = toy_batch([[(3, 5)]], 8)

    def temp_bytes():
        def loss(experts, params):
            variables = {"params": params, "experts": experts}
            return forward.__wrapped__(model, variables, batch, OwnExpert(np.array([0])))[0].sum()

        tree = shapes(model)
        compiled = jax.jit(jax.grad(loss)).lower(tree["experts"], tree["params"]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    full_precision_copy = 4 * num_params(shapes(model)["params"]["layers"])
    frozen = temp_bytes()
    monkeypatch.setattr(lora, "frozen_dot", lambda x, w, _: x @ dequantized(w, x.dtype).T)
    plain = temp_bytes()
    assert plain - frozen > 0.9 * full_precision_copy
    assert frozen < 0.5 * full_precision_copy
