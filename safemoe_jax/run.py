"""The verbs from corpus to report, a function each; each goes on where it was left.

fetch -> data -> train_experts -> train_gate -> evaluate -> report
"""

from safemoe_jax.data.chat import colored
from safemoe_jax.data.corpora import Example
from safemoe_jax.evaluating import check_systems, evaluate, judges_of
from safemoe_jax.evaluation.asked import parse_judges
from safemoe_jax.evaluation.prompt_sets import resolve
from safemoe_jax.evaluation.report import write_report
from safemoe_jax.evaluation.summary import Texts
from safemoe_jax.evaluation.systems import check_names
from safemoe_jax.experiment import Experiment
from safemoe_jax.parallel.hosts import is_first
from safemoe_jax.progress import console
from safemoe_jax.stages import budget, train_gate
from safemoe_jax.weights.base import fetch_base


def fetch(experiment: Experiment) -> None:
    """Brings base, corpus, benchmarks and local judges to this machine."""
    console.print(f"base: {fetch_base(experiment.config.model.source)}")
    corpus = experiment.corpus
    console.print(f"corpus: {len(corpus.examples)} examples of {len(corpus.domains)} domains")
    for benchmark in resolve(experiment.config.evaluation.benchmarks):
        console.print(f"benchmark {benchmark.name}: {', '.join(map(str, benchmark.files()))}")
    for asked in parse_judges(experiment.config.evaluation.judges):
        if asked.is_local:
            console.print(f"judge {asked.name}: {fetch_base(asked.model)}")


def data(experiment: Experiment, show: int = 0) -> None:
    """Builds and packs the corpora, says what is there, and shows `show` packed rows."""
    counts = experiment.corpus.counts
    console.print(
        f"{counts['rows']} rows read, {counts['kept']} kept; dropped: {counts['dropped']}"
    )
    for split in ("train", "validation"):
        for name, examples in _sets(experiment, split).items():
            if not examples:
                console.print(f"{split}, {name}: none")
                continue
            packed = experiment.packed(examples, by_domain=name == "unsafe")
            tokens = packed.tokens
            console.print(
                f"{split}, {name}: {packed.counts['examples']} examples in {packed.num_rows} rows "
                f"of {packed.sequence_length}; {tokens.all} tokens, {tokens.loss} of them carry "
                f"loss; cut to fit: {packed.counts['responses_cut']} answers, "
                f"{packed.counts['prompts_cut']} prompts"
            )
            for index in range(min(show, packed.num_rows) if split == "train" else 0):
                console.print(colored(packed.row(index), experiment.chat.text))
    for name, examples in _sets(experiment, "test").items():  # asked, never packed
        console.print(f"test, {name}: " + (f"{len(examples)} examples" if examples else "none"))


def _sets(experiment: Experiment, split: str) -> dict[str, list[Example]]:
    """What the stages learn of a split, by name."""
    own = {"unsafe": experiment.unsafe(split)} if experiment.imported is None else {}
    return {**own, "safe, informative": experiment.safe_informative(split)}


def report(experiment: Experiment, texts: Texts = "cut") -> None:
    """Writes the report of what has been evaluated."""
    if is_first():
        workdir = experiment.workdir
        console.print(f"report: {write_report([workdir.root], texts=texts, place=workdir.url)}")


def run(experiment: Experiment, keep_experts: bool = False) -> None:
    """All of it; what is done already is used as it is."""
    parse_judges(experiment.config.evaluation.judges)  # a mistake there need not wait
    check_names(experiment.config.evaluation.systems)
    fetch(experiment)
    judges_of(experiment)  # nor one in what they are on this machine
    check_systems(experiment)
    if not experiment.workdir.bundle.exists():
        data(experiment)
    train_gate(experiment, keep_experts)
    for line in budget(experiment).items():
        console.print("budget, {}: {}".format(*line))
    evaluate(experiment)
    report(experiment)
