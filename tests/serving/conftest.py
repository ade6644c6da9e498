"""A tiny bundle that was drawn, not trained, and what it says offline."""

import pytest
import tiny
from toys import toy_variables

from safemoe_jax.config import freeze, read_config
from safemoe_jax.loaded import on_devices
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.weights.base import load_base
from safemoe_jax.weights.bundle import read_bundle, write_bundle


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory):
    home = tmp_path_factory.mktemp("serving")
    tiny.write_base(home / "base")
    tiny.write_corpus(home / "corpus.jsonl")
    tiny.write_experiment(home / "tiny.py", home / "base", home / "corpus.jsonl")
    config = freeze(read_config(home / "tiny.py", []))
    base = load_base(config.model.source, config.model.param_dtype)
    drawn = toy_variables(Transformer.from_config(config, base.spec))
    write_bundle(
        home / "bundle",
        base=base,
        config=config,
        experts=drawn["experts"],
        router=drawn["router"],
        provenance={"corpus": "none"},
    )
    return home / "bundle"


@pytest.fixture(scope="session")
def loaded(bundle_path):
    return on_devices(bundle_path, read_bundle(bundle_path, None))
