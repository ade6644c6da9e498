"""Each layout computes what one device does, and moves over the network what it should."""

import collections
import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import (
    SPEC,
    forward,
    initial,
    toy_batch,
    toy_model,
    toy_variables,
    toy_weights,
)

from safemoe_jax.config import ExpertsConfig, MeshConfig
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.model.lora import Routed
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.parallel.sharding import put_batch, replicated, shardings
from safemoe_jax.training.state import init_expert_state, init_router_state, state_shardings
from safemoe_jax.training.steps import expert_train_step, gate_train_step

LAYERS = 5  # no other size of the model is 5: a shape that begins with it is stacked
MODEL = toy_model(
    spec=dataclasses.replace(SPEC, vocab_size=96, num_layers=LAYERS, head_dim=8, mlp_dim=48),
    experts=ExpertsConfig(("q", "o", "down"), rank=2, alpha=1.0),
)
LENGTH = 16
ROWS = [[(3, 5), (2, 4)], [(4, 9)], [(2, 3), (2, 2)], [(6, 8)]] * 2
EXPERT_IDS = [0, 0, 1, 1, 1, 2, 2, 2]
PROMPTS = [[7, 3, 9], [11], [4, 4, 8, 1, 2]]
ONE = MeshConfig(data=1, fsdp=1, tensor=1, context=1)
LAYOUTS = {
    "data": dataclasses.replace(ONE, data=8),
    "fsdp": dataclasses.replace(ONE, fsdp=8),
    "tensor": dataclasses.replace(ONE, data=2, fsdp=2, tensor=2),
    "context": dataclasses.replace(ONE, fsdp=4, context=2),
}
# Its state is the last gradient.
GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params=None: (gradient, gradient),
)


@functools.cache
def on(layout: str):
    """Both train steps, the logits and an answer on a layout, and the steps' compiled text."""
    mesh = make_mesh(LAYOUTS.get(layout, ONE))
    boxed = jax.eval_shape(lambda: initial(MODEL, unbox=False))
    variables = jax.device_put(toy_variables(MODEL), shardings(mesh, boxed))
    batch = put_batch(mesh, toy_batch(ROWS, LENGTH, expert_ids=EXPERT_IDS))
    found = SimpleNamespace(mesh=mesh, text={}, loss={}, gradient={})
    with jax.set_mesh(mesh):
        for stage, step, begin in (
            ("experts", expert_train_step, init_expert_state),
            ("router", gate_train_step, init_router_state),
        ):
            state = begin(toy_variables(MODEL)[stage], GRADIENT)
            placed = state_shardings(mesh, boxed[stage], state, GRADIENT)
            state = jax.device_put(state, placed)
            frozen = {name: variables[name] for name in ("params", "experts")}
            if stage == "experts":
                del frozen["experts"]
            step = functools.partial(step, model=MODEL, tx=GRADIENT, accumulation=1)
            step = jax.jit(step, donate_argnums=0, out_shardings=(placed, replicated(mesh)))
            compiled = step.lower(state, frozen, batch).compile()
            found.text[stage] = compiled.as_text()
            state, metrics = compiled(state, frozen, batch)
            assert jax.tree.map(lambda leaf: leaf.sharding, state) == placed
            found.loss[stage] = np.asarray(metrics["loss"])
            found.gradient[stage] = jax.device_get(state.opt_state)
        found.logits, _ = jax.device_get(forward(MODEL, variables, batch, Routed()))
        found.answers = Sampler(MODEL, variables, Routed(), ends=frozenset({0})).generate(
            PROMPTS, max_new_tokens=6, temperature=0, top_p=1.0, seed=0, batch_size=4
        )
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_computes_what_one_device_does(layout):
    one, found = on("one"), on(layout)
    scale = np.abs(one.logits).max()
    np.testing.assert_allclose(found.logits, one.logits, rtol=0, atol=1e-5 * scale)
    for stage in ("experts", "router"):
        np.testing.assert_allclose(found.loss[stage], one.loss[stage], rtol=1e-5)

        def close(left, right):
            assert np.linalg.norm(left - right) < 1e-5 * np.linalg.norm(right)

        jax.tree.map(close, found.gradient[stage], one.gradient[stage])
    for mine, theirs in zip(found.answers, one.answers, strict=True):
        assert mine.tokens == theirs.tokens
        np.testing.assert_allclose(mine.gates_TLE, theirs.gates_TLE, rtol=0, atol=1e-5)


def collectives(text):
    """{kind: shapes of its results on a device}, all of them and those in loops over layers."""
    everywhere, in_layers = collections.defaultdict(set), collections.defaultdict(set)
    pattern = r" = (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\("
    for line in text.splitlines():
        if match := re.search(pattern, line):
            shapes = re.findall(r"\w+\[([\d,]+)\]", match[1])
            shapes = {tuple(map(int, shape.split(","))) for shape in shapes}
            everywhere[match[2]] |= shapes
            if "/while/body/" in line:
                in_layers[match[2]] |= shapes
    return everywhere, in_layers


@pytest.mark.parametrize("stage", ["experts", "router"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_moves_over_the_network_what_it_should(layout, stage):
    spec, mesh = MODEL.spec, LAYOUTS[layout]
    everywhere, in_layers = collectives(on(layout).text[stage])
    heads, keys, mlp = (
        size // mesh.tensor
        for size in (
            spec.num_heads * spec.head_dim,
            spec.num_kv_heads * spec.head_dim,
            spec.mlp_dim,
        )
    )
    width, rows = spec.embed_dim, len(ROWS) // (mesh.data * mesh.fsdp)

    assert not [shape for shapes in everywhere.values() for shape in shapes if shape[0] == LAYERS]
    # One layer's weights at a time, in the loop over layers, and with fsdp alone.
    kernels = {(width, heads), (keys, width), (heads, width), (width, mlp), (mlp, width)}
    kernels = {(1, *kernel) for kernel in kernels}
    assert in_layers["all-gather"] & kernels == (kernels if mesh.fsdp > 1 else set())
    # What is trained: summed over rows. XLA for TPU makes reduce-scatters of these.
    trained = {"experts": (3, width // mesh.tensor, 2), "router": (3, width // mesh.tensor)}[stage]
    assert trained in in_layers["all-reduce"]
    if mesh.tensor > 1:  # each layer's outputs, summed over the parts of its heads and MLP
        assert (rows, LENGTH, width) in in_layers["all-reduce"]
    if mesh.context > 1:  # keys
        assert (rows, LENGTH, spec.num_kv_heads, spec.head_dim) in in_layers["all-gather"]
    if layout == "data":
        assert not everywhere["all-gather"]


def test_a_quantized_base_on_a_mesh_answers_as_what_it_stands_for_on_one_device():
    spec = dataclasses.replace(MODEL.spec, embed_dim=128, head_dim=32, mlp_dim=128)
    weights, model = toy_weights(spec), MODEL.clone(spec=spec, param_dtype="nf4")
    mesh = make_mesh(LAYOUTS["tensor"])
    boxed = jax.eval_shape(lambda: initial(model, unbox=False))
    variables = toy_variables(plain := MODEL.clone(spec=spec))
    trained = {name: variables[name] for name in ("experts", "router")}

    def answers(model, params):
        sampler = Sampler(model, {"params": params, **trained}, Routed(), ends=frozenset({0}))
        return sampler.generate(
            PROMPTS, max_new_tokens=6, temperature=0, top_p=1.0, seed=0, batch_size=4
        )

    with jax.set_mesh(mesh):
        found = answers(model, weights.place("nf4", shardings(mesh, boxed["params"])))
    for mine, theirs in zip(found, answers(plain, weights.read("nf4")), strict=True):
        assert mine.tokens == theirs.tokens
        np.testing.assert_allclose(mine.gates_TLE, theirs.gates_TLE, rtol=0, atol=1e-5)
