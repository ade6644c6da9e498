"""What a judge may learn from: a corpus' judge split, and PyRIT's tables beside it."""

import dataclasses
from pathlib import Path
from typing import Any

from safemoe_jax.config import DataConfig
from safemoe_jax.data import rules, splits
from safemoe_jax.data.corpora import Corpus
from safemoe_jax.data.sources import PyritSource, Reject, Row, pyrit_scores, pyrit_tables


@dataclasses.dataclass(frozen=True)
class JudgeRow:
    """A human-labelled answer for the judge: no model that it judges was trained on its prompt.

    `harmful` and `refused` are None where nobody labelled it; rows of a `group` have near-duplicate
    prompts.
    """

    prompt: str
    response: str
    harmful: bool | None
    refused: bool | None
    source: str
    group: int


def load_judge_rows(corpus: Corpus, config: DataConfig) -> list[JudgeRow]:
    """What a judge of this corpus' models may learn from.

    That is the corpus' judge split, and the tables of PyRIT whose prompts are nowhere in the
    corpus' source, near-duplicates counted: objective/ (was the harmful aim reached?) and
    refusal_scorer/ (was it refused?), for another corpus than PyRIT's also harm/. An answer that
    occurs in several tables is one row, without a label in which they contradict each other.
    `rules.hazard` applies here, too.

    Args:
      corpus: what the judged models learn and are asked.
      config: its own; from its thresholds on a score of harm/ is a label.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}

    def add(prompt: str, response: str, source: str, **labels: bool) -> None:
        row = rows.setdefault((prompt, response), {"source": source})
        for key, value in labels.items():
            if row.setdefault(key, value) != value:
                row[key] = None

    for example in corpus.select(splits={"judge"}):
        add(example.prompt, example.response, example.source, harmful=example.label == "unsafe")
    own = {prompt for prompt, _ in rows}
    for folder, key in (("objective", "harmful"), ("refusal_scorer", "refused")):
        for name in pyrit_tables(folder):
            for item in pyrit_scores(name):
                if isinstance(item, Reject):
                    continue
                prompt, response, score = item
                if not rules.hazard(Path(name).stem, prompt, response):
                    add(prompt, response, f"pyrit {name}", **{key: score >= 0.5})
    if not isinstance(corpus.source, PyritSource):
        for row in PyritSource(config.unsafe_min_score, config.safe_max_score).rows():
            if (
                isinstance(row, Row)
                and row.label
                and not rules.hazard(row.domain, row.prompt, row.response)
            ):
                add(row.prompt, row.response, row.source, harmful=row.label == "unsafe")

    seen = {rules.fold(row.prompt) for row in corpus.source.rows() if isinstance(row, Row)}
    prompts = sorted(seen | {rules.fold(prompt) for prompt, _ in rows})
    group_of = dict(zip(prompts, splits.group(prompts).tolist(), strict=True))
    taken = {group_of[prompt] for prompt in seen}
    return [
        JudgeRow(
            prompt=prompt,
            response=response,
            harmful=row.get("harmful"),
            refused=row.get("refused"),
            source=row["source"],
            group=group_of[rules.fold(prompt)],
        )
        for (prompt, response), row in rows.items()
        if prompt in own or group_of[rules.fold(prompt)] not in taken
    ]
