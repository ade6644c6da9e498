"""How judges are compared: with labels, with people, with one another."""

import io
import json
import random

import pytest
from judge_server import chat, completion, serve
from rich.console import Console

from safemoe_jax.data.corpora import Example
from safemoe_jax.evaluation import panel
from safemoe_jax.evaluation.agreement import against_labels, agreement
from safemoe_jax.evaluation.asked import parse_judges
from safemoe_jax.evaluation.endpoint import EndpointJudge
from safemoe_jax.evaluation.human import export_for_humans, import_humans
from safemoe_jax.evaluation.verdicts import Verdict
from safemoe_jax.private_files import read_json_lines, replace_json_lines

GOOD = Verdict(True, False, True, False, 0.1)
UNSAFE = Verdict(False, False, True, False, 0.9)
REFUSED = Verdict(True, True, True, False, 0.1)


def test_agreement_counts_only_what_both_know():
    first = [True, True, False, False, None, True]
    second = [True, False, False, False, True, None]
    assert agreement(first, second) == {
        "n": 4,
        "kappa": pytest.approx(0.5),
        "table": [[2, 0], [1, 1]],
    }
    assert agreement([True, True], [True, False])["kappa"] is None
    assert agreement([], []) == {"n": 0, "kappa": None, "table": [[0, 0], [0, 0]]}


def test_agreement_with_labels_has_confusion_and_calibration():
    labels = [True] * 5 + [False] * 5
    chance = [0.9] * 4 + [0.2] + [0.2] * 4 + [0.9]
    said = [p > 0.5 for p in chance]
    found = against_labels([*labels, True], [*said, None], [*chance, None])
    assert (found["n"], found["missing"]) == (10, 1)
    assert found["kappa"] == pytest.approx(0.6)
    assert found["table"] == [[4, 1], [1, 4]]
    assert found["F1"] == pytest.approx(0.8) and found["AUC"] == pytest.approx(0.8)
    assert found["Brier"] == pytest.approx((8 * 0.0225 + 0.65 + 0.8) / 10, abs=0.02)
    assert [mean for mean, _ in found["calibration"]] == pytest.approx([0.2, 0.9], abs=0.01)
    assert [share for _, share in found["calibration"]] == pytest.approx([0.2, 0.8], abs=0.01)
    silent = against_labels(labels, said, [None] * 10)
    assert (silent["AUC"], silent["Brier"], silent["calibration"]) == (None, None, None)
    assert against_labels([False], [False], [None])["F1"] is None


def answer(system, number, verdict, **more):
    return {
        "system": system,
        "seed": 0,
        "benchmark": "held_out",
        "domain": "cats",
        "harmful": True,
        "refusal_only": False,
        "prompt_id": f"p{number}",
        "messages": [{"role": "user", "content": f"Question {number}?"}],
        "response": f"{system} says {number}.",
        "verdict": verdict.to_dict(),
        **more,
    }


@pytest.fixture
def directory(tmp_path):
    verdicts = [GOOD, UNSAFE, REFUSED, GOOD]
    rows = [answer(s, i, v) for s in ("base", "safemoe") for i, v in enumerate(verdicts)]
    replace_json_lines(tmp_path / "answers.jsonl", rows)
    return tmp_path


def example(number, label):
    messages = ({"role": "user", "content": f"Known {number}?"},)
    return Example(
        number, messages, f"known {label}", "cats", label, "made up", "test", True, number
    )


LABELLED = [example(i, label) for i, label in enumerate(["unsafe", "safe"] * 3)]


def wildguard(body):
    """Harmful: unsafe known answers, and every answer to Question 1; a refusal: to Question 2."""
    prompt = body["prompt"].partition("Human user:")[2]
    harmful = "yes" if "Question 1?" in prompt or "known unsafe" in prompt else "no"
    refusal = "yes" if "Question 2?" in prompt else "no"
    if "base says 3" in prompt:
        return completion("?")
    return completion(f"Harmful: no\nRefusal: {refusal}\nHarmful: {harmful}")


def asked(server, template, model, directory):
    (found,) = parse_judges([f"{template}@{server.url}#{model}"])
    return [EndpointJudge(found, directory)]


def test_a_further_judge_is_heard_on_answers_and_labels(directory):
    with serve(wildguard) as server:
        judges = asked(server, "wildguard", "org/m", directory)
        heard = panel.hear(judges, LABELLED, 0, directory)
        count = len(server.bodies)
        assert panel.hear(judges, LABELLED, 0, directory) == heard
        assert len(server.bodies) == count == 8 + 6
    (judge,) = heard["judges"]
    assert (judge["name"], judge["model"], judge["n"], judge["missing"]) == (
        "wildguard",
        "org/m",
        7,
        1,
    )
    assert judge["unreadable"] == 1
    assert judge["harm"]["kappa"] == 1.0
    assert judge["harm"]["table"] == [[3, 0], [0, 3]]
    found = {(row["system"], row["metric"]): (row["value"], row["n"]) for row in judge["rows"]}
    assert found == {
        ("base", "srr"): (pytest.approx(2 / 3), 3),
        ("base", "refusal_rate"): (pytest.approx(1 / 3), 3),
        ("safemoe", "srr"): (0.75, 4),
        ("safemoe", "refusal_rate"): (0.25, 4),
    }
    rows = {(row["first"], row["second"], row["about"]): row for row in heard["agreement"]}
    assert rows.keys() == {("embedded", "wildguard", about) for about in ("safe", "refusal")}
    assert rows["embedded", "wildguard", "safe"]["kappa"] == 1.0
    assert rows["embedded", "wildguard", "safe"]["n"] == 7
    stored = read_json_lines(directory / "answers.jsonl")
    assert stored[1]["verdicts"]["wildguard"]["safe"] is False
    assert stored[3]["verdicts"]["wildguard"]["safe"] is None
    assert (directory / "answers.jsonl").stat().st_mode & 0o777 == 0o600


def test_people_are_one_more_judge(directory):
    answers = read_json_lines(directory / "answers.jsonl")
    sheet = export_for_humans(answers, 100, 0, directory)
    head, *lines = sheet.read_text().splitlines()
    labelled = [
        line[:-2]
        + ("no,no,yes" if "Question 1?" in line or "base says 0" in line else "yes,no,yes")
        for line in lines
    ]
    sheet.write_text("\n".join([head, *labelled[:6]]))
    import_humans(sheet, directory)
    heard = panel.hear((), [], 0, directory)
    (judge,) = heard["judges"]
    assert (judge["name"], judge["n"], judge["missing"]) == ("human", 6, 2)
    assert {row["metric"] for row in judge["rows"]} >= {"srr", "refusal_rate"}
    assert "degenerate_rate" not in {row["metric"] for row in judge["rows"]}  # nobody asked them
    abouts = [(row["first"], row["about"], row["n"]) for row in heard["agreement"]]
    assert ("human", "safe", 6) in abouts and ("human", "informative_safe", 6) in abouts
    stored = read_json_lines(directory / "answers.jsonl")
    assert sum(row["verdicts"]["human"]["safe"] is None for row in stored) == 2


def test_a_judge_that_takes_prompts_for_forbidden_sees_no_harmless_ones(directory):
    rows = read_json_lines(directory / "answers.jsonl")
    for row in rows[:3]:
        row["harmful"] = False
    replace_json_lines(directory / "answers.jsonl", rows)
    with serve(lambda body: chat("#thescore: 5")) as server:
        judges = asked(server, "policy_rubric", "m", directory)
        (judge,) = panel.hear(judges, [], 0, directory)["judges"]
    assert (judge["n"], judge["missing"]) == (5, 3)


def test_where_refusal_alone_counts_it_decides_what_is_safe(directory):
    rows = read_json_lines(directory / "answers.jsonl")
    for row in rows:
        row["refusal_only"] = True
    replace_json_lines(directory / "answers.jsonl", rows)
    with serve(wildguard) as server:
        judges = asked(server, "wildguard", "m", directory)
        panel.hear(judges, [], 0, directory)
    stored = read_json_lines(directory / "answers.jsonl")[:4]
    assert [row["verdicts"]["wildguard"]["safe"] for row in stored] == [False, False, True, None]


def test_only_so_many_labelled_answers_are_judged(directory, monkeypatch):
    monkeypatch.setattr(panel, "_LABELLED", 4)
    with serve(wildguard) as server:
        judges = asked(server, "wildguard", "m", directory)
        (judge,) = panel.hear(judges, LABELLED, 0, directory)["judges"]
    assert judge["harm"]["n"] == 4


def results():
    rng = random.Random(0)
    said = {name: [rng.random() < 0.5 for _ in range(40)] for name in ("human", "wildguard")}
    compared = agreement(*said.values())
    measured = {
        "n": 150,
        "kappa": 0.41,
        "table": [[1, 2], [3, 4]],
        "Brier": 0.2,
        "calibration": [[0.1, 0.25], [0.6, 0.5]],
    }
    return {
        "judge": {"name": "embedded", "off topic": {"n": 9}, "harm": {"held out": measured}},
        "panel": {
            "judges": [
                {"name": "wildguard", "model": "allenai/wildguard", "harm": compared},
                {"name": "human", "model": ""},
            ],
            "agreement": [{"first": "human", "second": "wildguard", "about": "safe", **compared}],
        },
    }


def test_the_terminal_table_has_every_comparison_in_80_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(panel.terminal_table(results()))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    lines = [line.split() for line in text.splitlines()]
    assert ["labels", "embedded", "harm", "150", "0.41", "1", "2", "3", "4", "0.200"] in lines
    assert any(line[:4] == ["human", "wildguard", "safe", "40"] for line in lines)
    told = " ".join(text.split())
    assert "Calibration of embedded, harm, said>labelled: 0.10>0.25 0.60>0.50." in told


def test_who_judged_is_said():
    assert panel.names(results()) == "Judges: embedded, wildguard (allenai/wildguard), human."
    assert panel.names({"panel": panel.NOBODY}) == "Embedded judge only."
    json.dumps(results())
