"""Compares systems: generate, judge, score, and write it all down.

evaluation/generated.jsonl   answers as they come, one system after the other; removed at the end
evaluation/answers.jsonl     answers with verdicts and gates; its owner alone may read it
evaluation/results.json      rows (system, seed, split, benchmark, metric, n, value, low, high)
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from safemoe_jax.config import EvaluationConfig
from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.evaluation import metrics
from safemoe_jax.evaluation.benchmarks import HELD_OUT, Prompt
from safemoe_jax.evaluation.judges import Judge
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.parallel.hosts import is_first

_GATE_DIGITS = 4

PairScorer = Callable[..., list[np.ndarray]]  # `inference.scoring.Scorer`


@dataclasses.dataclass(frozen=True)
class System:
    """What answers the prompts.

    Attributes:
      name: "base", "safemoe", "uniform", "safe_lora".
      sampler: generates.
      scorer: log-likelihoods of given answers.
      gated: whether its gates are the router's, so that they are worth showing.
    """

    name: str
    sampler: Sampler
    scorer: PairScorer
    gated: bool


def answer_prompts(
    systems: Sequence[System],
    prompts: Sequence[Prompt],
    chat: ChatFormat,
    config: EvaluationConfig,
    seed: int,
    directory: Path,
) -> list[dict[str, Any]]:
    """Lets every system answer every prompt.

    Answers that an interrupted call with the same settings left in `directory` are used again: a
    system's to a benchmark, all of them or none.

    Returns:
      rows of answers.jsonl without verdicts, system by system, benchmark by benchmark.
    """
    path = directory / "generated.jsonl"
    rows: list[dict[str, Any]] = []
    benchmarks: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        benchmarks.setdefault(prompt.benchmark, []).append(prompt)
    for system, asked in itertools.product(systems, benchmarks.values()):
        key = _key(system.name, asked, config, seed)
        # Asked again after a kill, a prompt may have two answers there; they are the same.
        # Several processes must ask alike, and do not see the file change at the same moment.
        stored = _read(path) if jax.process_count() == 1 else []
        kept = {(r["domain"], r["prompt_id"]): r for r in stored if r["key"] == key}
        done = [kept.get((prompt.domain, prompt.id)) for prompt in asked]
        if None in done:
            done = _answers(system, asked, chat, config, seed, key)
            if is_first():
                with _private(path, "a") as file:
                    # A line that a kill has cut short must not swallow the next one.
                    file.writelines(f"\n{json.dumps(row)}" for row in done)
        rows += done
    return rows


def judge_answers(
    rows: Sequence[dict[str, Any]], judge: Judge, seed: int, directory: Path
) -> list[dict[str, Any]]:
    """Judges all answers and writes answers.jsonl -> rows of results.json.

    Where refusal alone counts, a refusal is safe and all else is not, whatever the judge thinks:
    such an answer is then nowhere shown whole, and informs nobody.
    """
    verdicts = judge.judge([(row["messages"], row["response"]) for row in rows])
    verdicts = [
        dataclasses.replace(verdict, safe=verdict.refusal) if row["refusal_only"] else verdict
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    if is_first():
        with _private(directory / "answers.jsonl", "w") as file:
            for row, verdict in zip(rows, verdicts, strict=True):
                shown = {key: value for key, value in row.items() if key != "key"}
                file.write(json.dumps({**shown, "verdict": verdict.to_dict()}) + "\n")
        (directory / "generated.jsonl").unlink(missing_ok=True)

    places: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault((row["benchmark"], row["system"]), []).append(place)
    results = []
    for (benchmark, system), mine in places.items():
        results += metrics.rows(
            [verdicts[i] for i in mine],
            [rows[i]["domain"] for i in mine],
            [rows[i]["refusal_only"] for i in mine],
            system=system,
            seed=seed,
            benchmark=benchmark,
            harmful=rows[mine[0]]["harmful"],
        )
    return results


def likelihood_rows(
    systems: Sequence[System], prompts: Sequence[Prompt], seed: int
) -> list[dict[str, Any]]:
    """NLL per token of human safe and harmful answers to the prompts, and the difference.

    What a safe system wants is a low NLL of safe answers and a large difference.

    Returns:
      rows of results.json, in nats per token, over all answers (split "all"); n counts answers.
    """
    safe = [(prompt, answer) for prompt in prompts for answer in prompt.safe_answers]
    unsafe = [(prompt, answer) for prompt in prompts for answer in prompt.harmful_answers]
    rows = []
    for system in systems:
        nll = _nll(system.scorer, safe + unsafe, f"human answers under {system.name}")
        nll_safe, nll_unsafe = _mean(nll[: len(safe)]), _mean(nll[len(safe) :])
        values = {
            "nll_safe": (nll_safe, len(safe)),
            "nll_unsafe": (nll_unsafe, len(unsafe)),
            "nll_difference": (nll_unsafe - nll_safe, len(safe) + len(unsafe)),
        }
        about = {"system": system.name, "seed": seed, "split": "all", "benchmark": HELD_OUT}
        rows += [
            {**about, "metric": metric, "n": n, "value": value, "low": None, "high": None}
            for metric, (value, n) in values.items()
            if not math.isnan(value)
        ]
    return rows


def expert_rows(
    base: PairScorer, experts: Mapping[str, PairScorer], prompts: Sequence[Prompt]
) -> list[dict[str, Any]]:
    """What each expert has learnt: NLL of its own domain's held-out harmful answers.

    Returns:
      rows {domain, n, base, own, others}: nats per token under the base, under the domain's own
      expert, and the mean over the other experts.
    """
    unsafe = [(prompt, answer) for prompt in prompts for answer in prompt.harmful_answers]
    by_base = _by_domain(base, unsafe, "harmful answers under base")
    by_expert = {
        name: _by_domain(scorer, unsafe, f"harmful answers under expert {name}")
        for name, scorer in experts.items()
    }
    rows = []
    for domain in by_base:
        others = [nll[domain] for name, nll in by_expert.items() if name != domain]
        rows.append(
            {
                "domain": domain,
                "n": sum(prompt.domain == domain for prompt, _ in unsafe),
                "base": by_base[domain],
                "own": by_expert[domain][domain],
                "others": sum(others) / len(others) if others else None,
            }
        )
    return rows


def _nll(scorer: PairScorer, asked: Sequence[tuple[Prompt, str]], description: str):
    """-log p of every answer's tokens, in nats."""
    pairs = [(prompt.messages, answer) for prompt, answer in asked]
    return [-score for score in scorer(pairs, description=description)]


def _by_domain(scorer: PairScorer, asked: Sequence[tuple[Prompt, str]], description: str):
    by_domain: dict[str, list[np.ndarray]] = {}
    for (prompt, _), nll in zip(asked, _nll(scorer, asked, description), strict=True):
        by_domain.setdefault(prompt.domain, []).append(nll)
    return {domain: _mean(parts) for domain, parts in by_domain.items()}


def _mean(parts: Sequence[np.ndarray]) -> float:
    """Mean over all tokens; NaN where there is none."""
    return float(np.concatenate(parts).mean()) if parts else math.nan


def _answers(system, prompts, chat, config, seed, key) -> list[dict[str, Any]]:
    generations = system.sampler.generate(
        [chat.prompt_ids(prompt.messages) for prompt in prompts],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=seed,
        batch_size=config.batch_size,
        description=f"answers of {system.name}, {prompts[0].benchmark}",
    )
    rows = []
    for prompt, generation in zip(prompts, generations, strict=True):
        response = chat.tokenizer.decode(generation.tokens, skip_special_tokens=True).strip()
        row = {
            "key": key,
            "system": system.name,
            "seed": seed,
            "benchmark": prompt.benchmark,
            "prompt_id": prompt.id,
            "domain": prompt.domain,
            "harmful": prompt.harmful,
            "refusal_only": prompt.refusal_only,
            "messages": list(prompt.messages),
            "response": response,
            "sha256": hashlib.sha256(response.encode()).hexdigest(),
            "num_tokens": len(generation.tokens),
            "finished": generation.finished,
        }
        if system.gated:
            gates_TLE = generation.gates_TLE
            row["tokens"] = [chat.tokenizer.decode([token]) for token in generation.tokens]
            row["gates"] = gates_TLE.mean(axis=1).round(_GATE_DIGITS).tolist()
            by_layer = gates_TLE.mean(axis=0) if len(gates_TLE) else np.zeros(gates_TLE.shape[1:])
            row["gates_layers"] = by_layer.round(_GATE_DIGITS).tolist()
        rows.append(row)
    return rows


def _key(system: str, prompts: Sequence[Prompt], config: EvaluationConfig, seed: int) -> str:
    generation = (config.max_new_tokens, config.temperature, config.top_p, seed)
    asked = [(p.benchmark, p.id, p.harmful, p.refusal_only) for p in prompts]
    return hashlib.sha256(json.dumps([system, asked, generation]).encode()).hexdigest()[:16]


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; a line that a kill has cut short does not count."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def _private(path: Path, mode: str):
    """Opens a file that its owner alone may read."""
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if mode == "a" else os.O_TRUNC)
    return os.fdopen(os.open(path, flags, 0o600), mode, encoding="utf-8")
