"""The blinded sheet: who wrote what is not in it, and labels find their way back."""

import collections
import csv
import json
import re

import pytest

from safemoe_jax.errors import UserError
from safemoe_jax.evaluation.human import HumanJudge, export_for_humans, import_humans
from safemoe_jax.evaluation.verdicts import MISSING, Verdict

SYSTEMS = ("base", "safemoe", "uniform")


def answer(system, number, response=None):
    return {
        "system": system,
        "prompt_id": f"p{number}",
        "messages": [{"role": "user", "content": f"Question {number}?"}],
        "response": response or f"Answer {number}, the {SYSTEMS.index(system)} way; with a comma.",
    }


ANSWERS = [answer(system, number) for system in SYSTEMS for number in range(8)]


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fill(path, rows, label, **dialect):
    """Writes the sheet back with `label(row) -> labels`."""
    with path.open("w", encoding=dialect.pop("encoding", "utf-8"), newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), **dialect)
        writer.writeheader()
        writer.writerows({**row, **label(row)} for row in rows)


def whose(directory):
    key = json.loads((directory / "for_humans_key.json").read_text())
    return {name: entry["systems"] for name, entry in key.items()}


def test_the_sheet_is_blind_and_drawn_evenly(tmp_path):
    sheet = export_for_humans(ANSWERS, 12, 0, tmp_path)
    key = tmp_path / "for_humans_key.json"
    assert [path.stat().st_mode & 0o777 for path in (sheet, key)] == [0o600] * 2
    text = sheet.read_text()
    assert not any(name in text for name in SYSTEMS)
    rows = read(sheet)
    drawn = [system for row in rows for system in whose(tmp_path)[row["id"]]]
    assert collections.Counter(drawn) == {"base": 4, "safemoe": 4, "uniform": 4}
    assert drawn != [*SYSTEMS] * 4  # as they were drawn
    assert {row["safe"] for row in rows} == {""}
    assert all(re.fullmatch("x[0-9a-f]{8}", row["id"]) for row in rows)  # no spreadsheet's number
    known = {(a["messages"][-1]["content"], a["response"]) for a in ANSWERS}
    assert {(row["prompt"], row["answer"]) for row in rows} < known


def test_the_same_answer_of_two_systems_is_one_row(tmp_path):
    same = [answer(system, 1, "Just so.") for system in SYSTEMS]
    rows = read(export_for_humans([*same, answer("base", 2)], 100, 0, tmp_path))
    assert len(rows) == 2
    assert sorted(map(len, whose(tmp_path).values())) == [1, 3]


def test_labels_come_back_as_a_judge(tmp_path):
    sheet = export_for_humans(ANSWERS, 24, 0, tmp_path)
    labels = {
        "Question 0?": {"safe": "Yes", "refusal": "no", "on_topic": "y"},
        "Question 1?": {"safe": "NO", "refusal": " n "},
        "Question 2?": {"safe": "yes", "refusal": "yes"},
    }
    fill(sheet, read(sheet), lambda row: labels.get(row["prompt"], {}))
    assert import_humans(sheet, tmp_path) == 9
    assert (tmp_path / "human.jsonl").stat().st_mode & 0o777 == 0o600
    pairs = [(a["messages"], a["response"]) for a in ANSWERS]
    verdicts = HumanJudge(tmp_path).judge(pairs)[:4]
    assert verdicts == [
        Verdict(True, False, True, False, None),
        Verdict(False, False, None, None, None),
        Verdict(True, True, True, False, None),
        MISSING,
    ]
    assert [verdict.informative_safe for verdict in verdicts] == [True, None, False, None]


def test_a_spreadsheets_own_csv_is_read(tmp_path):
    sheet = export_for_humans(
        [*ANSWERS[:2], answer("base", 9, "Ünder\nlines\x0bhere\u2028too")], 3, 0, tmp_path
    )
    fill(sheet, read(sheet), lambda row: {"safe": "yes"}, encoding="utf-8-sig", delimiter=";")
    assert import_humans(sheet, tmp_path) == 3


def test_what_a_spreadsheet_would_run_is_text(tmp_path):
    (row,) = read(export_for_humans([answer("base", 1, "=1+1")], 1, 0, tmp_path))
    assert row["answer"] == "'=1+1"


def test_labelled_answers_are_not_asked_for_again(tmp_path):
    sheet = export_for_humans(ANSWERS, 20, 0, tmp_path)
    first = read(sheet)
    fill(sheet, first, lambda row: {"safe": "yes"})
    import_humans(sheet, tmp_path)
    with pytest.raises(UserError, match=r"for_humans\.csv is there already, perhaps with labels"):
        export_for_humans(ANSWERS, 20, 0, tmp_path)
    sheet.rename(tmp_path / "done.csv")
    second = read(export_for_humans(ANSWERS, 20, 0, tmp_path))
    assert len(second) == 4
    assert not {row["id"] for row in first} & {row["id"] for row in second}
    fill(sheet, second, lambda row: {"safe": "no"})
    import_humans(sheet, tmp_path)
    # The first sheet's key still holds; what is read last counts.
    fill(tmp_path / "done.csv", first[:1], lambda row: {"safe": "no"})
    assert import_humans(tmp_path / "done.csv", tmp_path) == 1
    verdicts = HumanJudge(tmp_path).judge([(a["messages"], a["response"]) for a in ANSWERS])
    assert collections.Counter(verdict.safe for verdict in verdicts) == {True: 19, False: 5}
    sheet.unlink()
    with pytest.raises(UserError, match="all 24 answers have labels"):
        export_for_humans(ANSWERS, 1, 0, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"safe": "maybe"}, r"line 3 \(id x[0-9a-f]{8}\): safe is 'maybe'; write yes, no or noth"),
        ({"id": "00"}, r"line 3: id '00' is not in .*key\.json; keep the sheet's ids"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_kept(tmp_path, change, message):
    sheet = export_for_humans(ANSWERS, 5, 0, tmp_path)
    rows = read(sheet)
    fill(sheet, rows, lambda row: change if row["id"] == rows[1]["id"] else {"safe": "yes"})
    with pytest.raises(UserError, match=message):
        import_humans(sheet, tmp_path)
    assert not (tmp_path / "human.jsonl").exists()


def test_a_sheet_of_another_form_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv is no file; --export-for-humans writes"):
        import_humans(tmp_path / "none.csv", tmp_path)
    with pytest.raises(UserError, match="is -1; export one answer or more"):
        export_for_humans(ANSWERS, -1, 0, tmp_path)
    sheet = export_for_humans(ANSWERS, 5, 0, tmp_path)
    sheet.write_text("id,safe,refusal\n1,yes,no\n")
    with pytest.raises(UserError, match="has no column 'on_topic'; keep the sheet's columns"):
        import_humans(sheet, tmp_path)
    sheet.write_bytes("id,safe\nä".encode("latin-1"))
    with pytest.raises(UserError, match=r"is not UTF-8 .*save it as CSV in UTF-8"):
        import_humans(sheet, tmp_path)


def test_a_sheet_without_a_label_makes_nobody_a_judge(tmp_path):
    sheet = export_for_humans(ANSWERS, 5, 0, tmp_path)
    with pytest.raises(
        UserError, match=r"for_humans\.csv has no label; write yes or no under safe,"
    ):
        import_humans(sheet, tmp_path)
    assert not (tmp_path / "human.jsonl").exists()


def test_a_damaged_key_is_named(tmp_path):
    sheet = export_for_humans(ANSWERS, 5, 0, tmp_path)
    (tmp_path / "for_humans_key.json").write_text("{")
    with pytest.raises(UserError, match=r"for_humans_key\.json is not JSON .*; put it back, or"):
        import_humans(sheet, tmp_path)
