import collections
import json
import stat
import subprocess
import sys

import pytest

from safemoe_jax.config import DataConfig
from safemoe_jax.data import corpora, rules, splits
from safemoe_jax.data.corpora import load_corpus
from safemoe_jax.data.judge_rows import load_judge_rows
from safemoe_jax.data.sources import PyritSource, Reject, Row, pyrit_scores, pyrit_tables
from safemoe_jax.errors import UserError

DOMAINS = (
    "exploits",
    "hate_speech",
    "info_integrity",
    "privacy",
    "self_harm",
    "sexual",
    "violence",
)


def config(corpus="pyrit", path="", domains=DOMAINS, **changes) -> DataConfig:
    values = {
        "sequence_length": 512,
        "unsafe_min_score": 0.5,
        "safe_max_score": 0.25,
        "informative_min_characters": 200,
    }
    return DataConfig(corpus=corpus, path=str(path), domains=domains, **{**values, **changes})


def line(prompt, *, domain="apples", label="safe", response="Yes.", **more) -> str:
    row = {"prompt": prompt, "response": response, "domain": domain, "label": label}
    return json.dumps({**row, "source": "test", **more})


@pytest.fixture(scope="module")
def pyrit(tmp_path_factory):
    return load_corpus(config(), tmp_path_factory.mktemp("pyrit"))


def test_pyrit_has_the_rows_that_were_counted(pyrit):
    assert pyrit.counts == {
        "rows": 955,
        "kept": 856,
        "dropped": {
            "score between safe and unsafe": 55,
            "minors_sexual": 14,
            "mass_destruction_weapons": 30,
        },
    }
    assert len(pyrit.select(label="unsafe")) == 488
    assert len(pyrit.select(label="safe")) == 368
    assert len(pyrit.select(label="safe", informative=True)) == 171
    assert not pyrit.select(label="unsafe", informative=True)


def test_every_pyrit_domain_can_be_trained_validated_and_tested(pyrit):
    for domain in DOMAINS:
        count = collections.Counter(e.split for e in pyrit.select(label="unsafe", domain=domain))
        assert count["train"] >= 20 and count["validation"] >= 1
        assert len({e.prompt for e in pyrit.select(splits={"test"}, domain=domain)}) >= 8


def test_near_duplicate_prompts_never_cross_a_split(pyrit):
    prompts = sorted({rules.fold(example.prompt) for example in pyrit.examples})
    groups = dict(zip(prompts, splits.group(prompts).tolist(), strict=True))
    found = collections.defaultdict(set)
    for example in pyrit.examples:
        found[groups[rules.fold(example.prompt)]].add(example.split)
    assert all(len(split) == 1 for split in found.values())


def test_the_judge_learns_from_no_prompt_of_a_model(pyrit):
    rows = load_judge_rows(pyrit, config())
    judged = {rules.fold(row.prompt) for row in rows}
    for split in ("train", "validation", "test"):
        assert judged.isdisjoint(rules.fold(e.prompt) for e in pyrit.select(splits={split}))
    assert {rules.fold(e.prompt) for e in pyrit.select(splits={"judge"})} <= judged
    assert sum(row.harmful is not None for row in rows) > 200
    assert sum(row.refused is not None for row in rows) > 140
    assert not [row for row in rows if rules.hazard("", row.prompt, row.response)]


def test_a_judge_learns_no_label_that_another_table_contradicts(pyrit):
    said = collections.defaultdict(set)
    for example in pyrit.select(splits={"judge"}):
        said[example.prompt, example.response].add(example.label == "unsafe")
    for name in pyrit_tables("objective"):
        for item in pyrit_scores(name):
            if not isinstance(item, Reject):
                said[item[0], item[1]].add(item[2] >= 0.5)
    rows = load_judge_rows(pyrit, config())
    disputed = [row for row in rows if len(said[row.prompt, row.response]) > 1]
    assert disputed and all(row.harmful is None for row in disputed)


def test_a_judge_of_another_corpus_still_learns_from_pyrit(pyrit, tmp_path):
    shared = pyrit.examples[0].prompt
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(line(prompt) for prompt in (shared, "Is a pear a fruit?")))
    settings = config("jsonl", path, ("apples",), unsafe_min_score=0.75)
    rows = load_judge_rows(load_corpus(settings, tmp_path / "data"), settings)
    assert len(rows) > 800
    assert shared not in {row.prompt for row in rows}
    scored = [row for row in PyritSource(0.75, 0.25).rows() if isinstance(row, Row)]
    labels = {(row.prompt, row.response, row.source): row.label for row in scored}
    own = [row for row in rows if "harm/" in row.source and row.harmful is not None]
    harmful = [labels[row.prompt, row.response, row.source] == "unsafe" for row in own]
    assert [row.harmful for row in own] == harmful and any(harmful)  # by the config's thresholds


def test_jsonl_rows_come_back_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "system", "content": "Ä"}, {"role": "user", "content": "Wie geht's?"}]
    row = json.loads(line("x", domain="pears", label="unsafe", response="Gut — 😀\n"))
    del row["prompt"]
    path.write_text("\n".join([line("Hi?"), json.dumps({**row, "messages": turns})]))
    corpus = load_corpus(config("jsonl", path, ("pears", "apples")), tmp_path / "data")
    first, second = corpus.examples
    assert (first.id, first.prompt, first.response, first.domain) == (0, "Hi?", "Yes.", "apples")
    assert second.messages == tuple(turns) and second.response == "Gut — 😀\n"
    assert (second.label, second.source, second.group) == ("unsafe", "test", 1)
    assert corpus.domains == ("pears", "apples")


def test_bad_and_dropped_rows_are_counted_and_bad_ones_listed(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        line("Hi?"),
        "{",
        line("Hi?"),
        line("Hi?", response="No."),
        line("Teens in a sex education class?"),
        line("Hello?", domain="child_abuse"),
        line("Who banned sarin?"),
        line("Hi?", domain="plums"),
        line("Hi?", label="maybe"),
    ]
    path.write_text("\n".join(lines))
    corpus = load_corpus(config("jsonl", path, ("apples",)), tmp_path / "data")
    assert corpus.counts == {
        "rows": 9,
        "kept": 2,
        "dropped": {
            "rejected: not a JSON value": 1,
            "rejected: label is neither unsafe nor safe": 1,
            "duplicate": 1,
            "minors_sexual": 2,
            "mass_destruction_weapons": 1,
            "domain not configured": 1,
        },
    }
    rejects = tmp_path / "data" / "rejects.jsonl"
    assert [json.loads(row) for row in rejects.read_text().splitlines()] == [
        {"file": "rows.jsonl", "line": 2, "reason": "not a JSON value"},
        {"file": "rows.jsonl", "line": 9, "reason": "label is neither unsafe nor safe"},
    ]
    assert stat.S_IMODE(rejects.stat().st_mode) == 0o600
    assert stat.S_IMODE(rejects.parent.stat().st_mode) == 0o700


def test_rows_whose_labels_contradict_each_other_are_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        line("Hi?", label="safe"),
        line("Ho?", label="unsafe"),
        line("Hi?", label="safe", source="another"),
        line("Hi?", label="unsafe"),
        line("Ho?", label="unsafe"),
        line("Hi?", label="safe", response="No."),
        line("Hi?", label="unsafe", domain="pears"),
        line("Hu?", label="unsafe", domain="plums"),
        line("Hu?", label="safe"),
        line("Ho?", label="unsafe", domain="pears"),
    ]
    path.write_text("\n".join(lines))
    corpus = load_corpus(config("jsonl", path, ("apples", "pears")), tmp_path / "data")
    assert corpus.counts == {
        "rows": 10,
        "kept": 4,
        "dropped": {
            "labelled both safe and unsafe": 3,
            "duplicate": 1,
            "domain not configured": 1,
            "labelled safe here, and unsafe in another domain": 1,
        },
    }
    assert [example.id for example in corpus.examples] == [1, 5, 6, 9]


def test_a_changed_source_or_setting_is_built_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(line("Hi?"))
    settings = config("jsonl", path, ("apples",))
    first = load_corpus(settings, tmp_path / "data")
    assert load_corpus(settings, tmp_path / "data").examples == first.examples
    path.write_text(line("Ho?"))
    second = load_corpus(settings, tmp_path / "data")
    assert [example.prompt for example in second.examples] == ["Ho?"]
    shorter = config("jsonl", path, ("apples",), informative_min_characters=4)
    third = load_corpus(shorter, tmp_path / "data")
    assert (second.examples[0].informative, third.examples[0].informative) == (False, True)
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3


@pytest.mark.parametrize("how", ["more", "gone"])
def test_a_source_that_changes_while_it_is_read_is_no_corpus(tmp_path, monkeypatch, how):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(line(f"one word {i}") for i in range(5)))
    survey = corpora._survey

    def then(*arguments):
        found = survey(*arguments)
        path.write_text(line("another")) if how == "more" else path.unlink()
        return found

    monkeypatch.setattr(corpora, "_survey", then)
    with pytest.raises(UserError, match="changed while it was read; run the same command again"):
        load_corpus(config("jsonl", path, ("apples",)), tmp_path / "data")
    monkeypatch.undo()
    path.write_text("\n".join(line(f"one word {i}") for i in range(5)))
    assert len(load_corpus(config("jsonl", path, ("apples",)), tmp_path / "data").examples) == 5


@pytest.mark.parametrize("name", ["*.array_record*", "dataset_info.json", "metadata.json"])
def test_a_stored_corpus_that_is_damaged_is_named(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(line(f"one word {i}") for i in range(5)))
    settings = config("jsonl", path, ("apples",))
    load_corpus(settings, tmp_path / "data")
    (file,) = (tmp_path / "data").rglob(name)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"data/jsonl/\w+ is damaged \(.*\); delete it"):
        load_corpus(settings, tmp_path / "data")


def test_splits_do_not_depend_on_the_domains_chosen(pyrit, tmp_path):
    some = load_corpus(config(domains=("privacy", "sexual")), tmp_path)
    expected = {e.id: e for e in pyrit.examples if e.domain in ("privacy", "sexual")}
    assert {example.id: example for example in some.examples} == expected


@pytest.mark.parametrize(
    ("lines", "domains", "message"),
    [
        (["{", "["], ("apples",), "2 rows and keeps none .*not a JSON value': 2"),
        ([], ("apples",), "0 rows and keeps none"),
        ([line("Hi?")], ("apples,pears",), r"for data.domains \('apples,pears',\): .*configured"),
        ([line("Hi?")], ("apples", "aples"), "'aples', of which no row is kept"),
        ([line("Hi?")], ("apples", "child_abuse"), "no expert is trained on it"),
    ],
)
def test_a_corpus_that_cannot_serve_is_refused(tmp_path, lines, domains, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        load_corpus(config("jsonl", path, domains), tmp_path / "data")


def test_building_is_quiet_and_needs_no_tensorflow(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(line("Hi?"))
    script = (
        "import sys, pathlib\n"
        "from safemoe_jax.config import DataConfig\n"
        "from safemoe_jax.data.corpora import load_corpus\n"
        f"config = DataConfig('jsonl', {str(path)!r}, ('apples',), 512, 0.5, 0.25, 200)\n"
        f"load_corpus(config, pathlib.Path({str(tmp_path / 'data')!r}))\n"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == ["group near-duplicate prompts: 1/1, eta 0 s"]
