"""The divergence of two mixtures, held to what their whole logits say."""

import dataclasses

import jax
import numpy as np
import pytest
from toys import SPEC, forward, toy_batch, toy_model, toy_variables

from safemoe_jax.config import ExpertsConfig, MeshConfig, RouterConfig
from safemoe_jax.inference.divergence import Answer, Mixture, answers, kl_per_token, mean_gates
from safemoe_jax.inference.sampler import Generation
from safemoe_jax.model.lora import Routed
from safemoe_jax.parallel.mesh import make_mesh

# The "sequence" granularity pools over the prompt, so it sees where the prompt is thought to end.
MODEL = toy_model(
    spec=dataclasses.replace(SPEC, vocab_size=64),
    experts=ExpertsConfig(("q", "down"), rank=2, alpha=3.0),
    router=RouterConfig("layer", "sequence", "signed", top_k=0, temperature=1.0),
)
SPOKEN = [Answer([5, 6, 7], [8, 9, 10, 11]), Answer([12], [13]), Answer([3, 4], [20, 21])]


@pytest.fixture(scope="module")
def gated():
    return Mixture(MODEL, toy_variables(MODEL), Routed())


def by_hand(mixture, answer):
    """Log-probabilities [n, V] and gates [L, n, E] where the answer's tokens are predicted."""
    batch = toy_batch([[(len(answer.prompt), len(answer.response))]], 16)
    tokens = answer.prompt + answer.response
    batch["tokens_BT"][0, : len(tokens)] = tokens
    logits_BTV, gates_LBTE = forward(mixture.model, mixture.variables, batch, mixture.routing)
    places = slice(len(answer.prompt) - 1, len(tokens) - 1)
    log_p = np.asarray(jax.nn.log_softmax(logits_BTV))[0, places].astype(np.float64)
    return log_p, None if gates_LBTE is None else np.asarray(gates_LBTE)[:, 0, places]


def test_kl_is_that_of_the_whole_distributions(gated):
    base = Mixture(MODEL, {"params": gated.variables["params"]}, None)
    pairs = [(by_hand(gated, answer)[0], by_hand(base, answer)[0]) for answer in SPOKEN]
    total = sum((np.exp(p) * (p - q)).sum() for p, q in pairs)
    found = kl_per_token(gated, {"base": base, "itself": gated}, SPOKEN)
    assert total / 7 > 0.1
    assert found["base"] == pytest.approx(total / 7, rel=1e-4)
    assert found["itself"] == 0.0


def test_mean_gates_are_over_all_answer_tokens(gated):
    expected = np.concatenate([by_hand(gated, answer)[1] for answer in SPOKEN], axis=1).mean(axis=1)
    np.testing.assert_allclose(mean_gates(gated, SPOKEN), expected, atol=1e-5)
    assert expected.shape == (2, 3)


def test_it_is_the_same_on_a_mesh_that_cuts_rows(gated):
    base = Mixture(MODEL, {"params": gated.variables["params"]}, None)
    alone = kl_per_token(gated, {"base": base}, SPOKEN)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, tensor=1, context=1))):
        together = kl_per_token(gated, {"base": base}, SPOKEN)
    assert together["base"] == pytest.approx(alone["base"], rel=1e-4)


def test_the_end_of_a_finished_answer_is_one_of_its_tokens():
    spoken = [
        Generation([4, 5], True, None),
        Generation([], True, None),
        Generation([6], False, None),
    ]
    assert answers([[1], [2], [3]], spoken, 9) == [
        Answer([1], [4, 5, 9]),
        Answer([2], [9]),
        Answer([3], [6]),
    ]
