"""Which mesh, remat policy and batch size of an experiment are the best on a slice.

One after another, each with the best of those before it: all combinations of a slice of 16 would be
some hundred compilations, this is some twenty.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax

from safemoe_jax.config import Config, MeshConfig
from safemoe_jax.errors import UserError
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.parallel.mesh import AXES
from safemoe_jax.planning.plan import Figures, Plan, plan
from safemoe_jax.planning.topologies import Topology
from safemoe_jax.progress import console

TRAINING = {"train-experts": "experts", "train-gate": "router"}
_TIMES = (0.25, 0.5, 2, 4)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config that was tried.

    Attributes:
      changes: of the experiment, by dotted key.
      plan: of its two train steps; None where mesh and sizes do not go together, or the compiler
        fails.
      hours: at least, for both stages to see as many tokens as the experiment has them see; None
        where it does not fit.
    """

    changes: dict[str, str | int]
    plan: Plan | None
    hours: float | None

    @property
    def label(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.changes.items()) or "as it is"

    @property
    def order(self) -> float:
        return float("inf") if self.hours is None else self.hours


def search(config: Config, spec: ModelSpec, topology: Topology) -> list[Candidate]:
    """Tries mesh shapes, then remat policies, then rows a step -> all that was tried, best first.

    The number of experts' rows and the sequence's length stay as they are.

    Raises:
      UserError: where nothing fits.
    """
    tried: dict[Config, Candidate] = {}
    best = config
    for variants in (_meshes, _remats, _rows):
        for variant in variants(best, topology):
            if variant not in tried:
                tried[variant] = _try(config, variant, spec, topology)
        best = min(tried, key=lambda variant: tried[variant].order)
    ranked = sorted(tried.values(), key=lambda candidate: candidate.order)
    if ranked[0].hours is None:
        raise UserError(
            f"no mesh of {topology.name} holds {config.model.source} with these rows; take a "
            "larger slice, or shorter rows (config.data.sequence_length)"
        )
    return ranked


def _try(config: Config, variant: Config, spec: ModelSpec, topology: Topology) -> Candidate:
    changes = dict(_changes(config, variant))
    try:
        found = plan(variant, spec, topology, tuple(TRAINING))
    except (UserError, jax.errors.JaxRuntimeError) as error:  # sizes, or the compiler's own fault
        candidate = Candidate(changes, None, None)
        console.print(f"{candidate.label}: {str(error).splitlines()[0]}")
        return candidate
    hours = None
    if found.fits:
        hours = sum(_hours(config, variant, one) for one in found.figures)
    candidate = Candidate(changes, found, hours)
    console.print(
        f"{candidate.label}: {'does not fit' if hours is None else f'{hours:.3g} hours at least'}"
    )
    return candidate


def _hours(config: Config, variant: Config, one: Figures) -> float:
    """At least, until a stage of `variant` has seen what the same stage of `config` sees."""
    stage = TRAINING[one.name]
    asked, train = getattr(config.train, stage), getattr(variant.train, stage)
    return asked.steps * asked.rows / train.rows * one.bound / 3600


def _meshes(config: Config, topology: Topology) -> Iterator[Config]:
    yield config
    devices = len(topology.devices)
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for fsdp, tensor in itertools.product(reversed(divisors), divisors):
        if devices % (fsdp * tensor) == 0:
            mesh = MeshConfig(data=devices // (fsdp * tensor), fsdp=fsdp, tensor=tensor, context=1)
            yield dataclasses.replace(config, mesh=mesh)


def _remats(config: Config, _: Topology) -> Iterator[Config]:
    for remat in ("none", "dots", "full"):
        yield dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))


def _rows(config: Config, _: Topology) -> Iterator[Config]:
    for times in _TIMES:
        stages = {}
        for stage in ("experts", "router"):
            train = getattr(config.train, stage)
            stages[stage] = dataclasses.replace(train, rows=int(max(1, train.rows * times)))
        yield dataclasses.replace(config, train=dataclasses.replace(config.train, **stages))


def _changes(config: Config, variant: Config) -> Iterator[tuple[str, str | int]]:
    for axis in AXES:
        if (size := getattr(variant.mesh, axis)) != getattr(config.mesh, axis):
            yield f"mesh.{axis}", size
    if variant.model.remat != config.model.remat:
        yield "model.remat", variant.model.remat
    for stage in ("experts", "router"):
        if (rows := getattr(variant.train, stage).rows) != getattr(config.train, stage).rows:
            yield f"train.{stage}.rows", rows
