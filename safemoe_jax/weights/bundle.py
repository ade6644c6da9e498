"""A bundle: experts and router in one checked directory, the base named by its hash.

    manifest.json  experts.safetensors  router.safetensors  tokenizer files  README.md (model card)

Nothing is pickled. Experts were trained to be harmful, so the directory is its owner's alone.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors import SafetensorError

from safemoe_jax.config import Config, freeze, to_dict
from safemoe_jax.errors import UserError
from safemoe_jax.model.lora import Routed
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.weights.base import BaseIdentity, BaseModel

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
COLLECTIONS = ("experts", "router")

# Of the corpora that experts and router are trained on.
DATA_LICENSES = {
    "pyrit": "MIT",
    "jsonl": "the user's own data; its owner knows",
    "beavertails": "CC-BY-NC-4.0: no commercial use",
}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What `read_bundle` has checked.

    Attributes:
      manifest: manifest.json as it stands.
      config: the experiment; domains in order, experts and router settings are in it.
      spec: the shape of the base.
      base: which base it belongs to.
      experts: nested dict of float32 numpy arrays, the model's collection `experts`.
      router: the same of the collection `router`.
    """

    manifest: dict[str, Any]
    config: Config
    spec: ModelSpec
    base: BaseIdentity
    experts: dict[str, Any]
    router: dict[str, Any]


def write_bundle(
    directory: Path,
    *,
    base: BaseModel,
    config: Config,
    experts: dict[str, Any],
    router: dict[str, Any],
    provenance: dict[str, Any],
) -> None:
    """Writes a bundle whole or not at all; an older bundle in its place is replaced.

    Args:
      directory: where; its parent is created.
      base: the base that experts and router were trained on.
      config: the experiment.
      experts: collection `experts`, numpy or jax leaves.
      router: collection `router`.
      provenance: what made it, JSON values by name; also shown in the model card.

    Raises:
      UserError: where `directory` is something else than a bundle.
    """
    if directory.exists() and not (directory / MANIFEST).is_file():
        raise UserError(f"{directory} exists and is no bundle; give another path or remove it")
    trees = {"experts": experts, "router": router}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "base": dataclasses.asdict(base.identity),
        "spec": dataclasses.asdict(base.spec),
        "config": to_dict(config),
        "data_licenses": {config.data.corpus: DATA_LICENSES[config.data.corpus]},
        "provenance": provenance,
    }

    directory.parent.mkdir(parents=True, exist_ok=True)
    # mkdtemp gives mode 0700, and beside its destination the last step is a rename.
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        for name, expected in _expected(config, base.spec).items():
            tree = flatten_dict(trees[name], sep="/")
            leaves = {path: np.asarray(leaf) for path, leaf in tree.items()}
            _check_tree(name, leaves, expected)
            safetensors.numpy.save_file(leaves, scratch / f"{name}.safetensors")
        base.tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(_model_card(manifest), encoding="utf-8")
        manifest["files"] = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(scratch.iterdir())
        }
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for file in scratch.iterdir():
            file.chmod(0o600)
        aside = scratch.with_name(f"{scratch.name}.old")
        if directory.exists():
            # A directory cannot be renamed over a full one: the old one steps aside first.
            os.rename(directory, aside)
        os.rename(scratch, directory)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def read_bundle(directory: Path, identity: BaseIdentity | None) -> Bundle:
    """Reads a bundle after checking all of it.

    Args:
      directory: the bundle.
      identity: the base it will run on; None where no base is at hand.

    Raises:
      UserError: where a file is missing, changed, a link or not listed; on another schema version
        or another base; on a leaf of another name, shape or dtype than the config gives.
    """
    manifest = _manifest(directory)
    try:
        spec, base = ModelSpec(**manifest["spec"]), BaseIdentity(**manifest["base"])
    except TypeError as error:
        raise UserError(f"{directory}/{MANIFEST} is damaged ({error}); make it again") from error
    config = freeze(manifest["config"])
    if identity is not None and identity.sha256 != base.sha256:
        raise UserError(
            f"bundle {directory} belongs to base {base.source} (sha256 {base.sha256[:12]}), not to "
            f"{identity.source} (sha256 {identity.sha256[:12]}); load the base that it names"
        )
    contents = _checked_files(directory, manifest["files"])
    trees = {}
    for name, expected in _expected(config, spec).items():
        try:
            leaves = safetensors.numpy.load(contents[f"{name}.safetensors"])
        except SafetensorError as error:
            raise UserError(f"{directory}/{name}.safetensors cannot be read: {error}") from error
        _check_tree(name, leaves, expected)
        trees[name] = unflatten_dict(leaves, sep="/")
    return Bundle(manifest, config, spec, base, **trees)


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if directory.is_symlink() or path.is_symlink() or not path.is_file():
        raise UserError(
            f"{directory} is no bundle: it has no {MANIFEST}; give a bundle's directory"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); make the bundle again") from error
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if found != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {found!r}, this package reads {SCHEMA_VERSION}; make the "
            "bundle again or use the version that made it"
        )
    keys = {"base", "spec", "config", "files", "provenance", "data_licenses"}
    if missing := sorted(keys - set(manifest)):
        raise UserError(f"{path} lacks {missing[0]!r}; make the bundle again")
    return manifest


def _checked_files(directory: Path, listed: dict[str, str]) -> dict[str, bytes]:
    """The tensor files' bytes, the very ones that were hashed; every other file is hashed too."""
    needed = {f"{name}.safetensors" for name in COLLECTIONS}
    present = {entry.name for entry in directory.iterdir()} - {MANIFEST}
    if missing := sorted((needed | set(listed)) - present):
        raise UserError(f"bundle {directory} lacks {missing[0]!r}; make or copy it again")
    if unlisted := sorted(present - set(listed)):
        raise UserError(
            f"bundle {directory} holds {unlisted[0]!r}, which its manifest does not list"
        )
    contents = {}
    for name, sha256 in listed.items():
        # A name that is in `present` is an entry of the directory, so it cannot lead out of it.
        path = directory / name
        if path.is_symlink() or not path.is_file():
            raise UserError(f"bundle {directory}: {name!r} is not a plain file; make it again")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"bundle {directory}: {name!r} was changed since; make it again")
        if name in needed:
            contents[name] = content
    return contents


def _expected(config: Config, spec: ModelSpec) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Leaves of the collections that the model itself would make, by path."""
    model = Transformer.from_config(config, spec)
    tokens = jnp.ones((1, 1), jnp.int32)
    rngs = {name: jax.random.key(0) for name in ("params", *COLLECTIONS)}
    shapes = jax.eval_shape(
        lambda: nn.unbox(model.init(rngs, tokens, tokens, tokens, tokens, Routed()))
    )
    return {name: flatten_dict(shapes[name], sep="/") for name in COLLECTIONS}


def _check_tree(name: str, leaves: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    for path in sorted(leaves.keys() | expected.keys()):
        found, wanted = (
            f"{tree[path].dtype}{list(tree[path].shape)}" if path in tree else "nothing"
            for tree in (leaves, expected)
        )
        if found != wanted:
            raise UserError(
                f"{name}/{path} is {found}, the config gives {wanted}; they do not belong"
            )


def _model_card(manifest: dict[str, Any]) -> str:
    # Plain text, not HTML; a value that is missing is a fault.
    environment = Environment(
        loader=PackageLoader("safemoe_jax", "weights"),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
    )
    config = manifest["config"]
    return environment.get_template("model_card.jinja").render(
        base=manifest["base"],
        domains=config["data"]["domains"],
        experts=config["experts"],
        router=config["router"],
        data_licenses=manifest["data_licenses"],
        provenance=manifest["provenance"],
    )
