import numpy as np
import pytest

from safemoe_jax.evaluation.gates import gate_statistics, router_rows


def test_statistics_of_one_answer():
    gates_TLE = np.array([[[0.2, -0.2], [0.5, 0.0]], [[0.0, 0.0], [0.5, 0.0]]])
    found = gate_statistics(gates_TLE, has_null=False)
    assert found["gates_layers"] == [[0.1, -0.1], [0.5, 0.0]]
    assert found["mass_layers"] == [[0.1, 0.1], [0.5, 0.0]]
    # Half and half once, one expert alone twice; where all gates are 0 there are no shares.
    assert found["entropy"] == pytest.approx(np.log(2) / 3)
    assert found["null"] is None
    assert gate_statistics(np.abs(gates_TLE), has_null=True)["null"] == pytest.approx(1 - 1.4 / 4)


def test_an_empty_answer_has_no_statistics():
    found = gate_statistics(np.zeros((0, 2, 3)), has_null=True)
    assert (found["entropy"], found["null"]) == (None, None)
    assert np.shape(found["gates_layers"]) == (2, 3)


def answer(domain, mass, tokens=1, fold="", **changes):
    row = {
        "system": "safemoe",
        "seed": 0,
        "fold": fold,
        "benchmark": "held_out",
        "domain": domain,
        "num_tokens": tokens,
        "gates_layers": (-np.array(mass)).tolist(),
        "mass_layers": mass,
        "entropy": 0.5,
        "null": None,
    }
    return {**row, **changes}


def test_rows_weigh_by_tokens_and_count_the_largest():
    answers = [
        answer("cats", [[1.0, 0.0], [0.0, 0.5]], tokens=3),
        answer("dogs", [[0.2, 0.0], [0.2, 0.0]], entropy=0.1),
        answer("dogs", [[0.0, 0.3], [0.0, 0.3]]),
        answer("dogs", [[0.0, 0.0], [0.0, 0.0]], entropy=None),  # no largest
        {"system": "base", "num_tokens": 9},
    ]
    (row,) = router_rows(answers, ["cats", "dogs"])
    assert row["argmax"] == {"cats": {"cats": 1, "dogs": 0}, "dogs": {"cats": 1, "dogs": 1}}
    np.testing.assert_allclose(row["mass_LE"][0], [3.2 / 6, 0.3 / 6], atol=1e-5)
    np.testing.assert_allclose(row["gates_LE"], -np.array(row["mass_LE"]))
    assert row["entropy"] == pytest.approx((3 * 0.5 + 0.1 + 0.5) / 5)
    assert row["null"] is None


def test_a_left_out_domain_is_no_expert():
    (row,) = router_rows([answer("cats", [[0.1]], fold="cats")], ["cats", "dogs"])
    assert (row["experts"], row["argmax"]) == (["dogs"], {"cats": {"dogs": 1}})
