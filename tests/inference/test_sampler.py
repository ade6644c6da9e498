import jax.numpy as jnp
import numpy as np
import pytest
from toys import SPEC, forward, toy_model, toy_variables

from safemoe_jax.config import ExpertsConfig
from safemoe_jax.errors import UserError
from safemoe_jax.inference import engine
from safemoe_jax.inference.engine import bucket
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.model.lora import Routed

NEVER = -1  # no token ends the turn
NEW = 8
LENGTHS = (3, 20, 7, 12, 5)
MODEL = toy_model(experts=ExpertsConfig(("q", "down"), rank=2, alpha=3.0))
VARIABLES = toy_variables(MODEL)


def prompt(length, seed=0):
    return np.random.default_rng([seed, length]).integers(1, SPEC.vocab_size, length).tolist()


PROMPTS = [prompt(length) for length in LENGTHS]


def generate(
    prompts=PROMPTS,
    *,
    ends=frozenset({NEVER}),
    routing=Routed(),  # noqa: B008
    temperature=0.0,
    top_p=1.0,
    seed=0,
    batch_size=5,
):
    return Sampler(MODEL, VARIABLES, routing, ends).generate(
        prompts,
        max_new_tokens=NEW,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
    )


def tokens(answers):
    return [answer.tokens for answer in answers]


def teacher_forced(prompts, answers, routing):
    """What the training forward pass says of prompt and answer, one row each.

    Yields per prompt the logits [answer, V] that chose the answer, and its gates [answer, L, E].
    """
    shape = (len(prompts), SPEC.max_positions)
    tokens_BT, segment_ids_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    prompt_mask_BT = np.zeros(shape, bool)
    for row, (start, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = [*start, *answer.tokens]
        tokens_BT[row, : len(whole)] = whole
        segment_ids_BT[row, : len(whole)] = 1
        prompt_mask_BT[row, : len(start)] = True
    batch = {
        "tokens_BT": tokens_BT,
        "positions_BT": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "segment_ids_BT": segment_ids_BT,
        "prompt_mask_BT": prompt_mask_BT,
    }
    logits_BTV, gates_LBTE = forward(MODEL, VARIABLES, batch, routing)
    for row, (start, answer) in enumerate(zip(prompts, answers, strict=True)):
        first, count = len(start), len(answer.tokens)
        chose = np.asarray(logits_BTV)[row, first - 1 : first - 1 + count]
        gates = None
        if gates_LBTE is not None:
            gates = np.asarray(gates_LBTE)[:, row, first : first + count].swapaxes(0, 1)
        yield chose, gates


@pytest.fixture(scope="module")
def greedy():
    return generate()


def test_greedy_is_the_argmax_of_the_training_forward_pass_and_the_gates_are_its_gates(greedy):
    for answer, (chose, gates) in zip(
        greedy, teacher_forced(PROMPTS, greedy, Routed()), strict=True
    ):
        assert answer.tokens == chose.argmax(axis=-1).tolist()
        assert answer.gates_TLE.shape == (NEW, SPEC.num_layers, 3)
        np.testing.assert_allclose(answer.gates_TLE, gates, rtol=0, atol=1e-4)
        assert gates.std() > 0.1
        assert not answer.finished


def test_the_base_alone_has_no_gates_and_answers_otherwise(greedy):
    answers = generate(routing=None)
    for answer, (chose, _) in zip(answers, teacher_forced(PROMPTS, answers, None), strict=True):
        assert answer.tokens == chose.argmax(axis=-1).tolist()
        assert answer.gates_TLE is None
    assert tokens(answers) != tokens(greedy)


def test_ragged_prompts_in_one_batch_answer_as_one_at_a_time(greedy):
    alone = generate(batch_size=1)
    assert tokens(alone) == tokens(greedy)
    for one, together in zip(alone, greedy, strict=True):
        np.testing.assert_allclose(one.gates_TLE, together.gates_TLE, rtol=0, atol=1e-4)


def test_an_answer_stops_at_any_of_its_ends_and_decoding_once_all_have(greedy, monkeypatch):
    steps = []
    original = engine._step
    monkeypatch.setattr(engine, "_step", lambda *args: steps.append(args) or original(*args))
    ends = frozenset({greedy[0].tokens[3], greedy[1].tokens[2]})

    def length(answer):
        return next((i for i, token in enumerate(answer.tokens) if token in ends), NEW)

    stopped = generate(ends=ends)
    assert len(stopped[0].tokens) == length(greedy[0]) <= 3
    assert len(stopped[1].tokens) == length(greedy[1]) <= 2
    for before, after in zip(greedy, stopped, strict=True):
        assert after.tokens == before.tokens[: length(before)]
        assert after.finished == (length(before) < NEW)
        assert after.gates_TLE.shape[0] == length(before)

    # All prompts the same, so all stop at the same step. The token that ends it is one step,
    # and one more is on its way when that is read.
    steps.clear()
    generate([PROMPTS[0]] * len(PROMPTS), ends=ends)
    assert len(steps) == length(greedy[0]) + 2


@pytest.mark.parametrize(
    "length, padded",
    [(1, 64), (64, 64), (65, 128), (129, 192), (295, 320), (513, 640), (900, 1024)],
)
def test_four_buckets_from_a_power_of_two_to_the_next_and_none_under_64(length, padded):
    assert bucket(length) == padded


def test_either_side_of_a_bucket_and_the_longest_prompt_that_fits():
    prompts = [prompt(length) for length in (63, 64, 65, 100, SPEC.max_positions - NEW)]
    answers = generate(prompts, batch_size=1)  # buckets 64, 64, then 128
    for answer, (chose, gates) in zip(
        answers, teacher_forced(prompts, answers, Routed()), strict=True
    ):
        assert answer.tokens == chose.argmax(axis=-1).tolist()
        np.testing.assert_allclose(answer.gates_TLE, gates, rtol=0, atol=1e-4)


def test_an_answer_depends_on_seed_and_index_and_not_on_the_batch():
    prompts = [PROMPTS[0]] * len(PROMPTS)
    sampled = tokens(generate(prompts, temperature=8.0, batch_size=2))
    assert len(set(map(tuple, sampled))) == len(prompts)
    assert tokens(generate(prompts, temperature=8.0)) == sampled
    assert tokens(generate(prompts[:3], temperature=8.0, batch_size=2)) == sampled[:3]
    assert tokens(generate(prompts, temperature=8.0, batch_size=2, seed=1)) != sampled


def test_each_token_is_drawn_anew():
    """At a temperature that makes all tokens alike, one draw for all steps would repeat a token."""
    assert all(len(set(answer)) > NEW // 2 for answer in tokens(generate(temperature=1e9)))


def test_sampling_becomes_greedy_as_temperature_or_nucleus_shrinks(greedy):
    assert tokens(generate(temperature=1e-4)) == tokens(greedy)
    assert tokens(generate(temperature=5.0, top_p=1e-6)) == tokens(greedy)
    assert tokens(generate(temperature=5.0)) != tokens(greedy)


@pytest.mark.parametrize(
    "top_p, kept",
    [
        (1e-6, {2}),
        (0.49, {2}),
        (0.51, {0, 2}),
        (0.79, {0, 2}),
        (0.81, {0, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, kept):
    probability_V = np.array([0.3, 0.05, 0.5, 0.15], np.float32)
    logits_BV = jnp.log(np.stack([probability_V, probability_V[::-1]])) + 3.0
    found = np.asarray(engine._nucleus(logits_BV, jnp.full(2, top_p, jnp.float32)))
    assert set(np.flatnonzero(np.isfinite(found[0]))) == kept
    assert set(3 - np.flatnonzero(np.isfinite(found[1]))) == kept
    np.testing.assert_array_equal(found[0][sorted(kept)], logits_BV[0][np.array(sorted(kept))])


@pytest.mark.parametrize("length", [0, SPEC.max_positions - NEW + 1])
def test_a_prompt_without_room_is_the_users_mistake(length):
    message = f"prompt 1 has {length} tokens and 8 new ones are asked for; the base reads 128: give"
    with pytest.raises(UserError, match=message):
        generate([PROMPTS[0], prompt(length)])


def test_no_prompts_no_answers():
    assert generate([]) == []
