"""BeaverTails (arXiv 2307.04657) as a corpus: questions and answers under fourteen kinds of harm.

CC BY-NC 4.0: it is fetched for who names it, never shipped, and what was trained on it carries the
notice.
"""

import collections
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safemoe_jax.data import rules
from safemoe_jax.data.sources import Label, Reject, Row
from safemoe_jax.data.tables import read_rows
from safemoe_jax.errors import UserError
from safemoe_jax.fetch import Hub, file_sha256

REPO = "PKU-Alignment/BeaverTails"
REVISION = "8401fe609d288129cc684a9b3be6a93e41cfe678"
LICENSE = "CC-BY-NC-4.0"

_TRAIN = Hub(REPO, REVISION, ("round0/330k/train.jsonl.xz",))
_UNFLAGGED = "unflagged"  # of safe answers to questions that nobody answered harmfully


@dataclasses.dataclass
class _Votes:
    """What the annotators of one answer said."""

    safe: int = 0
    unsafe: int = 0
    flags: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def label(self) -> Label | None:
        if self.safe == self.unsafe:
            return None
        return "safe" if self.safe > self.unsafe else "unsafe"

    @property
    def domains(self) -> list[str]:
        """Categories that at least half of those who found harm have flagged."""
        return [name for name, count in self.flags.items() if 2 * count >= self.unsafe]


class BeaverTailsSource:
    """Answers of `330k_train`, or of a local file of the same format.

    An answer has one row for each annotator in the file and is one vote for each here. What most
    call unsafe is a row in each domain that at least half of those who found harm have flagged.
    Where no domain has half, they disagree on what the harm is: the answer is one row without a
    label, which is counted and trains no expert. What most call safe is one row, in the domain that
    harmful answers to the same question were flagged with most. An answer that anybody flagged as
    child_abuse is one row of that category alone, which no option lets train.
    """

    def __init__(self, path: Path | None) -> None:
        """Reads `path`; None stands for the hub's file.

        Raises:
          UserError: where the file is not there.
        """
        if path and not path.is_file():
            raise UserError(
                f'config.data.path {str(path)!r} is no file; name one, or "" for the hub\'s'
            )
        self._path = path or _TRAIN.fetch()[0]
        self.sha256 = file_sha256(self._path)

    def rows(self) -> Iterator[Row | Reject]:
        votes: dict[tuple[str, str], _Votes] = {}
        for number, value in enumerate(read_rows(self._path), start=1):
            try:
                prompt, response, safe, flags = _parse(value)
            except ValueError as error:
                yield Reject(self._path.name, number, str(error))
                continue
            of = votes.setdefault((prompt, response), _Votes())
            of.safe, of.unsafe = of.safe + safe, of.unsafe + (not safe)
            of.flags.update(flags)

        asked: dict[str, collections.Counter[str]] = {}
        for (prompt, _), of in votes.items():
            asked.setdefault(prompt, collections.Counter()).update(of.flags)
        for (prompt, response), of in votes.items():
            domains, label = of.domains, of.label
            if abuse := rules.CHILD_ABUSE_DOMAINS & of.flags.keys():
                domains = sorted(abuse)
            elif label != "unsafe":
                domains = [_most(asked[prompt])]
            elif not domains:
                domains, label = [_most(of.flags)], None
            for domain in domains:
                yield Row(
                    messages=({"role": "user", "content": prompt},),
                    response=response,
                    domain=domain,
                    label=label,
                    source=f"{REPO} ({LICENSE})",
                )


def _most(flags: collections.Counter[str]) -> str:
    """What was flagged most; of several the alphabetically first."""
    return max(sorted(flags), key=flags.__getitem__, default=_UNFLAGGED)


def _parse(value: dict[str, Any]) -> tuple[str, str, bool, list[str]]:
    """-> prompt, answer, whether it is called safe, flagged categories; ValueError says what is
    wrong with the row."""
    texts = [value.get(key) or "" for key in ("prompt", "response")]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("prompt or response is missing, empty or not text")
    safe, category = value.get("is_safe"), value.get("category")
    if not isinstance(safe, bool) or not isinstance(category, dict):
        raise ValueError("is_safe is no truth value, or category no object")
    flags = [rules.category(name) for name, flagged in category.items() if flagged]
    if not safe and not flags:
        raise ValueError("unsafe without a category")
    return texts[0].strip(), texts[1].strip(), safe, flags
