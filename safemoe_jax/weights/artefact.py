"""A directory that this package writes: whole or not at all, private, checked by its manifest.

manifest.json says what kind of directory it is, and has the sha256 of every other file in it and
its own. That guards against accident: who changes a file on purpose can also write its new sha256.
What is encrypted is bound to the manifest and to the other files, and guards against that, too.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from safemoe_jax.errors import UserError
from safemoe_jax.fetch import file_digest
from safemoe_jax.private_files import NEW, OLD
from safemoe_jax.weights import encryption

MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a directory is.

    Attributes:
      name: in the manifest and in messages.
      schema_version: of its manifest, as it is written.
      keys: what its manifest has beside kind, schema_version, encryption, files and sha256.
      older: versions that are read, too. They have neither `encryption` nor `sha256`.
      free: files for people, which may change and are not listed.
    """

    name: str
    schema_version: int
    keys: Collection[str]
    older: Collection[int] = ()
    free: Collection[str] = ()


@contextlib.contextmanager
def new_artefact(
    directory: Path,
    kind: Kind,
    contents: dict[str, Any],
    hazardous: Mapping[str, bytes] | None = None,
) -> Iterator[Path]:
    """Gives a scratch directory to fill, and on leaving puts it, with its manifest, in place.

    Args:
      directory: where; its parent is created, and an older one of the same kind is replaced.
      kind: what it is.
      contents: the manifest's `kind.keys`, JSON values.
      hazardous: further files, by name, that are encrypted where the environment holds a key.

    Raises:
      UserError: where `directory` is something else, or cannot be written; on a key that is none.
    """
    assert contents.keys() == set(kind.keys)
    hazardous = hazardous or {}
    key = encryption.key_from_environment() if hazardous else None
    if directory.exists() and _kind_of(directory) != kind.name:
        raise UserError(f"{directory} exists and is no {kind.name}; give another path or remove it")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # mkdtemp gives mode 0700, and beside its destination the last step is a rename.
        scratch = Path(tempfile.mkdtemp(NEW, f".{directory.name}.", directory.parent))
    except OSError as error:
        raise UserError(
            f"cannot write to {directory} ({error.strerror}); give another path"
        ) from error
    aside = scratch.with_suffix(OLD)
    try:
        yield scratch
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        listed = {str(path.relative_to(scratch)): file_digest(path) for path in files}
        manifest = {
            "kind": kind.name,
            "schema_version": kind.schema_version,
            **contents,
            "encryption": key and _encryption(key, hazardous),
            "files": {name: listed[name] for name in listed if name not in kind.free},
        }
        told = _told(manifest)
        for name, content in hazardous.items():
            stored = encryption.encrypt(content, key, _context(told, name)) if key else content
            (scratch / name).write_bytes(stored)
            manifest["files"][name] = hashlib.sha256(stored).hexdigest()
        manifest["sha256"] = manifest_digest(manifest)
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in scratch.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
        if directory.exists():
            # A directory cannot be renamed over a full one: the old one steps aside first.
            os.rename(directory, aside)
        os.rename(scratch, directory)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        if aside.exists() and not directory.exists():
            os.rename(aside, directory)
        raise


def read_manifest(directory: Path, kind: Kind) -> dict[str, Any]:
    """The manifest of a directory of this kind.

    Raises:
      UserError: where there is none, or it is of another kind or version, or damaged.
    """
    path = directory / MANIFEST
    why = None
    if not directory.is_dir():
        why = "there is no such directory"
    elif directory.is_symlink() or path.is_symlink():
        why = f"it, or its {MANIFEST}, is a symbolic link"
    elif not path.is_file():
        why = f"it has no {MANIFEST}"
    if why:
        raise UserError(f"{directory} is no {kind.name}: {why}; give the directory of one")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); {_again(kind, directory)}") from error
    manifest = manifest if isinstance(manifest, dict) else {}
    if (other := manifest.get("kind", kind.name)) != kind.name:
        raise UserError(
            f"{directory} is no {kind.name}: its {MANIFEST} says {other!r}; give a {kind.name}'s "
            "directory"
        )
    found, newest = manifest.get("schema_version"), {"encryption", "sha256"}
    if found in kind.older:
        manifest, newest = {**manifest, "encryption": None}, set()
    elif found != kind.schema_version:
        reads = ", ".join(map(str, (*kind.older, kind.schema_version)))
        raise UserError(
            f"{path} has schema version {found!r}, this package reads {reads}; make the "
            f"{kind.name} again or use the version that made it"
        )
    if missing := sorted({*kind.keys, "files", *newest} - set(manifest)):
        raise UserError(f"{path} lacks {missing[0]!r}; {_again(kind, directory)}")
    if not isinstance(manifest["files"], dict):
        raise UserError(f"{path} lists no files; {_again(kind, directory)}")
    if newest and manifest_digest(manifest) != manifest["sha256"]:
        raise UserError(f"{path} was changed since it was written; {_again(kind, directory)}")
    return manifest


def _again(kind: Kind, directory: Path) -> str:
    return f"delete {directory}, and make or copy the {kind.name} again"


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of all that a manifest says but for where the base lies, which may be moved."""
    return hashlib.sha256(_told(manifest)).hexdigest()


def checked_files(
    directory: Path, kind: Kind, manifest: Mapping[str, Any], needed: Collection[str]
) -> dict[str, bytes]:
    """The needed files' bytes, the very ones that were hashed; every other file is hashed too.

    Args:
      directory: holds plain files only.
      kind: what it is.
      manifest: as `read_manifest` has it.
      needed: names of the files that are wanted; what is encrypted is decrypted.

    Raises:
      UserError: where a file is missing, changed, a link or not listed; where one is encrypted and
        the environment does not hold its key.
    """
    listed = manifest["files"]
    present = {entry.name for entry in directory.iterdir()} - {MANIFEST}
    present -= set(kind.free) - set(listed)
    if missing := sorted((set(needed) | set(listed)) - present):
        raise UserError(f"{kind.name} {directory} lacks {missing[0]!r}; {_again(kind, directory)}")
    if unlisted := sorted(present - set(listed)):
        raise UserError(
            f"{kind.name} {directory} holds {unlisted[0]!r}, which its manifest does not list"
        )
    contents = {}
    for name, sha256 in listed.items():
        # A name that is in `present` is an entry of the directory, so it cannot lead out of it.
        path = directory / name
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path} is not a plain file; {_again(kind, directory)}")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"{path} was changed since it was written; {_again(kind, directory)}")
        if name in needed:
            contents[name] = content
    return _decrypted(directory, kind, manifest, contents)


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


def _encryption(key: bytes, hazardous: Mapping[str, bytes]) -> dict[str, Any]:
    """What a manifest says of it."""
    return {
        "cipher": encryption.CIPHER,
        "key_id": encryption.key_id(key),
        "files": sorted(hazardous),
    }


def _decrypted(
    directory: Path, kind: Kind, manifest: Mapping[str, Any], contents: dict[str, bytes]
) -> dict[str, bytes]:
    """The same files, readable."""
    if (about := manifest["encryption"]) is None:
        return contents
    where = f"{kind.name} {directory}"
    known = isinstance(about, dict) and {"cipher", "key_id", "files"} <= about.keys()
    if not known or about["cipher"] != encryption.CIPHER:
        raise UserError(
            f"{where} is encrypted by {about!r}, this package knows {encryption.CIPHER}; use the "
            "version that made it"
        )
    key = encryption.key_from_environment()
    if key is None:
        raise UserError(
            f"{where} is encrypted; set {encryption.KEY_VARIABLE} to the key with the id "
            f"{about['key_id']}"
        )
    if encryption.key_id(key) != about["key_id"]:
        raise UserError(
            f"{encryption.KEY_VARIABLE} holds the key with the id {encryption.key_id(key)}, and "
            f"{where} is encrypted with {about['key_id']}; set that one"
        )
    plain = {name: sha for name, sha in manifest["files"].items() if name not in about["files"]}
    told = _told({**manifest, "files": plain})
    for name in contents.keys() & set(about["files"]):
        try:
            contents[name] = encryption.decrypt(contents[name], key, _context(told, name))
        except encryption.Unreadable:
            raise UserError(
                f"{where}: {name!r} does not belong to this manifest and these files, one of which "
                "was changed since; make or copy it again"
            ) from None
    return contents


def _told(manifest: Mapping[str, Any]) -> bytes:
    """All that a manifest says, but for its own sha256 and for where the base lies."""
    told = {key: value for key, value in manifest.items() if key != "sha256"}
    if isinstance(base := told.get("base"), dict):
        told["base"] = {key: value for key, value in base.items() if key != "source"}
    return json.dumps(told, sort_keys=True).encode()


def _context(told: bytes, name: str) -> bytes:
    return name.encode() + b"\n" + told


def _kind_of(directory: Path) -> str | None:
    try:
        return json.loads((directory / MANIFEST).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        return None
