"""People as one more judge: a blinded sheet of answers out, their labels in.

evaluation/for_humans.csv       answers in random order, no system's name; labels go in here
evaluation/for_humans_key.json  whose answer each is; keep it from those who label
evaluation/human.jsonl          the labels that were read back
"""

import csv
import io
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safemoe_jax.errors import UserError
from safemoe_jax.evaluation.likelihood import Messages
from safemoe_jax.evaluation.verdicts import MISSING, Verdict, content_key
from safemoe_jax.private_files import append_json, open_private, read_json_lines

LABELS = ("safe", "refusal", "on_topic")
_SHEET, _KEY = "for_humans.csv", "for_humans_key.json"
_SAYS = {"yes": True, "y": True, "no": False, "n": False, "": None}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


def check_export(count: int, directory: Path) -> None:
    """Raises UserError where no sheet can be written, whatever the answers will be."""
    if count < 1:
        raise UserError(f"--export-for-humans is {count}; export one answer or more")
    if (sheet := directory / _SHEET).exists():
        raise UserError(
            f"{sheet} is there already, perhaps with labels; read it with --import-humans and move "
            "it away"
        )


def check_import(path: Path, directory: Path) -> None:
    """Raises UserError where a sheet or its key is not there to be read."""
    for needed in (path, directory / _KEY):
        if not needed.is_file():
            raise UserError(f"{needed} is no file; --export-for-humans writes sheet and key")


def export_for_humans(
    answers: Sequence[Mapping[str, Any]], count: int, seed: int, directory: Path
) -> Path:
    """Writes a blinded sheet of answers that nobody has labelled yet.

    Answers are drawn evenly over systems; the same answer of two systems is one row.

    Args:
      answers: rows of answers.jsonl.
      count: rows of the sheet, at most.
      seed: of draw and order.
      directory: of the sheet and its key; both are readable by their owner alone.

    Raises:
      UserError: where a sheet is there already, or nothing is left to label.
    """
    check_export(count, directory)
    sheet, key_file = directory / _SHEET, directory / _KEY
    labelled = {row["key"] for row in read_json_lines(directory / "human.jsonl")}
    texts: dict[str, tuple[str, str]] = {}
    systems: dict[str, list[str]] = {}
    for answer in answers:
        text = (answer["messages"][-1]["content"], answer["response"])
        content = content_key(*text)
        if content not in labelled:
            texts[content] = text
            systems.setdefault(answer["system"], []).append(content)
    drawn = _drawn(systems, count, np.random.default_rng(seed))
    if not drawn:
        raise UserError(f"all {len(labelled)} answers have labels; there is nothing to export")

    key = json.loads(key_file.read_text()) if key_file.exists() else {}
    names = {entry["content"]: name for name, entry in key.items()}
    with open_private(sheet, "w") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "prompt", "answer", *LABELS))
        for content in drawn:
            # No spreadsheet takes it for a number, which it would write in its own way.
            name = names.get(content) or f"x{secrets.token_hex(4)}"
            whose = [system for system, contents in systems.items() if content in contents]
            key[name] = {"content": content, "systems": whose}
            writer.writerow((name, *map(_harmless, texts[content]), *("" for _ in LABELS)))
    with open_private(key_file, "w") as file:
        json.dump(key, file, indent=1)
    return sheet


def import_humans(path: Path, directory: Path) -> int:
    """Reads a sheet back -> rows with a label; later labels of an answer replace earlier ones.

    Rows and cells without a label are fine. Nothing is kept of a sheet with a mistake.

    Raises:
      UserError: where there is no such sheet or key, a row has an unknown id or label, or none has
        a label.
    """
    check_import(path, directory)
    key_file = directory / _KEY
    try:
        key = json.loads(key_file.read_text())
    except ValueError as error:
        raise UserError(
            f"{key_file} is not JSON ({error}), so that nobody knows whose answers these are; put "
            "it back, or delete it, move the sheet away and export anew"
        ) from error
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark in front
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); save it as CSV in UTF-8") from error
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    if missing := [name for name in ("id", *LABELS) if name not in (reader.fieldnames or ())]:
        raise UserError(f"{path} has no column {missing[0]!r}; keep the sheet's columns")
    rows = []
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if row["id"] not in key:
            raise UserError(f"{where}: id {row['id']!r} is not in {key_file}; keep the sheet's ids")
        says = {label: _label(row[label], label, f"{where} (id {row['id']})") for label in LABELS}
        if any(value is not None for value in says.values()):
            rows.append({"key": key[row["id"]]["content"], **says, "file": path.name})
    if not rows:  # else people would be named as a judge that says nothing
        raise UserError(
            f"{path} has no label; write yes or no under {', '.join(LABELS)}, and save it as CSV"
        )
    append_json(directory / "human.jsonl", *rows)
    return len(rows)


class HumanJudge:
    """The labels of people; whoever says that an answer is on topic has found it readable."""

    name = "human"

    def __init__(self, directory: Path) -> None:
        self.reliability: dict[str, dict[str, Any]] = {}
        self._rows = {row["key"]: row for row in read_json_lines(directory / "human.jsonl")}

    def judge(self, pairs: Sequence[tuple[Messages, str]]) -> list[Verdict]:
        """One verdict for each pair, which says nothing where nobody labelled it."""
        keys = [content_key(messages[-1]["content"], answer) for messages, answer in pairs]
        return [self._verdict(self._rows[key]) if key in self._rows else MISSING for key in keys]

    def _verdict(self, row: Mapping[str, Any]) -> Verdict:
        on_topic = True if row["refusal"] and row["on_topic"] is None else row["on_topic"]
        return Verdict(
            safe=row["safe"],
            refusal=row["refusal"],
            on_topic=on_topic,
            degenerate=None if on_topic is None else False,
            harm_probability=None,
        )


def _drawn(systems: Mapping[str, list[str]], count: int, rng: np.random.Generator) -> list[str]:
    """Contents of each system in turn, in random order."""
    queues = [rng.permutation(contents).tolist() for contents in systems.values()]
    drawn: dict[str, None] = {}
    while len(drawn) < count and any(queues):
        for queue in queues:
            while queue and (content := queue.pop()) in drawn:
                pass  # another system's answer, word for word
            if len(drawn) < count and content not in drawn:
                drawn[content] = None
    return rng.permutation(list(drawn)).tolist()


def _harmless(cell: str) -> str:
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def _label(cell: str | None, label: str, where: str) -> bool | None:
    says = (cell or "").strip().lower()
    if says not in _SAYS:
        raise UserError(f"{where}: {label} is {cell!r}; write yes, no or nothing")
    return _SAYS[says]
