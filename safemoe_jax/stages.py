"""The two stages of training, and the bundle that they end in.

Stage one and stage two are each one `Stage` for `training.loop.train`; controls are trained by the
same two, on other text (`controls`).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import grain
import jax

from safemoe_jax.config import TrainConfig, to_dict
from safemoe_jax.data.corpora import Example
from safemoe_jax.data.pipeline import PackedCorpus, train_iterator
from safemoe_jax.errors import UserError
from safemoe_jax.experiment import Experiment, init_shapes
from safemoe_jax.model.flops import MultiplyAdds
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.parallel.chips import peak_flops
from safemoe_jax.parallel.hosts import is_first, to_host
from safemoe_jax.parallel.sharding import local_rows, replicated
from safemoe_jax.private_files import read_json_lines
from safemoe_jax.progress import console
from safemoe_jax.training.checkpoints import Checkpoints
from safemoe_jax.training.loop import Stage, train
from safemoe_jax.training.metrics import MetricsWriter, TensorBoardWriter, WandbWriter, Writer
from safemoe_jax.training.observer import Observer, Trace, Work
from safemoe_jax.training.state import Best, TrainState, make_optimizer
from safemoe_jax.training.steps import expert_train_step, gate_train_step
from safemoe_jax.training.validation import expert_validation, gate_validation
from safemoe_jax.weights.bundle import Bundle, read_bundle, write_bundle
from safemoe_jax.weights.encryption import key_from_environment

OWN = ("experts", "router")  # the stages that make the bundle

Text = tuple[PackedCorpus, PackedCorpus]  # what is trained on, and what validates


def train_experts(experiment: Experiment) -> Any:
    """Stage one -> the experts, each as its best validation left it; imported ones as they are."""
    config, model = experiment.config, experiment.model
    if experiment.workdir.bundle.exists():
        return experiment.placed(model, "experts", own_bundle(experiment).experts)
    if experiment.imported:
        console.print(f"experts: imported, from {config.experts.source}; none is trained")
        return experiment.placed(model, "experts", experiment.imported.experts)
    text = (
        experiment.packed(experiment.unsafe("train"), by_domain=True),
        experiment.packed(experiment.unsafe("validation"), by_domain=True),
    )
    return stage_one(experiment, "experts", model, text, config.train.experts).trainable


def train_router(experiment: Experiment) -> None:
    """Trains the router over the finished experts, and writes both as the bundle."""
    key_from_environment()  # a mistake in it need not wait for the training
    experts = train_experts(experiment)
    imported = experiment.imported
    best = stage_two(
        experiment,
        "router",
        experiment.model,
        experts,
        safe_text(experiment),
        experiment.config.data.domains,
        {"experts": imported.sha256} if imported else {},
    )
    experts, router = to_host((experts, best.trainable))
    if is_first():
        write_bundle(
            experiment.workdir.bundle,
            base=experiment.base,
            config=experiment.config,
            experts=experts,
            router=router,
            provenance={
                **experiment.identity,
                "router_step": int(best.step),
                "seed": experiment.config.seed,
                **({"adapters": imported.adapters} if imported else {}),
            },
        )
    experiment.workdir.publish()


def train_gate(experiment: Experiment, keep_experts: bool = False) -> Bundle:
    """Stage two, and the bundle of both.

    Args:
      experiment: whose experts are trained first, if they are not there yet.
      keep_experts: leaves the experts' checkpoints behind; they are hazardous, and the bundle holds
        what is needed of them.
    """
    if not experiment.workdir.bundle.exists():
        train_router(experiment)
    bundle = own_bundle(experiment)  # checked, before what it was made of goes
    for stage in OWN if is_first() else ():
        kept = experiment.workdir.checkpoints(stage).parent
        if not keep_experts:
            kept.rmtree(missing_ok=True)
        elif kept.exists():
            console.print(f"[bold red]ungated[/]: checkpoints are kept, unencrypted, in {kept}")
    return bundle


def own_bundle(experiment: Experiment) -> Bundle:
    """The finished bundle, checked; one of another base or corpus is refused."""
    bundle = read_bundle(experiment.workdir.bundle, experiment.base)
    made_of = bundle.manifest["provenance"]["corpus"]
    if made_of != experiment.corpus.fingerprint:
        raise UserError(
            f"{experiment.workdir.bundle} was trained on corpus {made_of}, and the data is now "
            f"{experiment.corpus.fingerprint}; give another --workdir, or delete the bundle"
        )
    return bundle


def stage_one(
    experiment: Experiment,
    name: str,
    model: Transformer,
    text: Text,
    schedule: TrainConfig,
    made_of: Mapping[str, str] | None = None,
) -> Best:
    """Trains a model's experts, or the one LoRA that is its only expert.

    Args:
      experiment: whose base, optimizer and seed it is.
      name: of the stage in metrics.jsonl, and of where its checkpoints are (`place`).
      model: with an expert for each stream of the text.
      text: packed, a stream for each expert.
      schedule: steps and rows.
      made_of: what it is made of beside base and corpus.
    """
    packed, held_out = text
    frozen = {"params": experiment.params}
    tx = make_optimizer(experiment.config.optimizer.experts, schedule.steps)
    rows = schedule.rows * packed.num_streams
    together = rows // schedule.accumulation  # as many as a step has on the devices
    state = experiment.initial_state(model, "experts", tx)
    stage = Stage(
        name=name,
        step=jitted_step(expert_train_step, model, tx, schedule.accumulation, state),
        frozen=frozen,
        batches=_batches(experiment, packed, schedule.rows),
        validate=expert_validation(model, frozen, held_out, together, experiment.mesh),
    )
    work = _work(experiment, model, "experts", rows)
    observer = _observer(experiment, name, packed.streams, packed.streams, work)
    made_of = {**(made_of or {}), "text": packed.fingerprint}
    return _train(experiment, stage, state, schedule, observer, made_of)


def stage_two(
    experiment: Experiment,
    name: str,
    model: Transformer,
    experts: Any,
    text: Text,
    domains: Sequence[str],
    made_of: Mapping[str, str],
) -> Best:
    """Trains a model's router; arguments are those of `stage_one`, and:

    Args:
      experts: the finished experts, on the mesh.
      domains: their names.
    """
    packed, held_out = text
    schedule = experiment.config.train.router
    frozen = {"params": experiment.params, "experts": experts}
    tx = make_optimizer(experiment.config.optimizer.router, schedule.steps)
    together = schedule.rows // schedule.accumulation
    state = experiment.initial_state(model, "router", tx)
    stage = Stage(
        name=name,
        step=jitted_step(gate_train_step, model, tx, schedule.accumulation, state),
        frozen=frozen,
        batches=_batches(experiment, packed, schedule.rows),
        validate=gate_validation(model, frozen, held_out, together, experiment.mesh),
    )
    work = _work(experiment, model, "router", schedule.rows)
    observer = _observer(experiment, name, ("all",), domains, work)
    made_of = {**made_of, "text": packed.fingerprint}
    return _train(experiment, stage, state, schedule, observer, made_of)


def safe_text(experiment: Experiment, left_out: str = "") -> Text:
    """Stage two's training and validation text, without that of a domain that is left out."""
    learnt, held_out = (
        [e for e in experiment.safe_informative(split) if e.domain != left_out]
        for split in ("train", "validation")
    )
    but = f" but of {left_out}" if left_out else ""
    return in_one_stream(experiment, learnt, held_out, f"safe, informative answer{but}")


def in_one_stream(
    experiment: Experiment, learnt: Sequence[Example], held_out: Sequence[Example], kind: str
) -> Text:
    """Packs text that is all one stream's; `kind` names an example of it where there is none."""
    for examples, split in ((learnt, "train"), (held_out, "validation")):
        if not examples:
            raise UserError(
                f"there is no {kind} in the {split} split; add safe answers, or lower "
                "data.informative_min_characters"
            )
    return (
        experiment.packed(learnt, by_domain=False),
        experiment.packed(held_out, by_domain=False),
    )


def place(stage: str) -> str:
    """Where in the work directory a stage's checkpoints are; a control's go when it is done."""
    return stage if stage in OWN else f"unfinished/{stage}"


def _batches(experiment: Experiment, packed: PackedCorpus, rows: int) -> grain.DatasetIterator:
    """Train batches: the rows of them that this process's devices hold."""
    places = local_rows(experiment.mesh, rows * packed.num_streams)
    return train_iterator(packed, rows, experiment.config.seed, places)


def _work(
    experiment: Experiment, model: Transformer, trained: Literal["experts", "router"], rows: int
) -> Work:
    length = experiment.config.data.sequence_length
    count = MultiplyAdds.of(model, init_shapes(model))
    peak = peak_flops(experiment.mesh.devices.flat)
    return Work(rows * length, count.train_step(trained, rows, length), peak)


def _observer(
    experiment: Experiment, stage: str, streams: Sequence[str], domains: Sequence[str], work: Work
) -> Observer:
    workdir, recording = experiment.workdir, experiment.recording
    # One directory for both: TensorBoard shows a trace where it finds event files.
    shown = workdir.tensorboard / stage

    def writers(first: int) -> list[Writer]:
        found: list[Writer] = [MetricsWriter(workdir.metrics, stage, first)]
        if "tensorboard" in recording.log:
            found.append(TensorBoardWriter(shown, first))
        if "wandb" in recording.log:
            identity, config = workdir.identity, to_dict(experiment.config)
            found.append(WandbWriter(workdir.root, workdir.name, stage, identity, config))
        return found

    return Observer(
        stage,
        streams=streams,
        domains=domains,
        work=work,
        open_writers=writers,
        trace=Trace(recording.profile, shown),
    )


def jitted_step(step, model: Transformer, tx, accumulation: int, state: TrainState):
    """The train step, compiled for this stage; its state is donated and stays where it lies.

    Of `state`, arrays or shapes, only the shardings are read.
    """
    step = functools.partial(step, model=model, tx=tx, accumulation=accumulation)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(placed, replicated(placed.step.mesh)))


def _train(
    experiment: Experiment,
    stage: Stage,
    state: TrainState,
    schedule: TrainConfig,
    observer: Observer,
    made_of: Mapping[str, str],
) -> Best:
    checkpoints = Checkpoints(
        experiment.workdir.checkpoints(place(stage.name)),
        keep=schedule.keep,
        identity={**experiment.trained_on, **made_of},
    )
    try:
        return train(
            stage,
            state,
            schedule,
            experiment.mesh,
            checkpoints,
            observer,
            experiment.workdir.publish,
        ).best
    finally:
        checkpoints.close()


def budget(experiment: Experiment) -> dict[str, str]:
    """Tokens with loss that each stage has seen, of those there."""
    there = {"router": safe_text(experiment)[0].tokens.loss}
    if not experiment.config.experts.source:
        unsafe = experiment.packed(experiment.unsafe("train"), by_domain=True)
        there = {"experts": unsafe.tokens.loss, **there}
    seen = dict.fromkeys(there, 0.0)
    for row in read_json_lines(experiment.workdir.metrics):
        if row["split"] == "train" and row["stage"] in seen:
            seen[row["stage"]] += row["loss_tokens"]
    return {
        stage: f"{seen[stage]:,.0f} answer tokens seen of {there[stage]:,} there "
        f"({seen[stage] / there[stage]:.1f} epochs)"
        for stage in there
    }
