"""What an experiment needs on a TPU slice, from its own compiled steps, before a chip is rented.

The steps that a run compiles are compiled here for the slice's devices, from shapes: both train
steps as the two stages jit them, prefill and one decode step as the engine calls them. All sizes,
FLOPs and bytes are one device's.

Shape letters: B batch, T tokens, C cache slots.
"""

import dataclasses
import inspect
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from safemoe_jax.config import Config
from safemoe_jax.data.pipeline import empty_tokens
from safemoe_jax.errors import UserError
from safemoe_jax.experiment import check_layout, collection_shapes, state_shapes
from safemoe_jax.inference.engine import bucket, decode_step, prefill, rows_together
from safemoe_jax.model.attention import splash_block
from safemoe_jax.model.cache import CACHE_AXES
from safemoe_jax.model.flops import MultiplyAdds, num_params
from safemoe_jax.model.lora import Routed, rounded
from safemoe_jax.model.quantization import PARAM_DTYPES
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.parallel.sharding import batch_shardings, shardings, whole_rows, with_shardings
from safemoe_jax.planning.collectives import collectives
from safemoe_jax.planning.counts import Kernel, flops, hbm_bytes, kernels
from safemoe_jax.planning.hlo import Program
from safemoe_jax.planning.topologies import Topology
from safemoe_jax.progress import console
from safemoe_jax.stages import jitted_step
from safemoe_jax.training.losses import num_chunks
from safemoe_jax.training.state import make_optimizer
from safemoe_jax.training.steps import expert_train_step, gate_train_step

PARTS = ("base", "experts", "router", "optimizer", "best", "batch", "cache", "activations")
SCRATCH = PARTS[-1]  # what a function needs beside its arguments and results, and its code


@dataclasses.dataclass(frozen=True)
class Job:
    """One function as a run compiles it.

    Attributes:
      name: "train-experts", "train-gate", "prefill" or "decode".
      function: jitted.
      arguments: shapes, with where they live.
      parts: to which of `PARTS` an argument belongs, by the beginning of its path.
      rows: that one call works on.
      tokens: in them.
      useful_flops: of all devices together, what the result needs, without recomputation.
      loss_chunks: how often the loss's loop runs if every token carries loss.
      results: the part to which the results belong that overwrite no argument.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    parts: dict[str, str]
    rows: int
    tokens: int
    useful_flops: float
    loss_chunks: int = 1
    results: str = SCRATCH


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a job's compiled program does on a device.

    Attributes:
      name, rows, tokens: the job's.
      fits: whether the compiler found room for it.
      hbm: bytes by part. Where it does not fit: of the arguments, and what was asked for in all.
      needed: bytes in all.
      flops: additions and multiplications, attention kernels' and recomputation included.
      useful_flops: this device's share of the job's.
      hbm_traffic: bytes.
      sent: bytes by kind of collective.
      seconds: by "compute", "hbm" and "ici", each on its own at the chip's full rate.
    """

    name: str
    rows: int
    tokens: int
    fits: bool
    hbm: dict[str, float]
    needed: float
    useful_flops: float
    flops: float = 0.0
    hbm_traffic: float = 0.0
    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def bound(self) -> float:
        """Seconds that a call takes at least: what is slowest, all else hidden behind it."""
        return max(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.bound

    def mfu(self, topology: Topology) -> float:
        """Model FLOPs utilization at most (arXiv 2204.02311, appendix B)."""
        return self.useful_flops / (self.bound * topology.chip.flops * topology.share)


@dataclasses.dataclass(frozen=True)
class Plan:
    """An experiment on a slice."""

    config: Config
    topology: Topology
    parameters: dict[str, int]
    figures: tuple[Figures, ...]

    @property
    def fits(self) -> bool:
        return all(one.fits for one in self.figures)

    @property
    def hours(self) -> dict[str, float]:
        """At least, of each stage's steps; of answering too, where the config counts prompts."""
        by_name = {one.name: one for one in self.figures if one.fits}
        hours = {}
        for stage, name in (("experts", "train-experts"), ("router", "train-gate")):
            if name in by_name:
                steps = getattr(self.config.train, stage).steps
                hours[name] = steps * by_name[name].bound / 3600
        evaluation = self.config.evaluation
        prompts = evaluation.prompts_per_domain * len(self.config.data.domains)
        if prompts and {"prefill", "decode"} <= by_name.keys():
            read, step = by_name["prefill"], by_name["decode"]
            batches = math.ceil(prompts / step.rows) * len(evaluation.systems)
            reads = math.ceil(step.rows / read.rows)
            answer = reads * read.bound + evaluation.max_new_tokens * step.bound
            hours["answers"] = batches * answer / 3600
        return hours

    def check(self) -> None:
        """Refuses what does not fit.

        Raises:
          UserError: naming the function, what it needs, what there is, and what would help.
        """
        for one in self.figures:
            if not one.fits:
                raise UserError(
                    f"{one.name} needs {one.needed / 2**30:.1f} GiB of a device's "
                    f"{self.topology.room / 2**30:.1f} on {self.topology.name}; cut the base into "
                    "more parts (config.mesh.fsdp or tensor), recompute more "
                    "(config.model.remat='full'), take fewer rows at once (train.*.accumulation, "
                    "evaluation.batch_size) or a larger slice; --search tries what there is"
                )


def plan(
    config: Config,
    spec: ModelSpec,
    topology: Topology,
    names: tuple[str, ...] = ("train-experts", "train-gate", "prefill", "decode"),
) -> Plan:
    """Compiles an experiment's functions for a slice and reads what they need.

    Experts that come from elsewhere (`experts.source`) need no step.

    Args:
      config: the experiment; its mesh must use all of the slice's devices.
      spec: its base.
      topology: the slice.
      names: the functions.

    Raises:
      UserError: where mesh and slice, or mesh and sizes, do not go together.
    """
    mesh = make_mesh(config.mesh, topology.devices)
    if mesh.size < len(topology.devices):
        raise UserError(
            f"config.mesh has {mesh.size} devices and {topology.name} {len(topology.devices)}; let "
            f"its axes multiply to {len(topology.devices)}, or take a smaller slice"
        )
    if config.model.param_dtype == "gguf":
        raise UserError(
            "config.model.param_dtype is 'gguf', and a plan, made of shapes, knows no file's "
            "blocks; plan it as 'int8': a little less than blocks of 8 bits, more than those of 4"
        )
    check_layout(config, spec, PARAM_DTYPES[config.model.param_dtype])
    model = Transformer.from_config(config, spec, "tpu")
    shapes = collection_shapes(mesh, model)
    figures = []
    for name in names:
        if name == "train-experts" and config.experts.source:
            continue
        job = _JOBS[name](name, config, mesh, model, shapes)
        with jax.set_mesh(mesh), console.status(f"compiling {name} for {topology.name}"):
            figures.append(_figures(job, mesh, topology))
    parameters = {name: num_params(tree) for name, tree in shapes.items()}
    return Plan(config, topology, {"base": parameters.pop("params"), **parameters}, tuple(figures))


def _train_job(
    name: str, config: Config, mesh: Mesh, model: Transformer, shapes: dict[str, Any]
) -> Job:
    stage: Literal["experts", "router"] = "experts" if name == "train-experts" else "router"
    step = {"experts": expert_train_step, "router": gate_train_step}[stage]
    frozen = {"experts": ("params",), "router": ("params", "experts")}[stage]
    train, length = getattr(config.train, stage), config.data.sequence_length
    rows = train.rows * (len(config.data.domains) if stage == "experts" else 1)
    batch = empty_tokens((rows, length)) | {"expert_ids_B": np.zeros(rows, np.int32)}
    tx = make_optimizer(getattr(config.optimizer, stage), train.steps)
    state = state_shapes(mesh, model, stage, tx)
    count = MultiplyAdds.of(model, shapes)
    with jax.set_mesh(mesh):
        chunks = num_chunks(rows // train.accumulation, length, model.spec.vocab_size)
    return Job(
        name=name,
        function=jitted_step(step, model, tx, train.accumulation, state),
        arguments=(
            state,
            {key: shapes[key] for key in frozen},
            with_shardings(batch, batch_shardings(mesh, batch)),
        ),
        parts={
            "state.trainable": stage,
            "state.opt_state": "optimizer",
            "state.best": "best",
            "frozen['params']": "base",
            "frozen['experts']": "experts",
            "": "batch",
        },
        rows=rows,
        tokens=rows * length,
        useful_flops=count.train_step(stage, rows, length),
        loss_chunks=chunks,
    )


def _answer_job(
    name: str, config: Config, mesh: Mesh, model: Transformer, shapes: dict[str, Any]
) -> Job:
    """Prefill of as many prompts of a row's length as are read together, or one decode step of all
    slots behind them; both beside the cache of all slots, and the experts as they rest."""
    evaluation, spec = config.evaluation, model.spec

    def padded(length: int) -> int:
        return min(bucket(length), spec.max_positions)

    length = padded(config.data.sequence_length)
    room = padded(length + evaluation.max_new_tokens)
    with jax.set_mesh(mesh):
        slots = whole_rows(evaluation.batch_size)
        together = rows_together(length, slots, "tpu")
    named = {"tokens_BT": (together, length), "length_B": (together,), "token_B": (slots,)}
    tokens = {key: jax.ShapeDtypeStruct(shape, jnp.int32) for key, shape in named.items()}
    tokens = with_shardings(tokens, batch_shardings(mesh, tokens))
    cache = jax.eval_shape(lambda: model.empty_cache(slots, room))
    cache = with_shardings(cache, shardings(mesh, CACHE_AXES))
    count = MultiplyAdds.of(model, shapes)
    resting = shapes["experts"]
    placed = jax.tree.map(lambda leaf: leaf.sharding, resting)
    computing = jax.eval_shape(lambda leaves: rounded(leaves, model.compute_dtype), resting)
    variables = shapes | {"experts": with_shardings(computing, placed)}

    arguments: tuple[Any, ...]
    if name == "prefill":
        rows = together

        def read(variables, tokens_BT, length_B, cache, resting):
            own = model.empty_cache(rows, length)
            return prefill(model, variables, Routed(), tokens_BT, length_B, own)

        jitted = jax.jit(read, keep_unused=True)  # the slots' cache is there all the while
        arguments = (variables, tokens["tokens_BT"], tokens["length_B"], cache, resting)
        per_token = count.layers + count.experts + count.router + count.attention(length)
        used = rows * (length * per_token + count.head)
    else:
        rows = slots

        def decode(variables, token_B, cache, resting):
            return decode_step(model, variables, Routed(), token_B, cache)

        jitted = jax.jit(decode, donate_argnums=2, keep_unused=True)
        arguments = (variables, tokens["token_B"], cache, resting)
        attention = 2 * room * spec.num_heads * spec.head_dim * spec.num_layers
        used = rows * (count.matmuls + count.experts + count.router + attention)
    return Job(
        name=name,
        function=jitted,
        arguments=arguments,
        parts={
            "variables['params']": "base",
            "variables['experts']": "experts",
            "resting": "experts",
            "variables['router']": "router",
            "cache": "cache",
            "": "batch",
        },
        rows=rows,
        tokens=rows * length if name == "prefill" else rows,
        useful_flops=2 * used,
        results="cache",
    )


_JOBS: dict[str, Callable[..., Job]] = {
    "train-experts": _train_job,
    "train-gate": _train_job,
    "prefill": _answer_job,
    "decode": _answer_job,
}


def _figures(job: Job, mesh: Mesh, topology: Topology) -> Figures:
    share: dict[str, Any] = {"useful_flops": job.useful_flops / mesh.size}
    held = _held(job)
    if (needed := sum(held.values())) > topology.room:  # its arguments alone are too much
        return Figures(job.name, job.rows, job.tokens, False, held, needed, **share)
    try:
        compiled = compile_job(job)
    except jax.errors.JaxRuntimeError as error:
        if not (asked := _asked(str(error), needed)):
            raise
        return Figures(job.name, job.rows, job.tokens, False, held, asked, **share)
    text = compiled.as_text()
    assert text is not None  # as every program that XLA compiled
    program = Program.parse(text)
    runs = program.runs(unknown_trips=job.loss_chunks)
    work = flops(program, runs)
    work += sum(one.runs * attention_flops(one) for one in kernels(program, runs))
    traffic = hbm_bytes(program, runs)
    sent: defaultdict[str, float] = defaultdict(int)
    ici = 0.0
    for one in collectives(program, runs, mesh.size):
        sent[one.kind] += one.runs * one.bytes
        slowest = min(topology.bandwidth(mesh.devices.flat[list(group)]) for group in one.groups)
        ici += one.runs * one.bytes / slowest
    chip = topology.chip
    hbm = _hbm(job, program, compiled.memory_analysis())
    return Figures(
        name=job.name,
        rows=job.rows,
        tokens=job.tokens,
        fits=True,
        hbm=hbm,
        needed=sum(hbm.values()),
        flops=work,
        hbm_traffic=traffic,
        sent=dict(sent),
        seconds={
            "compute": work / (chip.flops * topology.share),
            "hbm": traffic / (chip.hbm_bandwidth * topology.share),
            "ici": ici,
        },
        **share,
    )


def compile_job(job: Job) -> jax.stages.Compiled:
    """A job's program for the devices that its arguments live on; the mesh must be set."""
    with warnings.catch_warnings():
        # Where the user keeps compiled programs: what has no device cannot be read back.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        return job.function.lower(*job.arguments).compile()


def _held(job: Job) -> dict[str, float]:
    """Bytes of a job's arguments on a device, by part, before anything is compiled."""
    held: Counter[str] = Counter()
    names = inspect.signature(job.function).parameters
    for name, argument in zip(names, job.arguments, strict=False):
        for path, leaf in jax.tree_util.tree_leaves_with_path(argument):
            size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            held[_part(job, name + jax.tree_util.keystr(path))] += size
    return dict(held)


def _part(job: Job, path: str) -> str:
    return next(part for prefix, part in job.parts.items() if path.startswith(prefix))


def _hbm(job: Job, program: Program, memory: Any) -> dict[str, float]:
    """Bytes on a device by part, with the layouts' padding; they sum to what the compiler says."""
    parts: defaultdict[str, float] = defaultdict(int)
    for path, array in program.parameters().items():
        parts[_part(job, path)] += array.padded_bytes
    parts[job.results] += memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts[SCRATCH] += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return {part: parts[part] for part in PARTS if parts[part]}


def _asked(message: str, held: float) -> float | None:
    """Bytes that a program needs, of the compiler's message that there are not as many."""
    size = r"([\d.]+)([KMGT]?)"
    everything = re.search(rf"Used {size} of [\d.]+[KMGT]? hbm", message)
    match = everything or re.search(rf"HLO temporaries \({size}\) exceeds", message)
    if not match:
        return None
    asked = float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")
    return asked if everything else held + asked


def attention_flops(kernel: Kernel) -> float:
    """FLOPs of a call of splash attention, which XLA does not count.

    Of matmuls of a block's [queries, keys, head dim] the forward kernel has 2, the backward ones 3
    (to the queries) and 4 (to keys and values), for the blocks on and below the diagonal.

    Raises:
      ValueError: for another kernel.
    """
    match = re.search(r"splash_mha_(fwd|dq|dkv)", kernel.name)
    if not match:
        raise ValueError(f"how many FLOPs has the kernel {kernel.name}?")
    matmuls = {"fwd": 2, "dq": 3, "dkv": 4}[match[1]]
    # Before them come the masks, which are whole numbers; a single row's axis may be missing.
    queries = next(array for array in kernel.arrays if array.is_float)
    length = queries.sizes[-2]
    blocks = length // splash_block(length)
    return 2 * matmuls * queries.elements * length * (blocks + 1) / (2 * blocks)
