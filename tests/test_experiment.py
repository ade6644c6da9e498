import dataclasses
import json
import re
import types

import numpy as np
import pytest
import tiny
from flax.core import FrozenDict

from experiments import pyrit
from safemoe_jax import evaluating, run, stages
from safemoe_jax.config import MeshConfig, freeze, read_config
from safemoe_jax.data import splits
from safemoe_jax.errors import UserError
from safemoe_jax.experiment import Experiment, check_layout
from safemoe_jax.model.quantization import PARAM_DTYPES, Blocks
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.workdir import Workdir

SPEC = ModelSpec(
    vocab_size=49_152,
    embed_dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_positions=2048,
)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ((7, 1, 1, 1), "fsdp is 7, .* the rows of a microbatch of train.router, 2; 1, 2"),
        ((1, 2, 1, 1), "is 2, .* the rows of a microbatch of train.experts, 7; 1, 7 would"),
        ((1, 7, 1, 1), "config.mesh.fsdp is 7, .* the base's width, 576; 1, 2, 3, 4, 6, 8,"),
        ((1, 1, 2, 1), "config.mesh.tensor is 2, .* the base's query heads, 9; 1, 3, 9 would"),
        ((1, 1, 9, 1), "config.mesh.tensor is 9, .* the base's vocabulary, 49152;"),
        ((1, 1, 1, 5), "config.mesh.context is 5, .* data.sequence_length, 384;"),
    ],
)
def test_a_mesh_that_does_not_divide_the_experiment_is_refused(mesh, message):
    config = freeze(pyrit.get_config())
    rests = PARAM_DTYPES[config.model.param_dtype]
    check_layout(config, SPEC, rests)
    config = dataclasses.replace(config, mesh=MeshConfig(*mesh))
    with pytest.raises(UserError, match=message):
        check_layout(config, SPEC, rests)


def test_rows_longer_than_the_base_reads_are_refused():
    values = pyrit.get_config()
    values.data.sequence_length = 2049
    config = freeze(values)
    with pytest.raises(UserError, match=r"is 2049, and .* on positions up to 2048; lower it"):
        check_layout(config, SPEC, PARAM_DTYPES[config.model.param_dtype])


def test_a_lora_that_would_end_in_its_warm_up_is_refused():
    values = pyrit.get_config()
    values.optimizer.experts.warmup_steps = 40
    values.train.router.steps = 41
    values.evaluation.systems = ("base", "safe_lora")
    chat = types.SimpleNamespace(prompt_ids=lambda turns: None)
    evaluating.check_systems(types.SimpleNamespace(config=freeze(values), chat=chat))
    values.train.router.steps = 40
    with pytest.raises(
        UserError, match=r"names 'safe_lora', .* train.router.steps, 40, and .* is 40;"
    ):
        evaluating.check_systems(types.SimpleNamespace(config=freeze(values), chat=chat))


@pytest.mark.parametrize(
    "rests, message",
    [
        ("nf4", r"fsdp is 2, .* in blocks of 64, 9; 1, 3, 9 would"),
        (
            FrozenDict({"layers/mlp/down/kernel": Blocks(4, 32, np.dtype(np.float16), True)}),
            r"fsdp is 4, .* in blocks of 32, 18; 1, 2, 3, 6, 9, 18 would",
        ),
    ],
)
def test_a_mesh_that_cuts_blocks_is_refused(rests, message):
    config = freeze(pyrit.get_config())
    check_layout(config, SPEC, rests)
    fsdp = int(re.search(r"fsdp is (\d)", message)[1])
    config = dataclasses.replace(config, mesh=MeshConfig(1, fsdp, 1, 1))
    with pytest.raises(UserError, match=message):
        check_layout(config, SPEC, rests)


def test_a_row_that_the_template_refuses_stops_no_run(tmp_path, capsys):
    tiny.write_base(tmp_path / "base")
    template = tmp_path / "base" / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    corpus = tmp_path / "corpus.jsonl"
    tiny.write_corpus(corpus)
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    system, user = {"role": "system", "content": "Hiss."}, {"role": "user", "content": "Why?"}
    rows.append({**rows[0], "messages": [system, user]})
    del rows[-1]["prompt"]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.write_experiment(tmp_path / "tiny.py", tmp_path / "base", corpus)
    config = freeze(read_config(tmp_path / "tiny.py", []))
    with Workdir(tmp_path / "run", config) as workdir:
        run.data(Experiment(config, workdir))
    said = capsys.readouterr().out
    assert f"{len(rows)} rows read, {len(rows) - 1} kept; dropped: " in said
    assert "{'rejected: the chat template refuses its turns': 1}" in said


def test_a_torn_line_of_metrics_costs_that_line_alone(tmp_path, monkeypatch):
    metrics = tmp_path / "metrics.jsonl"
    row = {"stage": "router", "split": "train", "loss_tokens": 30.0}
    metrics.write_text(json.dumps(row) + "\n" + json.dumps(row)[:-9])
    packed = types.SimpleNamespace(tokens=types.SimpleNamespace(loss=20))
    monkeypatch.setattr(stages, "safe_text", lambda experiment: (packed, packed))
    experiment = types.SimpleNamespace(
        config=types.SimpleNamespace(experts=types.SimpleNamespace(source="set")),
        workdir=types.SimpleNamespace(metrics=metrics),
    )
    assert stages.budget(experiment) == {
        "router": "30 answer tokens seen of 20 there (1.5 epochs)",
    }


def corpus_without(path, missing):
    """Writes the tiny corpus but for rows of {(label, split)}."""
    tiny.write_corpus(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    split = dict(zip(prompts, splits.split_of(prompts, np.arange(len(prompts))), strict=True))
    kept = [row for row in rows if (row["label"], split[row["prompt"]]) not in missing]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


def test_data_packs_what_is_trained_on_and_says_what_is_not_there(tmp_path, capsys):
    tiny.write_base(tmp_path / "base")
    corpus_without(tmp_path / "corpus.jsonl", {("safe", "test"), ("unsafe", "validation")})
    tiny.write_experiment(tmp_path / "tiny.py", tmp_path / "base", tmp_path / "corpus.jsonl")
    config = freeze(read_config(tmp_path / "tiny.py", []))
    with Workdir(tmp_path / "run", config) as workdir:
        experiment = Experiment(config, workdir)
        run.data(experiment)
        said = re.findall(r"^\w+, .*?(?:none|examples)", capsys.readouterr().out, re.MULTILINE)
        sets = {
            (split, name): len(of(split))
            for split in ("train", "validation", "test")
            for name, of in (
                ("unsafe", experiment.unsafe),
                ("safe, informative", experiment.safe_informative),
            )
        }
        assert said == [
            f"{split}, {name}: " + (f"{count} examples" if count else "none")
            for (split, name), count in sets.items()
        ]
        assert [key for key, count in sets.items() if not count] == [
            ("validation", "unsafe"),
            ("test", "safe, informative"),
        ]
        assert len(list(workdir.data.glob("packed/packed-*"))) == 3
        few = rf"too few unsafe answers: {sets['train', 'unsafe']} for train, 0 for validation;"
        with pytest.raises(UserError, match=few):
            stages.train_experts(experiment)
