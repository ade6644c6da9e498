"""Slots: what runs beside an answer changes nothing in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import SPEC, toy_model, toy_variables

from safemoe_jax.config import ExpertsConfig, MeshConfig
from safemoe_jax.inference import engine as engine_module
from safemoe_jax.inference.engine import Engine, Request, rows_together
from safemoe_jax.model.lora import Routed
from safemoe_jax.model.precision import bits
from safemoe_jax.parallel.mesh import make_mesh

MODEL = toy_model(experts=ExpertsConfig(("q", "down"), rank=2, alpha=3.0))
VARIABLES = toy_variables(MODEL)
NEVER = frozenset()


def prompt(length, seed=0):
    return np.random.default_rng([seed, length]).integers(1, SPEC.vocab_size, length).tolist()


def requests():
    """Of every kind: short and long, in two buckets, greedy and drawn, with and without an end."""
    return [
        Request(prompt(3), NEVER, 20),
        Request(prompt(70), NEVER, 5, temperature=8.0, seed=1),
        Request(prompt(9), frozenset(range(0, SPEC.vocab_size, 4)), 30),
        Request(prompt(12), NEVER, 1),
        Request(prompt(5), NEVER, 12, temperature=8.0, top_p=0.5, seed=2**40 + 3, index=7),
        Request(prompt(6), NEVER, 9),
        Request(prompt(2), NEVER, 17, temperature=8.0, seed=-1),
    ]


def collect(engine, events):
    for event in engine.step():
        events.setdefault(event.request, []).append(event)


def run(engine, asked, late=()):
    """Events by request; each of `late` is submitted a step after the one before it."""
    events, late = {}, list(late)
    for request in asked:
        engine.submit(request)
    while engine.busy or late:
        collect(engine, events)
        if late:
            engine.submit(late.pop(0))
    return events


def tokens(events):
    return [event.token for event in events if event.token is not None]


@pytest.fixture(scope="module")
def alone():
    """What each request is answered where nothing else runs."""
    return [run(Engine(MODEL, VARIABLES, Routed(), 1), [r])[r] for r in requests()]


def test_answers_are_those_given_alone_whatever_runs_beside_and_whenever_they_come(alone):
    asked = requests()
    events = run(Engine(MODEL, VARIABLES, Routed(), 3), asked[:4], late=asked[4:])
    for request, expected in zip(asked, alone, strict=True):
        assert tokens(events[request]) == tokens(expected)
        for ours, theirs in zip(events[request], expected, strict=True):
            assert ours.finish == theirs.finish
            np.testing.assert_allclose(ours.gates_LE, theirs.gates_LE, rtol=0, atol=1e-4)


def test_each_answer_ends_as_it_should(alone):
    assert [events[-1].finish for events in alone] == ["length"] * 2 + ["stop"] + ["length"] * 4
    for request, events in zip(requests(), alone, strict=True):
        assert all(event.finish is None for event in events[:-1])
        if events[-1].finish == "stop":
            assert events[-1].token is None
            assert len(events) <= request.max_new_tokens
        else:
            assert len(tokens(events)) == request.max_new_tokens


def test_seed_and_index_tell_drawn_answers_apart(alone):
    def drawn(**settings):
        request = Request(prompt(70), NEVER, 5, temperature=8.0, **settings)
        return tokens(run(Engine(MODEL, VARIABLES, Routed(), 1), [request])[request])

    assert drawn(seed=1) == drawn(seed=1 + 2**32) == tokens(alone[1])
    assert drawn(seed=1, index=1) != drawn(seed=1)
    assert drawn(seed=2) != drawn(seed=1)


def test_what_is_over_frees_its_slot_and_says_no_more(alone):
    engine, asked = Engine(MODEL, VARIABLES, Routed(), 1), requests()
    endless, never_begun, last = Request(prompt(4), NEVER, 100), asked[1], asked[0]
    for request in (endless, never_begun, last):
        engine.submit(request)
    events = {}
    for _ in range(4):
        collect(engine, events)
    assert len(events[endless]) == 3  # a step's events come with the next one
    endless.over = never_begun.over = True
    steps = 0
    while engine.busy:
        collect(engine, events)
        steps += 1
    assert steps <= last.max_new_tokens + 2
    assert len(events[endless]) == 3
    assert never_begun not in events
    assert tokens(events[last]) == tokens(alone[0])


def test_the_cache_is_as_long_as_what_runs_needs(monkeypatch):
    lengths = []
    original = engine_module._step

    def step(model, variables, routing, state, live_B):
        lengths.append(state.cache.k_LBKCH.shape[3])
        return original(model, variables, routing, state, live_B)

    monkeypatch.setattr(engine_module, "_step", step)
    engine = Engine(MODEL, VARIABLES, Routed(), 1)
    run(engine, [Request(prompt(3), NEVER, 2), Request(prompt(70), NEVER, 2)])
    run(engine, [Request(prompt(66), NEVER, 2), Request(prompt(5), NEVER, 2)])
    assert lengths == [64] * 2 + [128] * 4 + [64] * 2


def test_one_program_decodes_and_two_a_length_read_prompts():
    """A program that is compiled while others wait costs them seconds."""
    engine_module._step.clear_cache()
    engine_module._read_prompts.clear_cache()
    lengths = (3, 20, 7, 12, 5, 9, 30, 60)
    run(
        Engine(MODEL, VARIABLES, Routed(), 4),
        [Request(prompt(lengths[0]), NEVER, 3)],
        late=[Request(prompt(n), NEVER, 1 + n % 3, temperature=float(n % 2)) for n in lengths[1:]],
    )
    assert engine_module._step._cache_size() == 1
    assert engine_module._read_prompts._cache_size() <= 2


def test_a_step_in_bfloat16_widens_no_stack_of_weights_or_cache():
    """As bits they are sliced as they are; the values are the same."""
    model = toy_model(param_dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    variables = toy_variables(model)
    packed = variables | {
        "params": variables["params"]
        | {"layers": jax.tree.map(bits, variables["params"]["layers"])}
    }
    state = engine_module._empty(model, 4, 48)
    arguments = (Routed(), state, np.ones(4, bool))
    text = engine_module._step.lower(model, packed, *arguments).compile().as_text()
    for stack in (state.cache.k_LBKCH, packed["params"]["layers"]["mlp"]["up"]["kernel"]):
        shape = ",".join(map(str, stack.shape))
        assert f"u16[{shape}]" in text and f"f32[{shape}]" not in text

    def tokens_of(variables):
        asked = [Request(prompt(n, seed=n), NEVER, 6) for n in (3, 9)]
        found = run(Engine(model, variables, Routed(), 4), asked)
        return [tokens(events) for events in found.values()]

    assert tokens_of(packed) == tokens_of(variables)


def test_no_device_idles_while_others_read():
    """A TPU reads 16,384 tokens at once; rows are as many as devices, or a multiple, up to all."""
    assert rows_together(2048, 64, "tpu") == 8
    assert rows_together(40_000, 64, "tpu") == 1
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4, tensor=1, context=1))):
        assert rows_together(1024, 64, "tpu") == 16
        assert rows_together(1536, 64, "tpu") == 16  # ten would not go into eight
        assert rows_together(40_000, 64, "tpu") == 8
        assert rows_together(64, 24, "tpu") == 24
