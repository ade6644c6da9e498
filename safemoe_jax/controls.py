"""The systems of `evaluation.systems`, made: what one needs besides the bundle is trained once.

Weights of controls lie in controls/, a directory each, checked and encrypted as bundles are.
Experts of a left-out domain are not trained again: independence makes the bundle's others what they
would be without it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from safemoe_jax.data import benign
from safemoe_jax.data.corpora import Example
from safemoe_jax.data.splits import Split
from safemoe_jax.errors import UserError
from safemoe_jax.evaluation.evaluate import System
from safemoe_jax.evaluation.systems import (
    CONSTANT,
    SYSTEMS,
    Adapter,
    Base,
    ExpertData,
    Mixture,
    constant_router,
    fixed_gates,
    matched_random,
    null_experts,
    preamble,
    shuffled_router,
    without_expert,
)
from safemoe_jax.experiment import Experiment, init_shapes
from safemoe_jax.fetch import file_digest
from safemoe_jax.inference import divergence
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.inference.scoring import Scorer
from safemoe_jax.model.flops import num_params
from safemoe_jax.model.lora import Gates, Routed, Routing
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.parallel.hosts import is_first, to_host
from safemoe_jax.progress import console
from safemoe_jax.stages import (
    Text,
    in_one_stream,
    own_bundle,
    place,
    safe_text,
    stage_one,
    stage_two,
)
from safemoe_jax.weights.artefact import (
    MANIFEST,
    Kind,
    checked_files,
    new_artefact,
    read_manifest,
)
from safemoe_jax.weights.bundle import to_safetensors

CONTROL = Kind("control's weights", 1, ("identity",))
_FILE = "weights.safetensors"

# Tokens; what is scored must not be cut where training rows are short. With two answers before it
# (`attacks.two_shot`) a conversation is longer than any other.
_SHORTEST_SCORED = 768


class Controls:
    """Makes systems of a finished bundle."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._bundle = own_bundle(experiment)

    def system(self, name: str, left_out: str = "") -> System:
        """A system of the table, trained without a domain where one is left out.

        Raises:
          UserError: where the text that it should be trained on is not there.
        """
        recipe = SYSTEMS[name]
        if isinstance(recipe, Base):
            return self._system(self._experiment.model, {}, None, preamble(name))
        if isinstance(recipe, Adapter):
            model, lora = self._adapter(name, recipe, left_out)
            return self._system(model, {"experts": lora}, Gates(jnp.ones(1)))
        return self._mixture(recipe, left_out)

    def alone(self, domain: str) -> System:
        """One expert of the bundle, with gate 1."""
        experiment = self._experiment
        experts = experiment.placed(experiment.model, "experts", self._bundle.experts)
        return self._system(experiment.model, {"experts": experts}, self._one(domain))

    def trained_parameters(self, name: str) -> int:
        """Of the router or LoRA that learnt how to answer; 0 where nothing did."""
        recipe, experiment = SYSTEMS[name], self._experiment
        if isinstance(recipe, Adapter):
            return num_params(init_shapes(experiment.lora_model(recipe.size))["experts"])
        if isinstance(recipe, Mixture) and recipe.gates in ("trained", "harmful"):
            return num_params(self._bundle.router)
        return 0

    def _mixture(self, recipe: Mixture, left_out: str) -> System:
        experiment = self._experiment
        model, domains = experiment.model, list(experiment.config.data.domains)
        experts = self._experts(recipe.experts)
        if left_out:
            experts = without_expert(experts, domains.index(left_out))
            domains.remove(left_out)
            model = model.with_experts(len(domains))
        experts = experiment.placed(model, "experts", experts)
        variables = {"experts": experts}
        if recipe.gates in ("uniform", "negated"):
            return self._system(model, variables, Gates(fixed_gates(recipe.gates, len(domains))))
        if recipe.gates == "best":
            return self._system(model, variables, self._one(self._best()))
        learnt = "harmful" if recipe.gates == "harmful" else recipe.experts
        router = self._router(learnt, model, experts, domains, left_out)
        if recipe.gates == "constant":
            model, router = self._constant(router, model, variables)
        router = self._changed(recipe.gates, router, model.num_experts)
        variables["router"] = experiment.placed(model, "router", router)
        return self._system(model, variables, Routed())

    def _changed(self, gates: str, router: Any, num_experts: int) -> Any:
        """What a control without training makes of a trained router."""
        seed = self._experiment.config.seed
        if gates == "random":
            return matched_random(router, seed)
        if gates == "shuffled":
            return shuffled_router(router, num_experts, seed)
        return router

    def _constant(
        self, router: Any, model: Transformer, variables: Mapping[str, Any]
    ) -> tuple[Transformer, Any]:
        """A router of another's mean gates at every token, and the model that takes it."""
        placed = self._experiment.placed(model, "router", router)
        variables = {"params": self._experiment.params, **variables, "router": placed}
        routed = divergence.Mixture(model, variables, Routed())
        gates_LE = divergence.mean_gates(routed, self._spoken("train"))
        made = constant_router(gates_LE, model.spec.embed_dim)
        return model.clone(router=CONSTANT), made

    def _experts(self, data: ExpertData) -> Any:
        """Experts of the run's own shape, on the host."""
        experiment, own = self._experiment, self._bundle.experts
        if data in ("unsafe", "random", "null"):
            seed = experiment.config.seed
            make = {"random": lambda: matched_random(own, seed), "null": lambda: null_experts(own)}
            return make[data]() if data in make else own
        name = f"experts_{data}"
        schedule = experiment.config.train.experts

        def train() -> Any:
            learnt, held_out = expert_text(experiment, data)
            text = (
                experiment.packed(learnt, by_domain=True),
                experiment.packed(held_out, by_domain=True),
            )
            return stage_one(experiment, name, experiment.model, text, schedule).trainable

        made_of = {"text": benign.version()} if data == "benign" else {}
        return _once(experiment, name, made_of, train)

    def _router(
        self, learnt: str, model: Transformer, experts: Any, domains: Sequence[str], left_out: str
    ) -> Any:
        """A router over these experts, on the host.

        The run's own where the experts are, and where they are empty: nothing would be learnt.
        """
        if learnt in ("unsafe", "null") and not left_out:
            return self._bundle.router
        name = f"router_without_{left_out}" if left_out else f"router_{learnt}"
        own = self._experiment.workdir.controls / f"experts_{learnt}" / MANIFEST
        made_of = {"experts": file_digest(own) if own.exists() else self._bundle.experts_sha256}

        def train() -> Any:
            text = self._harmful() if learnt == "harmful" else safe_text(self._experiment, left_out)
            return stage_two(
                self._experiment, name, model, experts, text, domains, made_of
            ).trainable

        return _once(self._experiment, name, made_of, train)

    def _adapter(self, name: str, recipe: Adapter, left_out: str) -> tuple[Transformer, Any]:
        """One LoRA on the router's data, for as many steps, or on refusals."""
        experiment = self._experiment
        model = experiment.lora_model(recipe.size)
        name = f"{name}_without_{left_out}" if left_out else name

        def train() -> Any:
            text = (
                self._refusals() if recipe.text == "refusals" else safe_text(experiment, left_out)
            )
            schedule = experiment.config.train.router
            return stage_one(experiment, name, model, text, schedule).trainable

        return model, experiment.placed(model, "experts", _once(experiment, name, {}, train))

    def _refusals(self) -> Text:
        learnt, held_out = (self._experiment.refusals(split) for split in ("train", "validation"))
        return in_one_stream(self._experiment, learnt, held_out, "safe refusal")

    def _harmful(self) -> Text:
        learnt, held_out = (self._experiment.unsafe(split) for split in ("train", "validation"))
        return in_one_stream(self._experiment, learnt, held_out, "harmful answer")

    def _best(self) -> str:
        """The domain of the expert that makes safe validation answers likeliest."""
        examples = self._experiment.safe_informative("validation")
        pairs = [(example.messages, example.response) for example in examples]
        nll = {
            domain: -np.concatenate(
                self.alone(domain).scorer(pairs, description=f"expert {domain}")
            ).mean()
            for domain in self._experiment.config.data.domains
        }
        best = min(nll, key=lambda domain: nll[domain])
        console.print(f"best single expert on safe validation answers: {best}")
        return best

    def _one(self, domain: str) -> Gates:
        domains = self._experiment.config.data.domains
        return Gates(jax.nn.one_hot(domains.index(domain), len(domains)))

    def _spoken(self, split: str) -> list[divergence.Answer]:
        """The safe set's answers, as tokens."""
        experiment = self._experiment
        examples = experiment.safe_informative(split)
        items = experiment.chat.encode_all([(e.messages, e.response) for e in examples])
        cut = [item.cut_to(experiment.config.data.sequence_length) for item in items]
        return [
            divergence.Answer(
                item.tokens[: item.response_start].tolist(),
                item.tokens[item.response_start :].tolist(),
            )
            for item in cut
        ]

    def _system(
        self,
        model: Transformer,
        variables: Mapping[str, Any],
        routing: Routing,
        preamble: tuple[dict[str, str], ...] = (),
    ) -> System:
        experiment, chat = self._experiment, self._experiment.chat
        variables = {"params": experiment.params, **variables}
        longest = max(experiment.config.data.sequence_length, _SHORTEST_SCORED)
        return System(
            sampler=Sampler(model, variables, routing, chat.ends),
            scorer=Scorer(model, variables, routing, chat, longest),
            routed=isinstance(routing, Routed),
            # Where gates were dropped, what they lack to 1 is not its share alone.
            has_null=model.router.activation == "softmax_null" and not model.router.top_k,
            preamble=preamble,
        )


def expert_text(experiment: Experiment, data: ExpertData) -> tuple[list[Example], list[Example]]:
    """What experts of a control learn, and what validates them, by domain.

    - "safe": the safe answers of each domain, informative or not;
    - "permuted": the harmful ones, dealt to domains at random, as many to each as it had;
    - "benign": as many passages that know no harm.
    """
    unsafe = experiment.unsafe("train"), experiment.unsafe("validation")
    if data == "safe":
        return _validated(
            *(
                experiment.corpus.select(label="safe", splits={split})
                for split in ("train", "validation")
            )
        )
    if data == "permuted":
        rng = np.random.default_rng(experiment.config.seed)
        learnt, held_out = (
            [
                dataclasses.replace(example, domain=str(domain))
                for example, domain in zip(
                    part, rng.permutation([example.domain for example in part]), strict=True
                )
            ]
            for part in unsafe
        )
        return learnt, held_out
    splits: tuple[Split, Split] = ("train", "validation")
    learnt, held_out = (
        benign.benign_examples(split, _counts(part, experiment.config.data.domains))
        for split, part in zip(splits, unsafe, strict=True)
    )
    return learnt, held_out


def _counts(examples: Sequence[Example], domains: Sequence[str]) -> dict[str, int]:
    return {domain: sum(e.domain == domain for e in examples) for domain in domains}


def _validated(
    learnt: list[Example], held_out: list[Example]
) -> tuple[list[Example], list[Example]]:
    """Gives a domain that has nothing to validate by one group of its training rows for it."""
    there = {example.domain for example in held_out}
    for domain in dict.fromkeys(example.domain for example in learnt):
        if domain not in there:
            group = next(example.group for example in learnt if example.domain == domain)
            held_out = held_out + [e for e in learnt if e.group == group]
            learnt = [e for e in learnt if e.group != group]
    return learnt, held_out


def _once(
    experiment: Experiment, name: str, made_of: Mapping[str, str], train: Callable[[], Any]
) -> Any:
    """A control's weights on the host, from controls/NAME or else trained.

    Checkpoints go once the weights are there. What is of another base, corpus or bundle is refused.
    """
    path = experiment.workdir.controls / name
    identity = {**experiment.trained_on, **made_of}
    if not path.exists():
        weights = to_host(train())
        if is_first():
            experiment.workdir.controls.mkdir(exist_ok=True, mode=0o700)
            with new_artefact(
                path, CONTROL, {"identity": identity}, {_FILE: to_safetensors(weights)}
            ):
                pass  # there is no other file
        experiment.workdir.publish()
    if is_first():  # also what an earlier run had no time to remove
        checkpoints = experiment.workdir.checkpoints(place(name)).parent
        checkpoints.rmtree(missing_ok=True)
        if checkpoints.parent.exists() and not any(checkpoints.parent.iterdir()):
            checkpoints.parent.rmdir()
    manifest = read_manifest(path, CONTROL)
    found = manifest["identity"]
    for key, value in identity.items():
        if found.get(key) != value:
            raise UserError(
                f"{path} is of {key} {found.get(key)!r}, and this run of {value!r}; delete that "
                "directory, and it is trained again"
            )
    leaves = safetensors.numpy.load(checked_files(path, CONTROL, manifest, [_FILE])[_FILE])
    return unflatten_dict(leaves, sep="/")
