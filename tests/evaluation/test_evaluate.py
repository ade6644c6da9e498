import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import byte_tokenizer

from safemoe_jax.config import EvaluationConfig
from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.evaluation import metrics
from safemoe_jax.evaluation.benchmarks import Prompt
from safemoe_jax.evaluation.evaluate import (
    Asking,
    Entry,
    System,
    alone,
    expert_rows,
    judge_answers,
    measure,
)
from safemoe_jax.evaluation.verdicts import Verdict
from safemoe_jax.inference.sampler import Generation

TOKENIZER = byte_tokenizer()
CHAT = ChatFormat(TOKENIZER)
CONFIG = EvaluationConfig(
    systems=("base", "safemoe"),
    split="test",
    prompts_per_domain=0,
    left_out=(),
    attacks=(),
    utility=False,
    benchmarks=(),
    prompts_per_benchmark=0,
    max_new_tokens=16,
    temperature=0.0,
    top_p=1.0,
    batch_size=2,
    judges=(),
    judge_rows=20,
    demonstration=False,
)


def prompt(number, domain, **changes):
    values = {
        "id": f"p{number}",
        "benchmark": "held_out",
        "domain": domain,
        "messages": ({"role": "user", "content": f"Question {number}?"},),
        "group": number,
        "harmful": True,
        "refusal_only": False,
    }
    return Prompt(**{**values, **changes})


PROMPTS = (prompt(1, "cats"), prompt(2, "cats"), prompt(3, "dogs"))


class EchoSampler:
    """Answers "<name> <prompt tokens>"; expert e has gate t + l / 10 + e at token t, layer l."""

    def __init__(self, name, gated):
        self.name, self.gated, self.calls = name, gated, []

    def generate(self, prompts, **settings):
        self.calls.append((prompts, settings))
        answers = []
        for tokens in prompts:
            ids = TOKENIZER.encode(f"{self.name} {len(tokens)}")
            token, layer, expert = np.ogrid[: len(ids), :2, :3]
            gates_TLE = token + layer / 10 + expert if self.gated else None
            answers.append(Generation(ids, True, gates_TLE))
        return answers


@dataclasses.dataclass
class Made:
    """An entry, its sampler, and how often it was made."""

    entry: Entry
    sampler: EchoSampler
    count: int = 0


def made(name, *, gated=False, prompts=PROMPTS, fold="", score=None, answers=True, preamble=()):
    sampler = EchoSampler(name, gated)

    def make():
        each.count += 1
        return System(sampler, score or constant(-1.0), gated, False, preamble)

    each = Made(Entry(name, fold, prompts, answers, gated, make), sampler)
    return each


def constant(logp):
    """Scores every character of an answer alike."""

    def score(pairs, *, description):
        return [np.full(len(answer), logp, np.float32) for _, answer in pairs]

    return score


@pytest.fixture
def systems():
    return [made("base"), made("safemoe", gated=True)]


def asking(directory, made_of="bundle", send=lambda: None, **changes):
    return Asking(CHAT, dataclasses.replace(CONFIG, **changes), 5, made_of, directory, send)


def answer(systems, directory, **changes):
    answers, _ = measure([each.entry for each in systems], asking(directory, **changes))
    return answers


def test_each_part_is_sent_once_it_is_done(systems, tmp_path):
    """A work directory may lie elsewhere, and a process be killed."""
    path, sent = tmp_path / "generated.jsonl", []

    def send():
        sent.append(len(path.read_text().splitlines()))

    measure([each.entry for each in systems], asking(tmp_path, send=send))
    assert len(sent) > 1 and sorted(set(sent)) == list(range(sent[0], sent[-1] + 1))
    assert sent[-1] == len(path.read_text().splitlines())
    done = list(sent)
    measure([each.entry for each in systems], asking(tmp_path, send=send))
    assert sent == done  # nothing was new


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
    settings = systems[0].sampler.calls[0][1]
    assert (settings["seed"], settings["batch_size"], settings["max_new_tokens"]) == (5, 2, 16)


def test_no_space_of_an_answer_is_tidied_away(tmp_path, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "clean_up_tokenization_spaces", True)
    force = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    monkeypatch.setattr(TOKENIZER, force, True, raising=False)
    assert TOKENIZER.decode(TOKENIZER.encode("cats , dogs")) == "cats, dogs"
    row = answer([made("cats , dogs")], tmp_path)[0]
    assert row["response"].startswith("cats , dogs ")


def test_an_interrupted_call_goes_on_from_whole_answers(systems, tmp_path):
    rows = answer(systems, tmp_path)
    path = tmp_path / "generated.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    assert answer(systems, tmp_path) == rows
    assert [len(each.sampler.calls) for each in systems] == [1, 1]

    # A kill in the middle of the last line: its system answers again, the other does not. What
    # was cut short harms nothing that is written behind it.
    path.write_text(path.read_text()[:-30])
    assert answer(systems, tmp_path) == rows
    assert answer(systems, tmp_path) == rows
    assert [len(each.sampler.calls) for each in systems] == [1, 2]


def test_who_has_answered_is_not_even_made_again(systems, tmp_path):
    rows = answer(systems, tmp_path)
    more = [*systems, made("uniform")]
    assert answer(more, tmp_path)[: len(rows)] == rows
    assert [each.count for each in more] == [1, 1, 1]
    answer(more, tmp_path, made_of="another bundle")
    assert [each.count for each in more] == [2, 2, 2]


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
    outcomes, results = judge_answers(rows, EvenJudge(), tmp_path)
    path = tmp_path / "answers.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["verdict"]["safe"] for row in written] == [True, False, True] * 2
    assert [row["safe"] for row in outcomes] == [True, False, True] * 2
    about = ("system", "fold", "prompt_id", "group", "domain")
    assert [outcomes[1][key] for key in about] == ["base", "", "p2", 2, "cats"]
    assert [row["attack_success"] for row in outcomes[:3]] == [False, True, False]
    srr = {
        (row["system"], row["split"]): (row["value"], row["n"])
        for row in results
        if row["metric"] == "srr"
    }
    assert srr["base", "all"] == (pytest.approx(2 / 3), 3)
    assert srr["safemoe", "cats"] == (0.5, 2)
    assert srr["safemoe", "dogs"] == (1.0, 1)
    assert {row["seed"] for row in results} == {5}


BENCHMARK = (
    prompt(4, "a", benchmark="mine", harmful=False),
    prompt(5, "a", benchmark="mine", harmful=False, refusal_only=True),
    prompt(1, "cats", benchmark="bad", refusal_only=True),
    prompt(6, "b", benchmark="bad"),
)


def with_benchmark(*more):
    prompts = PROMPTS + BENCHMARK + more
    return [made("base", prompts=prompts), made("safemoe", gated=True, prompts=prompts)]


def test_benchmarks_are_answered_one_by_one_and_kept_one_by_one(tmp_path):
    systems = with_benchmark()
    rows = answer(systems, tmp_path)
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
    systems = with_benchmark(prompt(7, "a", benchmark="more"))
    answer(systems, tmp_path)
    assert [len(each.sampler.calls) for each in systems] == [1, 1]


class LenientJudge:
    """Finds every answer safe and informative, but those to question 1 and 4 refusals."""

    name, reliability = "lenient", {}

    def judge(self, pairs):
        return [
            Verdict(True, messages[-1]["content"][9] in "14", True, False, 0.1)
            for messages, _ in pairs
        ]


def test_answers_are_judged_by_refusal_alone_where_the_prompt_says_so(tmp_path):
    rows = answer(with_benchmark(), tmp_path)
    outcomes, results = judge_answers(rows, LenientJudge(), tmp_path)
    of = {(row["benchmark"], row["prompt_id"]): row for row in outcomes}
    benign, harmful = of["mine", "p5"], of["bad", "p1"]
    assert (benign["safe"], benign["refusal"]) == (None, False)
    assert (harmful["safe"], harmful["refusal"]) == (True, True)
    for row in (benign, harmful):
        assert {row[k] for k in ("on_topic", "informative_safe", "attack_success")} == {None}
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


class CutJudge:
    """Finds an answer informative as long as it is no longer than 64 characters."""

    name, reliability = "cut", {}

    def judge(self, pairs):
        return [Verdict(True, False, len(answer) <= 64, False, 0.1) for _, answer in pairs]


def test_isr_at_matched_length_judges_the_first_64_tokens(tmp_path):
    rows = answer([made("a long name " * 6), made("short")], tmp_path)
    assert [len(row["response_64"] or "") for row in rows] == [64] * 3 + [0] * 3
    outcomes, results = judge_answers(rows, CutJudge(), tmp_path)
    assert [row["informative_safe"] for row in outcomes] == [False] * 3 + [True] * 3
    assert all(row["informative_safe_64"] for row in outcomes)
    share = {row["metric"]: row["value"] for row in results if row["split"] == "all"}
    assert share["isr_64"] == 1.0


def test_what_comes_before_a_conversation_is_read_and_not_judged(tmp_path):
    told = ({"role": "system", "content": "Be very kind."},)
    base, prompted = made("base"), made("base_prompted", preamble=told)
    rows = answer([base, prompted], tmp_path)
    (plain, _), (longer, _) = base.sampler.calls[0], prompted.sampler.calls[0]
    assert TOKENIZER.decode(longer[0]) == TOKENIZER.decode(plain[0]).replace(
        "Be kind.", "Be very kind."
    )
    assert rows[0]["messages"] == rows[3]["messages"]


def test_a_prefix_is_put_into_the_models_mouth(tmp_path):
    asked = (prompt(1, "cats", prefix="Sure:", harmful_answers=("They hiss",)),)

    def score(pairs, *, description):
        assert [answer for _, answer in pairs] == ["Sure: They hiss"]
        return [-np.arange(len("Sure: They hiss"), dtype=np.float32)]

    attacked = made("base", prompts=asked, score=score)
    (row,), (likelihood,) = measure([attacked.entry], asking(tmp_path))
    assert TOKENIZER.decode(attacked.sampler.calls[0][0][0]).endswith("assistant\nSure:")
    assert row["response"].startswith("Sure:base ")
    assert likelihood["tokens"] == len(" They hiss")
    assert likelihood["nll"] == sum(range(5, 15))


def test_problems_are_solved_and_not_judged(tmp_path):
    problem = prompt(1, "gsm8k", benchmark="gsm8k", harmful=False, solution=4)
    read = prompt(2, "benign", benchmark="benign", harmful=False, benign_answers=("Yes",))
    entry = made("4", prompts=(problem, read))
    answers, likelihoods = measure([entry.entry], asking(tmp_path))
    assert [row["benchmark"] for row in answers] == ["gsm8k"]  # nobody is asked the other
    assert [row["kind"] for row in likelihoods] == ["benign"]
    answers[0]["response"] = "It is 1,004, no: 4."
    outcomes, results = judge_answers(answers, EvenJudge(), tmp_path)
    assert [(row["correct"], row["safe"]) for row in outcomes] == [(True, None)]
    assert [(row["metric"], row["value"]) for row in results] == [("accuracy", 1.0)]
    assert (tmp_path / "answers.jsonl").read_text() == ""


def test_folds_are_kept_apart_and_pooled(tmp_path):
    def asked(domain, number):
        return (prompt(number, domain, benchmark="left_out"),)

    entries = [made("safemoe", fold="cats", prompts=asked("cats", 1))]
    entries += [made("safemoe", fold="dogs", prompts=asked("dogs", 2))]
    outcomes, results = judge_answers(answer(entries, tmp_path), EvenJudge(), tmp_path)
    assert [(row["fold"], row["safe"]) for row in outcomes] == [("cats", True), ("dogs", False)]
    srr = {(row["fold"], row["split"]): row["value"] for row in results if row["metric"] == "srr"}
    assert srr == {("each", "all"): 0.5, ("cats", "cats"): 1.0, ("dogs", "dogs"): 0.0}


def test_a_question_in_two_domains_is_two_prompts(tmp_path):
    same = [prompt(1, domain, harmful_answers=("h",)) for domain in ("cats", "dogs")]
    entry = made("base", prompts=tuple(same), score=lambda pairs, *, description: [-np.ones(1)] * 2)
    _, likelihoods = measure([entry.entry], asking(tmp_path))
    assert [(row["domain"], row["nll"], row["tokens"]) for row in likelihoods] == [
        ("cats", 1.0, 1), ("dogs", 1.0, 1),
    ]  # fmt: skip


def test_likelihoods_are_means_over_tokens_not_answers(tmp_path):
    def score(pairs, *, description):
        # A short answer at 1 nat a token, a long one at 3; the harmful one at 5.
        return [
            np.full(len(text), {"s": -1.0, "l": -3.0, "h": -5.0}[text[0]], np.float32)
            for _, text in pairs
        ]

    prompts = (
        prompt(1, "cats", safe_answers=("s", "lll")),
        prompt(2, "cats", harmful_answers=("hh",)),
    )
    entry = made("base", prompts=prompts, score=score)
    _, likelihoods = measure([entry.entry], asking(tmp_path))
    assert [(row["prompt_id"], row["kind"], row["nll"], row["tokens"]) for row in likelihoods] == [
        ("p1", "safe", 10.0, 4), ("p2", "harmful", 10.0, 2),
    ]  # fmt: skip
    rows = metrics.nll_rows(likelihoods)
    found = {row["metric"]: (row["value"], row["n"]) for row in rows if row["split"] == "all"}
    assert found == {"nll_safe": (2.5, 1), "nll_unsafe": (5.0, 1), "nll_difference": (2.5, 2)}
    assert {row["split"] for row in rows} == {"all", "cats"}
    text = Path(tmp_path / "likelihoods.jsonl").read_text()
    assert "sss" not in text and "Question" not in text
    assert measure([entry.entry], asking(tmp_path))[1] == likelihoods and entry.count == 1


def test_each_expert_is_compared_on_its_own_domain():
    def rows(system, **nll):
        return [
            {
                "system": system,
                "benchmark": "held_out",
                "kind": "harmful",
                "domain": domain,
                "nll": 4.0 * value,
                "tokens": 4,
            }
            for domain, value in nll.items()
        ]

    base = rows("base", a=5, b=6, c=7)
    experts = rows(alone("a"), a=1, b=4, c=6) + rows(alone("b"), a=2, b=2, c=8)
    experts += rows(alone("c"), a=4, b=5, c=3)
    assert expert_rows(base + experts, ["a", "b", "c"]) == [
        {"domain": "a", "n": 1, "base": 5.0, "own": 1.0, "others": 3.0},
        {"domain": "b", "n": 1, "base": 6.0, "own": 2.0, "others": 4.5},
        {"domain": "c", "n": 1, "base": 7.0, "own": 3.0, "others": 7.0},
    ]
    (only,) = expert_rows(rows("base", a=5) + rows(alone("a"), a=1), ["a"])
    assert only["others"] is None
