"""A set of imported experts: adapters trained elsewhere, to train a gate on.

    manifest.json  experts.safetensors

Whoever trained them, they are taken to be as hazardous as our own.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from safemoe_jax.config import Config
from safemoe_jax.errors import UserError
from safemoe_jax.fetch import file_digest
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.weights.artefact import (
    MANIFEST,
    Kind,
    checked_files,
    new_artefact,
    read_manifest,
)
from safemoe_jax.weights.base import BaseIdentity
from safemoe_jax.weights.bundle import check_leaves, expected_leaves, to_safetensors
from safemoe_jax.weights.peft import Adapter, stack

EXPERTS = Kind("set of imported experts", 2, ("base", "domains", "experts", "adapters"), older=(1,))
_FILE = "experts.safetensors"


@dataclasses.dataclass(frozen=True)
class Imported:
    """Experts as a config asked for them.

    Attributes:
      experts: the model's collection `experts`, numpy leaves, in the order of the config's domains.
      adapters: each adapter's `Origin` as a dict, by domain.
      sha256: of the set's manifest, and so of all that is in it.
    """

    experts: dict[str, Any]
    adapters: dict[str, dict[str, Any]]
    sha256: str


def write_imported(
    directory: Path, identity: BaseIdentity, spec: ModelSpec, adapters: dict[str, Adapter]
) -> dict[str, Any]:
    """Writes adapters, by domain, as one set of experts; an older set in its place is replaced.

    Returns:
      The config's `experts` section that fits them, `source` included.
    """
    config, experts = stack(list(adapters.values()), spec)
    section = dataclasses.asdict(config)
    contents = {
        "base": dataclasses.asdict(identity),
        "domains": list(adapters),
        "experts": section,
        "adapters": {name: dataclasses.asdict(a.origin) for name, a in adapters.items()},
    }
    with new_artefact(directory, EXPERTS, contents, {_FILE: to_safetensors(experts)}):
        pass  # there is no other file
    return {"source": str(directory.absolute()), **section}


def read_imported(
    directory: Path, identity: BaseIdentity, config: Config, spec: ModelSpec
) -> Imported:
    """Reads a set of imported experts for an experiment.

    Raises:
      UserError: where the set is damaged or of another base, or where domains, targets, rank or
        alpha are not those of the config.
    """
    manifest = read_manifest(directory, EXPERTS)
    base, found = manifest["base"], manifest["experts"]
    if base["sha256"] != identity.sha256:
        raise UserError(
            f"{directory} was imported for base {base['source']} (sha256 {base['sha256'][:12]}), "
            f"not for {identity.source} (sha256 {identity.sha256[:12]}); import the adapters with "
            f"--base {identity.source}"
        )
    domains, wanted = manifest["domains"], config.data.domains
    if set(domains) != set(wanted):
        raise UserError(
            f"{directory} holds experts of {', '.join(domains)}, and config.data.domains is "
            f"{', '.join(wanted)}; name the same ones"
        )
    for key in ("targets", "rank", "alpha"):
        value, own = getattr(config.experts, key), found[key]
        if (set(value) != set(own)) if key == "targets" else (value != own):
            raise UserError(
                f"config.experts.{key} is {value!r}, and the experts in {directory} have {own!r}; "
                "set the config's to that"
            )
    leaves = safetensors.numpy.load(checked_files(directory, EXPERTS, manifest, [_FILE])[_FILE])
    order = np.array([domains.index(domain) for domain in wanted])
    leaves = {path: leaf[:, order] for path, leaf in leaves.items()}
    check_leaves("experts", leaves, expected_leaves(config, spec)["experts"])
    adapters = {domain: manifest["adapters"][domain] for domain in wanted}
    return Imported(unflatten_dict(leaves, sep="/"), adapters, file_digest(directory / MANIFEST))
