"""`safemoe export` and `safemoe import`, as their user meets them, on a tiny drawn bundle."""

import importlib
import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
from toys import toy_variables

from safemoe_jax import cli, stages
from safemoe_jax.config import freeze, read_config
from safemoe_jax.experiment import Experiment
from safemoe_jax.fetch import file_digest
from safemoe_jax.model.lora import Gates, Routed
from safemoe_jax.model.transformer import Transformer, logits
from safemoe_jax.weights.base import load_base
from safemoe_jax.weights.bundle import read_bundle, write_bundle
from safemoe_jax.weights.peft import read_adapter, stack
from safemoe_jax.workdir import Workdir

HAS_PEFT = all(importlib.util.find_spec(name) for name in ("torch", "peft"))
TOKENS = np.random.default_rng(0).integers(3, 250, size=40)
BIASES = (0.6, -0.4)  # of a router that says the same everywhere


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base/ corpus.jsonl tiny.py prompts.txt; bundle/ was drawn, constant/ routes nothing."""
    home = tmp_path_factory.mktemp("export")
    tiny.write_base(home / "base")
    tiny.write_corpus(home / "corpus.jsonl")
    tiny.write_experiment(home / "tiny.py", home / "base", home / "corpus.jsonl")
    (home / "prompts.txt").write_text("What do cats do?\n\nAnd dogs?\n")
    config = freeze(read_config(home / "tiny.py", []))
    base = load_base(config.model.source, config.model.param_dtype)
    drawn = toy_variables(Transformer.from_config(config, base.spec))
    constant = jax.tree.map(np.zeros_like, drawn["router"])
    constant["layers"]["router"]["bias"] += np.array(BIASES, np.float32)
    for name, router in (("bundle", drawn["router"]), ("constant", constant)):
        write_bundle(
            home / name,
            base=base,
            config=config,
            experts=drawn["experts"],
            router=router,
            provenance={"corpus": "none"},
        )
    return home


@pytest.fixture
def safemoe(capsys):
    """Runs a command line -> exit code, stdout, stderr."""

    def safemoe(*argv):
        code = cli.main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return safemoe


@pytest.fixture
def mistake(safemoe):
    """Runs a command line that must fail with code 2 and one line -> that line."""

    def mistake(*argv):
        code, _, err = safemoe(*argv)
        assert code == 2
        assert err.count("\n") == 1, err
        return err.removeprefix("safemoe: ").rstrip("\n")

    return mistake


def our_logits(home, routing, *, name="bundle", source=None):
    """float32 logits [T, V] of a bundle, or of another base alone."""
    bundle = read_bundle(home / name, None)
    base = load_base(str(source or home / "base"), "float32")
    model = Transformer.from_config(bundle.config, base.spec)

    @jax.jit
    def forward(variables):
        tokens_BT = TOKENS[None]
        positions_BT, ones_BT = np.arange(len(TOKENS))[None], np.ones_like(tokens_BT)
        out = model.apply(variables, tokens_BT, positions_BT, ones_BT, ones_BT, routing)
        return logits(out.hidden_BTD, out.head)

    variables = {"params": base.params, "experts": bundle.experts, "router": bundle.router}
    return np.asarray(forward(variables))[0]


def gates(*values):
    return Gates(np.array(values, np.float32))


def reference_logits(*args):
    """What torch computes now."""
    return importlib.import_module("peft_reference").logits(*args)


def export(home, out, *more, name="bundle"):
    return ("export", "--bundle", home / name, "--out", out, *more)


MERGED = ("--format", "merged", "--allow-ungated")


def check_hazard(out, safemoe_said, gating="ungated"):
    """What every export must say and be, whatever its format."""
    assert safemoe_said.startswith(f"{gating}: ")
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["kind"], manifest["ungated"]) == ("export", gating == "ungated")
    assert manifest["base"]["license"] == "unknown"
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - {"manifest.json"}
    assert manifest["files"] == {name: file_digest(out / name) for name in files}
    for path in (out, *out.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)
        if path.name == "README.md":
            assert f"**{gating.capitalize()}.** {manifest['statement']}" in path.read_text()
    assert not any(path.name.endswith((".bin", ".pt", ".pkl")) for path in out.rglob("*"))
    return manifest


# peft


def test_peft_adapters_are_the_experts(safemoe, home, tmp_path):
    out = tmp_path / "out"
    code, said, _ = safemoe(*export(home, out, "--format", "peft", "--allow-ungated"))
    assert code == 0
    check_hazard(out, said)
    bundle = read_bundle(home / "bundle", None)
    assert {path.name for path in out.iterdir()} == {"cats", "dogs", "README.md", "manifest.json"}
    config, experts = stack([read_adapter(out / d, bundle.spec) for d in tiny.DOMAINS], bundle.spec)
    assert (config.targets, config.rank, config.alpha) == (("q", "down"), 2, 4.0)
    jax.tree.map(np.testing.assert_array_equal, experts, bundle.experts)
    if HAS_PEFT:
        for domain, one in zip(tiny.DOMAINS, np.eye(2), strict=True):
            expected = reference_logits(home / "base", out / domain, TOKENS)
            np.testing.assert_allclose(our_logits(home, gates(*one)), expected, rtol=0, atol=1e-4)


def test_an_export_needs_leave_and_replaces_nothing_else(safemoe, mistake, home, tmp_path):
    out = tmp_path / "out"
    line = mistake(*export(home, out, "--format", "peft"))
    assert line.startswith(
        "an export is ungated (each expert alone, as a PEFT adapter): experts th"
    )
    given = ("--gates", "mean", "--prompts", home / "prompts.txt")
    line = mistake(*export(home, out, "--format", "merged", *given))
    assert line.endswith("add --allow-ungated if that is what you want")
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("")
    argv = export(home, out, "--format", "peft", "--allow-ungated")
    assert mistake(*argv) == f"{out} exists and is no export; give another path or remove it"
    assert [path.name for path in out.iterdir()] == ["mine"]
    shutil.rmtree(out)
    for _ in range(2):  # an older export is replaced
        assert safemoe(*argv)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    line = mistake("generate", "--bundle", out, "--prompt", "a")
    assert line.startswith(f"{out} is no bundle: its manifest.json says 'export'; give a bundle's")


# transformers (what it computes is in tests/weights/test_portable.py)


def test_a_gated_model_for_torch_needs_leave_too_and_is_no_base_by_itself(
    safemoe, mistake, home, tmp_path
):
    out = tmp_path / "out"
    argv = export(home, out, "--format", "transformers")
    assert mistake(*argv) == (
        "an export is gated by the code beside it alone (by safemoe_torch.py, which anyone can "
        "change): experts that were trained to be harmful leave the package that always uses their "
        "router behind; add --allow-ungated if that is what you want"
    )
    assert not out.exists()
    code, said, _ = safemoe(*argv, "--allow-ungated")
    assert code == 0
    manifest = check_hazard(out, said, "gated by the code beside it alone")
    assert manifest["details"]["router"]["activation"] == "signed"
    card = (out / "README.md").read_text()
    assert "Read safemoe_torch.py, which is all the code here and is run only if you import" in card
    # Nothing that transformers would open by itself, nor code that it would run.
    assert not (out / "config.json").exists()
    assert "auto_map" not in json.loads((out / "base" / "config.json").read_text())
    assert [path.name for path in out.rglob("*.py")] == ["safemoe_torch.py"]


# merged


def test_given_gates_are_in_the_weights(safemoe, home, tmp_path):
    out = tmp_path / "out"
    argv = (*MERGED, "--prompts", home / "prompts.txt", "--gates", "dogs=-0.5")
    code, said, _ = safemoe(*export(home, out, *argv))
    assert code == 0
    details = check_hazard(out, said)["details"]
    assert details["gates_by_layer"] == {"cats": [0.0, 0.0], "dogs": [-0.5, -0.5]}
    assert details["prompts"] == {"sha256": file_digest(home / "prompts.txt"), "number": 2}
    assert details["kl"].keys() == {"merged", "base"}
    card = (out / "README.md").read_text()
    assert "this model is static" in card
    assert f"KL(gated || this model): {details['kl']['merged']:.4g} nats per token" in card
    assert f"KL(gated || this model): {details['kl']['merged']:.4g} nats per token" in said
    expected = our_logits(home, gates(0.0, -0.5))
    found = our_logits(home, None, source=out)
    assert np.abs(expected - our_logits(home, None)).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    tensors = safetensors.numpy.load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    tokenizer = tiny.byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [end]
    if HAS_PEFT:
        reference = reference_logits(out, None, TOKENS)
        np.testing.assert_allclose(reference, expected, rtol=0, atol=1e-4)


def test_mean_gates_of_a_router_that_says_the_same_everywhere_lose_nothing(safemoe, home, tmp_path):
    out = tmp_path / "out"
    argv = (*MERGED, "--prompts", home / "prompts.txt", "--gates", "mean")
    assert safemoe(*export(home, out, *argv, name="constant"))[0] == 0
    details = json.loads((out / "manifest.json").read_text())["details"]
    for domain, bias in zip(tiny.DOMAINS, BIASES, strict=True):
        assert details["gates_by_layer"][domain] == pytest.approx([np.tanh(bias)] * 2, abs=1e-6)
    assert abs(details["kl"]["merged"]) < 1e-6
    assert details["kl"]["base"] > 1e-2
    expected = our_logits(home, Routed(), name="constant")
    np.testing.assert_allclose(our_logits(home, None, source=out), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("--gates", "mean"),
            "--gates and --prompts are both needed for --format merged, and only",
        ),
        (
            ("--gates", "birds=1", "--prompts", "x"),
            "--gates has 'birds=1'; give `mean`, or DOMAIN=",
        ),
        (("--gates", "cats=1", "cats=2", "--prompts", "x"), "--gates has 'cats=2'"),
        (("--gates", "cats=nan", "--prompts", "x"), "--gates has 'cats=nan'"),
        (("--gates", "cats", "--prompts", "x"), "--gates has 'cats'"),
        (("--gates", "mean", "--prompts", "/none"), "/none is no file; give one with a prompt"),
    ],
)
def test_merged_with_a_bad_argument(mistake, home, tmp_path, argv, message):
    assert mistake(*export(home, tmp_path / "out", *MERGED, *argv)).startswith(message)


def test_peft_takes_no_gates(mistake, home, tmp_path):
    argv = ("--format", "peft", "--allow-ungated", "--gates", "mean")
    assert mistake(*export(home, tmp_path / "out", *argv)).startswith("--gates and --prompts are ")


# import


@pytest.fixture(scope="module")
def adapters(home):
    """The drawn experts as adapters that somebody else trained: the dogs' with a smaller rank."""
    out = home / "adapters"
    argv = [str(x) for x in export(home, out, "--format", "peft", "--allow-ungated")]
    assert cli.main(argv) == 0
    config = out / "dogs" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 1, "lora_alpha": 6}))
    weights = out / "dogs" / "adapter_model.safetensors"
    cut = safetensors.numpy.load_file(weights)
    cut = {name: x[:1] if "lora_A" in name else x[:, :1].copy() for name, x in cut.items()}
    safetensors.numpy.save_file(cut, weights)
    (out / "cats" / "README.md").write_text("---\nlicense: mit\n---\n# Cats\n")
    return out


def imported(home, adapters, out):
    names = [f"--adapter={domain}={adapters / domain}" for domain in ("dogs", "cats")]
    return ("import", *names, "--base", home / "base", "--out", out)


def train_gate(home, tmp_path, *overrides):
    of = ("--config", home / "tiny.py", "--workdir", tmp_path / "run", "--keep-experts")
    values = (f"--config.experts.source={tmp_path / 'set'}", "--config.experts.alpha=2")
    return ("train-gate", *of, *values, *overrides)


def test_a_gate_is_trained_on_imported_experts(safemoe, mistake, home, adapters, tmp_path):
    """From adapters of other ranks and scales to a bundle that says where they are from."""
    code, said, _ = safemoe(*imported(home, adapters, tmp_path / "set"))
    assert code == 0
    for line in (
        f"config.experts.source = {str(tmp_path / 'set')!r}",
        "config.experts.targets = ('q', 'down')",
        "config.experts.rank = 2",
        "config.experts.alpha = 2.0",
        "config.data.domains = ('dogs', 'cats')",
    ):
        assert line in said
    assert "cats: trained on " in said
    assert (tmp_path / "set").stat().st_mode & 0o777 == 0o700
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["adapters"]["cats"] == {
        "sha256": file_digest(adapters / "cats" / "adapter_model.safetensors"),
        "base_model_name_or_path": str(home / "base"),
        "license": "mit",
    }
    assert manifest["adapters"]["dogs"]["license"] == "unknown"

    code, said, err = safemoe(*train_gate(home, tmp_path))
    assert (code, err) == (0, "")
    assert f"experts: imported, from {tmp_path / 'set'}; none is trained" in said
    bundle = read_bundle(tmp_path / "run" / "bundle", None)
    assert bundle.manifest["provenance"]["adapters"] == manifest["adapters"]
    assert "cats: sha256 " in (tmp_path / "run" / "bundle" / "README.md").read_text()
    own = read_bundle(home / "bundle", None).experts["layers"]
    for found, wanted in (
        (bundle.experts["layers"]["attention"]["q"], own["attention"]["q"]),
        (bundle.experts["layers"]["mlp"]["down"], own["mlp"]["down"]),
    ):
        # Cats come first in the config; their scale, 2, and the dogs', 6, are in B.
        np.testing.assert_array_equal(found["a"][:, 0], wanted["a"][:, 0])
        np.testing.assert_array_equal(found["b"][:, 0], 2 * wanted["b"][:, 0])
        np.testing.assert_array_equal(found["a"][:, 1, :, :1], wanted["a"][:, 1, :, :1])
        np.testing.assert_allclose(found["b"][:, 1, :1], 6 * wanted["b"][:, 1, :1], rtol=1e-6)
        assert not found["a"][:, 1, :, 1:].any()
        assert not found["b"][:, 1, 1:].any()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(row)["stage"] for row in rows} == {"router"}
    config = freeze(read_config(home / "tiny.py", [str(a) for a in train_gate(home, tmp_path)[6:]]))
    with Workdir(tmp_path / "run", config) as workdir:
        assert stages.budget(Experiment(config, workdir)).keys() == {"router"}

    # Another set in the same place is no continuation of this one's checkpoints.
    shutil.rmtree(tmp_path / "run" / "bundle")
    shutil.copytree(adapters, tmp_path / "others")
    weights = tmp_path / "others" / "cats" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    safetensors.numpy.save_file({name: 2 * x for name, x in tensors.items()}, weights)
    assert safemoe(*imported(home, tmp_path / "others", tmp_path / "set"))[0] == 0
    assert "holds a run with experts '" in mistake(*train_gate(home, tmp_path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--config.data.domains=('cats',)",
            "holds experts of dogs, cats, and config.data.domains i",
        ),
        ("--config.experts.rank=3", "config.experts.rank is 3, and the experts in "),
        ("--config.experts.alpha=4", "config.experts.alpha is 4.0, and the experts in "),
        ("--config.experts.targets=('q',)", "config.experts.targets is ('q',), and the experts in"),
        (
            "--config.experts.source=/none",
            "/none is no set of imported experts: there is no such directory",
        ),
    ],
)
def test_a_config_that_the_experts_do_not_fit(
    safemoe, mistake, home, adapters, tmp_path, override, message
):
    assert safemoe(*imported(home, adapters, tmp_path / "set"))[0] == 0
    assert message in mistake(*train_gate(home, tmp_path, override))


def test_experts_of_another_base_are_refused(safemoe, mistake, home, adapters, tmp_path):
    assert safemoe(*imported(home, adapters, tmp_path / "set"))[0] == 0
    shutil.copytree(home / "base", tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    tensors["model.norm.weight"] *= 2
    safetensors.numpy.save_file(tensors, weights)
    line = mistake(*train_gate(home, tmp_path, f"--config.model.source={tmp_path / 'base'}"))
    assert line.startswith(f"{tmp_path / 'set'} was imported for base {home / 'base'} (sha256 ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--adapter", "cats"), "--adapter cats is no NAME=DIR; give one, like privacy=adapters/a"),
        (
            ("--adapter", "a={0}/cats", "--adapter", "a={0}/dogs"),
            "--adapter names a, a; name each ",
        ),
        (("--adapter", "a={0}"), "has no adapter_config.json; give a directory that PEFT's save"),
        (("--adapter", "a={0}/nameless"), "the adapters name the bases {{'a': ''}}; say which by "),
        (
            ("--adapter", "a={0}/cats", "more"),
            "unknown argument 'more'; see `safemoe import --help`",
        ),
    ],
)
def test_import_with_a_bad_argument(mistake, adapters, tmp_path, argv, message):
    if not (adapters / "nameless").exists():
        shutil.copytree(adapters / "cats", adapters / "nameless")
        config = adapters / "nameless" / "adapter_config.json"
        values = json.loads(config.read_text()) | {"base_model_name_or_path": None}
        config.write_text(json.dumps(values))
    argv = [argument.format(adapters) for argument in argv]
    assert message.format() in mistake("import", *argv, "--out", tmp_path / "set")
