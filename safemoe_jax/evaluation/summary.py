"""From evaluated runs to report.json: every number of the report, and no text that must not leave.

An answer that any judge found unsafe is in it by its sha256, its verdicts and its first 80
characters, a prompt by its first 160. Only "whole" leaves texts as they are, for a file of another
name; "none" leaves them out, where a benchmark's licence keeps its prompts from being passed on.

Shape letters: L layers, E experts.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from safemoe_jax.errors import UserError
from safemoe_jax.evaluation import claims, comparisons, panel
from safemoe_jax.evaluation.comparisons import ALL, OURS
from safemoe_jax.evaluation.prompt_sets import HELD_OUT, LEFT_OUT
from safemoe_jax.private_files import read_json_lines

SCHEMA = 1
ANSWER_CHARACTERS, PROMPT_CHARACTERS = 80, 160
# What is shown of answers, so that a page opens: prompts side by side, and those with their gates.
PROMPTS_SHOWN, GATED_SHOWN = 140, 28

_BY_DOMAIN = (HELD_OUT, LEFT_OUT)
_OF_DOMAINS = ("isr", "srr", "attack_success_rate")
_CURVES = ("stage", "step", "split")
_SAID = ("safe", "refusal", "on_topic", "degenerate", "informative_safe")

Row = dict[str, Any]
Texts = Literal["none", "cut", "whole"]


def summarize(workdirs: Sequence[Path], *, texts: Texts = "cut", place: str = "") -> Row:
    """Puts the runs of one experiment, a seed each, together.

    Args:
      workdirs: each holds metrics.jsonl, run.json, config.json, evaluation/answers.jsonl and
        evaluation/results.json. Answers and curves are of the first; numbers are of all.
      texts: what of prompts and answers is in it.
      place: the URL that the one work directory is a copy of, which names it.

    Raises:
      UserError: where a file is not there, two runs have the same seed, or they are not of one
        experiment.
    """
    results = [_json(workdir / "evaluation" / "results.json") for workdir in workdirs]
    configs = [_json(workdir / "config.json") for workdir in workdirs]
    _check_together(workdirs, configs)
    assert not place or len(workdirs) == 1
    homes = [Path(place or workdir).resolve() for workdir in workdirs]  # a URL ends in names, too
    first, config, seed = results[0], configs[0], configs[0]["seed"]

    measured = comparisons.tables(
        *(  # without each expert alone, whose likelihoods are no system's
            [row for row in _joined(results, key) if row["system"] in first["systems"]]
            for key in ("outcomes", "likelihoods")
        )
    )
    shares: list[Row] = []
    differences: list[Row] = []
    for table in measured:
        splits = {ALL: table}
        if table.benchmark in _BY_DOMAIN and table.metric in _OF_DOMAINS:
            splits |= {name: table.of_domain(name) for name in first["domains"]}
        for split, part in splits.items():
            shares += comparisons.shares(part, split, seed)
            differences += comparisons.differences(part, split, seed)
    differences = comparisons.correct(differences, first["systems"])
    failed = [row for each in results for row in each["validity"] if not row["passed"]]
    path = workdirs[0] / "evaluation" / "answers.jsonl"
    answers = [] if texts == "none" else _json_lines(path)
    return {
        "schema": SCHEMA,
        "name": _name(homes[0]),
        "demonstration": any(each["demonstration"] for each in results),
        "full": texts == "whole",
        "split": first["provenance"]["split"],
        "domains": first["domains"],
        "systems": first["systems"],
        "signed": config["router"]["activation"] == "signed",
        "primary": {
            "benchmark": claims.primary_benchmark(differences),
            "metric": "srr" if failed else "isr",
        },
        "claims": [
            claim._asdict()
            for claim in claims.claims(
                differences,
                {name: about["title"] for name, about in first["systems"].items()},
                not failed,
            )
        ],
        "shares": shares,
        "differences": differences,
        "experts": first["experts"],
        "router": _joined(results, "router"),
        "benchmarks": first["benchmarks"],
        "budget": first["budget"],
        "judges": {
            "names": panel.names(first),
            "comparisons": panel.comparisons(first),
            "reliability": first["judge"],
            "panel": first["panel"]["judges"],
            "validity": [
                {"seed": config["seed"], **row}
                for config, each in zip(configs, results, strict=True)
                for row in each["validity"]
            ],
        },
        "test_evaluations": [each["test_evaluations"] for each in results],
        "curves": _curves(_json_lines(workdirs[0] / "metrics.jsonl")),
        "answers": _shown_answers(answers, texts == "whole"),
        "gated": _gated_answers(answers, texts == "whole"),
        "runs": [
            {
                "workdir": home.name,
                "seed": config["seed"],
                "results_sha256": _sha256(workdir / "evaluation" / "results.json"),
                "provenance": each["provenance"],
                "run": _json(workdir / "run.json"),
                "config": config,
            }
            for workdir, home, config, each in zip(workdirs, homes, configs, results, strict=True)
        ],
    }


def read_summary(path: Path) -> Row:
    """A report.json that `summarize` made.

    Raises:
      UserError: where it is not there, or is something else.
    """
    summary = _json(path)
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
        raise UserError(
            f"{path} is no report.json of this version (schema {SCHEMA}); `safemoe report` writes "
            "one from an evaluated run"
        )
    return summary


def cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters].rstrip() + "…"


def _name(home: Path) -> str:
    """A directory's name, with the one before where it is a seed's number."""
    return f"{home.parent.name}/{home.name}" if home.name.isdigit() else home.name


def _check_together(workdirs: Sequence[Path], configs: Sequence[Row]) -> None:
    seeds = [config["seed"] for config in configs]
    for place, config in enumerate(configs):
        if seeds.index(seeds[place]) != place:
            raise UserError(
                f"{workdirs[seeds.index(seeds[place])]} and {workdirs[place]} both have seed "
                f"{seeds[place]}; a report puts together runs that differ in config.seed"
            )
        if {**config, "seed": 0} != {**configs[0], "seed": 0}:
            raise UserError(
                f"{workdirs[place]} has another config than {workdirs[0]}; a report puts together "
                "runs that differ in config.seed alone"
            )


def _joined(results: Sequence[Row], key: str) -> list[Row]:
    return [row for each in results for row in each[key]]


def _curves(rows: Sequence[Row]) -> list[Row]:
    return [
        {
            key: float(f"{value:.5g}") if isinstance(value, float) else value
            for key, value in row.items()
            if key in _CURVES or key.split("/")[0] in ("loss", "gates")
        }
        for row in rows
    ]


def _is_safe(answer: Row) -> bool:
    """Whether a judge finds it safe and none finds it unsafe."""
    verdicts = [answer["verdict"], *answer.get("verdicts", {}).values()]
    said = [verdict["safe"] for verdict in verdicts]
    return any(said) and False not in said


def _shown_answers(answers: Sequence[Row], full: bool) -> list[Row]:
    """The answers side by side: {benchmark, domain, prompt, harmful, answers: [...]} for a part of
    the prompts, by the order of their hashes, evenly over benchmarks and domains."""
    prompts: dict[tuple[str, str, str], dict[tuple[str, str], list[Row]]] = {}
    for answer in answers:
        place = (answer["benchmark"], answer["domain"], answer["fold"])
        key = (answer["prompt_id"], answer["fold"])
        prompts.setdefault(place, {}).setdefault(key, []).append(answer)
    return [
        {
            "benchmark": (one := mine[0])["benchmark"],
            "domain": one["domain"],
            "harmful": one["harmful"],
            "refusal_only": one["refusal_only"],
            "prompt": _prompt_text(one, full),
            "answers": [_shown(answer, full) for answer in mine],
        }
        for mine in _in_turn([dict(sorted(each.items())) for each in prompts.values()])
    ]


def _in_turn(places: Sequence[dict]) -> list[list[Row]]:
    """The first of each place, then the second of each, up to what is shown; by place again."""
    queues = [list(place.values()) for place in places]
    numbers = [0] * len(queues)
    while sum(numbers) < PROMPTS_SHOWN and any(
        number < len(queue) for number, queue in zip(numbers, queues, strict=True)
    ):
        for i, queue in enumerate(queues):
            if numbers[i] < len(queue) and sum(numbers) < PROMPTS_SHOWN:
                numbers[i] += 1
    return [mine for i, queue in enumerate(queues) for mine in queue[: numbers[i]]]


def _shown(answer: Row, full: bool) -> Row:
    hidden = not (full or _is_safe(answer))
    verdict = answer["verdict"]
    harm = verdict["harm_probability"]
    return {
        "system": answer["system"],
        "text": cut(answer["response"], ANSWER_CHARACTERS) if hidden else answer["response"],
        "hidden": hidden,
        "sha256": answer["sha256"],
        **{name: verdict[name] for name in _SAID},
        "harm": None if harm is None else round(harm, 3),
        "finished": answer["finished"],
        "others": {
            name: {about: said[about] for about in ("safe", "refusal")}
            for name, said in answer.get("verdicts", {}).items()
        },
    }


def _prompt_text(answer: Mapping[str, Any], full: bool) -> str:
    prompt = answer["messages"][-1]["content"]
    return prompt if full else cut(prompt, PROMPT_CHARACTERS)


def _gated_answers(answers: Sequence[Row], full: bool) -> list[Row]:
    """SafeMoE's answers to held-out prompts with each token's gates, for a part of the prompts."""
    mine = [
        answer
        for answer in answers
        if answer["system"] == OURS and answer["benchmark"] == HELD_OUT and answer.get("gates")
    ]
    by_domain: dict[str, dict[str, list[Row]]] = {}
    for answer in sorted(mine, key=lambda answer: answer["prompt_id"]):
        by_domain.setdefault(answer["domain"], {})[answer["prompt_id"]] = [answer]
    shown = _in_turn(list(by_domain.values()))
    each = max(1, GATED_SHOWN // max(1, len(by_domain)))
    counts: dict[str, int] = {}
    rows = []
    for (answer,) in shown:
        counts[answer["domain"]] = counts.get(answer["domain"], 0) + 1
        if counts[answer["domain"]] <= each:
            tokens, gates = _tokens(answer, full)
            rows.append(
                {
                    "domain": answer["domain"],
                    "prompt": _prompt_text(answer, full),
                    "safe": _is_safe(answer),
                    "tokens": tokens,
                    "gates": gates,
                }
            )
    return rows


def _tokens(answer: Row, full: bool) -> tuple[list[str], list[list[float]]]:
    """Each token's text and gates; an answer judged unsafe stops where it is cut."""
    gates = np.round(np.asarray(answer["gates"], float), 3).tolist()
    if full or _is_safe(answer):
        return answer["tokens"], gates
    left, tokens = ANSWER_CHARACTERS, []
    for token in answer["tokens"]:
        if left <= 0:
            break
        tokens.append(token[:left])
        left -= len(token)
    return tokens, gates[: len(tokens)]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _json(path: Path) -> Any:
    content = _read(path, Path.read_bytes)
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); write it anew") from error


def _json_lines(path: Path) -> list[Row]:
    return _read(path, read_json_lines)


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        path.stat()  # a file of JSON lines that is not there would be taken for an empty one
        return read(path)
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there; the report is made of an evaluated run: "
            "`safemoe run` makes all of it in this workdir"
        ) from None
    except (IsADirectoryError, NotADirectoryError) as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); --runs wants work directories, --results a "
            "report.json"
        ) from error
