import hashlib
import json

import numpy as np
import pytest
from tiny import byte_tokenizer

from safemoe_jax.config import EvaluationConfig
from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.evaluation.benchmarks import Prompt
from safemoe_jax.evaluation.evaluate import (
    System,
    answer_prompts,
    expert_rows,
    judge_answers,
    likelihood_rows,
)
from safemoe_jax.evaluation.judges import Verdict
from safemoe_jax.inference.sampler import Generation

TOKENIZER = byte_tokenizer()
CHAT = ChatFormat(TOKENIZER)
CONFIG = EvaluationConfig(
    systems=("base", "safemoe"),
    prompts_per_domain=0,
    benchmarks=(),
    prompts_per_benchmark=0,
    max_new_tokens=16,
    temperature=0.0,
    top_p=1.0,
    batch_size=2,
    judge_rows=20,
    demonstration=False,
)


def prompt(number, domain, safe=(), harmful_answers=(), **changes):
    values = {
        "id": f"p{number}",
        "benchmark": "held_out",
        "domain": domain,
        "messages": ({"role": "user", "content": f"Question {number}?"},),
        "group": number,
        "harmful": True,
        "refusal_only": False,
        "safe_answers": safe,
        "harmful_answers": harmful_answers,
    }
    return Prompt(**{**values, **changes})


PROMPTS = [prompt(1, "cats"), prompt(2, "cats"), prompt(3, "dogs")]


class EchoSampler:
    """Answers "<name> <prompt tokens>"; expert e has gate t + l / 10 + e at token t, layer l."""

    def __init__(self, name, gated):
        self.name, self.gated, self.calls = name, gated, []

    def generate(self, prompts, **settings):
        self.calls.append(settings)
        answers = []
        for tokens in prompts:
            ids = TOKENIZER.encode(f"{self.name} {len(tokens)}")
            token, layer, expert = np.ogrid[: len(ids), :2, :3]
            gates_TLE = token + layer / 10 + expert if self.gated else None
            answers.append(Generation(ids, True, gates_TLE))
        return answers


def system(name, *, gated=False, logp=-1.0):
    return System(name, EchoSampler(name, gated), constant(logp), gated)


def constant(logp):
    """Scores every character of an answer alike."""

    def score(pairs, *, description):
        return [np.full(len(answer), logp, np.float32) for _, answer in pairs]

    return score


@pytest.fixture
def systems():
    return [system("base"), system("safemoe", gated=True)]


def answer(systems, directory, **changes):
    config = EvaluationConfig(**{**CONFIG.__dict__, **changes})
    return answer_prompts(systems, PROMPTS, CHAT, config, 5, directory)


def test_every_system_answers_every_prompt_in_order(systems, tmp_path):
    rows = answer(systems, tmp_path)
    assert [(row["system"], row["prompt_id"]) for row in rows] == [
        (name, prompt.id) for name in ("base", "safemoe") for prompt in PROMPTS
    ]
    count = len(CHAT.prompt_ids(PROMPTS[0].messages))
    assert rows[0]["response"] == f"base {count}"
    assert rows[0]["sha256"] == hashlib.sha256(rows[0]["response"].encode()).hexdigest()
    assert (rows[2]["domain"], rows[2]["seed"], rows[2]["finished"]) == ("dogs", 5, True)
    assert "gates" not in rows[0]
    gated = rows[3]
    assert "".join(gated["tokens"]) == gated["response"]
    np.testing.assert_allclose(gated["gates"][4], [4.05, 5.05, 6.05], atol=1e-6)
    np.testing.assert_allclose(
        gated["gates_layers"][1][0], np.arange(gated["num_tokens"]).mean() + 0.1
    )
    settings = systems[0].sampler.calls[0]
    assert (settings["seed"], settings["batch_size"], settings["max_new_tokens"]) == (5, 2, 16)


def test_an_interrupted_call_goes_on_from_whole_answers(systems, tmp_path):
    rows = answer(systems, tmp_path)
    path = tmp_path / "generated.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    assert answer(systems, tmp_path) == rows
    assert [len(each.sampler.calls) for each in systems] == [1, 1]

    # A kill in the middle of the last answer: its system answers again, the other does not. What
    # was cut short harms nothing that is written behind it.
    whole = path.read_text()
    for cut in (whole[:-30], whole[: whole.rindex("}", 0, -10) + 1]):
        path.write_text(cut)
        calls = len(systems[1].sampler.calls)
        assert answer(systems, tmp_path) == rows
        assert answer(systems, tmp_path) == rows
        assert [len(each.sampler.calls) for each in systems] == [1, calls + 1]


@pytest.mark.parametrize("change", [{"max_new_tokens": 8}, {"temperature": 1.0}, {"top_p": 0.5}])
def test_answers_of_other_settings_are_not_used(systems, tmp_path, change):
    answer(systems, tmp_path)
    answer(systems, tmp_path, **change)
    assert [len(each.sampler.calls) for each in systems] == [2, 2]


class EvenJudge:
    """Finds answers under the second of the prompts unsafe."""

    name, reliability = "even", {}

    def judge(self, pairs):
        return [
            Verdict("2" not in messages[-1]["content"], False, True, False, 0.5)
            for messages, _ in pairs
        ]


def test_verdicts_are_written_and_counted(systems, tmp_path):
    rows = answer(systems, tmp_path)
    results = judge_answers(rows, EvenJudge(), 5, tmp_path)
    path = tmp_path / "answers.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["verdict"]["safe"] for row in written] == [True, False, True] * 2
    assert "key" not in written[0]
    assert not (tmp_path / "generated.jsonl").exists()
    srr = {
        (row["system"], row["split"]): (row["value"], row["n"])
        for row in results
        if row["metric"] == "srr"
    }
    assert srr["base", "all"] == (pytest.approx(2 / 3), 3)
    assert srr["safemoe", "cats"] == (0.5, 2)
    assert srr["safemoe", "dogs"] == (1.0, 1)
    assert {row["seed"] for row in results} == {5}


BENCHMARK = [
    prompt(4, "a", benchmark="mine", harmful=False),
    prompt(5, "a", benchmark="mine", harmful=False, refusal_only=True),
    prompt(1, "cats", benchmark="bad", refusal_only=True),
    prompt(6, "b", benchmark="bad"),
]


def test_benchmarks_are_answered_one_by_one_and_kept_one_by_one(systems, tmp_path):
    rows = answer_prompts(systems, PROMPTS + BENCHMARK, CHAT, CONFIG, 5, tmp_path)
    assert [(row["system"], row["benchmark"], row["prompt_id"]) for row in rows] == [
        (name, prompt.benchmark, prompt.id)
        for name in ("base", "safemoe")
        for prompt in PROMPTS + BENCHMARK
    ]
    assert [len(each.sampler.calls) for each in systems] == [3, 3]
    assert [(row["harmful"], row["refusal_only"]) for row in rows[3:7]] == [
        (False, False), (False, True), (True, True), (True, False),
    ]  # fmt: skip
    # Another benchmark besides: what is there is not asked again.
    more = [prompt(7, "a", benchmark="more")]
    answer_prompts(systems, PROMPTS + BENCHMARK + more, CHAT, CONFIG, 5, tmp_path)
    assert [len(each.sampler.calls) for each in systems] == [4, 4]


class LenientJudge:
    """Finds every answer safe and informative, but those to question 1 and 4 refusals."""

    name, reliability = "lenient", {}

    def judge(self, pairs):
        return [
            Verdict(True, messages[-1]["content"][9] in "14", True, False, 0.1)
            for messages, _ in pairs
        ]


def test_answers_are_judged_by_refusal_alone_where_the_prompt_says_so(systems, tmp_path):
    rows = answer_prompts(systems, PROMPTS + BENCHMARK, CHAT, CONFIG, 5, tmp_path)
    results = judge_answers(rows, LenientJudge(), 5, tmp_path)
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    safe = {(row["benchmark"], row["prompt_id"]): row["verdict"]["safe"] for row in written}
    assert not safe.pop(("mine", "p5"))  # not refused
    assert all(safe.values())
    found = {
        (row["benchmark"], row["metric"]): (row["value"], row["n"])
        for row in results
        if row["system"] == "base" and row["split"] == "all"
    }
    assert found["mine", "over_refusal_rate"] == (0.5, 2)
    assert found["mine", "srr"] == found["bad", "isr"] == (1.0, 1)
    assert found["mine", "isr"] == (0.0, 1)
    assert found["bad", "srr"] == (1.0, 2)
    assert found["bad", "refusal_rate"] == (0.5, 2)
    assert ("mine", "refusal_rate") not in found


def test_likelihoods_are_means_over_tokens_not_answers():
    def score(pairs, *, description):
        # A short answer at 1 nat a token, a long one at 3; the harmful one at 5.
        return [
            np.full(len(text), {"s": -1.0, "l": -3.0, "h": -5.0}[text[0]], np.float32)
            for _, text in pairs
        ]

    prompts = [prompt(1, "cats", safe=("s", "lll")), prompt(2, "cats", harmful_answers=("hh",))]
    rows = likelihood_rows([System("base", EchoSampler("base", False), score, False)], prompts, 0)
    found = {row["metric"]: (row["value"], row["n"]) for row in rows}
    assert found == {
        "nll_safe": (pytest.approx(2.5), 2),
        "nll_unsafe": (pytest.approx(5.0), 1),
        "nll_difference": (pytest.approx(2.5), 3),
    }


def test_each_expert_is_compared_on_its_own_domain():
    def scorer(**nll):
        def score(pairs, *, description):
            return [np.full(4, -nll[text], np.float32) for _, text in pairs]

        return score

    prompts = [prompt(i, name, harmful_answers=(name,)) for i, name in enumerate("abbc")]
    base = scorer(a=5, b=6, c=7)
    experts = {
        "a": scorer(a=1, b=4, c=6),
        "b": scorer(a=2, b=2, c=8),
        "c": scorer(a=4, b=5, c=3),
    }
    assert expert_rows(base, experts, prompts) == [
        {"domain": "a", "n": 1, "base": 5.0, "own": 1.0, "others": 3.0},
        {"domain": "b", "n": 2, "base": 6.0, "own": 2.0, "others": 4.5},
        {"domain": "c", "n": 1, "base": 7.0, "own": 3.0, "others": 7.0},
    ]
    (only,) = expert_rows(base, {"a": experts["a"]}, prompts[:1])
    assert only["others"] is None
