import re
from pathlib import Path

import jax
import numpy as np
import pytest
from toys import leaves_equal

from safemoe_jax.errors import UserError
from safemoe_jax.evaluation import systems
from safemoe_jax.model.router import gates_from_logits

RNG = np.random.default_rng(0)
LAYERS, WIDTH, EXPERTS = 3, 5, 4


def router(slots=EXPERTS, layers=LAYERS):
    shape = (layers,) if layers else ()
    kernel, bias = (RNG.normal(size=(*shape, *rest)) for rest in ((WIDTH, slots), (slots,)))
    leaves = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
    return {"layers": {"router": leaves}}


def leaves_of(tree):
    return tree["layers"]["router"]["kernel"], tree["layers"]["router"]["bias"]


def test_random_weights_have_the_norms_of_the_trained_ones_and_no_more():
    trained = router()
    trained["layers"]["router"]["bias"][1] = 0.0  # as an untrained layer's
    drawn = systems.matched_random(trained, seed=1)
    for leaf, own, axes in zip(leaves_of(drawn), leaves_of(trained), ((1, 2), (1,)), strict=True):
        norms = [np.sqrt((x.astype(float) ** 2).sum(axis=axes)) for x in (leaf, own)]
        np.testing.assert_allclose(*norms, rtol=1e-5)
        assert abs(np.corrcoef(leaf.ravel(), own.ravel())[0, 1]) < 0.7
    assert leaves_equal(drawn, systems.matched_random(trained, seed=1))
    assert not leaves_equal(drawn, systems.matched_random(trained, seed=2))
    # Of experts [L, E, D, R] each has its own norm.
    experts = {"a": RNG.normal(size=(2, 3, 5, 2)) * np.array([1.0, 10.0, 0.0])[:, None, None]}
    norms = np.sqrt((systems.matched_random(experts, 0)["a"] ** 2).sum(axis=(2, 3)))
    np.testing.assert_allclose(norms, np.sqrt((experts["a"] ** 2).sum(axis=(2, 3))))


@pytest.mark.parametrize("slots", [EXPERTS, EXPERTS + 1])
def test_a_shuffled_router_gives_every_expert_another_ones_gate(slots):
    trained = router(slots)
    kernel, bias = leaves_of(systems.shuffled_router(trained, EXPERTS, seed=3))
    own_kernel, own_bias = leaves_of(trained)
    order = [int(np.flatnonzero(own_bias[0] == value)[0]) for value in bias[0]]
    assert sorted(order[:EXPERTS]) == list(range(EXPERTS))
    assert all(new != old for new, old in enumerate(order[:EXPERTS]))
    assert order[EXPERTS:] == list(range(EXPERTS, slots))  # "no expert" stays what it is
    np.testing.assert_array_equal(kernel, own_kernel[..., order])
    np.testing.assert_array_equal(bias, own_bias[..., order])


def test_one_expert_cannot_be_shuffled():
    with pytest.raises(UserError, match="needs two experts"):
        systems.shuffled_router(router(1), 1, seed=0)


def test_a_constant_router_has_the_gates_that_it_is_given():
    gates_LE = RNG.uniform(-1.0, 1.0, (LAYERS, EXPERTS))
    gates_LE[0] = [0.1, 0.2, 0.0, 0.0]  # as a softmax gives them where others were dropped
    gates_LE[1, 0] = 1.0
    kernel, bias = leaves_of(systems.constant_router(gates_LE, WIDTH))
    assert kernel.shape == (LAYERS, WIDTH, EXPERTS) and not kernel.any()
    found = gates_from_logits(bias[:, None], systems.CONSTANT, EXPERTS)[:, 0]
    np.testing.assert_allclose(found, gates_LE, rtol=1e-4)


def test_one_expert_is_taken_out():
    experts = {"a": np.arange(24.0).reshape(2, 3, 2, 2)}
    left = systems.without_expert(experts, 1)["a"]
    np.testing.assert_array_equal(left, experts["a"][:, [0, 2]])


def test_fixed_gates():
    np.testing.assert_allclose(systems.fixed_gates("uniform", 4), [0.25] * 4)
    np.testing.assert_allclose(systems.fixed_gates("negated", 4), [-0.25] * 4)


def test_null_experts_change_nothing():
    assert not any(leaf.any() for leaf in jax.tree.leaves(systems.null_experts(router())))


def test_the_table_is_whole():
    assert len({recipe.title for recipe in systems.SYSTEMS.values()}) == len(systems.SYSTEMS)
    assert {*systems.LEFT_OUT_SYSTEMS, *systems.ATTACKED_SYSTEMS} <= systems.SYSTEMS.keys()
    systems.check_names(list(systems.SYSTEMS))
    with pytest.raises(UserError, match="names 'safemo'; choose of base, base_prompted, safemoe"):
        systems.check_names(["base", "safemo"])


def test_the_documentation_has_the_table():
    text = (Path(__file__).parents[2] / "docs" / "recipes" / "compare.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE) == list(systems.SYSTEMS)
