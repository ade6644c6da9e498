"""A bundle comes back as it was written, and not at all once anything in it was changed."""

import dataclasses
import json
import os
import re
import shutil
import stat
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

from safemoe_jax.config import freeze
from safemoe_jax.errors import UserError
from safemoe_jax.loaded import on_devices
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.private_files import clear_unfinished
from safemoe_jax.weights import artefact
from safemoe_jax.weights.artefact import manifest_digest
from safemoe_jax.weights.base import BaseIdentity, load_base
from safemoe_jax.weights.bundle import non_commercial, read_bundle, write_bundle
from safemoe_jax.weights.huggingface import read_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"


def config(**router):
    adamw = dict(
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=1,
        weight_decay=0.0,
        clip_norm=1.0,
        b1=0.9,
        b2=0.99,
    )
    train = dict(steps=1, rows=1, accumulation=1, validate_every=1, save_every=1, keep=1)
    return freeze(
        dict(
            seed=0,
            model=dict(
                source=str(GOLDEN / "gqa_tied"),
                param_dtype="float32",
                compute_dtype="float32",
                remat="none",
                attention="auto",
            ),
            data=dict(
                corpus="pyrit",
                path="",
                domains=("violence", "privacy", "exploits"),
                sequence_length=16,
                unsafe_min_score=0.5,
                safe_max_score=0.25,
                informative_min_characters=200,
            ),
            experts=dict(source="", targets=("q", "down"), rank=2, alpha=4.0),
            router=dict(
                scope="layer",
                granularity="token",
                activation="signed",
                top_k=0,
                temperature=1.0,
            )
            | router,
            optimizer=dict(experts=adamw, router=adamw),
            train=dict(experts=train, router=train),
            mesh=dict(data=1, fsdp=1, tensor=1, context=1),
            evaluation=dict(
                systems=("base", "safemoe"),
                split="test",
                prompts_per_domain=1,
                left_out=(),
                attacks=(),
                utility=False,
                benchmarks=(),
                prompts_per_benchmark=0,
                max_new_tokens=1,
                temperature=0.0,
                top_p=1.0,
                batch_size=1,
                judges=(),
                judge_rows=1,
                demonstration=True,
            ),
        ),
        trained=True,  # as the golden bundle says, with a warm-up of all its steps
    )


@pytest.fixture(scope="module")
def base():
    return load_base(str(GOLDEN / "gqa_tied"), "float32")


def trees(base, settings):
    """Random experts and router of the model's own shapes."""
    model = Transformer.from_config(settings, base.spec)
    shapes = nn.unbox(jax.eval_shape(lambda: model.initial(jax.random.key(0))))
    rng = np.random.default_rng(0)
    return {
        name: jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes[name])
        for name in ("experts", "router")
    }


@pytest.fixture
def bundle(tmp_path, base):
    directory = tmp_path / "bundle"
    settings = config()
    write_bundle(
        directory,
        base=base,
        config=settings,
        provenance={"commit": "abc123"},
        **trees(base, settings),
    )
    return directory


@pytest.mark.parametrize("router", [{}, {"scope": "shared", "activation": "softmax_null"}])
def test_comes_back_as_it_was_written(tmp_path, base, router):
    settings = config(**router)
    written = trees(base, settings)
    write_bundle(
        tmp_path / "b", base=base, config=settings, provenance={"commit": "abc"}, **written
    )
    found = read_bundle(tmp_path / "b", base)
    assert found.config == settings
    assert found.spec == base.spec
    assert found.base == base.identity
    assert found.manifest["provenance"] == {"commit": "abc"}
    assert found.manifest["data_licenses"] == {"pyrit": "MIT"}
    for name in ("experts", "router"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found, name), written[name])


def test_a_bundle_of_other_devices_answers_on_these(tmp_path, base):
    settings = config()
    leaves = trees(base, settings)
    for kernel, home in (("splash", "TPUs"), ("cudnn", "NVIDIA's GPUs")):
        model = dataclasses.replace(settings.model, attention=kernel, compute_dtype="bfloat16")
        settings = dataclasses.replace(settings, model=model)
        message = f"is '{kernel}', which runs on {home}, and this is 'cpu'; set 'auto'"
        with pytest.raises(UserError, match=message):
            Transformer.from_config(settings, base.spec)
    directory = tmp_path / "bundle"
    write_bundle(directory, base=base, config=settings, provenance={}, **leaves)
    assert on_devices(directory, read_bundle(directory, None)).model.kernel == "reference"


def test_is_its_owners_alone_and_leaves_nothing_beside_it(bundle):
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in bundle.iterdir()} == {0o600}
    assert list(bundle.parent.iterdir()) == [bundle]
    assert not list(bundle.glob("*.bin")) + list(bundle.glob("*.pkl"))


def test_brings_tokenizer_and_model_card(bundle, base):
    assert read_tokenizer(bundle)("w3 w5")["input_ids"] == [3, 5]
    card = (bundle / "README.md").read_text()
    assert "violence, privacy, exploits" in card
    assert "trained to be harmful" in card
    assert "- pyrit: MIT\n" in card
    assert "- commit: abc123" in card
    assert base.identity.sha256 in card


def test_replaces_an_older_bundle_but_nothing_else(bundle, base, tmp_path):
    settings = config()
    new = dict(base=base, config=settings, provenance={"commit": "new"}, **trees(base, settings))
    write_bundle(bundle, **new)
    assert read_bundle(bundle, None).manifest["provenance"] == {"commit": "new"}
    assert list(tmp_path.iterdir()) == [bundle]
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="is no bundle"):
        write_bundle(tmp_path / "other", **new)


def test_failed_write_leaves_the_old_one(bundle, base, tmp_path):
    broken = trees(base, config())
    del broken["experts"]["layers"]["mlp"]
    with pytest.raises(UserError, match="experts/layers/mlp/down/a is nothing, the config gives f"):
        write_bundle(bundle, base=base, config=config(), provenance={}, **broken)
    assert read_bundle(bundle, None).manifest["provenance"] == {"commit": "abc123"}
    assert list(tmp_path.iterdir()) == [bundle]


@pytest.mark.parametrize("killed", [False, True])
def test_what_ends_between_two_renames_keeps_the_old_one(bundle, base, monkeypatch, killed):
    rename, calls = os.rename, []

    def ending(source, target):
        calls.append(source)
        if len(calls) == 2 or (killed and len(calls) > 2):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", ending)
    if killed:  # nothing is tidied up
        monkeypatch.setattr(artefact.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(bundle, base=base, config=config(), provenance={}, **trees(base, config()))
    monkeypatch.undo()
    assert calls[0] == bundle and bundle.exists() != killed
    clear_unfinished(bundle.parent)
    assert read_bundle(bundle, None).manifest["provenance"] == {"commit": "abc123"}
    assert list(bundle.parent.iterdir()) == [bundle]


def append(path):
    path.write_bytes(path.read_bytes() + b" ")


def link(path):
    os.rename(path, path.parent.parent / "target")
    path.symlink_to(path.parent.parent / "target")


def edit(path, change):
    """On purpose: as somebody who knows how the manifest's own sha256 is made."""
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["sha256"] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: append(b / "experts.safetensors"), r"experts\.safetensors was changed"),
        (lambda b: append(b / "tokenizer.json"), r"tokenizer\.json was changed"),
        (lambda b: (b / "router.safetensors").unlink(), "lacks 'router.safetensors'"),
        (lambda b: (b / "x.json").write_text("{}"), "holds 'x.json', which its manifest does not"),
        (lambda b: link(b / "router.safetensors"), r"router\.safetensors is not a plain file"),
        (lambda b: link(b / "manifest.json"), "is no bundle"),
        (
            lambda b: edit(b / "manifest.json", lambda m: m["files"].update({"../x": "0"})),
            r"lacks '\.\./x'",
        ),
        (
            lambda b: edit(b / "manifest.json", lambda m: m["files"].pop("router.safetensors")),
            "holds 'router.safetensors', which",
        ),
        (
            lambda b: edit(b / "manifest.json", lambda m: m.update(schema_version=99)),
            "schema version 99, this package reads 4, 5",
        ),
        (lambda b: edit(b / "manifest.json", lambda m: m["spec"].pop("vocab_size")), "is damaged"),
        (lambda b: edit(b / "manifest.json", lambda m: m.pop("files")), "lacks 'files'"),
        (lambda b: (b / "manifest.json").write_text("{"), "is not JSON"),
        (
            lambda b: edit(b / "manifest.json", lambda m: m["config"]["experts"].update(rank=1)),
            r"attention/q/a is float32\[2, 3, 16, 2\], the config gives float32\[2, 3, 16, 1\]",
        ),
    ],
)
def test_damage_is_refused(bundle, damage, message):
    damage(bundle)
    with pytest.raises(UserError, match=message):
        read_bundle(bundle, None)


def test_a_bundle_of_the_schema_before_is_read(base):
    """golden/bundle_v4 was written by commit 4105ae3, from `trees` of this file."""
    found = read_bundle(GOLDEN / "bundle_v4", base)
    settings = dataclasses.replace(config().model, source="gqa_tied")
    assert found.config == dataclasses.replace(config(), model=settings)
    assert (found.spec, found.manifest["schema_version"]) == (base.spec, 4)
    assert found.manifest["encryption"] is None
    for name, tree in trees(base, config()).items():
        jax.tree.map(np.testing.assert_array_equal, getattr(found, name), tree)


def test_damage_to_a_bundle_of_the_schema_before_is_refused(tmp_path):
    old = shutil.copytree(GOLDEN / "bundle_v4", tmp_path / "old")
    append(old / "README.md")  # its manifest lists the card, too
    with pytest.raises(UserError, match=r"README\.md was changed since"):
        read_bundle(old, None)


def test_another_base_is_refused(bundle, base):
    other = dataclasses.replace(base, identity=BaseIdentity("other", "0" * 64, "mit"))
    with pytest.raises(UserError, match=r"belongs to base .* not to other \(sha256 000000000000\)"):
        read_bundle(bundle, other)


def test_the_same_weights_under_another_config_are_refused(bundle, base):
    spec = dataclasses.replace(base.spec, rope_theta=7.0)
    message = (
        f"the config of base {base.identity.source} was changed since bundle {bundle} was made: it "
        f"has rope_theta 7.0, the bundle {base.spec.rope_theta}; bring back the one"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        read_bundle(bundle, dataclasses.replace(base, spec=spec))


def test_licences_for_research_alone_forbid_commercial_use():
    manifest = {"data_licenses": {}, "provenance": {}}
    for licence, forbidden in (("qwen-research", True), ("mrl", True), ("apache-2.0", False)):
        found = non_commercial(manifest | {"base": {"license": licence}})
        assert found == ({"the base": licence} if forbidden else {})
