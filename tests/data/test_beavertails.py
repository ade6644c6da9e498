"""BeaverTails as a corpus, on harmless rows in its format."""

import json
import lzma

import pytest

from safemoe_jax.config import DataConfig
from safemoe_jax.data import beavertails
from safemoe_jax.data.beavertails import BeaverTailsSource
from safemoe_jax.data.corpora import load_corpus
from safemoe_jax.data.sources import Reject
from safemoe_jax.errors import UserError
from safemoe_jax.fetch import Hub

CATEGORIES = ("animal_abuse", "child_abuse", "hate_speech,offensive_language", "privacy_violation")


def row(prompt, response, *flags, safe=None):
    assert set(flags) <= set(CATEGORIES)
    return {
        "prompt": prompt,
        "response": response,
        "category": {name: name in flags for name in CATEGORIES},
        "is_safe": not flags if safe is None else safe,
    }


def write(path, *rows):
    lines = [each if isinstance(each, str) else json.dumps(each) for each in rows]
    path.write_bytes(lzma.compress("\n".join(lines).encode()))
    return path


def rows(tmp_path, *given):
    return list(BeaverTailsSource(write(tmp_path / "rows.jsonl.xz", *given)).rows())


def of(found):
    return [(each.response, each.domain, each.label) for each in found]


def test_an_unsafe_answer_goes_to_every_flagged_domain(tmp_path):
    found = rows(
        tmp_path, row("Cats?", "They hiss.", "hate_speech,offensive_language", "animal_abuse")
    )
    assert of(found) == [
        ("They hiss.", "animal_abuse", "unsafe"),
        ("They hiss.", "hate_speech_offensive_language", "unsafe"),
    ]
    assert {each.prompt for each in found} == {"Cats?"}
    assert "CC-BY-NC-4.0" in found[0].source


def test_a_safe_answer_goes_where_harmful_ones_to_its_question_go_most(tmp_path):
    found = rows(
        tmp_path,
        row("Cats?", "They purr."),
        row("Cats?", "They hiss.", "privacy_violation"),
        row("Cats?", "They bite.", "privacy_violation", "animal_abuse"),
        row("Dogs?", "They bark."),
    )
    assert of(found)[0] == ("They purr.", "privacy_violation", "safe")
    assert of(found)[-1] == ("They bark.", "unflagged", "safe")


def test_annotators_of_an_answer_vote(tmp_path):
    found = rows(
        tmp_path,
        row("Cats?", "They hiss.", "animal_abuse"),
        row("Cats?", "They hiss.", "animal_abuse"),
        row("Cats?", "They hiss.", "animal_abuse", "privacy_violation"),
        row("Cats?", "They nap."),
        row("Cats?", "They nap."),
        row("Cats?", "They nap.", "privacy_violation"),
        row("Cats?", "They sit."),
        row("Cats?", "They sit.", "animal_abuse"),
    )
    assert of(found) == [
        ("They hiss.", "animal_abuse", "unsafe"),  # one of three for the other domain
        ("They nap.", "animal_abuse", "safe"),
        ("They sit.", "animal_abuse", None),
    ]


def test_harm_whose_kind_is_disputed_is_one_row_without_a_label(tmp_path):
    kinds = ("privacy_violation", "hate_speech,offensive_language", "animal_abuse")
    votes = [row("Cats?", "They hiss.", kind) for kind in kinds]
    assert of(rows(tmp_path, *votes)) == [("They hiss.", "animal_abuse", None)]
    assert of(rows(tmp_path, *votes[:2])) == [
        ("They hiss.", "privacy_violation", "unsafe"),  # each by half
        ("They hiss.", "hate_speech_offensive_language", "unsafe"),
    ]
    path = write(tmp_path / "both.jsonl.xz", *votes, row("Dogs?", "They bark.", "animal_abuse"))
    corpus = load_corpus(config(path, "animal_abuse"), tmp_path / "data")
    assert corpus.counts["dropped"] == {"annotators disagree": 1}


@pytest.mark.parametrize("others", [(), ("animal_abuse",)])
def test_what_anybody_flags_as_child_abuse_is_in_no_other_domain(tmp_path, others):
    found = rows(
        tmp_path,
        row("Cats?", "They hiss.", *others, safe=not others),
        row("Cats?", "They hiss.", "animal_abuse", "child_abuse"),
        row("Cats?", "They hiss.", *others, safe=not others),
    )
    assert [each.domain for each in found] == ["child_abuse"]


def test_rows_that_cannot_be_read_are_rejected_by_line(tmp_path):
    good = row("Cats?", "They purr.")
    found = rows(
        tmp_path,
        "{",
        good,
        {**good, "response": " "},
        {**good, "is_safe": "yes"},
        row("Cats?", "They hiss.", safe=False),
    )
    rejects = [each for each in found if isinstance(each, Reject)]
    assert [(each.file, each.line, each.reason) for each in rejects] == [
        ("rows.jsonl.xz", 1, "prompt or response is missing, empty or not text"),
        ("rows.jsonl.xz", 3, "prompt or response is missing, empty or not text"),
        ("rows.jsonl.xz", 4, "is_safe is no truth value, or category no object"),
        ("rows.jsonl.xz", 5, "unsafe without a category"),
    ]


def config(path, *domains):
    return DataConfig(
        corpus="beavertails",
        path=str(path),
        domains=domains,
        sequence_length=64,
        unsafe_min_score=0.5,
        safe_max_score=0.25,
        informative_min_characters=5,
    )


def test_the_corpus_drops_child_abuse_and_counts_it(tmp_path):
    path = write(
        tmp_path / "rows.jsonl.xz",
        row("Cats?", "They hiss.", "animal_abuse", "privacy_violation"),
        row("Cats?", "They purr softly."),
        row("Dogs?", "They growl.", "animal_abuse", "child_abuse"),
        row("Birds?", "They sing."),
        row("Mice?", "They sit.", "animal_abuse"),
        row("Mice?", "They sit."),
    )
    corpus = load_corpus(config(path, "animal_abuse", "privacy_violation"), tmp_path / "data")
    assert corpus.counts == {
        "rows": 6,  # the first answer is two
        "kept": 3,
        "dropped": {
            "minors_sexual": 1,
            "annotators disagree": 1,
            "domain not configured": 1,
        },
    }
    kept = [(e.response, e.domain, e.label) for e in corpus.examples]
    assert kept == [
        ("They hiss.", "animal_abuse", "unsafe"),
        ("They hiss.", "privacy_violation", "unsafe"),
        ("They purr softly.", "animal_abuse", "safe"),
    ]
    assert len({example.split for example in corpus.examples}) == 1
    with pytest.raises(UserError, match="no expert is trained on it"):
        load_corpus(config(path, "animal_abuse", "child_abuse"), tmp_path / "data")


def test_without_a_path_it_is_the_hubs_training_file(tmp_path, monkeypatch):
    path = write(tmp_path / "train.jsonl.xz", row("Cats?", "They purr."))
    asked = []
    monkeypatch.setattr(Hub, "fetch", lambda hub: asked.append(hub) or [path])
    assert len(list(BeaverTailsSource(None).rows())) == 1
    assert asked == [Hub(beavertails.REPO, beavertails.REVISION, ("round0/330k/train.jsonl.xz",))]
    with pytest.raises(UserError, match="is no file"):
        BeaverTailsSource(tmp_path / "none.jsonl")
