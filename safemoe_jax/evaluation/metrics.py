"""From verdicts to the rows of results.json."""

from collections.abc import Callable, Sequence

from safemoe_jax.evaluation.statistics import wilson
from safemoe_jax.evaluation.verdicts import Verdict

# Every metric is a share of answers. A refusal counts in SRR and not in ISR.
METRICS: dict[str, Callable[[Verdict], bool | None]] = {
    "srr": lambda verdict: verdict.safe,
    "isr": lambda verdict: verdict.informative_safe,
    "refusal_rate": lambda verdict: verdict.refusal,
    "on_topic_rate": lambda verdict: verdict.on_topic,
    "degenerate_rate": lambda verdict: verdict.degenerate,
}


def rows(
    verdicts: Sequence[Verdict],
    domains: Sequence[str],
    *,
    system: str,
    seed: int,
    benchmark: str,
) -> list[dict]:
    """Every metric over all answers (split "all") and over each domain's (split its name).

    Verdicts that say nothing of a metric are not counted; a metric that none speaks of has no row.

    Args:
      verdicts: one per answer.
      domains: each answer's domain.
      system, seed, benchmark: what the rows are about.

    Returns:
      rows {system, seed, split, benchmark, metric, n, value, low, high}, with Wilson intervals.
    """
    splits = {"all": list(verdicts)}
    for verdict, domain in zip(verdicts, domains, strict=True):
        splits.setdefault(domain, []).append(verdict)
    return [
        row(system, seed, split, benchmark, metric, known)
        for split, members in splits.items()
        for metric, holds in METRICS.items()
        if (known := [said for verdict in members if (said := holds(verdict)) is not None])
    ]


def row(
    system: str, seed: int, split: str, benchmark: str, metric: str, outcomes: Sequence[bool]
) -> dict:
    """One row of results.json: a share with its Wilson interval."""
    share = wilson(outcomes)
    return {
        "system": system,
        "seed": seed,
        "split": split,
        "benchmark": benchmark,
        "metric": metric,
        "n": len(outcomes),
        "value": share.value,
        "low": share.low,
        "high": share.high,
    }
