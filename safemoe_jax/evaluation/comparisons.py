"""Who is better than whom: pooled shares, paired differences and families of tests of results.json.

All of it comes from `outcomes` and `likelihoods`, a row for each judged answer or scored prompt
(docs/results.md), of one run or of several seeds' together.

Shape letters: S training seeds, P prompts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from safemoe_jax.evaluation import statistics
from safemoe_jax.evaluation.prompt_sets import GSM8K, HARMLESS, OTHER_ORIGIN, OWN
from safemoe_jax.evaluation.statistics import Difference, Interval

OURS, BASE = "safemoe", "base"
ALL = "all"  # the split of all domains
CLAIMED_GAIN = 0.15  # in SRR over the base; the power that is printed is about it

Row = Mapping[str, Any]


class Metric(NamedTuple):
    """What is counted, of which rows.

    Attributes:
      title: what tables call it.
      field: of `outcomes`; or "nll" of `likelihoods`.
      of: prompts that ask for harm, harmless ones, problems; or the kind of a scored answer.
      better: 1 where more is better, -1 where less is, 0 where that depends.
    """

    title: str
    field: str
    of: Literal["harmful", "harmless", "problems", "safe answers", "harmful answers", "benign"]
    better: int


METRICS = {
    "isr": Metric("informative safe rate", "informative_safe", "harmful", 1),
    "srr": Metric("safe response rate", "safe", "harmful", 1),
    "isr_64": Metric("ISR of the first 64 tokens", "informative_safe_64", "harmful", 1),
    "refusal_rate": Metric("refusals", "refusal", "harmful", 0),
    "on_topic_rate": Metric("on topic", "on_topic", "harmful", 1),
    "degenerate_rate": Metric("degenerate", "degenerate", "harmful", -1),
    "attack_success_rate": Metric("attack success", "attack_success", "harmful", -1),
    "over_refusal_rate": Metric("over-refusals", "refusal", "harmless", -1),
    "accuracy": Metric("GSM8K", "correct", "problems", 1),
    "nll_safe": Metric("NLL of safe answers", "nll", "safe answers", -1),
    "nll_unsafe": Metric("NLL of harmful answers", "nll", "harmful answers", 1),
    "nll_benign": Metric("NLL of benign answers", "nll", "benign", -1),
}


@dataclasses.dataclass(frozen=True)
class Table:
    """One metric on one benchmark.

    Attributes:
      benchmark, metric: which.
      seeds: S.
      groups_P: of prompts that are not independent.
      domains_P: each prompt's.
      weights_P: what each prompt counts for: 1, or its answers' tokens.
      values: system -> [S, P], NaN where there is none.
    """

    benchmark: str
    metric: str
    seeds: tuple[int, ...]
    groups_P: np.ndarray
    domains_P: np.ndarray
    weights_P: np.ndarray
    values: dict[str, np.ndarray]

    def of_domain(self, domain: str) -> "Table":
        mine = self.domains_P == domain
        return dataclasses.replace(
            self,
            groups_P=self.groups_P[mine],
            domains_P=self.domains_P[mine],
            weights_P=self.weights_P[mine],
            values={system: values[:, mine] for system, values in self.values.items()},
        )


def tables(outcomes: Sequence[Row], likelihoods: Sequence[Row]) -> list[Table]:
    """Every metric on every benchmark that has it; published sets also together.

    Args:
      outcomes, likelihoods: rows of results.json.
    """
    found: dict[tuple[str, str], list[tuple[Row, float, float]]] = {}
    for row in outcomes:
        for name, metric in METRICS.items():
            value = row.get(metric.field)
            if value is None or metric.of != _kind(row):
                continue
            for benchmark in (row["benchmark"], *_pools(row)):
                found.setdefault((benchmark, name), []).append((row, float(value), 1.0))
    names = {"safe": "nll_safe", "harmful": "nll_unsafe", "benign": "nll_benign"}
    for row in likelihoods:
        if row["tokens"]:
            entry = (row, row["nll"] / row["tokens"], float(row["tokens"]))
            found.setdefault((row["benchmark"], names[row["kind"]]), []).append(entry)
    return [_table(*about, entries) for about, entries in found.items()]


def shares(table: Table, split: str, seed: int) -> list[dict[str, Any]]:
    """Every system's mean, with its interval, over all seeds.

    Wilson's where it is of one seed's independent outcomes, or where all are the same (then of as
    many outcomes as there are groups); else bootstrapped over groups and seeds. One group of
    near-duplicates tells nothing of others: where it is mixed, its share has no interval.

    Returns:
      rows {system, benchmark, split, metric, n, groups, seeds, value, low, high, method, by_seed}.
    """
    rows = []
    for system, values_SP in table.values.items():
        there_SP = ~np.isnan(values_SP)
        known_P, known_S = there_SP.any(axis=0), there_SP.any(axis=1)
        if not known_P.any():
            continue
        groups = len(np.unique(table.groups_P[known_P]))
        interval, method = _share(table, values_SP[known_S], groups, seed)
        rows.append(
            {
                "system": system,
                "benchmark": table.benchmark,
                "split": split,
                "metric": table.metric,
                "n": int(known_P.sum()),
                "groups": groups,
                "seeds": int(known_S.sum()),
                **_ends(interval),
                "method": method,
                "by_seed": {
                    str(table.seeds[s]): _mean(values_SP[s], table.weights_P)
                    for s in np.flatnonzero(known_S)
                },
            }
        )
    return rows


def differences(table: Table, split: str, seed: int) -> list[dict[str, Any]]:
    """SafeMoE less every other system, on the prompts and seeds that both answered.

    Returns:
      rows {benchmark, split, metric, first, second, n, groups, seeds, value, low, high, relative,
      p, p_holm, spread, power, detectable, mcnemar}: `power` is that of finding +15 points,
      `detectable` the difference that would be found in 80 %. `p_holm` is None until `correct`
      sets it; of one domain alone p, power and McNemar's are None, too: it is no test.
    """
    if OURS not in table.values:
        return []
    ours_SP = table.values[OURS]
    rows = []
    for other, other_SP in table.values.items():
        both_SP = ~(np.isnan(ours_SP) | np.isnan(other_SP))
        paired = both_SP.any(axis=0)
        groups = len(np.unique(table.groups_P[paired]))
        if other == OURS or groups < 2:
            continue
        seeds = np.flatnonzero(both_SP.any(axis=1))
        found = statistics.paired_difference(
            ours_SP[seeds], other_SP[seeds], table.groups_P, seed, table.weights_P
        )
        row = {
            "benchmark": table.benchmark,
            "split": split,
            "metric": table.metric,
            "first": OURS,
            "second": other,
            "n": int(paired.sum()),
            "groups": groups,
            "seeds": len(seeds),
            **_ends(found.absolute),
            "relative": found.relative and _ends(found.relative),
            "spread": found.spread,
        }
        rows.append(row | _tests(table, found, other, seeds, split))
    return rows


def correct(rows: Sequence[dict[str, Any]], systems: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Adds `family` and `p_holm`, Holm's correction within each family.

    A family is one metric on one benchmark against systems of one role: the base, what any method
    would have to beat ("control"), the same router over other experts ("thesis"), or what an
    attacker makes of the weights ("hazard").

    Args:
      rows: of `differences`.
      systems: of results.json; its `role` of each.
    """
    families: dict[tuple[str, str, str], list[int]] = {}
    for i, row in enumerate(rows):
        if row["p"] is not None:
            family = (row["benchmark"], row["metric"], systems[row["second"]]["role"])
            families.setdefault(family, []).append(i)
    corrected = [{**row, "family": systems[row["second"]]["role"]} for row in rows]
    for places in families.values():
        for i, p in zip(places, statistics.holm([rows[i]["p"] for i in places]), strict=True):
            corrected[i]["p_holm"] = p
    return corrected


def verdict(row: Row) -> str:
    """What a difference shows, in words that claim no more.

    "no difference shown" where the interval includes zero; "one domain, no test"; "not after Holm";
    else "higher" or "lower".
    """
    if row["low"] <= 0 <= row["high"]:
        return "no difference shown"
    if row["split"] != ALL:
        return "one domain, no test"
    if row["p_holm"] >= statistics.SIGNIFICANCE:
        return "not after Holm"
    return "higher" if row["value"] > 0 else "lower"


def signed(text: str) -> str:
    """A number as it is printed, with a minus for its hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")


def shows(row: Row | None, sign: int) -> bool:
    """Whether a difference of this sign is shown: interval, test and correction."""
    return row is not None and verdict(row) == {1: "higher", -1: "lower"}[sign]


def _kind(row: Row) -> str:
    if row["benchmark"] == GSM8K:
        return "problems"
    return "harmful" if row["harmful"] else "harmless"


def _pools(row: Row) -> tuple[str, ...]:
    if row["benchmark"] in OWN:
        return ()
    return (OTHER_ORIGIN if row["harmful"] else HARMLESS,)


def _table(benchmark: str, metric: str, entries: Sequence[tuple[Row, float, float]]) -> Table:
    prompts: dict[tuple[str, str, str], tuple[int, Row, float]] = {}
    for row, _, weight in entries:
        prompts.setdefault(_asked(row), (len(prompts), row, weight))
    seeds = tuple(sorted({row["seed"] for row, _, _ in entries}))
    values: dict[str, np.ndarray] = {}
    for row, value, _ in entries:
        if row["system"] not in values:
            values[row["system"]] = np.full((len(seeds), len(prompts)), np.nan)
        values[row["system"]][seeds.index(row["seed"]), prompts[_asked(row)][0]] = value
    about = [row for _, row, _ in prompts.values()]
    # Near-duplicates across published sets have the same group.
    return Table(
        benchmark=benchmark,
        metric=metric,
        seeds=seeds,
        groups_P=np.array([row["group"] for row in about]),
        domains_P=np.array([row["domain"] for row in about]),
        weights_P=np.array([weight for _, _, weight in prompts.values()]),
        values=values,
    )


def _asked(row: Row) -> tuple[str, str, str]:
    """Names a prompt; the corpus may ask the same one in two domains."""
    return row["benchmark"], row["domain"], row["prompt_id"]


def _share(table: Table, values_SP: np.ndarray, groups: int, seed: int) -> tuple[Interval, str]:
    found = values_SP[~np.isnan(values_SP)]
    rates = METRICS[table.metric].field != "nll"
    if rates and np.ptp(found) == 0:
        return statistics.wilson(np.full(groups, found[0], bool)), "Wilson"
    if groups < 2:
        return Interval(_mean(values_SP, table.weights_P), np.nan, np.nan), "none"
    if rates and len(values_SP) == 1 and groups == len(found):
        return statistics.wilson(found.astype(bool)), "Wilson"
    return statistics.clustered_mean(values_SP, table.groups_P, seed, table.weights_P), "bootstrap"


def _tests(
    table: Table, found: Difference, other: str, seeds: np.ndarray, split: str
) -> dict[str, Any]:
    none = {"p": None, "p_holm": None, "power": None, "detectable": None, "mcnemar": None}
    if split != ALL:
        return none
    tests: dict[str, Any] = {"p": found.p, "p_holm": None, "mcnemar": None}
    rates = METRICS[table.metric].field != "nll"
    tests["detectable"] = statistics.detectable(found.spread, found.groups, rates=rates)
    tests["power"] = None
    if rates:
        tests["power"] = statistics.power(CLAIMED_GAIN, found.spread, found.groups, rates=True)
        tests["mcnemar"] = {
            str(table.seeds[s]): _mcnemar(table.values[OURS][s], table.values[other][s])
            for s in seeds
        }
    return tests


def _mcnemar(first_P: np.ndarray, second_P: np.ndarray) -> dict[str, Any]:
    both = ~(np.isnan(first_P) | np.isnan(second_P))
    first_P, second_P = first_P[both].astype(bool), second_P[both].astype(bool)
    return {
        "only_first": int(np.sum(first_P & ~second_P)),
        "only_second": int(np.sum(~first_P & second_P)),
        "p": statistics.mcnemar_p(first_P, second_P),
    }


def _mean(values: np.ndarray, weights_P: np.ndarray) -> float:
    there = ~np.isnan(values)
    return float(np.sum(np.where(there, values, 0.0) * weights_P) / np.sum(there * weights_P))


def _ends(interval: Interval) -> dict[str, float | None]:
    return {
        name: None if np.isnan(value) else value
        for name, value in dataclasses.asdict(interval).items()
    }
