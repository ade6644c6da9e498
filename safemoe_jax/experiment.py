"""What the verbs share: an experiment's base, data and model, each made when first asked for."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from safemoe_jax.config import Config
from safemoe_jax.data import rules
from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.data.corpora import Corpus, Example, load_corpus
from safemoe_jax.data.pipeline import PackedCorpus, encodable, pack
from safemoe_jax.errors import UserError
from safemoe_jax.model.flops import num_params
from safemoe_jax.model.quantization import ParamDtype, largest_block
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.parallel.mesh import check_divides, make_mesh
from safemoe_jax.parallel.sharding import shardings, with_shardings
from safemoe_jax.remote import local_copy
from safemoe_jax.training.metrics import NOTHING_MORE, Recording
from safemoe_jax.training.state import (
    TrainState,
    init_expert_state,
    init_router_state,
    state_shardings,
)
from safemoe_jax.weights.base import BaseModel, load_base
from safemoe_jax.weights.imported import Imported, read_imported
from safemoe_jax.workdir import Workdir


class Experiment:
    """A config at work in a workdir."""

    def __init__(
        self, config: Config, workdir: Workdir, recording: Recording = NOTHING_MORE
    ) -> None:
        self.config, self.workdir, self.recording = config, workdir, recording

    @functools.cached_property
    def mesh(self) -> Mesh:
        mesh = make_mesh(self.config.mesh)
        check_layout(self.config, self.base.spec, self.base.rests)
        return mesh

    @functools.cached_property
    def base(self) -> BaseModel:
        return load_base(self.config.model.source, self.config.model.param_dtype)

    @functools.cached_property
    def chat(self) -> ChatFormat:
        return ChatFormat(self.base.tokenizer)

    @functools.cached_property
    def corpus(self) -> Corpus:
        """What the base's chat template takes of the configured one."""
        loaded = load_corpus(self.config.data, self.workdir.data)
        return encodable(loaded, self.chat, self.workdir.data)

    @functools.cached_property
    def imported(self) -> Imported | None:
        """The experts, where the config takes them from elsewhere and trains none."""
        if not (source := self.config.experts.source):
            return None
        return read_imported(local_copy(source), self.base.identity, self.config, self.base.spec)

    @functools.cached_property
    def model(self) -> Transformer:
        """The base with one expert per domain and the router."""
        return Transformer.from_config(self.config, self.base.spec, rests=self.base.rests)

    def lora_model(self, size: Literal["router", "experts"]) -> Transformer:
        """A control: one LoRA, always on, at the experts' scale.

        Args:
          size: "router" gives it the rank whose parameters are as many as the router's (or as near
            as a whole rank comes, from rank 1 up), "experts" the rank of all experts together.
        """
        one = dataclasses.replace(self.config.experts, rank=1, alpha=self.config.experts.scale)
        model = self.model.with_experts(1, one)
        rank = self.model.num_experts * self.config.experts.rank
        if size == "router":
            router = num_params(init_shapes(self.model)["router"])
            rank = max(1, round(router / num_params(init_shapes(model)["experts"])))
        return model.clone(
            experts=dataclasses.replace(one, rank=rank, alpha=rank * self.config.experts.scale)
        )

    @functools.cached_property
    def params(self) -> Any:
        """The frozen base on the mesh."""
        return self.base.placed(shardings(self.mesh, boxed_shapes(self.model)["params"]))

    def release(self) -> None:
        """Gives back the devices' memory of the frozen base; who asks for it has it read anew."""
        vars(self).pop("params", None)

    @property
    def identity(self) -> dict[str, str]:
        """What this experiment's results and bundle belong to."""
        return {"base": self.base.identity.sha256, "corpus": self.corpus.fingerprint}

    @property
    def trained_on(self) -> dict[str, str]:
        """What its checkpoints and controls belong to.

        A base's config.json may change though its weights do not; a bundle holds the spec whole.
        """
        return {**self.identity, "spec": repr(self.base.spec)}

    def initial_state(
        self, model: Transformer, collection: str, tx: optax.GradientTransformation
    ) -> TrainState:
        """What trains `experts` or `router`, at its start; it is made where it lives."""
        shapes = state_shapes(self.mesh, model, collection, tx)
        placed = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        make = functools.partial(_start, model, collection, tx, self.config.seed)
        return jax.jit(make, out_shardings=placed)()

    def placed(self, model: Transformer, collection: str, tree: Any) -> Any:
        """A model's collection of host arrays, on the mesh."""
        return jax.device_put(tree, shardings(self.mesh, boxed_shapes(model)[collection]))

    def unsafe(self, split: str) -> list[Example]:
        """What experts learn, by domain."""
        return self.corpus.select(label="unsafe", splits={split})

    def safe_informative(self, split: str) -> list[Example]:
        """What the router learns."""
        return self.corpus.select(label="safe", informative=True, splits={split})

    def refusals(self, split: str) -> list[Example]:
        """Safe answers that refuse, which the router does not learn."""
        safe = self.corpus.select(label="safe", splits={split})
        return [example for example in safe if rules.is_refusal(example.response)]

    def packed(self, examples: Sequence[Example], *, by_domain: bool) -> PackedCorpus:
        """Text of a stage, packed: a stream for each domain, or one of all.

        Raises:
          UserError: where there is none for the experts; the router's is counted in `stages`.
        """
        if by_domain and not examples:
            there = (f"{len(self.unsafe(split))} for {split}" for split in ("train", "validation"))
            raise UserError(
                f"the corpus has too few unsafe answers: {', '.join(there)}; add some, or check "
                "data.domains and data.unsafe_min_score"
            )
        return pack(
            examples,
            self.chat,
            self.config.data.sequence_length,
            self.config.seed,
            streams=self.config.data.domains if by_domain else None,
            directory=self.workdir.data / "packed",
        )


def check_layout(config: Config, spec: ModelSpec, rests: ParamDtype) -> None:
    """Refuses a config whose rows are longer than the base reads, or whose mesh cannot cut the base
    or the steps' rows into equal parts.

    Args:
      config: the experiment.
      spec: of its base.
      rests: how the base does.

    Raises:
      UserError: names what does not fit, its size, and what would.
    """
    if (length := config.data.sequence_length) > spec.max_positions:
        raise UserError(
            f"config.data.sequence_length is {length}, and the base was trained on positions up to "
            f"{spec.max_positions}; lower it to that or less"
        )
    sizes = [
        *model_sizes(spec, rests, "the base"),
        ("data.sequence_length", "length", length),
    ]
    for stage, streams in (("experts", len(config.data.domains)), ("router", 1)):
        train = getattr(config.train, stage)
        rows = train.rows * streams // train.accumulation
        sizes.append((f"the rows of a microbatch of train.{stage}", "batch", rows))
    check_divides(config.mesh, sizes)


def model_sizes(spec: ModelSpec, rests: ParamDtype, whose: str) -> list[tuple[str, str, int]]:
    """What a mesh cuts of a model, as `check_divides` takes it.

    Args:
      spec: of the model.
      rests: how the model does; what rests in blocks is cut between them.
      whose: sizes these are, in messages.
    """
    sizes = [
        (f"{whose}'s width", "embed", spec.embed_dim),
        (f"{whose}'s vocabulary", "vocab", spec.vocab_size),
        (f"{whose}'s query heads", "heads", spec.num_heads),
        (f"{whose}'s key/value heads", "kv_heads", spec.num_kv_heads),
        (f"{whose}'s MLP's width", "mlp", spec.mlp_dim),
    ]
    if block := largest_block(rests):
        sizes += [
            (f"{whose}'s {what}, in blocks of {block}", axis, size // block)
            for what, axis, size in (
                ("width", "embed", spec.embed_dim),
                ("queries' width", "heads", spec.num_heads * spec.head_dim),
                ("MLP's width", "mlp", spec.mlp_dim),
            )
        ]
    return sizes


@functools.cache
def boxed_shapes(model: Transformer) -> Any:
    """Shapes of all three collections, boxed with their logical names; nothing is computed."""
    return jax.eval_shape(lambda: model.initial(jax.random.key(0)))


def init_shapes(model: Transformer) -> Any:
    """Shapes of all three collections."""
    return nn.unbox(boxed_shapes(model))


def collection_shapes(mesh: Mesh, model: Transformer) -> dict[str, Any]:
    """Shapes of all three collections, with where they live."""
    boxed = boxed_shapes(model)
    return with_shardings(nn.unbox(boxed), shardings(mesh, boxed))


def state_shapes(
    mesh: Mesh, model: Transformer, collection: str, tx: optax.GradientTransformation
) -> TrainState:
    """Shapes of what trains `experts` or `router`, with where they live."""
    shapes = jax.eval_shape(lambda: _start(model, collection, tx, seed=0))
    return with_shardings(
        shapes, state_shardings(mesh, boxed_shapes(model)[collection], shapes, tx)
    )


def _start(
    model: Transformer, collection: str, tx: optax.GradientTransformation, seed: int
) -> TrainState:
    begin = {"experts": init_expert_state, "router": init_router_state}[collection]
    return begin(nn.unbox(model.initial(jax.random.key(seed))[collection]), tx)
