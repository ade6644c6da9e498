"""Sets of prompts, on harmless rows in the formats that they are published in."""

import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from safemoe_jax import fetch
from safemoe_jax.errors import UserError
from safemoe_jax.evaluation.prompt_sets import (
    PROMPT_SETS,
    RESERVED,
    Question,
    gsm8k,
    questions,
    resolve,
)

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def table(*rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def lines(*rows):
    return "\n".join(map(json.dumps, rows)).encode()


def parquet(*rows):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


XSTEST = {"id": 1, "prompt": "Kill a process?", "type": "homonyms", "label": "safe", "focus": "k"}
JBB = {"Index": 0, "Goal": "Feed cats", "Target": "Sure", "Behavior": "Cats", "Category": "Privacy"}
SST = {"id": "a", "harm_area": "Scams, and Fraud", "category": "Info", "prompt": "Sell cats?"}
SORRY = {"question_id": 1, "category": "5", "turns": ["Ask\n\nthe cat"], "prompt_style": "base"}
GUARD = {"prompt": "Cats?", "prompt_harm_label": "harmful", "subcategory": "others"}
BEAVER = {
    "prompt": "Cats?",
    "response": "They hiss.",
    "category": {"a": False, "privacy_violation": True, "b,c": True},
    "is_safe": False,
}
PAIR = {"text": "Bake?\n\nMix.", "harmful_version": "Burn?\n\nLight.", "domain": "a_vs_b"}
DANGER = {**PAIR, "harmful_version": "Hide?\n\nThere.", "domain": "education_vs_csam"}
EDGY = {"text": "Bleach?", "category": "self-defense", "expected_topic": "x", "id": "o"}

# name -> file, contents, (prompt, domain, harmful, refusal only) of each question
PUBLISHED = {
    "advbench": (
        "adv_bench.prompt",
        b"seeds:\n- value: Feed cats\n  harm_categories:\n  - A and B\n  - C\n",
        [("Feed cats", "a_and_b", True, False)],
    ),
    "beavertails": (
        "test.jsonl",
        lines(
            BEAVER,
            {**BEAVER, "is_safe": True, "prompt": "Never answered harmfully?"},
            {**BEAVER, "prompt": "Dogs?", "category": {"a": True, "child_abuse": True}},
            {**BEAVER, "prompt": "Birds?", "category": {"a": True}},
            {**BEAVER, "prompt": "Birds? ", "category": {"child_abuse": True}},
        ),
        [
            ("Cats?", "privacy_violation", True, False),
            ("Dogs?", "a", True, True),
            ("Birds?", "a", True, True),
        ],
    ),
    "do_not_answer": (
        "malicious_uses.jsonl",
        lines({"prompt": "Feed cats?", "intents": ["S1"]}),
        [("Feed cats?", "malicious_uses", True, False)],
    ),
    "false_reject": (
        "test.jsonl",
        lines({"id": 1, "prompt": "Cats?", "category": 3, "category_text": "Drug Use"}),
        [("Cats?", "drug_use", False, False)],
    ),
    "harmbench": (
        "harmbench_prompts.txt",
        b"Feed cats\nMake a nuclear weapon for cats\n",
        [
            ("Feed cats", "harmbench", True, False),
            ("Make a nuclear weapon for cats", "harmbench", True, True),
        ],
    ),
    "jailbreakbench": (
        "benign-behaviors.csv",
        table(JBB),
        [("Feed cats", "privacy", False, False)],
    ),
    "or_bench_hard": (
        "or-bench-hard-1k.csv",
        table({"prompt": "Cats?", "category": "self-harm"}),
        [("Cats?", "self_harm", False, False)],
    ),
    "or_bench_toxic": (
        "or-bench-toxic.csv",
        table({"prompt": "Cats?", "category": "hate"}),
        [("Cats?", "hate", True, False)],
    ),
    "rho_edgy": (
        "benign_edgy_80.json",
        json.dumps([EDGY]).encode(),
        [("Bleach?", "self_defense", False, False)],
    ),
    "rho_pairs_benign": (
        "harmful_benign_50.json",
        json.dumps([PAIR]).encode(),
        [("Bake?", "rho_pairs_benign", False, False)],
    ),
    "rho_pairs_harmful": (
        "harmful_benign_50.json",
        json.dumps([PAIR, DANGER]).encode(),
        [
            ("Burn?", "rho_pairs_harmful", True, False),
            ("Hide?", "rho_pairs_harmful", True, True),
        ],
    ),
    "simple_safety_tests": (
        "sst_test_cases.csv",
        table(SST, {**SST, "prompt": "Meet?", "harm_area": "Child Abuse"}),
        [("Sell cats?", "scams_and_fraud", True, False), ("Meet?", "child_abuse", True, True)],
    ),
    "sorry_bench": (
        "question.jsonl",
        lines(
            SORRY,
            {**SORRY, "turns": ["Other?"], "prompt_style": "ascii"},
            {**SORRY, "turns": ["Hide?"], "category": "20"},
        ),
        [("Ask\n\nthe cat", "5", True, False), ("Hide?", "20", True, True)],
    ),
    "strong_reject": (
        "strongreject_dataset.csv",
        table({"category": "Violence", "source": "x", "forbidden_prompt": "Scare cats"}),
        [("Scare cats", "violence", True, False)],
    ),
    "wildguard_test": (
        "wildguard_test.parquet",
        parquet(
            GUARD,
            {**GUARD, "prompt": "Dogs?", "prompt_harm_label": "unharmful", "subcategory": "benign"},
            {**GUARD, "prompt": "Neither?", "prompt_harm_label": None},
        ),
        [("Cats?", "others", True, False), ("Dogs?", "benign", False, False)],
    ),
    "xstest": (
        "xstest_prompts.csv",
        table(XSTEST, {**XSTEST, "prompt": "Kill?", "label": "unsafe", "type": "contrast"}),
        [("Kill a process?", "homonyms", False, False), ("Kill?", "contrast", True, False)],
    ),
    "harmful_instructions": (
        "I-Cats.json",
        b'{"instructions": ["Scare cats"]}',
        [("Scare cats", "i_cats", True, False)],
    ),
    "benign_instructions": (
        "Mine.json",
        b'{"instructions": ["Feed cats"]}',
        [("Feed cats", "mine", False, False)],
    ),
}


def local(directory, name, file, content):
    path = directory / file
    path.write_bytes(content)
    (named,) = resolve([f"{name}={path}"])
    return named


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_each_set_is_read_as_it_is_published(tmp_path, name):
    file, content, expected = PUBLISHED[name]
    if PROMPT_SETS[name].origin:
        assert file in [
            Path(origin).name.removesuffix(".xz") for origin in PROMPT_SETS[name].origin.files
        ]
    found, _ = questions(local(tmp_path, name, file, content))
    assert found == [Question(*each) for each in expected]


@pytest.mark.parametrize(
    ("name", "file", "row", "expected"),
    [
        ("advbench", "harmful_behaviors.csv", {"goal": "Feed cats", "target": "Sure"}, "advbench"),
        ("do_not_answer", "data_en.csv", {"question": "Feed cats", "risk_area": "Hate"}, "hate"),
        (
            "harmbench",
            "all.csv",
            {"Behavior": "Feed cats", "SemanticCategory": "x", "FunctionalCategory": "standard"},
            "x",
        ),
    ],
)
def test_the_authors_own_tables_are_read_where_a_wheel_has_others(
    tmp_path, name, file, row, expected
):
    content = table(row)
    if name == "harmbench":
        content = table(row, {**row, "Behavior": "No", "FunctionalCategory": "copyright"})
    found, _ = questions(local(tmp_path, name, file, content))
    assert found == [Question("Feed cats", expected, True, False)]


def test_rows_that_cannot_be_asked_are_counted(tmp_path):
    rows = (XSTEST, {**XSTEST, "prompt": " kill A  process?"}, {**XSTEST, "prompt": " "})
    named = local(tmp_path, "xstest", "x.csv", table(*rows, {**XSTEST, "label": "?"}))
    found, left = questions(named)
    assert [question.text for question in found] == ["Kill a process?"]
    assert left == {"repeated": 1, "without a prompt": 1, "without a label": 1}


def test_a_file_of_another_set_is_named_with_its_columns(tmp_path):
    with pytest.raises(UserError, match=r"benchmark xstest: .*column prompt, .*Goal"):
        questions(local(tmp_path, "xstest", "x.csv", table(JBB)))


def test_a_directory_stands_for_all_files_of_a_set(tmp_path):
    (tmp_path / "README.md").write_text("not a table")
    (tmp_path / "harmful-behaviors.csv").write_bytes(table({**JBB, "Goal": "Scare cats"}))
    (named,) = resolve([f"jailbreakbench={tmp_path}"])
    with pytest.raises(UserError, match=r"benign-behaviors\.csv is no file"):
        questions(named)
    (tmp_path / "benign-behaviors.csv").write_bytes(table(JBB))
    found, _ = questions(named)
    assert [(question.text, question.harmful) for question in found] == [
        ("Scare cats", True),
        ("Feed cats", False),
    ]


def test_files_are_told_apart_by_their_bytes(tmp_path):
    named = local(tmp_path, "xstest", "x.csv", table(XSTEST))
    before = named.sha256()
    assert named.sha256() == before
    (tmp_path / "x.csv").write_bytes(table({**XSTEST, "prompt": "Other?"}))
    assert named.sha256() != before


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("xtest",), r"names 'xtest'; choose of advbench, .*harmful_instructions=FILE"),
        (("/data/mine.json",), r"names '/data/mine\.json'; .*harmful_instructions=FILE"),
        (("benign_instructions",), r"no source; give 'benign_instructions=FILE'"),
        (("xstest", "xstest=x.csv"), "names 'xstest' twice"),
        *(
            ((f"harmful_instructions={name}.json",), f"benchmark '{name}', which is a name of the")
            for name in (*sorted(RESERVED), "xstest_harmful")
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_file_is_read(entries, message):
    with pytest.raises(UserError, match=message):
        resolve(entries)


DENIED = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            GatedRepoError("no", response=DENIED),
            r"wildguardmix is gated: accept its terms .*HF_TOKEN.*'wildguard_test=PATH'",
        ),
        (
            LocalEntryNotFoundError("no hub"),
            r"could not fetch test/wild.* \(no hub\); .*'wildguard_test=PATH'",
        ),
    ],
)
def test_what_the_hub_does_not_give_names_the_remedy(monkeypatch, error, message):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(fetch, "hf_hub_download", refuse)
    (named,) = resolve(["wildguard_test"])
    with pytest.raises(UserError, match=message) as raised:
        questions(named)
    assert "\n" not in str(raised.value)


def test_the_hub_is_asked_for_the_named_files_at_the_pinned_revision(tmp_path, monkeypatch):
    path = tmp_path / "xstest_prompts.csv"
    path.write_bytes(table(XSTEST))
    asked = []

    def download(repo, name, **settings):
        asked.append((repo, name, settings["repo_type"], settings["revision"]))
        return str(path)

    monkeypatch.setattr(fetch, "hf_hub_download", download)
    (named,) = resolve(["xstest"])
    assert len(questions(named)[0]) == 1
    revision = "f600c994b256f12867dfa5b3eb3d545a3e62f8b5"
    assert asked == [("Paul/XSTest", "xstest_prompts.csv", "dataset", revision)]


@pytest.mark.parametrize(
    ("name", "count", "by_refusal"),
    [
        ("advbench", 520, 9),
        ("do_not_answer", 938, 3),
        ("harmbench", 200, 16),
        ("rho_edgy", 150, 4),
        ("rho_pairs_benign", 150, 0),
        ("rho_pairs_harmful", 150, 18),
    ],
)
def test_sets_from_wheels_have_the_prompts_that_were_counted(name, count, by_refusal):
    (named,) = resolve([name])
    found, _ = questions(named)
    assert len(found) == count
    assert sum(question.refusal_only for question in found) == by_refusal
    assert not any("\n\n" in question.text for question in found)


def test_problems_have_whole_numbers_as_answers():
    problems = gsm8k()
    assert len(problems) == 100
    assert problems[0].text.startswith("The girls are trying to raise money")
    assert problems[0].answer == 2280


def test_the_documentation_shows_the_table():
    row = re.compile(r"\| `(\w+)` \| (.+?) \| (.+?) \| (yes|no) \| (harm|no harm|both) \|")
    shown = {match[1]: match.groups()[1:] for match in row.finditer(DOCS.read_text())}
    assert list(shown) == list(PROMPT_SETS)
    for name, (origin, license, gated, asks) in shown.items():
        of = PROMPT_SETS[name]
        assert license == of.license
        assert gated == ("yes" if of.gated else "no")
        mixed = not isinstance(of.harmful, bool)
        assert asks == ("both" if mixed else "harm" if of.harmful else "no harm")
        place = re.search(r"`(.+)`", origin)
        if of.origin is None:
            assert origin == "your own file"
        elif isinstance(of.origin, fetch.Url):
            assert place[1] in of.origin.url
        else:
            hub = isinstance(of.origin, fetch.Hub)
            assert place[1] == (of.origin.repo if hub else of.origin.requirement)
