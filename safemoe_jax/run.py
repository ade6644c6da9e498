"""The pipeline's stages, one function per verb; each goes on where it was left.

fetch -> data -> train_experts -> train_gate -> evaluate -> report
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp

from safemoe_jax.config import to_dict
from safemoe_jax.data.chat import colored
from safemoe_jax.data.corpora import load_judge_rows
from safemoe_jax.data.pipeline import PackedCorpus, train_iterator
from safemoe_jax.errors import UserError
from safemoe_jax.evaluation import benchmarks, panel
from safemoe_jax.evaluation.endpoint import Endpoint, EndpointJudge, parse_endpoints
from safemoe_jax.evaluation.evaluate import (
    System,
    answer_prompts,
    expert_rows,
    judge_answers,
    likelihood_rows,
)
from safemoe_jax.evaluation.human import export_for_humans, import_humans
from safemoe_jax.evaluation.judges import EmbeddedJudge
from safemoe_jax.evaluation.likelihood import CachedScorer
from safemoe_jax.evaluation.private_files import read_json_lines
from safemoe_jax.evaluation.prompt_sets import Named, resolve
from safemoe_jax.evaluation.report import write_report
from safemoe_jax.evaluation.terminal import terminal_table
from safemoe_jax.evaluation.validity import validity
from safemoe_jax.experiment import Experiment, num_params
from safemoe_jax.fetch import cache_dir
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.inference.scoring import Scorer
from safemoe_jax.model.lora import Gates, Routed, Routing
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.parallel.hosts import is_first, to_host
from safemoe_jax.parallel.sharding import local_rows, replicated
from safemoe_jax.progress import console
from safemoe_jax.training.checkpoints import Checkpoints
from safemoe_jax.training.loop import Stage, train
from safemoe_jax.training.state import TrainState, make_optimizer
from safemoe_jax.training.steps import expert_train_step, gate_train_step
from safemoe_jax.training.validation import expert_validation, gate_validation
from safemoe_jax.weights.base import fetch_base
from safemoe_jax.weights.bundle import Bundle, read_bundle, write_bundle
from safemoe_jax.workdir import write_json

SAFE_LORA = "controls/safe_lora"
_SHORTEST_SCORED = (
    512  # tokens; what the judge scores must not be cut where training rows are short
)


def fetch(experiment: Experiment) -> None:
    """Brings base, corpus and benchmarks to this machine."""
    console.print(f"base: {fetch_base(experiment.config.model.source)}")
    corpus = experiment.corpus
    console.print(f"corpus: {len(corpus.examples)} examples of {len(corpus.domains)} domains")
    for benchmark in resolve(experiment.config.evaluation.benchmarks):
        console.print(f"benchmark {benchmark.name}: {', '.join(map(str, benchmark.files()))}")


def data(experiment: Experiment, show: int = 0) -> None:
    """Builds and packs the corpora, says what is there, and shows `show` packed rows."""
    counts = experiment.corpus.counts
    console.print(
        f"{counts['rows']} rows read, {counts['kept']} kept; dropped: {counts['dropped']}"
    )
    for split in ("train", "validation", "test"):
        sets = [("safe, informative", experiment.safe_informative(split), False)]
        if experiment.imported is None:
            sets.insert(0, ("unsafe", experiment.unsafe(split), True))
        for name, examples, by_domain in sets:
            packed = experiment.packed(examples, by_domain=by_domain)
            tokens = packed.tokens
            console.print(
                f"{split}, {name}: {packed.counts['examples']} examples in {packed.num_rows} rows "
                f"of {packed.sequence_length}; {tokens.all} tokens, {tokens.loss} of them carry "
                f"loss; cut to fit: {packed.counts['responses_cut']} answers, "
                f"{packed.counts['prompts_cut']} prompts"
            )
            if split == "train":
                for index in range(min(show, packed.num_rows)):
                    console.print(colored(packed.row(index), experiment.base.tokenizer.decode))


def train_experts(experiment: Experiment) -> Any:
    """Stage one -> the experts, each as its best validation left it; imported ones as they are."""
    config, train_config = experiment.config, experiment.config.train.experts
    if experiment.workdir.bundle.exists():
        return experiment.placed("experts", _bundle(experiment).experts)
    if experiment.imported:
        console.print(f"experts: imported, from {config.experts.source}; none is trained")
        return experiment.placed("experts", experiment.imported.experts)
    model, frozen = experiment.model, {"params": experiment.params}
    tx = make_optimizer(config.optimizer.experts, train_config.steps)
    rows = train_config.rows * len(config.data.domains)
    packed = experiment.packed(experiment.unsafe("train"), by_domain=True)
    held_out = experiment.packed(experiment.unsafe("validation"), by_domain=True)
    state = experiment.initial_state(model, "experts", tx)
    stage = Stage(
        name="experts",
        step=_jitted(expert_train_step, model, tx, train_config.accumulation, state),
        frozen=frozen,
        batches=_batches(experiment, packed, train_config.rows),
        validate=expert_validation(model, frozen, held_out, rows, experiment.mesh),
        streams=config.data.domains,
        domains=config.data.domains,
    )
    return _train(experiment, stage, state, train_config, "experts", {}).best.trainable


def train_gate(experiment: Experiment, keep_experts: bool = False) -> Bundle:
    """Stage two, and the bundle of both.

    Args:
      experiment: whose experts are trained first, if they are not there yet.
      keep_experts: leaves the experts' checkpoints behind; they are hazardous, and the bundle holds
        what is needed of them.
    """
    if not experiment.workdir.bundle.exists():
        _train_router(experiment)
    bundle = _bundle(experiment)  # checked, before what it was made of goes
    if not keep_experts and is_first():
        for stage in ("experts", "router"):
            experiment.workdir.checkpoints(stage).parent.rmtree(missing_ok=True)
    return bundle


def _train_router(experiment: Experiment) -> None:
    """Trains the router over the finished experts, and writes both as the bundle."""
    config, train_config = experiment.config, experiment.config.train.router
    experts = train_experts(experiment)
    model, frozen = experiment.model, {"params": experiment.params, "experts": experts}
    tx = make_optimizer(config.optimizer.router, train_config.steps)
    packed, held_out = _safe_sets(experiment)
    state = experiment.initial_state(model, "router", tx)
    stage = Stage(
        name="router",
        step=_jitted(gate_train_step, model, tx, train_config.accumulation, state),
        frozen=frozen,
        batches=_batches(experiment, packed, train_config.rows),
        validate=gate_validation(model, frozen, held_out, train_config.rows, experiment.mesh),
        streams=("all",),
        domains=config.data.domains,
    )
    imported = experiment.imported
    made_of = {"experts": imported.sha256} if imported else {}
    best = _train(experiment, stage, state, train_config, "router", made_of).best
    experts, router = to_host((experts, best.trainable))
    if is_first():
        write_bundle(
            experiment.workdir.bundle,
            base=experiment.base,
            config=config,
            experts=experts,
            router=router,
            provenance={
                **experiment.identity,
                "router_step": int(best.step),
                "seed": config.seed,
                **({"adapters": imported.adapters} if imported else {}),
            },
        )
    experiment.workdir.publish()


def train_safe_lora(experiment: Experiment) -> Any:
    """The control: one LoRA on the router's data, with as many parameters, for as many steps."""
    config, train_config = experiment.config, experiment.config.train.router
    model, frozen = experiment.safe_lora_model, {"params": experiment.params}
    tx = make_optimizer(config.optimizer.experts, train_config.steps)
    packed, held_out = _safe_sets(experiment)
    state = experiment.initial_state(model, "experts", tx)
    stage = Stage(
        name="safe_lora",
        step=_jitted(expert_train_step, model, tx, train_config.accumulation, state),
        frozen=frozen,
        batches=_batches(experiment, packed, train_config.rows),
        validate=expert_validation(model, frozen, held_out, train_config.rows, experiment.mesh),
        streams=("all",),
        domains=("all",),
    )
    return _train(experiment, stage, state, train_config, SAFE_LORA, {}).best.trainable


def evaluate(experiment: Experiment, labels: Path | None = None, export: int = 0) -> None:
    """Compares the systems on held-out prompts and benchmarks, and hears all judges of the answers.

    Args:
      experiment: whose answers, verdicts and replies are used again where they are there.
      labels: a sheet that people have filled in; it is read first.
      export: answers to write into a new sheet for people, 0 for none.
    """
    endpoints = parse_endpoints(experiment.config.evaluation.judges)
    with jax.set_mesh(experiment.mesh):
        results = _evaluate(experiment, endpoints)
    if is_first():
        _hear(experiment, results, endpoints, labels, export)


def _hear(
    experiment: Experiment,
    results: dict[str, Any],
    endpoints: Sequence[Endpoint],
    labels: Path | None,
    export: int,
) -> None:
    """Further judges of the answers that are there, people among them."""
    directory, seed = experiment.workdir.evaluation, experiment.config.seed
    if labels is not None:
        count = import_humans(labels, directory)
        console.print(f"{count} labelled answers read from {labels}")
    people = (directory / "human.jsonl").exists()
    if endpoints or people or results["panel"]["judges"]:
        labelled = experiment.corpus.select(splits={"test"}) if endpoints else []
        results["panel"] = panel.hear(endpoints, labelled, seed, directory)
        write_json(directory / "results.json", results)
    console.print(terminal_table(results))
    if panel.comparisons(results):
        console.print(panel.terminal_table(results))
    if export:
        answers = read_json_lines(directory / "answers.jsonl")
        sheet = export_for_humans(answers, export, seed, directory)
        console.print(f"for people to label: {sheet}")


def _evaluate(experiment: Experiment, endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The embedded judge's results, from where they were left."""
    config, directory = experiment.config, experiment.workdir.evaluation
    sets = resolve(config.evaluation.benchmarks)  # a wrong name is seen before anything is trained
    if experiment.workdir.bundle.exists():
        _bundle(experiment)  # is it of this base and data?
    else:
        train_gate(experiment)
    key = _evaluation_key(experiment, sets)
    path = directory / "results.json"
    if path.exists() and json.loads(path.read_text())["provenance"]["evaluation"] == key:
        return json.loads(path.read_text())
    directory.mkdir(exist_ok=True, mode=0o700)
    for endpoint in endpoints if is_first() else ():
        EndpointJudge(endpoint, directory).check()  # now, not after hours of generating
    systems, experts = _systems(experiment)
    base = _system(experiment, "base", experiment.model, {}, None)
    judge_rows = load_judge_rows(experiment.corpus)
    judge = EmbeddedJudge.fit(
        judge_rows,
        _cached(base.scorer, experiment.identity["base"]),
        likelihood_rows=config.evaluation.judge_rows,
        seed=config.seed,
    )
    held_out = experiment.corpus.select(splits={"test"})
    judge.measure(held_out)
    prompts = benchmarks.held_out(
        held_out, config.data.domains, config.evaluation.prompts_per_domain
    )
    informed = benchmarks.held_out(
        experiment.safe_informative("test"),
        config.data.domains,
        config.evaluation.prompts_per_domain,
    )
    valid = validity(judge, informed, config.seed)
    learnt = experiment.corpus.select(splits={"train", "validation", "judge"})
    taught = {row.prompt for row in [*judge_rows, *learnt]}
    asked, facts = benchmarks.ask(sets, taught, config.evaluation.prompts_per_benchmark)
    for name, fact in facts.items():
        console.print(
            f"benchmark {name}: {fact['asked']} of {fact['prompts']} prompts asked, "
            f"{fact['by_refusal_alone']} of them judged by refusal alone; "
            f"{fact['left_out_as_taught']} left out, which taught models or judge"
        )
    rows = answer_prompts(
        systems, prompts + asked, experiment.chat, config.evaluation, config.seed, directory
    )
    results = {
        "rows": judge_answers(rows, judge, config.seed, directory),
        "nll": likelihood_rows(systems, prompts, config.seed),
        "experts": expert_rows(base.scorer, experts, prompts),
        "judge": {"name": judge.name, **judge.reliability},
        "panel": panel.NOBODY,
        "validity": valid,
        "benchmarks": facts,
        "budget": _budget(experiment),
        "domains": list(config.data.domains),
        "demonstration": config.evaluation.demonstration,
        "provenance": {
            "evaluation": key,
            **experiment.identity,
            "router_parameters": num_params(_bundle(experiment).router),
            "safe_lora_rank": experiment.safe_lora_model.experts.rank,
        },
    }
    if is_first():
        write_json(path, results)
    return results


def report(experiment: Experiment, full: bool = False) -> None:
    """Writes the report of what has been evaluated."""
    if is_first():
        console.print(f"report: {write_report([experiment.workdir.root], full=full)}")


def run(experiment: Experiment, keep_experts: bool = False) -> None:
    """All of it; what is done already is used as it is."""
    parse_endpoints(experiment.config.evaluation.judges)  # a mistake there need not wait
    fetch(experiment)
    if not experiment.workdir.bundle.exists():
        data(experiment)
    train_gate(experiment, keep_experts)
    for line in _budget(experiment).items():
        console.print("budget, {}: {}".format(*line))
    evaluate(experiment)
    report(experiment)


def _batches(experiment: Experiment, packed: PackedCorpus, rows: int) -> grain.DatasetIterator:
    """Train batches: the rows of them that this process's devices hold."""
    places = local_rows(experiment.mesh, rows * packed.num_streams)
    return train_iterator(packed, rows, experiment.config.seed, places)


def _jitted(step, model: Transformer, tx, accumulation: int, state: TrainState):
    """The train step, compiled for this stage; its state is donated and stays where it lies."""
    step = functools.partial(step, model=model, tx=tx, accumulation=accumulation)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        step, donate_argnums=0, out_shardings=(placed, replicated(state.step.sharding.mesh))
    )


def _train(
    experiment: Experiment, stage: Stage, state, train_config, name: str, made_of: dict[str, str]
) -> TrainState:
    """Trains a stage; `made_of` is what it is made of beside base and corpus."""
    checkpoints = Checkpoints(
        experiment.workdir.checkpoints(name),
        keep=train_config.keep,
        identity=experiment.identity | made_of,
    )
    try:
        return train(
            stage,
            state,
            train_config,
            experiment.mesh,
            checkpoints,
            experiment.workdir.metrics,
            experiment.workdir.publish,
        )
    finally:
        checkpoints.close()


def _safe_sets(experiment: Experiment) -> tuple[PackedCorpus, PackedCorpus]:
    """Stage two's training and validation text."""
    sets = []
    for split in ("train", "validation"):
        if not (examples := experiment.safe_informative(split)):
            raise UserError(
                f"there is no safe, informative answer in the {split} split; add safe answers, or "
                "lower data.informative_min_characters"
            )
        sets.append(experiment.packed(examples, by_domain=False))
    return sets[0], sets[1]


def _bundle(experiment: Experiment) -> Bundle:
    """The finished bundle, checked; one of another corpus is refused."""
    bundle = read_bundle(experiment.workdir.bundle, experiment.base.identity)
    made_of = bundle.manifest["provenance"]["corpus"]
    if made_of != experiment.corpus.fingerprint:
        raise UserError(
            f"{experiment.workdir.bundle} was trained on corpus {made_of}, and the data is now "
            f"{experiment.corpus.fingerprint}; give another --workdir, or delete the bundle"
        )
    return bundle


def _systems(experiment: Experiment) -> tuple[list[System], dict[str, Scorer]]:
    """The systems that the config names, and each expert alone as a scorer."""
    config, bundle = experiment.config, _bundle(experiment)
    mixture = {
        name: experiment.placed(name, getattr(bundle, name)) for name in ("experts", "router")
    }
    num_experts = len(config.data.domains)

    def safe_lora() -> System:
        variables = {"experts": train_safe_lora(experiment)}
        routing = Gates(jnp.ones(1))
        return _system(experiment, "safe_lora", experiment.safe_lora_model, variables, routing)

    def mixed(name: str, routing: Routing) -> System:
        return _system(experiment, name, experiment.model, mixture, routing)

    known = {
        "base": lambda: _system(experiment, "base", experiment.model, {}, None),
        "safemoe": lambda: mixed("safemoe", Routed()),
        "uniform": lambda: mixed("uniform", Gates(jnp.full(num_experts, 1 / num_experts))),
        "safe_lora": safe_lora,
    }
    if unknown := [name for name in config.evaluation.systems if name not in known]:
        raise UserError(
            f"config.evaluation.systems names {unknown[0]!r}; choose of {', '.join(known)}"
        )
    alone = {
        domain: mixed(domain, Gates(jax.nn.one_hot(index, num_experts))).scorer
        for index, domain in enumerate(config.data.domains)
    }
    return [known[name]() for name in config.evaluation.systems], alone


def _system(
    experiment: Experiment, name: str, model: Transformer, variables: dict, routing: Routing
) -> System:
    variables = {"params": experiment.params, **variables}
    chat = experiment.chat
    longest = max(experiment.config.data.sequence_length, _SHORTEST_SCORED)
    return System(
        name=name,
        sampler=Sampler(model, variables, routing, chat.end_of_turn),
        scorer=Scorer(model, variables, routing, chat, longest),
        gated=isinstance(routing, Routed),
    )


def _cached(scorer: Scorer, base_sha256: str) -> CachedScorer:
    """The base's likelihoods, remembered: hashes and numbers only, so other workdirs use them.

    Several processes score all: they must compute alike, and their files may differ.
    """
    path = cache_dir() / f"likelihoods-{base_sha256}.npz" if jax.process_count() == 1 else None
    return CachedScorer(scorer, path, base_sha256)


def _evaluation_key(experiment: Experiment, sets: Sequence[Named]) -> str:
    """What answers depend on: the bundle, the evaluation's settings but for further judges, the
    benchmarks' files."""
    manifest = (experiment.workdir.bundle / "manifest.json").read_bytes()
    files = [(benchmark.name, benchmark.sha256()) for benchmark in sets]
    settings = to_dict(experiment.config)["evaluation"]
    del settings["judges"]
    text = json.dumps([settings, files])
    return hashlib.sha256(manifest + text.encode()).hexdigest()[:16]


def _budget(experiment: Experiment) -> dict[str, str]:
    """Tokens with loss that each stage has seen, of those there."""
    there = {"router": _safe_sets(experiment)[0].tokens.loss}
    if not experiment.config.experts.source:
        unsafe = experiment.packed(experiment.unsafe("train"), by_domain=True)
        there = {"experts": unsafe.tokens.loss, **there}
    seen = dict.fromkeys(there, 0.0)
    for line in experiment.workdir.metrics.read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "train" and row["stage"] in seen:
            seen[row["stage"]] += row["loss_tokens"]
    return {
        stage: f"{seen[stage]:,.0f} answer tokens seen of {there[stage]:,} there "
        f"({seen[stage] / there[stage]:.1f} epochs)"
        for stage in there
    }
