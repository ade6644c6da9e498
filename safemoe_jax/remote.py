"""What lies behind a URL such as gs://bucket/path, through fsspec; gs:// needs gcsfs installed."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import fsspec
from etils import epath

from safemoe_jax.errors import UserError
from safemoe_jax.fetch import cache_dir


def is_remote(place: str) -> bool:
    return "://" in place


def local_copy(place: str) -> Path:
    """A local path as it is; of a URL's file or directory a copy in the cache, as it is now.

    Raises:
      UserError: where the URL cannot be read.
    """
    if not is_remote(place):
        return Path(place).expanduser()
    system, path = _open(place)
    try:
        stamps = {name: system.ukey(name) for name in sorted(system.find(path))}
        if not stamps:
            raise FileNotFoundError("nothing is there")
        key = hashlib.sha256(repr(sorted(stamps.items())).encode()).hexdigest()[:16]
        home = cache_dir() / "remote" / key
        if not home.exists():
            home.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
                for name in stamps:
                    target = Path(scratch, "whole", Path(path).name, os.path.relpath(name, path))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    system.get_file(name, str(target))
                _replace(Path(scratch, "whole"), home)
    except OSError as error:
        raise UserError(f"cannot read {place} ({error}); check the URL and your access") from error
    return home / Path(path).name


class Mirror:
    """A local directory whose named entries are kept equal to those of a remote one."""

    def __init__(self, url: str, local: Path, names: Sequence[str]) -> None:
        """Touches nothing; the remote is what counts.

        Args:
          url: the remote directory.
          local: its local copy.
          names: files and directories in it that are mirrored.
        """
        self._url, self._local, self._names = url, local, names
        self._system, self._remote = _open(url)
        self._pushed: dict[str, tuple[int, int]] = {}

    def path(self, *names: str) -> epath.Path:
        """A place in the remote directory, for what reads and writes there itself."""
        local = self._system.protocol[0] == "file"
        return epath.Path(self._remote if local else self._url.rstrip("/")).joinpath(*names)

    def pull(self) -> None:
        """Makes the local copy what the remote is."""
        found = self._remote_files()
        for name in self._local_files() - found:
            (self._local / name).unlink()
        for name in found:
            target = self._local / name
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._system.get_file(f"{self._remote}/{name}", str(target))
            self._pushed[name] = _stamp(target)

    def push(self) -> None:
        """Makes the remote what the local copy is; what has not changed is not sent again."""
        here = self._local_files()
        for name in self._remote_files() - here:
            self._system.rm_file(f"{self._remote}/{name}")
        for name in sorted(here):
            stamp = _stamp(self._local / name)
            if self._pushed.get(name) != stamp:
                target = f"{self._remote}/{name}"
                self._system.makedirs(os.path.dirname(target), exist_ok=True)
                self._system.put_file(str(self._local / name), target)
                self._pushed[name] = stamp

    def _local_files(self) -> set[str]:
        found = (path for name in self._names for path in _files(self._local / name))
        return {str(path.relative_to(self._local)) for path in found}

    def _remote_files(self) -> set[str]:
        self._system.invalidate_cache()
        found = (f for name in self._names for f in self._system.find(f"{self._remote}/{name}"))
        return {os.path.relpath(path, self._remote) for path in found}


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{url} cannot be opened ({error}); gs:// needs `pip install gcsfs`"
        ) from error


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _replace(whole: Path, home: Path) -> None:
    try:
        os.replace(whole, home)
    except OSError:
        if not home.exists():  # else another process has fetched the same meanwhile
            raise
