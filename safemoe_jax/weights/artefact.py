"""A directory that this package writes: whole or not at all, private, checked by its manifest.

manifest.json says what kind of directory it is and has the sha256 of every other file in it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from safemoe_jax.errors import UserError

MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a directory is.

    Attributes:
      name: in the manifest and in messages.
      schema_version: of its manifest; other versions are not read.
      keys: what its manifest has beside kind, schema_version and files.
    """

    name: str
    schema_version: int
    keys: Collection[str]


@contextlib.contextmanager
def new_artefact(directory: Path, kind: Kind, contents: dict[str, Any]) -> Iterator[Path]:
    """Gives a scratch directory to fill, and on leaving puts it, with its manifest, in place.

    Args:
      directory: where; its parent is created, and an older one of the same kind is replaced.
      kind: what it is.
      contents: the manifest's `kind.keys`, JSON values.

    Raises:
      UserError: where `directory` is something else, or cannot be written.
    """
    assert contents.keys() == set(kind.keys)
    if directory.exists() and _kind_of(directory) != kind.name:
        raise UserError(f"{directory} exists and is no {kind.name}; give another path or remove it")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # mkdtemp gives mode 0700, and beside its destination the last step is a rename.
        scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    except OSError as error:
        raise UserError(
            f"cannot write to {directory} ({error.strerror}); give another path"
        ) from error
    try:
        yield scratch
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        manifest = {
            "kind": kind.name,
            "schema_version": kind.schema_version,
            **contents,
            "files": {str(path.relative_to(scratch)): file_digest(path) for path in files},
        }
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in scratch.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
        aside = scratch.with_name(f"{scratch.name}.old")
        if directory.exists():
            # A directory cannot be renamed over a full one: the old one steps aside first.
            os.rename(directory, aside)
        os.rename(scratch, directory)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def read_manifest(directory: Path, kind: Kind) -> dict[str, Any]:
    """The manifest of a directory of this kind.

    Raises:
      UserError: where there is none, or it is of another kind or version, or damaged.
    """
    path = directory / MANIFEST
    if directory.is_symlink() or path.is_symlink() or not path.is_file():
        raise UserError(
            f"{directory} is no {kind.name}: it has no {MANIFEST}; give a {kind.name}'s directory"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); make the {kind.name} again") from error
    manifest = manifest if isinstance(manifest, dict) else {}
    if (other := manifest.get("kind", kind.name)) != kind.name:
        raise UserError(
            f"{directory} is no {kind.name}: its {MANIFEST} says {other!r}; give a {kind.name}'s "
            "directory"
        )
    if (found := manifest.get("schema_version")) != kind.schema_version:
        raise UserError(
            f"{path} has schema version {found!r}, this package reads {kind.schema_version}; make "
            f"the {kind.name} again or use the version that made it"
        )
    if missing := sorted({*kind.keys, "files"} - set(manifest)):
        raise UserError(f"{path} lacks {missing[0]!r}; make the {kind.name} again")
    return manifest


def checked_files(
    directory: Path, kind: Kind, listed: dict[str, str], needed: Collection[str]
) -> dict[str, bytes]:
    """The needed files' bytes, the very ones that were hashed; every other file is hashed too.

    Args:
      directory: holds plain files only.
      kind: what it is.
      listed: sha256 of each file, by name, as its manifest says.
      needed: names of the files that are wanted.

    Raises:
      UserError: where a file is missing, changed, a link or not listed.
    """
    present = {entry.name for entry in directory.iterdir()} - {MANIFEST}
    if missing := sorted((set(needed) | set(listed)) - present):
        raise UserError(f"{kind.name} {directory} lacks {missing[0]!r}; make or copy it again")
    if unlisted := sorted(present - set(listed)):
        raise UserError(
            f"{kind.name} {directory} holds {unlisted[0]!r}, which its manifest does not list"
        )
    contents = {}
    for name, sha256 in listed.items():
        # A name that is in `present` is an entry of the directory, so it cannot lead out of it.
        path = directory / name
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{kind.name} {directory}: {name!r} is not a plain file; make it again")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"{kind.name} {directory}: {name!r} was changed since; make it again")
        if name in needed:
            contents[name] = content
    return contents


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def render(template: str, **values: Any) -> str:
    """A card of this room, from its template."""
    # Plain text, not HTML; a value that is missing is a fault.
    environment = Environment(
        loader=PackageLoader("safemoe_jax", "weights"),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def _kind_of(directory: Path) -> str | None:
    try:
        return json.loads((directory / MANIFEST).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        return None
