"""`safemoe evaluate`: the systems are asked and the judges heard; what is there is used again."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from safemoe_jax.config import to_dict
from safemoe_jax.controls import Controls
from safemoe_jax.data.judge_rows import load_judge_rows
from safemoe_jax.errors import UserError
from safemoe_jax.evaluation import benchmarks, ledger, metrics, panel
from safemoe_jax.evaluation.asked import Asked, AskedJudge, parse_judges
from safemoe_jax.evaluation.attacks import ATTACKS
from safemoe_jax.evaluation.benchmarks import Prompt
from safemoe_jax.evaluation.card import measured
from safemoe_jax.evaluation.endpoint import EndpointJudge
from safemoe_jax.evaluation.evaluate import (
    Asking,
    Entry,
    PairScorer,
    System,
    alone,
    expert_rows,
    judge_answers,
    measure,
)
from safemoe_jax.evaluation.gates import router_rows
from safemoe_jax.evaluation.human import (
    check_export,
    check_import,
    export_for_humans,
    import_humans,
)
from safemoe_jax.evaluation.judges import EmbeddedJudge
from safemoe_jax.evaluation.likelihood import CachedScorer
from safemoe_jax.evaluation.prompt_sets import HELD_OUT, Named, resolve
from safemoe_jax.evaluation.systems import (
    ATTACKED_SYSTEMS,
    LEFT_OUT_SYSTEMS,
    SYSTEMS,
    Adapter,
    check_names,
    is_ungated,
    preamble,
    role,
    title,
)
from safemoe_jax.evaluation.terminal import terminal_table
from safemoe_jax.evaluation.validity import human_answers, validity
from safemoe_jax.experiment import Experiment
from safemoe_jax.fetch import cache_dir, file_digest
from safemoe_jax.local_judge import LocalJudge
from safemoe_jax.parallel.hosts import is_first
from safemoe_jax.private_files import read_json_lines
from safemoe_jax.progress import console
from safemoe_jax.stages import budget, own_bundle, train_gate
from safemoe_jax.weights.artefact import MANIFEST
from safemoe_jax.weights.bundle import write_card
from safemoe_jax.workdir import own_commit, read_object, write_json


def evaluate(experiment: Experiment, labels: Path | None = None, export: int = 0) -> None:
    """Compares the systems on held-out prompts and benchmarks, and hears all judges of the answers.

    Args:
      experiment: whose answers, verdicts and replies are used again where they are there.
      labels: a sheet that people have filled in; it is read first.
      export: answers to write into a new sheet for people, 0 for none.
    """
    if is_first():  # now, not after hours of training and generating
        if labels is not None:
            check_import(labels, experiment.workdir.evaluation)
        if export:
            check_export(export, experiment.workdir.evaluation)
    judges = judges_of(experiment)
    with jax.set_mesh(experiment.mesh):
        results = _evaluate(experiment, judges)
    experiment.release()  # a local judge may need the room
    if is_first():
        _hear(experiment, results, judges, labels, export)


def judges_of(experiment: Experiment) -> list[AskedJudge]:
    """The models that the config asks besides the embedded judge, those on this machine checked."""
    config, directory = experiment.config, experiment.workdir.evaluation

    def judge(asked: Asked) -> AskedJudge:
        if not asked.is_local:
            return EndpointJudge(asked, directory)  # may be started while this trains
        local = LocalJudge(asked, config, experiment.mesh, directory)
        local.check()
        return local

    return [judge(asked) for asked in parse_judges(config.evaluation.judges)]


def check_systems(experiment: Experiment) -> None:
    """Refuses systems that there are not, that the base's chat template cannot begin with, or
    whose LoRA would end in its warm-up.

    Raises:
      UserError: which names the first of them.
    """
    names = experiment.config.evaluation.systems
    check_names(names)
    warmup = experiment.config.optimizer.experts.warmup_steps
    for name in names:
        if isinstance(SYSTEMS[name], Adapter) and warmup >= experiment.config.train.router.steps:
            raise UserError(
                f"config.evaluation.systems names {name!r}, a LoRA that is trained as an expert "
                f"is, for train.router.steps, {experiment.config.train.router.steps}, and "
                f"optimizer.experts.warmup_steps is {warmup}; lower it below, or leave it out"
            )
        try:
            experiment.chat.prompt_ids([*preamble(name), {"role": "user", "content": "?"}])
        except UserError as error:
            raise UserError(
                f"config.evaluation.systems names {name!r}, which begins with a system's turn, and "
                f"the template of {experiment.base.identity.source} takes none; leave it out"
            ) from error


def _hear(
    experiment: Experiment,
    results: dict[str, Any],
    judges: Sequence[AskedJudge],
    labels: Path | None,
    export: int,
) -> None:
    """Further judges of the answers that are there, people among them."""
    directory, seed = experiment.workdir.evaluation, experiment.config.seed
    if labels is not None:
        count = import_humans(labels, directory)
        console.print(f"{count} labelled answers read from {labels}")
    people = bool(read_json_lines(directory / "human.jsonl"))
    if judges or people or results["panel"]["judges"]:
        labelled = experiment.corpus.select(splits={"test"}) if judges else []
        results["panel"] = panel.hear(judges, labelled, seed, directory)
        write_json(directory / "results.json", results)
        experiment.workdir.send_evaluation()
    write_card(experiment.workdir.bundle, measured(results))
    console.print(terminal_table(results))
    if panel.comparisons(results):
        console.print(panel.terminal_table(results))
    if export:
        answers = read_json_lines(directory / "answers.jsonl")
        sheet = export_for_humans(answers, export, seed, directory)
        console.print(f"for people to label: {sheet}")


def _evaluate(experiment: Experiment, judges: Sequence[AskedJudge]) -> dict[str, Any]:
    """The embedded judge's results, from where they were left."""
    config, directory = experiment.config, experiment.workdir.evaluation
    # What is wrong with the config is seen before anything is trained.
    sets = resolve(config.evaluation.benchmarks)
    check_systems(experiment)
    if experiment.workdir.bundle.exists():
        own_bundle(experiment)  # is it of this base and data?
    else:
        train_gate(experiment)
    key = _evaluation_key(experiment, sets)
    path = directory / "results.json"
    if path.exists():
        results = read_object(path, "delete it, and the same command judges the answers anew")
        if results["provenance"]["evaluation"] == key:
            return results
    informed = benchmarks.held_out(
        experiment.safe_informative(config.evaluation.split),
        config.data.domains,
        config.evaluation.prompts_per_domain,
    )
    human = human_answers(informed, config.evaluation.split)
    directory.mkdir(exist_ok=True, mode=0o700)
    for further in judges if is_first() else ():
        further.check()  # now, not after hours of generating
    times = _count(experiment, key, sets)
    if ungated := [name for name in config.evaluation.systems if is_ungated(name)]:
        console.print(f"[bold red]ungated[/]: {', '.join(ungated)}; answers are in {directory}")
    controls = Controls(experiment)
    results = {
        **_compared(experiment, controls, sets, human),
        "panel": panel.NOBODY,
        "budget": budget(experiment),
        "domains": list(config.data.domains),
        "demonstration": config.evaluation.demonstration,
        "test_evaluations": times,
        "provenance": {
            "evaluation": key,
            "split": config.evaluation.split,
            "commit": own_commit(),
            **experiment.identity,
            "router_parameters": controls.trained_parameters("safemoe"),
            "safe_lora_rank": experiment.lora_model("router").experts.rank,
        },
    }
    if is_first():
        write_json(path, results)
    counts = ", ".join(f"{name} {count}" for name, count in times.get("counts", {}).items())
    console.print(f"evaluations of test prompts so far: {counts or 'none'}")
    return results


def _compared(
    experiment: Experiment,
    controls: Controls,
    sets: Sequence[Named],
    human: Sequence[tuple[Prompt, str]],
) -> dict[str, Any]:
    """What the systems answer, what the judge says of it, and what it says of `human` answers."""
    config, directory = experiment.config, experiment.workdir.evaluation
    judge_rows = load_judge_rows(experiment.corpus, config.data)
    prompts, facts = _prompts(experiment, sets, [row.prompt for row in judge_rows])
    asking = Asking(
        chat=experiment.chat,
        config=config.evaluation,
        seed=config.seed,
        made_of=_bundle_digest(experiment),
        directory=directory,
        send=experiment.workdir.send_evaluation,
    )
    answers, likelihoods = measure(_entries(experiment, controls, prompts), asking)
    judge = EmbeddedJudge.fit(
        judge_rows,
        _cached(controls.system("base").scorer, experiment),
        likelihood_rows=config.evaluation.judge_rows,
        seed=config.seed,
    )
    judge.measure(experiment.corpus.select(splits={"test"}))
    valid = validity(judge, human, config.seed)
    outcomes, rows = judge_answers(answers, judge, directory)
    experiment.workdir.send_evaluation()
    compared = [row for row in likelihoods if row["system"] in config.evaluation.systems]
    return {
        "rows": rows,
        "nll": metrics.nll_rows(compared),
        "outcomes": outcomes,
        "likelihoods": compared,
        "router": router_rows(answers, config.data.domains),
        "systems": {
            name: {
                "title": title(name),
                "role": role(name),
                "ungated": is_ungated(name),
                "trained_parameters": controls.trained_parameters(name),
            }
            for name in config.evaluation.systems
        },
        "experts": expert_rows(likelihoods, config.data.domains),
        "judge": {"name": judge.name, **judge.reliability},
        "validity": valid,
        "benchmarks": facts,
    }


def _prompts(
    experiment: Experiment, sets: Sequence[Named], judge_taught: Sequence[str]
) -> tuple[dict[str, list[Prompt]], dict[str, Any]]:
    """What is asked, by the domain that is left out ("" for none) or "attacks", and the facts."""
    config, corpus = experiment.config.evaluation, experiment.corpus
    domains, most = experiment.config.data.domains, config.prompts_per_domain
    fits = _room(experiment)
    own = benchmarks.held_out(corpus.select(splits={config.split}), domains, most)
    learnt = corpus.select(splits={"train", "validation", "judge"})
    taught = {*judge_taught, *(row.prompt for row in learnt)}
    asked, facts = benchmarks.ask(sets, taught, config.prompts_per_benchmark, fits)
    for name, fact in facts.items():
        console.print(
            f"benchmark {name}: {fact['asked']} of {fact['prompts']} prompts asked, "
            f"{fact['by_refusal_alone']} of them judged by refusal alone; "
            f"{fact['left_out_as_taught']} left out, which taught models or judge, and "
            f"{fact['left_out_as_too_long']}, which leave no room for an answer"
        )
    general = benchmarks.general_ability() if config.utility else []
    attacked = [ATTACKS[name](own, experiment.unsafe("train")) for name in config.attacks]
    prompts = {"": own + asked + general, "attacks": list(itertools.chain(*attacked))}
    # A domain's training text is no secret to choices; its test prompts are, and the judge's teach.
    free = corpus.select(splits={"train", "validation", config.split})
    for domain in config.left_out:
        prompts[domain] = benchmarks.left_out(free, domain, most)
    fitting = {place: list(filter(fits, of_place)) for place, of_place in prompts.items()}
    if left := sum(map(len, prompts.values())) - sum(map(len, fitting.values())):
        console.print(f"{left} more prompts are left out, which leave no room for an answer")
    return fitting, facts


def _room(experiment: Experiment) -> Callable[[Prompt], bool]:
    """Whether every system can read a prompt and has room for a whole answer behind it."""
    config, chat = experiment.config.evaluation, experiment.chat
    starts: list[tuple[dict[str, str], ...]] = [()]
    starts += [turns for name in config.systems if (turns := preamble(name)) not in starts]

    def fits(prompt: Prompt) -> bool:
        prefix = chat.tokenizer.encode(prompt.prefix, add_special_tokens=False)
        try:
            longest = max(len(chat.prompt_ids((*turns, *prompt.messages))) for turns in starts)
        except UserError:  # the chat template refuses its turns
            return False
        room = experiment.base.spec.max_positions - longest - len(prefix)
        return room >= config.max_new_tokens

    return fits


def _entries(
    experiment: Experiment, controls: Controls, prompts: Mapping[str, list[Prompt]]
) -> list[Entry]:
    """Every system of every fold with its prompts; each is made only when it is needed."""
    config = experiment.config

    def entry(name: str, fold: str, asked: Sequence[Prompt]) -> Entry:
        make = functools.partial(controls.system, name, fold)
        shows_gates = (name, fold) == ("safemoe", "")
        return Entry(name, fold, tuple(asked), True, shows_gates, make)

    def read(name: str, make: Callable[[], System]) -> Entry:
        """Held-out harmful answers, read by one that answers nothing."""
        own = [
            dataclasses.replace(prompt, safe_answers=())
            for prompt in prompts[""]
            if prompt.benchmark == HELD_OUT
        ]
        return Entry(name, "", tuple(own), False, False, make)

    systems = config.evaluation.systems
    entries = [
        entry(name, "", prompts[""] + (prompts["attacks"] if name in ATTACKED_SYSTEMS else []))
        for name in systems
    ]
    for domain in config.evaluation.left_out:
        entries += [entry(n, domain, prompts[domain]) for n in systems if n in LEFT_OUT_SYSTEMS]
    if "base" not in systems:
        entries.append(read("base", functools.partial(controls.system, "base")))
    return entries + [
        read(alone(domain), functools.partial(controls.alone, domain))
        for domain in config.data.domains
    ]


def _count(experiment: Experiment, key: str, sets: Sequence[Named]) -> dict[str, Any]:
    """Notes down that test prompts or benchmarks are asked -> how often they were, with this."""
    parts = {named.name: named.sha256() for named in sets}
    if experiment.config.evaluation.split == "test":
        parts = {HELD_OUT: experiment.corpus.fingerprint, **parts}
    if not parts or not is_first():
        return {}
    return ledger.record(cache_dir() / "test_evaluations.jsonl", key, parts)


def _cached(scorer: PairScorer, experiment: Experiment) -> CachedScorer:
    """The base's likelihoods, remembered: hashes and numbers only, so other workdirs use them.

    Each way of resting and computing has its own. Several processes score all: they must compute
    alike, and their files may differ.
    """
    model = experiment.config.model
    who = f"{experiment.base.fingerprint}-{model.param_dtype}-{model.compute_dtype}"
    path = cache_dir() / f"likelihoods-{who}.npz" if jax.process_count() == 1 else None
    return CachedScorer(scorer, path, who)


def _evaluation_key(experiment: Experiment, sets: Sequence[Named]) -> str:
    """What answers depend on: the bundle, the evaluation's settings but for further judges, the
    benchmarks' files."""
    files = [(benchmark.name, benchmark.sha256()) for benchmark in sets]
    settings = to_dict(experiment.config)["evaluation"]
    del settings["judges"]
    text = json.dumps([_bundle_digest(experiment), settings, files])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bundle_digest(experiment: Experiment) -> str:
    return file_digest(experiment.workdir.bundle / MANIFEST)
