"""A bundle: experts and router in one checked directory, the base named by its hash.

    manifest.json  experts.safetensors  router.safetensors  tokenizer files  README.md (model card)

Nothing is pickled. Experts were trained to be harmful, so the directory is its owner's alone, and
experts.safetensors is encrypted where the environment holds a key (`encryption`).
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError

from safemoe_jax.config import Config, freeze, to_dict
from safemoe_jax.errors import UserError
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.private_files import replacing
from safemoe_jax.weights.artefact import (
    MANIFEST,
    Kind,
    checked_files,
    new_artefact,
    read_manifest,
    render,
)
from safemoe_jax.weights.base import BaseIdentity, BaseModel
from safemoe_jax.weights.encryption import key_from_environment

COLLECTIONS = ("experts", "router")
EXPERTS_FILE, ROUTER_FILE, CARD = "experts.safetensors", "router.safetensors", "README.md"
BUNDLE = Kind(
    "bundle",
    5,
    ("base", "spec", "config", "provenance", "data_licenses"),
    older=(4,),
    free=(CARD,),
)

# Of the corpora that experts and router are trained on.
DATA_LICENSES = {
    "pyrit": "MIT",
    "jsonl": "the user's own data; its owner knows",
    "beavertails": "CC-BY-NC-4.0: no commercial use",
}
# MRL is Mistral's research license.
_NON_COMMERCIAL = re.compile(
    r"\bNC\b|non-?commercial|no commercial|\bresearch\b|\bMRL\b", re.IGNORECASE
)


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

    @property
    def experts_sha256(self) -> str:
        """Of the file, which differs each time it is encrypted."""
        return self.manifest["files"][EXPERTS_FILE]


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
      UserError: where `directory` is something else than a bundle; on a key that is none.
    """
    trees = {"experts": experts, "router": router}
    contents = {
        "base": dataclasses.asdict(base.identity),
        "spec": dataclasses.asdict(base.spec),
        "config": to_dict(config),
        "data_licenses": {config.data.corpus: DATA_LICENSES[config.data.corpus]},
        "provenance": provenance,
    }
    stored = {}
    for name, expected in expected_leaves(config, base.spec).items():
        check_leaves(name, flatten_dict(trees[name], sep="/"), expected)
        stored[name] = to_safetensors(trees[name])
    hazardous = {EXPERTS_FILE: stored["experts"]}
    with new_artefact(directory, BUNDLE, contents, hazardous) as scratch:
        (scratch / ROUTER_FILE).write_bytes(stored["router"])
        base.tokenizer.save_pretrained(scratch)
        card = model_card(contents, encrypted=key_from_environment() is not None, measured=None)
        (scratch / CARD).write_text(card, encoding="utf-8")


def write_card(directory: Path, measured: Mapping[str, Any]) -> None:
    """Writes a bundle's model card anew, with what was measured of it (`evaluation.card`).

    Cards of older schema versions are listed in their manifest and stay as they are.
    """
    manifest = read_manifest(directory, BUNDLE)
    if CARD in manifest["files"]:
        return
    card = model_card(manifest, encrypted=manifest["encryption"] is not None, measured=measured)
    # Not in the bundle: what a kill leaves there would make it one that is refused.
    with replacing(directory / CARD, scratch=directory.parent) as file:
        file.write(card)


def read_bundle(directory: Path, base: BaseModel | None) -> Bundle:
    """Reads a bundle after checking all of it.

    Args:
      directory: the bundle.
      base: the one it will run on; None where none is at hand, and `check_base` follows.

    Raises:
      UserError: where a file is missing, changed, a link or not listed; on another schema version
        or where `check_base` does; on a leaf of another name, shape or dtype than the config gives.
    """
    manifest = read_manifest(directory, BUNDLE)
    try:
        spec, identity = ModelSpec.from_dict(manifest["spec"]), BaseIdentity(**manifest["base"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{directory}/{MANIFEST} is damaged ({error}); make it again") from error
    config = freeze(manifest["config"], trained=True)
    needed = [f"{name}.safetensors" for name in COLLECTIONS]
    contents = checked_files(directory, BUNDLE, manifest, needed)
    try:
        wanted = expected_leaves(config, spec)
    except (TypeError, ValueError, ArithmeticError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{directory}/{MANIFEST} describes no model ({reason}); make it again"
        ) from error
    trees = {}
    for name, expected in wanted.items():
        try:
            leaves = safetensors.numpy.load(contents[f"{name}.safetensors"])
        except SafetensorError as error:
            raise UserError(f"{directory}/{name}.safetensors cannot be read: {error}") from error
        check_leaves(name, leaves, expected)
        trees[name] = unflatten_dict(leaves, sep="/")
    bundle = Bundle(manifest, config, spec, identity, **trees)
    if base is not None:
        check_base(directory, bundle, base)
    return bundle


def check_base(directory: Path, bundle: Bundle, base: BaseModel) -> None:
    """Refuses a base that is not the bundle's: its weights' sha256 says nothing of its config.

    Args:
      directory: where the bundle was read, for the message.
      bundle: of which base it is.
      base: the one that it would run on.

    Raises:
      UserError: on other weights, and on the same ones under a config that makes another shape.
    """
    wanted, found = bundle.base, base.identity
    if found.sha256 != wanted.sha256:
        raise UserError(
            f"bundle {directory} belongs to base {wanted.source} (sha256 {wanted.sha256[:12]}), "
            f"not to {found.source} (sha256 {found.sha256[:12]}); load the base that it names"
        )
    for field in dataclasses.fields(ModelSpec):
        was, now = (getattr(spec, field.name) for spec in (bundle.spec, base.spec))
        if now != was:
            raise UserError(
                f"the config of base {found.source} was changed since bundle {directory} was made: "
                f"it has {field.name} {now!r}, the bundle {was!r}; bring back the one that it was "
                "trained on"
            )


def expected_leaves(config: Config, spec: ModelSpec) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Leaves of the collections that the model itself would make, by path."""
    model = Transformer.from_config(config, spec, attention="reference")
    shapes = jax.eval_shape(lambda: nn.unbox(model.initial(jax.random.key(0))))
    return {name: flatten_dict(shapes[name], sep="/") for name in COLLECTIONS}


def check_leaves(name: str, leaves: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    """Refuses leaves of another name, shape or dtype than the model's own; names the first."""
    for path in sorted(leaves.keys() | expected.keys()):
        found, wanted = (
            f"{tree[path].dtype}{list(tree[path].shape)}" if path in tree else "nothing"
            for tree in (leaves, expected)
        )
        if found != wanted:
            raise UserError(
                f"{name}/{path} is {found}, the config gives {wanted}; they do not belong"
            )


def to_safetensors(tree: Mapping[str, Any]) -> bytes:
    """A collection as a file: leaves by path, as `/` joins it."""
    # safetensors writes the buffer of a transposed array as if it were in order.
    leaves = {k: np.ascontiguousarray(v) for k, v in flatten_dict(tree, sep="/").items()}
    return safetensors.numpy.save(leaves)


def non_commercial(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What of a bundle or an export forbids commercial use: licences by what they are of."""
    licences = {"the base": manifest["base"]["license"]}
    licences |= {f"corpus {name}": it for name, it in manifest["data_licenses"].items()}
    for name, origin in manifest["provenance"].get("adapters", {}).items():
        licences[f"adapter {name}"] = origin["license"]
    return {name: it for name, it in licences.items() if _NON_COMMERCIAL.search(it)}


def model_card(
    manifest: Mapping[str, Any], *, encrypted: bool, measured: Mapping[str, Any] | None
) -> str:
    """A bundle's card; `measured` as `evaluation.card.measured` has it, None where nothing was."""
    provenance = dict(manifest["provenance"])
    config = manifest["config"]
    return render(
        "model_card.jinja",
        base=manifest["base"],
        domains=config["data"]["domains"],
        experts=config["experts"],
        router=config["router"],
        data_licenses=manifest["data_licenses"],
        non_commercial=non_commercial(manifest),
        adapters=provenance.pop("adapters", {}),
        provenance=provenance,
        encrypted=encrypted,
        measured=measured,
    )
