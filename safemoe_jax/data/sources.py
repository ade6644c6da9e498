"""Where labelled conversations come from, row by row: PyRIT's human scores, anyone's JSON lines."""

import csv
import dataclasses
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from safemoe_jax.errors import UserError
from safemoe_jax.fetch import file_sha256, wheel_member

Label = Literal["unsafe", "safe"]

PYRIT = "pyrit==1.1.0"
PYRIT_SHA256 = "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a"
_PACKED, _TABLES = (".gz", ".xz", ".bz2", ".zst", ".zip"), (".csv", ".tsv", ".parquet")
_SCORER_EVALS = "pyrit/datasets/scorer_evals"
_PYRIT_HARM = {
    "exploits": ("exploits",),
    "hate_speech": ("hate_speech", "hate_speech_multi_score"),
    "info_integrity": ("info_integrity",),
    "privacy": ("privacy",),
    "self_harm": ("self_harm",),
    "sexual": ("sexual",),
    "violence": ("violence", "violence_multi_score"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A labelled conversation as its source has it; `label` is None where people disagreed."""

    messages: tuple[dict[str, str], ...]
    response: str
    domain: str
    label: Label | None
    source: str

    @property
    def prompt(self) -> str:
        return self.messages[-1]["content"]


@dataclasses.dataclass(frozen=True)
class Reject:
    """A row that cannot be read, and why. It holds nothing of the row's text."""

    file: str
    line: int
    reason: str


class Source(Protocol):
    """Rows in a fixed order, read anew at each call; `sha256` names the bytes that they are in."""

    sha256: str

    def rows(self) -> Iterator[Row | Reject]: ...


class PyritSource:
    """Human-scored answers from PyRIT's `scorer_evals/harm` (MIT).

    A score is the mean of a row's score columns; an (objective, answer) that occurs more than once
    in a domain is one row with the mean of its scores.
    """

    sha256 = PYRIT_SHA256

    def __init__(self, unsafe_min_score: float, safe_max_score: float) -> None:
        """A score from `unsafe_min_score` is unsafe, one up to `safe_max_score` safe."""
        self._unsafe_min_score = unsafe_min_score
        self._safe_max_score = safe_max_score

    def rows(self) -> Iterator[Row | Reject]:
        for domain, names in _PYRIT_HARM.items():
            scores: dict[tuple[str, str], list[float]] = {}
            for name in names:
                for item in pyrit_scores(f"harm/{name}.csv"):
                    if isinstance(item, Reject):
                        yield item
                    else:
                        prompt, response, score = item
                        scores.setdefault((prompt, response), []).append(score)
            for (prompt, response), values in scores.items():
                yield Row(
                    messages=({"role": "user", "content": prompt},),
                    response=response,
                    domain=domain,
                    label=self._label(sum(values) / len(values)),
                    source=f"{PYRIT} harm/{domain}",
                )

    def _label(self, score: float) -> Label | None:
        if score >= self._unsafe_min_score:
            return "unsafe"
        return "safe" if score <= self._safe_max_score else None


def pyrit_scores(name: str) -> Iterator[tuple[str, str, float] | Reject]:
    """Reads one table of PyRIT's scorer evaluations.

    Args:
      name: path below `scorer_evals`, such as "objective/privacy.csv".

    Yields:
      (prompt, answer, mean of the human scores, in [0, 1]), or why a row has none of these.
    """
    wheel = wheel_member(PYRIT, None, wheel_sha256=PYRIT_SHA256)
    with zipfile.ZipFile(wheel) as archive, archive.open(f"{_SCORER_EVALS}/{name}") as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        above, header = next(
            (number, line) for number, line in enumerate(lines, 1) if not line.startswith("#")
        )
        columns = next(csv.reader([header]))
        score_columns = [i for i, name in enumerate(columns) if name.startswith("human_score")]
        places = columns.index("objective"), columns.index("assistant_response")
        table = csv.reader(lines)
        for cells in table:
            try:
                prompt, response = (cells[place].strip() for place in places)
                scores = [float(cells[i]) for i in score_columns if cells[i].strip()]
            except (IndexError, ValueError):
                yield Reject(name, above + table.line_num, "a cell is missing or no number")
                continue
            if prompt and response and scores:
                yield prompt, response, sum(scores) / len(scores)
            else:
                yield Reject(name, above + table.line_num, "prompt, answer or score is empty")


def pyrit_tables(folder: str) -> list[str]:
    """Names of the tables in a folder of the scorer evaluations, for `pyrit_scores`."""
    wheel = wheel_member(PYRIT, None, wheel_sha256=PYRIT_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(archive.namelist())
    prefix = f"{_SCORER_EVALS}/"
    return [
        name.removeprefix(prefix)
        for name in names
        if name.startswith(f"{prefix}{folder}/") and name.endswith(".csv")
    ]


class JsonlSource:
    """Conversations from a .jsonl file, or from all of a directory's, one JSON object a line.

    Keys: `prompt` (text) or `messages` (turns, the last the user's), `response`, `domain`, `label`
    ("unsafe" or "safe"), `source`.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError where `path` holds no .jsonl file."""
        if not path.exists():
            raise UserError(f"config.data.path {str(path)!r} does not exist; name a .jsonl file")
        self._files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not self._files:
            raise UserError(f"config.data.path {str(path)!r} holds no *.jsonl file; add one")
        # Half a corpus would go unnoticed, and each line of another format be a reject of its own.
        around = path.iterdir() if path.is_dir() else [path]
        if others := sorted(file.name for file in around if _is_not_read(file, path)):
            raise UserError(
                f"config.data.path {str(path)!r} has {others[0]!r}, which is not read; write it as "
                "JSON lines into a file *.jsonl, uncompressed, or take it away"
            )
        self.sha256 = "-".join(file_sha256(file) for file in self._files)

    def rows(self) -> Iterator[Row | Reject]:
        for path in self._files:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.strip():
                        continue
                    try:
                        yield _parse(json.loads(line))
                    except (ValueError, RecursionError) as error:
                        yield Reject(path.name, number, _reason(error))


def _is_not_read(file: Path, path: Path) -> bool:
    """Whether a file of a corpus' path holds rows, by its name, that `JsonlSource` cannot read."""
    name = file.name.lower()
    inner = name.removesuffix(file.suffix.lower()) if name.endswith(_PACKED) else name
    if file == path:
        return inner != name or name.endswith(_TABLES)
    return inner.endswith(".jsonl") and file.suffix != ".jsonl"


def read_prompts(path: Path) -> list[tuple[dict[str, str], ...]]:
    """Conversations to answer, each ending with a user turn.

    Args:
      path: a text file with a prompt a line, or a .jsonl file with `prompt` or `messages` in each
        line, whatever else is there.

    Raises:
      UserError: naming the line that holds none, without its text.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; give one with a prompt a line, or a .jsonl file")
    prompts = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line.decode()}
            prompts.append(_messages(value))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {_reason(error)}; correct it") from error
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one a line")
    return prompts


def _reason(error: Exception) -> str:
    """Why a line was rejected, without its text, which errors of the JSON and codecs quote."""
    if isinstance(error, UnicodeError):
        return "not valid Unicode"
    if isinstance(error, (json.JSONDecodeError, RecursionError)):
        return "not a JSON value"
    return str(error)


def _parse(value: Any) -> Row:
    """Checks one object; a ValueError says what is wrong with it."""
    messages = _messages(value)
    for key in ("response", "domain", "source"):
        if not isinstance(value.get(key), str) or not value[key].strip():
            raise ValueError(f"{key} is missing, empty or not text")
    if value.get("label") not in ("unsafe", "safe"):
        raise ValueError("label is neither unsafe nor safe")
    row = Row(
        messages=messages,
        response=value["response"],
        domain=value["domain"],
        label=value["label"],
        source=value["source"],
    )
    for text in (row.response, row.domain, row.source):
        text.encode()  # a lone surrogate passes for text until it is written
    return row


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    """The turns of one object, in valid Unicode; a ValueError says what is wrong."""
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if ("prompt" in value) == ("messages" in value):
        raise ValueError("needs either prompt or messages")
    if "messages" in value:
        return _turns(value["messages"])
    if not isinstance(value["prompt"], str) or not value["prompt"].strip():
        raise ValueError("prompt is missing, empty or not text")
    value["prompt"].encode()
    return ({"role": "user", "content": value["prompt"]},)


def _turns(messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is not a list of turns")
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            raise ValueError("a turn's role is none of system, user, assistant")
        if not isinstance(turn.get("content"), str):
            raise ValueError("a turn's content is not text")
        turn["content"].encode()
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError("the last turn is not the user's, or empty")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in messages)
