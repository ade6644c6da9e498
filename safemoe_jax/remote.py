"""What lies behind a URL such as gs://bucket/path, through fsspec; gs:// needs gcsfs installed.

And what is not remote at all: whether a place, or a host, is on this machine.
"""

import contextlib
import hashlib
import ipaddress
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
from etils import epath

from safemoe_jax.errors import Unreachable, UserError, refused_by_the_machine
from safemoe_jax.fetch import cache_dir, file_sha256
from safemoe_jax.private_files import is_unfinished


def is_remote(place: str) -> bool:
    return "://" in place


def is_loopback(host: str) -> bool:
    """Whether a host, an address or a name, is this machine and no other."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may mean any address


def local_copy(place: str) -> Path:
    """A local path as it is; of a URL's file or directory a copy in the cache, as it is now.

    Raises:
      UserError: where the URL cannot be read.
    """
    if not is_remote(place):
        return Path(place).expanduser()
    system, path = _open(place)
    with _reached(place, "read"):
        stamps = {name: _version(system, place, name) for name in sorted(system.find(path))}
        if not stamps:
            raise FileNotFoundError("nothing is there")
        homes = cache_dir() / "remote"
        home = homes / _key(stamps)
        if None in stamps.values() or not home.exists():
            homes.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=homes) as scratch:
                whole = Path(scratch, "whole")
                for name, stamp in stamps.items():
                    target = whole / Path(path).name / os.path.relpath(name, path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    system.get_file(name, str(target))
                    stamps[name] = stamp or file_sha256(target)
                home = homes / _key(stamps)
                _replace(whole, home)
    return home / Path(path).name


def _version(system: fsspec.AbstractFileSystem, place: str, name: str) -> str | None:
    """What changes when a file does; None where nothing tells, and only its content can."""
    if not place.startswith(("http://", "https://")):
        return system.ukey(name)
    about = system.info(name)  # fsspec's own key is of the URL alone
    tag = about.get("ETag") or about.get("Last-Modified")
    return f"{tag} {about['size']}" if tag else None


def _key(stamps: dict[str, str | None]) -> str:
    return hashlib.sha256(repr(sorted(stamps.items())).encode()).hexdigest()[:16]


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
        self._pulled: dict[str, tuple[str | None, tuple[int, int]]] = {}

    def path(self, *names: str) -> epath.Path:
        """A place in the remote directory, for what reads and writes there itself."""
        local = self._system.protocol[0] == "file"
        return epath.Path(self._remote if local else self._url.rstrip("/")).joinpath(*names)

    def pull(self) -> None:
        """Makes the local copy what the remote is; what has not changed is not read again.

        Raises:
          UserError: where the remote cannot be read.
        """
        with _reached(self._url, "read"):
            found = set(filter(_is_whole, self._remote_files(self._names)))
            for name in self._local_files(self._names) - found:
                (self._local / name).unlink()
            for name in found:
                target, source = self._local / name, f"{self._remote}/{name}"
                version = _version(self._system, self._url, source)
                here = _stamp(target) if target.exists() else None
                if version is None or self._pulled.get(name) != (version, here):
                    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    self._system.get_file(source, str(target))
                    self._pushed[name] = _stamp(target)
                    self._pulled[name] = version, self._pushed[name]

    def push(self, *names: str) -> None:
        """Makes the remote what the local copy is; what has not changed is not sent again, and what
        is not whole never.

        Args:
          names: those of the mirrored entries that are sent; all if none is given.

        Raises:
          Unreachable: where the remote cannot be written to.
        """
        names = names or tuple(self._names)
        with _reached(self._url, "write to", Unreachable):
            here = self._local_files(names)
            for name in self._remote_files(names) - here:
                self._system.rm_file(f"{self._remote}/{name}")
            for name in sorted(here):
                stamp = _stamp(self._local / name)
                if self._pushed.get(name) != stamp:
                    target = f"{self._remote}/{name}"
                    self._system.makedirs(os.path.dirname(target), exist_ok=True)
                    self._system.put_file(str(self._local / name), target)
                    self._pushed[name] = stamp

    def _local_files(self, names: Sequence[str]) -> set[str]:
        found = (path for name in names for path in _files(self._local / name))
        return set(filter(_is_whole, (str(path.relative_to(self._local)) for path in found)))

    def _remote_files(self, names: Sequence[str]) -> set[str]:
        self._system.invalidate_cache()
        found = (f for name in names for f in self._system.find(f"{self._remote}/{name}"))
        return {os.path.relpath(path, self._remote) for path in found}


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    with _reached(url, "open"):
        return fsspec.core.url_to_fs(url)


@contextlib.contextmanager
def _reached(url: str, doing: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Names the URL in what fsspec and its backends raise: their errors have no common class."""
    try:
        yield
    except Exception as error:
        if refused_by_the_machine(error) and not isinstance(error, PermissionError):
            raise  # a full disk and its like, on this side
        said = " ".join(str(error).split()) or type(error).__name__
        raise kind(
            f"cannot {doing} {url} ({said}); check the URL, your access and the network (gs:// "
            "needs `pip install gcsfs`)"
        ) from error


def _files(path: Path) -> list[Path]:
    """Itself or all in it, but for links, as W&B has to its newest run."""
    found = [path] if path.is_file() else path.rglob("*")
    return [file for file in found if file.is_file() and not file.is_symlink()]


def _is_whole(name: str) -> bool:
    return not any(map(is_unfinished, Path(name).parts))


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _replace(whole: Path, home: Path) -> None:
    try:
        os.replace(whole, home)
    except OSError:
        if not home.exists():  # else another process has fetched the same meanwhile
            raise
