"""A tiny experiment compiled for a v5e slice by the real TPU compiler; no TPU is needed."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from experiments import pyrit
from safemoe_jax import cli
from safemoe_jax.config import MeshConfig, freeze
from safemoe_jax.errors import UserError
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.planning import plan as planning
from safemoe_jax.planning.counts import Kernel, flops
from safemoe_jax.planning.hlo import Array, Program
from safemoe_jax.planning.search import search
from safemoe_jax.planning.topologies import Topology, get_topology

from .conftest import needs_compiler

pytestmark = needs_compiler
EXPERIMENT = Path(__file__).parents[2] / "experiments" / "llama32_1b.py"
LAYERS = 3
SPEC = ModelSpec(
    vocab_size=512,
    embed_dim=256,
    num_layers=LAYERS,
    num_heads=2,
    num_kv_heads=1,
    head_dim=128,
    mlp_dim=512,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_positions=1024,
)


def tiny_config():
    config = pyrit.get_config()
    config.model.param_dtype = config.model.compute_dtype = "bfloat16"
    config.model.remat = "none"  # what is computed twice is no part of the model's arithmetic
    config.data.domains = ("cats", "dogs")
    config.data.sequence_length = 256
    config.train.experts.rows = 2
    config.train.router.rows = 4
    config.mesh.fsdp = 4
    config.evaluation.batch_size = 4
    config.evaluation.max_new_tokens = 64
    return freeze(config)


@pytest.fixture(scope="module")
def topology():
    return get_topology("v5e:2x2")


@pytest.fixture(scope="module")
def planned(topology):
    """The plan, and what it compiled by function."""
    compiled, original = {}, planning.compile_job

    def recording(job):
        compiled[job.name] = original(job)
        return compiled[job.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "compile_job", recording)
        return planning.plan(tiny_config(), SPEC, topology), compiled


def test_memory_is_the_compilers_part_by_part(planned):
    plan, compiled = planned
    for one in plan.figures:
        memory = compiled[one.name].memory_analysis()
        assert one.needed == (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes
        )
    by_name = {one.name: one.hbm for one in plan.figures}
    base = 2 * plan.parameters["base"] / 4  # bfloat16, on four devices
    assert all(base <= hbm["base"] < 1.1 * base for hbm in by_name.values())
    experts = 4 * plan.parameters["experts"] / 4
    train = by_name["train-experts"]
    assert train["experts"] >= experts
    assert train["best"] == pytest.approx(train["experts"], rel=0.01)
    assert train["optimizer"] == pytest.approx(2 * train["experts"], rel=0.01)
    assert by_name["train-gate"]["experts"] == train["experts"]
    slot = 2 * 2 * LAYERS * 1 * 128  # keys and values of one row a device
    assert by_name["decode"]["cache"] == pytest.approx(slot * (256 + 64), rel=0.1)
    # What is read lies beside the cache of all until it is put there.
    assert by_name["prefill"]["cache"] == pytest.approx(slot * (256 + 64 + 256), rel=0.1)


def test_flops_counted_once_are_xlas_own(planned):
    _, compiled = planned
    for name in ("train-experts", "train-gate", "prefill"):
        parsed = Program.parse(compiled[name].as_text())
        once = flops(parsed, Counter(dict.fromkeys(parsed.computations, 1)))
        # Its count has comparisons and the like, too: half of it in a decode step as small as this.
        assert 0.95 < once / compiled[name].cost_analysis()["flops"] <= 1.0, name


def test_flops_with_trips_are_the_arithmetic_of_the_model(planned, topology):
    plan, _ = planned
    for one in plan.figures:
        assert one.flops == pytest.approx(one.useful_flops, rel=0.3), one.name
        assert 0 < one.mfu(topology) <= 1.0


def test_layers_are_gathered_one_at_a_time_and_counted_each(planned):
    plan, _ = planned
    sent = plan.figures[0].sent
    kernels = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    # Forward and backward, three of four parts come from the other devices.
    assert sent["all-gather"] > 2 * LAYERS * kernels * 3 / 4


@pytest.fixture
def kept_programs(tmp_path):
    """JAX keeps compiled programs here, as with JAX_COMPILATION_CACHE_DIR."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def test_a_second_plan_does_not_warn_of_programs_that_it_cannot_read(topology, kept_programs):
    for _ in range(2):
        jax.clear_caches()
        planning.plan(tiny_config(), SPEC, topology, ("decode",))
    assert any(kept_programs.iterdir())


def test_the_compilers_own_refusal_is_read(topology):
    """Weights of 3 GiB a device fit; 64 rows of them at once without recomputation do not."""
    config = tiny_config()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sequence_length=2048),
        train=dataclasses.replace(
            config.train, experts=dataclasses.replace(config.train.experts, rows=512)
        ),
    )
    deep = dataclasses.replace(SPEC, num_layers=40, max_positions=2048)
    found = planning.plan(config, deep, topology, ("train-experts",))
    (one,) = found.figures
    assert not found.fits
    assert one.needed > sum(one.hbm.values()) + 15 * 2**30


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5),
        ("required for HLO temporaries (48.25G) exceeds available HBM (15.75G).", 1 + 48.25),
        ("INTERNAL: the compiler is broken", None),
    ],
)
def test_both_of_the_compilers_refusals_are_read(message, needed):
    asked = planning._asked(message, held=2.0**30)
    assert asked == (needed and needed * 2**30)


def test_a_mesh_must_use_the_whole_slice(topology):
    small = dataclasses.replace(tiny_config(), mesh=MeshConfig(data=1, fsdp=2, tensor=1, context=1))
    with pytest.raises(UserError, match="has 2 devices and v5e:2x2 4; let its axes multiply to 4"):
        planning.plan(small, SPEC, topology)


@pytest.mark.parametrize(
    ("name", "matmuls"), [("fwd_residuals", 2), ("dq_no_residuals", 3), ("dkv", 4)]
)
def test_flops_of_splash_attention(name, matmuls):
    """Of 4 x 4 blocks of 512 those on and below the diagonal."""
    sizes = [("s8", (1, 4, 4)), ("bf16", (3, 8, 2048, 64)), ("bf16", (3, 2, 2048, 64))]
    arrays = tuple(Array(*size, "") for size in [*sizes, ("f32", (3, 8, 2048, 128))])
    kernel = Kernel(f"splash_mha_{name}.2", arrays, 1)
    assert planning.attention_flops(kernel) == 2 * matmuls * 3 * 8 * 10 * 512 * 512 * 64


def figures(name, seconds, fits=True, rows=1):
    return planning.Figures(name, rows, 1, fits, {}, 0.0, 0.0, seconds={"compute": seconds})


def test_hours_of_steps_and_of_answers():
    """Of 60 prompts, 32 are decoded at once, and read 16 at a time."""
    config = tiny_config()
    evaluation = dataclasses.replace(config.evaluation, prompts_per_domain=30, systems=("base",))
    config = dataclasses.replace(config, evaluation=evaluation)
    parts = (
        figures("train-gate", 3.0),
        figures("prefill", 7.0, rows=16),
        figures("decode", 0.25, rows=32),
    )
    hours = planning.Plan(config, None, {}, parts).hours
    assert hours == {
        "train-gate": pytest.approx(config.train.router.steps * 3.0 / 3600),
        "answers": pytest.approx(2 * (2 * 7.0 + 64 * 0.25) / 3600),
    }


def test_search_goes_by_hours_for_the_same_tokens(monkeypatch, topology):
    """A plan that is twice as fast with tensor 2, slower with remat, and faster still with more
    rows, until they no longer fit. One mesh breaks the compiler."""

    def play(config, spec, topology, names):
        if config.mesh.data == 4:
            raise jax.errors.JaxRuntimeError("INTERNAL: the compiler is broken")
        seconds = {1: 1.0, 2: 0.5}.get(config.mesh.tensor, 3.0)
        seconds *= {"none": 1.0, "dots": 1.2, "full": 1.4}[config.model.remat]
        rows = config.train.experts.rows
        parts = tuple(figures(name, seconds * rows**0.5, fits=rows < 8) for name in names)
        return planning.Plan(config, topology, {}, parts)

    monkeypatch.setattr("safemoe_jax.planning.search.plan", play)
    best, *others = search(tiny_config(), SPEC, topology)
    assert best.changes == {
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
        "train.experts.rows": 4,
        "train.router.rows": 8,
    }
    assert others[-1].hours is None
    (broken,) = (one for one in others if one.plan is None)
    assert broken.changes == {"mesh.data": 4, "mesh.fsdp": 1}
    assert [one.order for one in others] == sorted(one.order for one in others)


@pytest.mark.parametrize("fits", [True, False])
def test_the_command_says_whether_it_fits(fits, tmp_path, monkeypatch, capsys):
    hbm = {"base": 2.0**30, "activations": 3 * 2.0**30}
    one = planning.Figures(
        "decode", 4, 4, fits, hbm, 4 * 2.0**30, 1e9, 2e9, 3e9, {"all-gather": 5e9}, {"compute": 0.5}
    )
    one.seconds.update(hbm=0.25, ici=0.125)
    chip = get_topology("v5e:2x2")
    monkeypatch.setattr(
        planning, "plan", lambda config, spec, _: planning.Plan(config, chip, {"base": 7}, (one,))
    )
    path = tmp_path / "plan.json"
    page = tmp_path / "plan.html"
    code = cli.main(
        [
            *("plan", "--config", str(EXPERIMENT), "--topology", "v5e:2x2"),
            *("--json", str(path), "--picture", str(page)),
        ]
    )
    out, err = capsys.readouterr()
    assert f"decode: fits: {'yes' if fits else 'no'}; 4.00 of 16.00 GiB a device" in out
    values = json.loads(path.read_text())
    assert values["fits"] is fits
    assert values["functions"][0]["hbm"] == hbm
    assert "Llama-3.2-1B" in page.read_text()
    assert code == (0 if fits else 2)
    assert ("decode needs 4.0 GiB of a device's 16.0 on v5e:2x2" in err) is not fits


def test_a_base_too_large_for_its_slice_is_refused_within_seconds(capsys):
    """What launch/tpu_run.sh --plan asks before it rents anything; nothing is compiled."""
    config = EXPERIMENT.with_name("llama31_70b.py")
    slice_ = ["--topology", "v5litepod-8", "--config.mesh.fsdp=8"]
    assert cli.main(["plan", "--config", str(config), *slice_]) == 2
    out, err = capsys.readouterr()
    assert out.count("fits: no") == 4
    said = r"safemoe: train-experts needs \d+\.\d GiB of a device's 16\.0 on v5e:2x4; cut the base"
    assert re.match(said, err)
    assert err.count("\n") == 1


def test_where_nothing_can_be_written_nothing_is_compiled(tmp_path, capsys):
    common = ["plan", "--config", str(EXPERIMENT), "--topology", "v5e:2x4"]
    assert cli.main([*common, "--json", str(tmp_path / "no" / "plan.json")]) == 2
    assert "no is no directory; make it, or give another path" in capsys.readouterr().err
    assert cli.main([*common, "--json", str(tmp_path)]) == 2
    assert f"{tmp_path} is a directory; give the path of a file" in capsys.readouterr().err
    assert cli.main([*common, "--picture", "plan.png"]) == 2
    assert "--picture plan.png is no .html" in capsys.readouterr().err


def test_a_device_of_half_a_chip_has_half_its_peak():
    half = Topology("v4:2x2x1", get_topology("v4:2x2x1").chip, (2, 2, 1), [None] * 8, "")
    one = planning.Figures("", 1, 1, True, {}, 0.0, 275e12, seconds={"compute": 4.0})
    assert one.mfu(half) == 0.5
