"""Fetching, with a local directory of wheels in place of the package index."""

import hashlib
import os
import urllib.error
import zipfile
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from safemoe_jax.errors import Unreachable, UserError
from safemoe_jax.fetch import Hub, Url, Wheel, cache_dir, file_sha256, wheel_member
from safemoe_jax.weights.base import fetch_base

MEMBER = "toy_pkg/data.bin"
CONTENT = b"weights"
METADATA = "Metadata-Version: 2.1\nName: toy-pkg\nVersion: 1.0\n"


@pytest.fixture(autouse=True)
def index(tmp_path, monkeypatch):
    """A directory of one wheel that pip takes for its whole index, and an empty cache."""
    directory = tmp_path / "index"
    directory.mkdir()
    with zipfile.ZipFile(directory / "toy_pkg-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, CONTENT)
        wheel.writestr("toy_pkg-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("toy_pkg-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("toy_pkg-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("SAFEMOE_CACHE", str(tmp_path / "cache"))
    return directory


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def remove(index):
    next(index.glob("*.whl")).unlink()


def test_member_is_extracted_checked_and_then_read_from_the_cache(index):
    pins = {"member_sha256": sha256(CONTENT)}
    path = wheel_member("toy-pkg==1.0", MEMBER, **pins)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache_dir())
    remove(index)
    assert wheel_member("toy-pkg==1.0", MEMBER, **pins) == path


def test_whole_wheel_is_kept_byte_for_byte(index):
    original = next(index.glob("*.whl")).read_bytes()
    path = wheel_member("toy-pkg==1.0", None, wheel_sha256=sha256(original))
    assert path.read_bytes() == original
    remove(index)
    assert wheel_member("toy-pkg==1.0", None, wheel_sha256=sha256(original)) == path


def test_corrupt_cache_is_fetched_again():
    path = wheel_member("toy-pkg==1.0", MEMBER, member_sha256=sha256(CONTENT))
    path.write_bytes(b"cut")
    wheel_member("toy-pkg==1.0", MEMBER, member_sha256=sha256(CONTENT))
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("pin", ["wheel_sha256", "member_sha256"])
def test_other_bytes_than_pinned_are_refused_and_not_kept(pin):
    with pytest.raises(UserError, match="not the pinned 0000"):
        wheel_member("toy-pkg==1.0", MEMBER, **{pin: "0" * 64})
    assert not list(cache_dir().rglob("data.bin"))


def test_unreached_index_names_the_remedy(index):
    remove(index)
    with pytest.raises(UserError, match=r"could not fetch toy-pkg==1\.0 .*put the file at .*data"):
        wheel_member("toy-pkg==1.0", MEMBER)


def test_absent_member_is_named():
    with pytest.raises(UserError, match=r"no member 'toy_pkg/other'"):
        wheel_member("toy-pkg==1.0", "toy_pkg/other")


def test_file_sha256_follows_a_change(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert file_sha256(path) == sha256(b"one")
    assert file_sha256(path) == sha256(b"one")
    path.write_bytes(b"three")
    assert file_sha256(path) == sha256(b"three")


def test_members_of_a_pinned_wheel_need_one_download(index):
    pin = sha256(next(index.glob("*.whl")).read_bytes())
    wheel = Wheel("toy-pkg==1.0", pin, (MEMBER,))
    (path,) = wheel.fetch()
    assert path.read_bytes() == CONTENT
    remove(index)
    (other,) = Wheel("toy-pkg==1.0", pin, ("toy_pkg-1.0.dist-info/METADATA",)).fetch()
    assert other.read_text() == METADATA


def test_a_file_behind_an_address_is_checked_and_then_read_from_the_cache(tmp_path):
    served = tmp_path / "rows.csv"
    served.write_bytes(CONTENT)
    url = Url(served.as_uri(), sha256(CONTENT))
    assert url.files == (served.as_uri(),)
    (path,) = url.fetch()
    assert path.read_bytes() == CONTENT and path.name == "rows.csv"
    assert path.is_relative_to(cache_dir())
    served.unlink()
    assert url.fetch() == [path]


def test_an_address_that_serves_other_bytes_or_none_is_refused(tmp_path):
    served = tmp_path / "rows.csv"
    with pytest.raises(UserError, match=r"could not fetch file:.*; check the network"):
        Url(served.as_uri(), "0" * 64).fetch()
    served.write_bytes(CONTENT)
    with pytest.raises(UserError, match="not the pinned 0000"):
        Url(served.as_uri(), "0" * 64).fetch()
    assert not list((cache_dir() / "urls").rglob("rows.csv"))


def answered(status):
    """What the hub's client raises on an answer."""
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("an answer", response=response)


def not_cached(cause):
    """What it raises where it then found nothing in its cache."""
    error = LocalEntryNotFoundError("not here")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "outage"),
    [
        (answered(403), False),
        (answered(404), False),
        (answered(429), True),
        (answered(503), True),
        (not_cached(answered(503)), True),
        (not_cached(HTTPError("")), True),
        (not_cached(OfflineModeIsEnabled("offline")), False),
        (HTTPError(""), True),
        (ConnectionError("reset"), True),
        (RuntimeError("Task error: CAS Client Error"), True),
        (HFValidationError("no name"), False),
    ],
)
def test_the_hubs_outages_are_no_mistakes(monkeypatch, error, outage):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("safemoe_jax.fetch.hf_hub_download", refuse)
    monkeypatch.setattr("safemoe_jax.weights.base.snapshot_download", refuse)
    with pytest.raises(UserError, match="could not fetch a of owner/data from the hub") as told:
        Hub("owner/data", "main", ("a",)).fetch()
    assert isinstance(told.value, Unreachable) == outage
    with pytest.raises(UserError, match="could not fetch owner/name from the hub") as told:
        fetch_base("owner/name")
    assert isinstance(told.value, Unreachable) == outage


def test_an_addresss_outages_are_no_mistakes(monkeypatch):
    for status, outage in ((404, False), (429, True), (502, True)):

        def refuse(url, status=status, **_):
            raise urllib.error.HTTPError(url, status, "an answer", {}, None)

        monkeypatch.setattr("urllib.request.urlopen", refuse)
        with pytest.raises(UserError, match=r"could not fetch https://x/rows\.csv") as told:
            Url("https://x/rows.csv", "0" * 64).fetch()
        assert isinstance(told.value, Unreachable) == outage


def test_a_file_that_was_changed_and_dated_back_has_another_digest(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEMOE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one")
    status = path.stat()
    assert file_sha256(path) == file_sha256(path) == sha256(b"one")
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_sha256(path) == sha256(b"two")
    for record in (tmp_path / "cache" / "sha256").iterdir():
        record.write_text("{")  # as a full disk may leave it
    assert file_sha256(path) == sha256(b"two")
