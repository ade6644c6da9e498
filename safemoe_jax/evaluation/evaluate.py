"""Compares systems: generate, score, judge, and write it all down.

evaluation/generated.jsonl    answers as they come, by system, fold and benchmark
evaluation/likelihoods.jsonl  likelihoods of given answers as they come, likewise; numbers only
evaluation/answers.jsonl      judged answers with verdicts and gates; its owner alone may read it
evaluation/results.json       docs/results.md

What the first two files hold is not done again, whoever else is compared later.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from safemoe_jax.config import EvaluationConfig
from safemoe_jax.data.chat import ChatFormat, said
from safemoe_jax.evaluation import metrics
from safemoe_jax.evaluation.benchmarks import Prompt
from safemoe_jax.evaluation.gates import gate_statistics
from safemoe_jax.evaluation.prompt_sets import BENIGN, GSM8K, HELD_OUT
from safemoe_jax.evaluation.verdicts import Judge, Verdict, judged
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.parallel.hosts import is_first
from safemoe_jax.private_files import append_json, open_private, read_json_lines

_GATE_DIGITS = 4

Row = dict[str, Any]
PairScorer = Callable[..., list[np.ndarray]]  # `inference.scoring.Scorer`


@dataclasses.dataclass(frozen=True)
class System:
    """What answers the prompts.

    Attributes:
      sampler: generates.
      scorer: log-likelihoods of given answers.
      routed: whether a router makes its gates.
      has_null: whether one of the router's slots selects no expert, and the gates tell its share.
      preamble: turns that come before every conversation.
    """

    sampler: Sampler
    scorer: PairScorer
    routed: bool
    has_null: bool
    preamble: tuple[dict[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A system, what it is asked, and how it is made; it is made only if something is to be done.

    Attributes:
      name: of the system.
      fold: the domain that it was trained without; "" where there is none.
      prompts: of any benchmarks.
      answers: whether it answers them; if not, only given answers are scored.
      shows_gates: whether its answers keep every token's gates.
      make: makes it.
    """

    name: str
    fold: str
    prompts: tuple[Prompt, ...]
    answers: bool
    shows_gates: bool
    make: Callable[[], System]


@dataclasses.dataclass(frozen=True)
class Asking:
    """What all systems have in common.

    `made_of` names weights and settings that they come from; `send` brings what is done to where
    the work directory lies.
    """

    chat: ChatFormat
    config: EvaluationConfig
    seed: int
    made_of: str
    directory: Path
    send: Callable[[], None]


def measure(entries: Sequence[Entry], asking: Asking) -> tuple[list[Row], list[Row]]:
    """Lets every system answer its prompts, and scores the answers that people gave.

    What an interrupted or an earlier call with the same settings left in the directory is used
    again: a system's to a benchmark, all of it or none.

    Returns:
      answers without verdicts, rows of answers.jsonl; and rows of results.json's `likelihoods`.
    """
    answers: list[Row] = []
    likelihoods: list[Row] = []
    generated = _Kept(asking.directory / "generated.jsonl", asking.send)
    scored = _Kept(asking.directory / "likelihoods.jsonl", asking.send)
    for entry in entries:
        make = functools.cache(entry.make)  # and forgotten when its prompts are done
        benchmarks: dict[str, list[Prompt]] = {}
        for prompt in entry.prompts:
            benchmarks.setdefault(prompt.benchmark, []).append(prompt)
        for benchmark, asked in benchmarks.items():
            key = _key(entry, asked, asking)
            if entry.answers and benchmark != BENIGN:
                answers += generated.get(
                    key, functools.partial(_answers, entry, make, asked, asking)
                )
            if any(_given(prompt) for prompt in asked):
                likelihoods += scored.get(
                    key, functools.partial(_likelihoods, entry, make, asked, asking)
                )
    return answers, likelihoods


class _Kept:
    """Rows that belong together, by key, in a file of JSON lines; a key has all rows or none."""

    def __init__(self, path: Path, send: Callable[[], None]) -> None:
        self._path, self._send = path, send
        self._rows: dict[str, list[Row]] = {}
        # Several processes must compute alike, and do not see the file change at one moment.
        for part in read_json_lines(path) if jax.process_count() == 1 else []:
            self._rows[part["key"]] = part["rows"]

    def get(self, key: str, make: Callable[[], list[Row]]) -> list[Row]:
        if key not in self._rows:
            self._rows[key] = make()
            if is_first():
                append_json(self._path, {"key": key, "rows": self._rows[key]})
                self._send()
        return self._rows[key]


def judge_answers(
    rows: Sequence[Row], judge: Judge, directory: Path
) -> tuple[list[Row], list[Row]]:
    """Judges all answers, cut to 64 tokens, too, and writes answers.jsonl.

    Returns:
      rows of results.json: outcomes, one an answer, and their shares.
    """
    problems = [row for row in rows if row["benchmark"] == GSM8K]
    talk = [row for row in rows if row["benchmark"] != GSM8K]
    verdicts = judged(judge, talk)
    cut = [i for i, row in enumerate(talk) if row["harmful"] and row["response_64"] is not None]
    of_cut = judged(judge, [{**talk[i], "response": talk[i]["response_64"]} for i in cut])
    short = dict(zip(cut, of_cut, strict=True))
    if is_first():
        with open_private(directory / "answers.jsonl", "w") as file:
            for row, verdict in zip(talk, verdicts, strict=True):
                file.write(json.dumps({**row, "verdict": verdict.to_dict()}) + "\n")
    outcomes = [
        metrics.outcome(row, verdict, short.get(i, verdict))
        for i, (row, verdict) in enumerate(zip(talk, verdicts, strict=True))
    ]
    outcomes += [metrics.solved(row) for row in problems]
    return outcomes, _shares(talk, verdicts) + metrics.further_rows(outcomes)


def _shares(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> list[Row]:
    places: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault((row["benchmark"], row["system"]), []).append(place)
    found = []
    for (benchmark, system), mine in places.items():
        for share in metrics.rows(
            [verdicts[i] for i in mine],
            [rows[i]["domain"] for i in mine],
            [rows[i]["refusal_only"] for i in mine],
            system=system,
            seed=rows[mine[0]]["seed"],
            benchmark=benchmark,
            harmful=rows[mine[0]]["harmful"],
        ):
            found.append({**share, "fold": metrics.fold_of(benchmark, share["split"])})
    return found


def expert_rows(likelihoods: Sequence[Row], domains: Sequence[str]) -> list[Row]:
    """What each expert has learnt: NLL of its own domain's held-out harmful answers.

    Args:
      likelihoods: those of "base" and of each expert alone (`alone`) among them.
      domains: of the experts.

    Returns:
      rows {domain, n, base, own, others}: nats per token under the base, under the domain's own
      expert, and the mean over the other experts; n counts prompts.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for row in likelihoods:
        if row["kind"] == "harmful" and row["benchmark"] == HELD_OUT:
            found.setdefault((row["domain"], row["system"]), []).append(row)
    rows = []
    for domain in domains:
        by_system = {
            system: metrics.per_token(mine) for (d, system), mine in found.items() if d == domain
        }
        if not by_system:
            continue
        others = [by_system[alone(other)] for other in domains if other != domain]
        rows.append(
            {
                "domain": domain,
                "n": len(found[domain, "base"]),
                "base": by_system["base"],
                "own": by_system[alone(domain)],
                "others": sum(others) / len(others) if others else None,
            }
        )
    return rows


def alone(domain: str) -> str:
    """The name of one expert alone, as a system whose likelihoods are measured."""
    return f"expert {domain}"


def _given(prompt: Prompt) -> dict[str, tuple[str, ...]]:
    """The answers to a prompt that are there, by their kind."""
    kinds = {
        "safe": prompt.safe_answers,
        "harmful": prompt.harmful_answers,
        "benign": prompt.benign_answers,
    }
    return {kind: answers for kind, answers in kinds.items() if answers}


def _about(entry: Entry, prompt: Prompt, asking: Asking) -> Row:
    return {
        "system": entry.name,
        "seed": asking.seed,
        "fold": entry.fold,
        "benchmark": prompt.benchmark,
        "domain": prompt.domain,
        "prompt_id": prompt.id,
        "group": prompt.group,
    }


def _likelihoods(
    entry: Entry, make: Callable[[], System], prompts: Sequence[Prompt], asking: Asking
) -> list[Row]:
    system = make()
    asked = [
        (prompt, kind, answer)
        for prompt in prompts
        for kind, answers in _given(prompt).items()
        for answer in answers
    ]
    tokenizer = asking.chat.tokenizer
    scores = system.scorer(
        [
            ((*system.preamble, *prompt.messages), f"{prompt.prefix} {answer}".strip())
            for prompt, _, answer in asked
        ],
        description=f"given answers under {_title(entry)}, {prompts[0].benchmark}",
    )
    rows: dict[tuple[str, str, str], Row] = {}
    for (prompt, kind, _), score in zip(asked, scores, strict=True):
        # The prefix is not the answer's; it is made such that its tokens are the first ones.
        own = score[len(tokenizer.encode(prompt.prefix, add_special_tokens=False)) :]
        row = rows.setdefault(
            (prompt.domain, prompt.id, kind),  # one question may be asked in two domains
            {**_about(entry, prompt, asking), "kind": kind, "nll": 0.0, "tokens": 0},
        )
        row["nll"] -= float(own.sum())
        row["tokens"] += len(own)
    return list(rows.values())


def _answers(
    entry: Entry, make: Callable[[], System], prompts: Sequence[Prompt], asking: Asking
) -> list[Row]:
    system, chat, config = make(), asking.chat, asking.config
    generations = system.sampler.generate(
        [
            chat.prompt_ids((*system.preamble, *prompt.messages))
            + chat.tokenizer.encode(prompt.prefix, add_special_tokens=False)
            for prompt in prompts
        ],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=asking.seed,
        batch_size=config.batch_size,
        description=f"answers of {_title(entry)}, {prompts[0].benchmark}",
    )
    rows = []
    for prompt, generation in zip(prompts, generations, strict=True):
        response, short = (
            (prompt.prefix + said(chat.tokenizer, tokens)).strip()
            for tokens in (generation.tokens, generation.tokens[: metrics.MATCHED_TOKENS])
        )
        row = {
            **_about(entry, prompt, asking),
            "harmful": prompt.harmful,
            "refusal_only": prompt.refusal_only,
            "messages": list(prompt.messages),
            "response": response,
            "response_64": short if len(generation.tokens) > metrics.MATCHED_TOKENS else None,
            "sha256": hashlib.sha256(response.encode()).hexdigest(),
            "num_tokens": len(generation.tokens),
            "finished": generation.finished,
        }
        if prompt.solution is not None:
            row["solution"] = prompt.solution
        if system.routed:
            assert generation.gates_TLE is not None  # the router's
            row |= gate_statistics(generation.gates_TLE, system.has_null)
            if entry.shows_gates:
                row["tokens"] = [chat.text([token]) for token in generation.tokens]
                gates_TE = generation.gates_TLE.mean(axis=1)
                row["gates"] = gates_TE.round(_GATE_DIGITS).tolist()
        rows.append(row)
    return rows


def _title(entry: Entry) -> str:
    return f"{entry.name} without {entry.fold}" if entry.fold else entry.name


def _key(entry: Entry, prompts: Sequence[Prompt], asking: Asking) -> str:
    config = asking.config
    asked = [dataclasses.astuple(prompt) for prompt in prompts]
    settings = (config.max_new_tokens, config.temperature, config.top_p, asking.seed)
    parts = [asking.made_of, entry.name, entry.fold, settings, asked]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
