"""Every system of the table on a tiny base: what is trained for it, once, and on what."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from toys import leaves_equal

from safemoe_jax import cli, controls, evaluating, stages
from safemoe_jax.config import freeze, read_config
from safemoe_jax.controls import Controls, expert_text
from safemoe_jax.errors import UserError
from safemoe_jax.evaluation import benchmarks
from safemoe_jax.evaluation.prompt_sets import Problem
from safemoe_jax.evaluation.systems import (
    ATTACKED_SYSTEMS,
    LEFT_OUT_SYSTEMS,
    SYSTEMS,
    is_ungated,
)
from safemoe_jax.evaluation.verdicts import Verdict
from safemoe_jax.experiment import Experiment, init_shapes
from safemoe_jax.inference.sampler import Generation
from safemoe_jax.inference.scoring import Scorer
from safemoe_jax.model.lora import Routed
from safemoe_jax.training.state import init_expert_state, init_router_state
from safemoe_jax.weights.artefact import new_artefact, read_manifest
from safemoe_jax.workdir import Workdir

OPTIONS = ["--config.evaluation.left_out=('cats',)", "--config.evaluation.utility=True"]
OPTIONS += ["--config.evaluation.attacks=('prefix', 'two_shot')"]
OPTIONS += ["--config.router.top_k=2"]  # of a LoRA, or with a domain left out, there is one alone
TRAINED = {
    "experts", "router", "experts_safe", "experts_benign", "experts_permuted", "router_safe",
    "router_benign", "router_permuted", "router_random", "router_harmful",
    "router_without_cats", "safe_lora", "safe_lora_wide", "refusal_lora", "refusal_lora_wide",
    "safe_lora_without_cats",
}  # fmt: skip
OPTIONS += [f"--config.train.{stage}.accumulation=2" for stage in ("experts", "router")]
VALIDATED_TOGETHER = set()


class StubJudge:
    name, reliability = "stub", {"harm": {"AUC": 0.5}}

    def judge(self, pairs):
        return [Verdict(True, False, True, False, 0.1)] * len(pairs)

    def measure(self, held_out):
        pass


class Fake:
    """Sampler and scorer that compute nothing, and keep what they were made of."""

    def __init__(self, model, variables, routing, *rest):
        self.model, self.variables, self.routing = model, variables, routing

    def generate(self, prompts, **settings):
        shape = (1, self.model.spec.num_layers, self.model.num_experts)
        gates = np.full(shape, 0.1) if isinstance(self.routing, Routed) else None
        return [Generation([65], True, gates)] * len(prompts)

    def __call__(self, pairs, *, description):
        return [np.full(len(answer) + 1, -1.0, np.float32) for _, answer in pairs]


class Trainer:
    """Stands for `training.loop.train`: moves every weight a little, and notes what was asked."""

    def __init__(self):
        self.stages = {}

    def __call__(self, stage, state, config, mesh, checkpoints, observer, publish):
        assert stage.name not in self.stages, "trained twice"
        (metrics,) = observer._open_writers(0)
        metrics._path.touch()
        ids = next(stage.batches)["example_ids_BS"]
        self.stages[stage.name] = observer, set(ids[ids >= 0].tolist())
        seed = len(self.stages)
        key = iter(jax.random.split(jax.random.key(seed), 100))
        moved = jax.tree.map(
            lambda leaf: leaf + 0.1 * jax.random.normal(next(key), leaf.shape), state.trainable
        )
        return state.replace(best=state.best.replace(trainable=moved))


TRAINER = Trainer()


def noting_rows(validation):
    def noting(model, frozen, held_out, batch_size, mesh):
        VALIDATED_TOGETHER.add(batch_size)
        return validation(model, frozen, held_out, batch_size, mesh)

    return noting


def empty_state(experiment, model, collection, tx):
    """Stands for `Experiment.initial_state`, which compiles."""
    begin = {"experts": init_expert_state, "router": init_router_state}[collection]
    shapes = init_shapes(model)[collection]
    return begin(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), tx)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run that has evaluated all systems, the bundle included, in home/run."""
    home = tmp_path_factory.mktemp("controls")
    tiny.write_base(home / "base")
    tiny.write_corpus(home / "corpus.jsonl")
    tiny.write_experiment(home / "tiny.py", home / "base", home / "corpus.jsonl")
    rows = [json.loads(line) for line in (home / "corpus.jsonl").read_text().splitlines()]
    refused = [
        {**row, "response": f"I'm sorry, but I can't talk about {row['prompt']}."}
        for row in rows
        if row["label"] == "safe"
    ]
    (home / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows + refused))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEMOE_CACHE", str(home / "cache"))
        patch.setattr(stages, "train", TRAINER)
        patch.setattr(Experiment, "initial_state", empty_state)
        patch.setattr(stages, "jitted_step", lambda *_: None)
        for name in ("expert_validation", "gate_validation"):
            patch.setattr(stages, name, noting_rows(getattr(stages, name)))
        patch.setattr(controls, "Sampler", Fake)
        patch.setattr(controls, "Scorer", Fake)
        patch.setattr(evaluating, "load_judge_rows", lambda *_: [])
        patch.setattr(evaluating.EmbeddedJudge, "fit", lambda rows, scorer, **settings: StubJudge())
        patch.setattr(benchmarks, "gsm8k", lambda: [Problem("One and one?", 2)])
        patch.setattr(benchmarks, "harmless_answers", lambda: [("How are you?", "Well.")])
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert evaluate(home, tuple(SYSTEMS)) == 0
        (home / "said").write_text(said.getvalue())
        yield home


def evaluate(home, systems, *options):
    workdir = ["--config", str(home / "tiny.py"), "--workdir", str(home / "run")]
    return cli.main(
        ["evaluate", *workdir, f"--config.evaluation.systems={systems}", *OPTIONS, *options]
    )


def results(home):
    return json.loads((home / "run" / "evaluation" / "results.json").read_text())


@pytest.fixture(scope="module")
def experiment(home):
    config = freeze(read_config(home / "tiny.py", OPTIONS))
    with Workdir(home / "run", config) as workdir:
        yield Experiment(config, workdir)


def test_every_system_is_there_with_a_row_for_each_answer(home):
    found = results(home)
    assert list(found["systems"]) == list(SYSTEMS)
    asked = {}
    for row in found["outcomes"]:
        asked.setdefault((row["system"], row["fold"]), set()).add(row["benchmark"])
    for name in SYSTEMS:
        attacks = {"attack_prefix", "attack_two_shot"} if name in ATTACKED_SYSTEMS else set()
        assert asked.pop((name, "")) == {"held_out", "gsm8k"} | attacks
    assert asked == {(name, "cats"): {"left_out"} for name in LEFT_OUT_SYSTEMS}
    kinds = {(row["benchmark"], row["kind"]) for row in found["likelihoods"]}
    assert {("held_out", "safe"), ("held_out", "harmful"), ("benign", "benign")} <= kinds
    assert ("attack_prefix", "harmful") in kinds
    assert {row["system"] for row in found["likelihoods"]} == set(SYSTEMS)
    assert {row["domain"] for row in found["experts"]} == set(tiny.DOMAINS)
    routed = {row["system"] for row in found["router"]}
    assert routed == {name for name, recipe in SYSTEMS.items() if "router" in recipe.title} | {
        "safemoe", "harmful_gates",
    }  # fmt: skip
    (fold,) = (r for r in found["router"] if r["fold"] == "cats" and r["system"] == "safemoe")
    assert (fold["experts"], np.shape(fold["mass_LE"])) == (["dogs"], (2, 1))
    parameters = {name: row["trained_parameters"] for name, row in found["systems"].items()}
    assert parameters["base"] == parameters["uniform"] == 0
    assert parameters["safe_lora_wide"] == 4 * parameters["safe_lora"]  # E * R against 1


def test_what_is_ungated_is_announced_and_recorded(home):
    found = results(home)
    ungated = [name for name in SYSTEMS if is_ungated(name)]
    assert {name for name, row in found["systems"].items() if row["ungated"]} == set(ungated)
    announced = f"ungated: {', '.join(ungated)}; answers are in {home / 'run' / 'evaluation'}\n"
    assert announced in (home / "said").read_text()
    card = (home / "run" / "bundle" / "README.md").read_text()
    for name in ("base", "safemoe", *ungated):
        title = found["systems"][name]["title"]
        (line,) = re.findall(rf"^\| held_out \| {re.escape(title)}( \(ungated\))? \|", card, re.M)
        assert (" (ungated)" in title + line) == is_ungated(name)
    for attack in ("attack_prefix", "attack_two_shot", "leaked bundle, gates trained for harm"):
        assert re.search(rf"^\| {attack} \| 0.0 % .*\| 0.0 % .*\| \+0.0 \|$", card, re.M)


def test_results_hold_no_text(home):
    text = (home / "run" / "evaluation" / "results.json").read_text()
    for row in (json.loads(line) for line in (home / "corpus.jsonl").read_text().splitlines()):
        assert row["prompt"] not in text


def test_the_contract_is_what_is_written(home):
    """docs/results.md names the fields of every row."""
    text = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    fields = {}
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        columns = re.findall(r"^\|([^|]*)\|", part, flags=re.MULTILINE)
        fields[part.split("\n")[0]] = set(re.findall(r"`(\w+)`", " ".join(columns)))
    whose = fields["Whose row"]
    found = results(home)
    assert found.keys() == fields["results.json"]
    for kind in ("outcomes", "likelihoods"):
        for row in found[kind]:
            assert row.keys() == whose | fields[kind]
    for row in found["router"]:
        assert row.keys() == {"system", "seed", "fold"} | fields["router"]


def test_each_part_is_trained_once_and_kept_as_weights_alone(home, capsys):
    assert TRAINER.stages.keys() == TRAINED
    left = {path.name for path in (home / "run" / "controls").iterdir()}
    assert left == TRAINED - {"experts", "router"}
    for path in (home / "run" / "controls").iterdir():
        assert path.stat().st_mode & 0o777 == 0o700
        files = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
        assert files == {"manifest.json": 0o600, "weights.safetensors": 0o600}
    assert not [p for p in (home / "run").rglob("checkpoints") if any(p.iterdir())]

    # Another choice of systems: nothing is trained, made or answered again.
    before = results(home)["outcomes"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Controls, "_mixture", None)
        assert evaluate(home, ("base", "safe_experts")) == 0
    assert results(home)["outcomes"] == [
        row for row in before if row["system"] in ("base", "safe_experts")
    ]
    assert results(home)["test_evaluations"]["counts"]["held_out"] == 2
    assert evaluate(home, ("base",), "--config.evaluation.split=validation") == 0
    assert "held_out" not in results(home)["test_evaluations"].get("counts", {})
    assert {row["benchmark"] for row in results(home)["outcomes"]} >= {"held_out", "left_out"}
    assert evaluate(home, ("base", "best")) == 2
    assert "names 'best'; choose of base" in capsys.readouterr().err


def test_what_each_part_is_trained_on(home, experiment):
    by_id = {example.id: example for example in experiment.corpus.examples}

    def learnt(name):
        observer, ids = TRAINER.stages[name]
        return observer, [by_id[number] for number in ids]

    for name in ("router_without_cats", "safe_lora_without_cats"):
        observer, examples = learnt(name)
        assert {(e.domain, e.label, e.informative) for e in examples} == {("dogs", "safe", True)}
    assert observer._streams == ("all",)
    assert TRAINER.stages["router_without_cats"][0]._domains == ["dogs"]
    for name in ("refusal_lora", "refusal_lora_wide"):
        _, examples = learnt(name)
        assert all("can't talk" in e.response and e.label == "safe" for e in examples)
    _, examples = learnt("router_harmful")
    assert {e.label for e in examples} == {"unsafe"}
    observer, examples = learnt("experts_safe")
    assert {e.label for e in examples} == {"safe"} and observer._streams == tiny.DOMAINS
    assert not {e.split for e in examples} - {"train"}


def test_a_validation_has_no_more_rows_together_than_a_microbatch(home):
    assert {1} == VALIDATED_TOGETHER  # of the two of each step


def test_the_texts_of_thesis_controls(experiment):
    own = experiment.unsafe("train")
    permuted, _ = expert_text(experiment, "permuted")
    assert [e.response for e in permuted] == [e.response for e in own]
    counts = [[e.domain for e in part].count("cats") for part in (permuted, own)]
    assert counts[0] == counts[1]
    moved = sum(a.domain != b.domain for a, b in zip(permuted, own, strict=True))
    assert 0.2 < moved / len(own) < 0.8
    benign, _ = expert_text(experiment, "benign")
    assert [[e.domain for e in benign].count(d) for d in tiny.DOMAINS] == [
        [e.domain for e in own].count(d) for d in tiny.DOMAINS
    ]
    safe, held_out = expert_text(experiment, "safe")
    assert {e.label for e in safe + held_out} == {"safe"}


def test_a_domain_without_validation_text_gives_one_group_of_its_own():
    class Row:
        def __init__(self, domain, group):
            self.domain, self.group = domain, group

    learnt = [Row("a", 1), Row("b", 2), Row("b", 2), Row("b", 3)]
    there = [Row("a", 4)]
    learnt, held_out = controls._validated(learnt, there)
    assert [(row.domain, row.group) for row in learnt] == [("a", 1), ("b", 3)]
    assert [(row.domain, row.group) for row in held_out] == [("a", 4), ("b", 2), ("b", 2)]


def test_left_out_experts_are_the_bundles_own(home, experiment):
    made = Controls(experiment)
    with jax.set_mesh(experiment.mesh):
        whole, fold = made.system("safemoe").sampler, made.system("safemoe", "cats").sampler
    assert (whole.model.num_experts, fold.model.num_experts) == (2, 1)
    dogs = jax.tree.map(lambda leaf: leaf[:, 1:], whole.variables["experts"])
    assert leaves_equal(fold.variables["experts"], dogs)


def test_a_null_share_is_told_where_no_gate_is_dropped(experiment):
    made = Controls(experiment)
    for top_k, told in ((0, True), (1, False)):
        form = dataclasses.replace(experiment.config.router, activation="softmax_null", top_k=top_k)
        assert made._system(experiment.model.clone(router=form), {}, Routed()).has_null == told


def test_what_weights_are_of_is_checked(home, experiment):
    path = home / "run" / "controls" / "safe_lora"
    kept = shutil.copytree(path, home / "kept")
    try:
        identity = read_manifest(kept, controls.CONTROL)["identity"]
        for key, other in (("base", "x"), ("spec", "of another config.json")):
            with new_artefact(path, controls.CONTROL, {"identity": {**identity, key: other}}):
                pass
            with pytest.raises(UserError, match=rf"safe_lora is of {key} .*delete that directory"):
                Controls(experiment).system("safe_lora")
    finally:
        shutil.rmtree(path)
        kept.rename(path)


def test_the_systems_differ_as_they_should(home, experiment, monkeypatch):
    """By likelihoods of one answer, computed: empty experts are the base, the others are not."""
    monkeypatch.setattr(controls, "Scorer", Scorer)
    made = Controls(experiment)
    pairs = [([{"role": "user", "content": "How are cats?"}], "They like to sleep.")]
    names = ("base", "null_experts", "uniform", "negated", "safemoe", "shuffled_router")
    with jax.set_mesh(experiment.mesh):
        score = {name: made.system(name).scorer(pairs)[0] for name in names}
    np.testing.assert_array_equal(score["null_experts"], score["base"])
    rest = [score[name] for name in names if name != "null_experts"]
    for i, one in enumerate(rest):
        assert all(np.abs(one - other).max() > 1e-4 for other in rest[:i])
