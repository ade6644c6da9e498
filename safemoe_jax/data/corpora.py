"""Corpora: a source's rows, checked, grouped, split, and kept as ArrayRecord by TFDS.

`load_corpus` surveys a source once (what is kept, what is dropped and why, each prompt's group and
split), then a TFDS builder writes the kept rows. The builder config's name holds the sha256 of the
source, the settings and the rules: TFDS would otherwise serve old rows for a changed source.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from safemoe_jax.config import DataConfig
from safemoe_jax.data import rules, splits
from safemoe_jax.data.beavertails import BeaverTailsSource
from safemoe_jax.data.sources import (
    JsonlSource,
    Label,
    PyritSource,
    Reject,
    Row,
    Source,
)
from safemoe_jax.data.splits import Split
from safemoe_jax.errors import UserError, refused_by_the_machine
from safemoe_jax.private_files import replacing
from safemoe_jax.progress import console
from safemoe_jax.remote import local_copy

_ROWS = "rows"  # the one TFDS split; what a row may be used for is a feature
# Raise it when what is stored for the same source and settings changes.
_FORMATS = {"pyrit": 1, "beavertails": 3, "jsonl": 3}
# Why a row has no label; one from JSON lines always has.
_UNDECIDED = {"pyrit": "score between safe and unsafe", "beavertails": "annotators disagree"}


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation with its answer.

    Attributes:
      id: the row's place in the source, the same whatever the settings.
      messages: turns with "role" and "content"; the last is the user's.
      response: the answer.
      domain: the harm category.
      label: whether the answer is harmful.
      source: where the row comes from.
      split: what the row may be used for.
      informative: a safe answer that is no refusal and long enough to inform (`rules`).
      group: near-duplicate prompts share it; a group lies in one split.
    """

    id: int
    messages: tuple[dict[str, str], ...]
    response: str
    domain: str
    label: Label
    source: str
    split: Split
    informative: bool
    group: int

    @property
    def prompt(self) -> str:
        return self.messages[-1]["content"]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Examples of the configured domains, in the order of their ids.

    Attributes:
      examples: all of them.
      counts: "rows" read, "kept", "dropped" by reason.
      fingerprint: of the source, the settings and the rules.
      domains: harm domains, in the order of the experts.
      source: where the rows came from.
    """

    examples: tuple[Example, ...]
    counts: dict[str, Any]
    fingerprint: str
    domains: tuple[str, ...]
    source: Source

    def select(
        self,
        *,
        label: Label | None = None,
        splits: Collection[str] | None = None,
        domain: str | None = None,
        informative: bool | None = None,
    ) -> list[Example]:
        """Examples that have all of the given values; None takes any."""
        return [
            example
            for example in self.examples
            if (label is None or example.label == label)
            and (splits is None or example.split in splits)
            and (domain is None or example.domain == domain)
            and (informative is None or example.informative == informative)
        ]


def load_corpus(config: DataConfig, data_dir: Path) -> Corpus:
    """Reads a corpus, built first where that has not been done for the same source and settings.

    Rows that cannot be read are counted, and written to `data_dir`/rejects.jsonl with file, line
    and reason. Rows that no model may train on (`rules.hazard`) are dropped and counted.

    Args:
      config: which corpus, domains and thresholds.
      data_dir: where ArrayRecord files and rejects go; made readable by its owner alone.

    Raises:
      UserError: where no row is left, a domain has none, or a domain must not have an expert.
    """
    for domain in config.domains:
        if reason := rules.hazardous_domain(domain):
            raise UserError(
                f"config.data.domains names {domain!r}: no expert is trained on it ({reason}); "
                "take it out"
            )
    source = _source(config)
    fingerprint = _fingerprint(config, source)
    data_dir.mkdir(parents=True, exist_ok=True)
    data_dir.chmod(0o700)
    kind = _BUILDERS[config.corpus]
    make = functools.partial(kind, data_dir=data_dir, config=_config(fingerprint))
    with _damage_told(data_dir / kind.name / fingerprint), _quiet():
        builder = make()
        prepared = builder.is_prepared()
    if not prepared:
        builder = _built(make, source, config, data_dir / "rejects.jsonl")
    with _damage_told(data_dir / kind.name / fingerprint):
        counts = dict(builder.info.metadata)
        examples = [_example(row) for row in builder.as_data_source(split=_ROWS)]
        if len(examples) != counts["kept"]:
            raise ValueError(f"{len(examples)} rows of {counts['kept']}")
    return Corpus(
        examples=tuple(sorted(examples, key=lambda example: example.id)),
        counts=counts,
        fingerprint=fingerprint,
        domains=config.domains,
        source=source,
    )


def _built(
    make: Callable[[], "_CorpusBuilder"], source: Source, config: DataConfig, rejects: Path
) -> "_CorpusBuilder":
    """Writes the kept rows of a source that stays as it is for as long as it is read."""
    changed = UserError(
        f"the corpus {config.path or config.corpus!r} changed while it was read; run the same "
        "command again once it is whole"
    )
    try:
        survey = _survey(source, config, rejects)
        with _quiet():
            builder = make()
            builder.survey = survey
            try:
                builder.download_and_prepare(file_format="array_record")
            except OSError:
                builder = make()
                if not builder.is_prepared():  # else another host has built the same meanwhile
                    raise
    except (OSError, LookupError) as error:
        if _is_as_it_was(source, config):
            raise
        raise changed from error
    if not _is_as_it_was(source, config):
        shutil.rmtree(builder.data_path)
        raise changed
    return builder


def _is_as_it_was(source: Source, config: DataConfig) -> bool:
    try:
        return _source(config).sha256 == source.sha256
    except (UserError, OSError):
        return False


@contextlib.contextmanager
def _damage_told(place: Path) -> Iterator[None]:
    """Names what TFDS and ArrayRecord cannot read as they wrote it."""
    try:
        yield
    except Exception as error:  # of TFDS, protobuf, ArrayRecord and json: they have no common class
        if refused_by_the_machine(error):
            raise  # it may be whole
        raise UserError(
            f"{place} is damaged ({type(error).__name__} in reading it); delete it, and the same "
            "command makes it again"
        ) from error


def _source(config: DataConfig) -> Source:
    if config.corpus == "pyrit":
        return PyritSource(config.unsafe_min_score, config.safe_max_score)
    if config.corpus == "beavertails":
        return BeaverTailsSource(local_copy(config.path) if config.path else None)
    return JsonlSource(local_copy(config.path))


@dataclasses.dataclass(frozen=True)
class _Survey:
    """What a first pass over a source found: all but the kept rows' text."""

    source: Source
    kept: frozenset[int]
    groups: dict[str, int]
    splits: dict[str, Split]
    informative_min_characters: int
    counts: dict[str, Any]


# TFDS is without types here, so that the keyword seems to be nobody's.
class _CorpusBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes the rows that `survey` kept."""

    VERSION = tfds.core.Version("1.0.0")
    survey: _Survey

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "id": np.int64,
                    "messages": tfds.features.Text(doc="turns, as JSON"),
                    "response": tfds.features.Text(),
                    "domain": tfds.features.Text(),
                    "label": tfds.features.Text(),
                    "source": tfds.features.Text(),
                    "split": tfds.features.Text(),
                    "informative": np.bool_,
                    "group": np.int64,
                }
            ),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # the source has its bytes already
        self.info.metadata.update(self.survey.counts)
        return {_ROWS: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        survey = self.survey
        rows = (row for row in survey.source.rows() if isinstance(row, Row))
        for place, row in enumerate(rows):
            if place not in survey.kept:
                continue
            prompt = rules.fold(row.prompt)
            informative = row.label == "safe" and rules.is_informative(
                row.response, survey.informative_min_characters
            )
            yield (
                place,
                {
                    "id": place,
                    "messages": json.dumps(row.messages),
                    "response": row.response,
                    "domain": row.domain,
                    "label": row.label,
                    "source": row.source,
                    "split": survey.splits[prompt],
                    "informative": informative,
                    "group": survey.groups[prompt],
                },
            )


class Pyrit(_CorpusBuilder):
    """Human-scored answers from PyRIT's scorer evaluations (MIT)."""


class Jsonl(_CorpusBuilder):
    """Labelled conversations from JSON lines."""


class BeaverTails(_CorpusBuilder):
    """Answers under fourteen kinds of harm (CC BY-NC 4.0)."""


_BUILDERS = {"pyrit": Pyrit, "jsonl": Jsonl, "beavertails": BeaverTails}


def _config(fingerprint: str) -> tfds.core.BuilderConfig:
    return tfds.core.BuilderConfig(name=fingerprint, version=_CorpusBuilder.VERSION)


def _fingerprint(config: DataConfig, source: Source) -> str:
    settings = dataclasses.asdict(config)
    del settings["path"], settings["sequence_length"]  # the bytes count; packing comes later
    text = json.dumps(
        [_FORMATS[config.corpus], settings, source.sha256, rules.version()], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _survey(source: Source, config: DataConfig, rejects_path: Path) -> _Survey:
    """Reads the source once, keeping prompts, places and counts, but no answers."""
    rejects: collections.Counter[str] = collections.Counter()
    dropped: collections.Counter[str] = collections.Counter()
    prompts: dict[str, None] = {}
    # Rows of one domain and text are one: the first's place and label.
    first: dict[tuple[str, bytes], tuple[int, Label | None]] = {}
    repeated: collections.defaultdict[tuple[str, bytes], list[Label | None]]
    repeated = collections.defaultdict(list)
    unsafe: set[bytes] = set()  # texts, in whatever domain
    place = -1
    with replacing(rejects_path) as file:
        for row in source.rows():
            if isinstance(row, Reject):
                rejects[row.reason] += 1
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
                continue
            place += 1
            # Dropped rows' prompts are grouped, too: the splits do not depend on the settings.
            prompts[rules.fold(row.prompt)] = None
            text = _digest(row)
            if row.label == "unsafe":
                unsafe.add(text)
            if reason := _drop_reason(row, config):
                dropped[reason] += 1
            elif (row.domain, text) in first:
                repeated[row.domain, text].append(row.label)
            else:
                first[row.domain, text] = place, row.label
    for key, labels in repeated.items():
        if set(labels) == {first[key][1]}:
            dropped["duplicate"] += len(labels)
        else:
            dropped["labelled both safe and unsafe"] += len(labels) + 1
            del first[key]
    for key in [key for key, (_, label) in first.items() if label == "safe" and key[1] in unsafe]:
        dropped["labelled safe here, and unsafe in another domain"] += 1
        del first[key]
    kept = frozenset(place for place, _ in first.values())
    domains = collections.Counter(domain for domain, _ in first)
    reasons = {**{f"rejected: {key}": n for key, n in rejects.items()}, **dropped}
    counts = {"rows": place + 1 + rejects.total(), "kept": len(kept), "dropped": reasons}
    _check(counts, domains, config)
    if rejects:
        console.print(f"{rejects.total()} rows rejected; file, line and reason: {rejects_path}")
    names = list(prompts)
    groups = splits.group(names)
    return _Survey(
        source=source,
        kept=kept,
        groups=dict(zip(names, groups.tolist(), strict=True)),
        splits=dict(zip(names, splits.split_of(names, groups), strict=True)),
        informative_min_characters=config.informative_min_characters,
        counts=counts,
    )


def _drop_reason(row: Row, config: DataConfig) -> str | None:
    """Why a readable row is not kept, whatever others there are, or None."""
    texts = [message["content"] for message in row.messages]
    if reason := rules.hazard(row.domain, *texts, row.response):
        return reason
    if row.label is None:
        return _UNDECIDED[config.corpus]
    if row.domain not in config.domains:
        return "domain not configured"
    return None


def _digest(row: Row) -> bytes:
    """Of what is said, whatever it is called."""
    key = json.dumps([row.messages, row.response])
    return hashlib.sha256(key.encode()).digest()


def _check(counts: dict[str, Any], domains: collections.Counter[str], config: DataConfig) -> None:
    """Refuses an empty corpus or domain before TFDS, whose message would not say why."""
    if not counts["kept"]:
        raise UserError(
            f"the corpus {config.path or config.corpus!r} has {counts['rows']} rows and keeps none "
            f"for data.domains {config.domains}: {counts['dropped']}; correct the rows or "
            "data.domains"
        )
    if missing := [domain for domain in config.domains if domain not in domains]:
        raise UserError(
            f"config.data.domains names {missing[0]!r}, of which no row is kept; rows kept: "
            f"{dict(domains)}; dropped: {counts['dropped']}; correct the rows or data.domains"
        )


def _example(row: dict[str, Any]) -> Example:
    values: dict[str, Any] = {
        key: value.decode() for key, value in row.items() if isinstance(value, bytes)
    }
    values["messages"] = tuple(json.loads(values["messages"]))
    return Example(
        id=int(row["id"]),
        informative=bool(row["informative"]),
        group=int(row["group"]),
        **values,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS' announcements, progress bars and log lines off the terminal."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(verbosity)
