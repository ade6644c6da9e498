"""The faults of a campaign: each disturbs a run, ends, and leaves it to be started again.

A trial passes where every start ends in one of three ways: killed by the trial itself, with one
line that says what is wrong, or with the outcome of a run that nobody disturbed. Where the line
says what to delete, that is done; the last start must reach the outcome. A committed checkpoint
that the trial did not damage itself must be gone on from.
"""

import ctypes
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from attempts import Attempt, Ended, Prepare, on_writes
from home import Home, committed, outcome

_MOST_STARTS = 5
_SOON = 0.03  # seconds in which a checkpoint of this size is written
_SIZES_KIB = (40, 900)  # of a full disk; a whole run takes some 800


class Broken(Exception):
    """What must not be: a trial's finding."""


@dataclasses.dataclass
class Trial:
    """One work directory, what is done to it, and how its runs have ended so far."""

    home: Home
    root: Path
    notes: Path
    rng: np.random.Generator
    starts: list[str] = dataclasses.field(default_factory=list)
    what: str = ""
    result: str = ""  # where the trial has finished already

    def begin(self, snapshot: str) -> None:
        """Starts from a place on the undisturbed run's way; "nothing" is its beginning."""
        self.what += f"from {snapshot}"
        if snapshot != "nothing":
            shutil.copytree(self.home.snapshot(snapshot), self.root, dirs_exist_ok=True)

    def did(self, what: str) -> None:
        self.what += f"; {what}"

    def start(self, prepare: Prepare | None = None, notes: str = "") -> Attempt:
        notes = self.notes / notes
        notes.mkdir(exist_ok=True)
        return Attempt(self.home.argv(self.root), notes, prepare)

    def note(self, ended: Ended, *, killed: bool = False) -> Ended:
        """Takes down how a start ended; `killed` where the trial itself may have ended it."""
        self.starts.append(f"{ended.code} {ended.message}".strip())
        if ended.code is None:
            raise Broken(f"hung: {ended.error[-2000:]}")
        if ended.code < 0 and killed:
            return ended
        if ended.code != 0 and not ended.message:
            raise Broken(f"ended with {ended.code} and no message: {ended.error[-4000:]}")
        return ended

    def finish(self) -> str:
        """Starts until the outcome is there -> "identical", or "message" where it took one."""
        said = ""
        for _ in range(_MOST_STARTS):
            before, bundled = committed(self.root), (self.root / "bundle").exists()
            ended = self.note(self.start().wait())
            if ended.code == 0:
                if not bundled and (lost := _lost(before, ended.restored)):
                    raise Broken(f"a committed checkpoint was lost: {lost}")
                self.compare()
                return "message" if said else "identical"
            if ended.message == said:
                raise Broken(f"its remedy does not help: {said}")
            said = ended.message
            self._follow(said)
        raise Broken(f"not done after {_MOST_STARTS} starts: {self.starts}")

    def compare(self) -> None:
        found = outcome(self.root)
        for key, wanted in self.home.outcome.items():
            if found[key] != wanted:
                raise Broken(f"{key} differ silently: {found[key]}, without a fault {wanted}")

    def _follow(self, message: str) -> None:
        """Deletes what the message says to, in the work directory: "delete PATH" or "PATH ...
        delete it"."""
        place = rf"{re.escape(str(self.root))}(?:[\w./-]*\w)?"
        paths = re.findall(rf"delete ({place})", message) or re.findall(place, message)
        if "delete" not in message or not paths:
            raise Broken(f"a message without a remedy that can be followed: {message}")
        path = Path(paths[-1])
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _lost(before: dict[str, int], restored: dict[str, int]) -> str:
    behind = {stage: step for stage, step in before.items() if restored.get(stage, 0) < step}
    return f"{behind}, went on from {restored}" if behind else ""


# What ends a run: a moment in time, or a change that it makes to its files.


def _signalled(trial: Trial, number: int) -> Ended:
    """Starts it and sends a signal at a random moment before its end."""
    share = trial.rng.uniform(0.0, 1.0)
    while True:
        seconds = share * trial.home.seconds
        attempt = trial.start()
        if (ended := attempt.wait(until=seconds)) is None:
            attempt.send(number)
            trial.did(f"{signal.Signals(number).name} after {seconds:.2f} s")
            return trial.note(attempt.wait(), killed=True)
        trial.note(ended)  # it was faster than the undisturbed run
        shutil.rmtree(trial.root)
        trial.starts.clear()
        share /= 2


def _random_place(trial: Trial) -> None:
    trial.begin(str(trial.rng.choice(["nothing", "data", "experts", "router"])))


def killed(trial: Trial) -> None:
    trial.begin("nothing")
    _signalled(trial, signal.SIGKILL)


def killed_twice(trial: Trial) -> None:
    killed(trial)
    attempt = trial.start()
    if (ended := attempt.wait(until=trial.rng.uniform(0.0, trial.home.seconds / 2))) is None:
        attempt.send(signal.SIGKILL)
        ended = attempt.wait()
    trial.note(ended, killed=True)


def terminated(trial: Trial) -> None:
    trial.begin("nothing")
    _signalled(trial, signal.SIGTERM)


def interrupted(trial: Trial) -> None:
    trial.begin("nothing")
    _signalled(trial, signal.SIGINT)


def killed_writing(trial: Trial) -> None:
    """SIGKILL before a random change to a file."""
    trial.begin("nothing")
    _killed_at(trial, range(len(trial.home.writes)), 0.0)


def killed_in_checkpoint(trial: Trial) -> None:
    """SIGKILL within a checkpoint's write, tensorstore's own part included."""
    trial.begin("nothing")
    places = [i for i, path in enumerate(trial.home.writes) if "/checkpoints/" in path]
    _killed_at(trial, places, trial.rng.uniform(0.0, _SOON))


def _killed_at(trial: Trial, places, later: float) -> None:
    place = int(trial.rng.choice(places))

    def kill(number: int, path: str) -> None:
        if number == place + 1:
            if later:  # from another process: this one goes on
                if os.fork() == 0:
                    time.sleep(later)
                    os.kill(os.getppid(), signal.SIGKILL)
                    os._exit(0)
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    trial.did(f"SIGKILL {later:.3f} s after change {place} of {len(trial.home.writes)}")
    trial.note(trial.start(on_writes(trial.root, kill)).wait(), killed=True)


# Where it writes.


def full_disk(trial: Trial) -> None:
    """A file system that is too small, and then is made larger."""
    trial.root.mkdir()
    size = int(trial.rng.integers(*_SIZES_KIB))
    _mount(trial.root, f"size={size}k")
    try:
        trial.begin("nothing")
        trial.did(f"{size} KiB of disk")
        trial.note(trial.start().wait())
        subprocess.run(["mount", "-o", "remount,size=64m", trial.root], check=True)
        _out_of(trial)
    finally:
        subprocess.run(["umount", trial.root], check=True)


def read_only_disk(trial: Trial) -> None:
    """A file system that is mounted to be read alone, and then to be written to."""
    trial.root.mkdir()
    _mount(trial.root, "size=64m")
    try:
        _random_place(trial)
        subprocess.run(["mount", "-o", "remount,ro", trial.root], check=True)
        trial.did("mounted read-only")
        trial.note(trial.start().wait())
        subprocess.run(["mount", "-o", "remount,rw", trial.root], check=True)
        _out_of(trial)
    finally:
        subprocess.run(["umount", trial.root], check=True)


def _mount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)


def _out_of(trial: Trial) -> None:
    """Finishes here, where the fault still holds its directory."""
    trial.result = trial.finish()


def read_only_directory(trial: Trial) -> None:
    """A directory within the work directory that may not be written to for a while."""
    _random_place(trial)
    trial.root.mkdir(exist_ok=True)
    inside = [path for path in sorted(trial.root.rglob("*")) if path.is_dir()]
    path = trial.root if not inside else inside[trial.rng.integers(len(inside))]
    path.chmod(0o500)
    trial.did(f"0500 on {path.relative_to(trial.root)}")
    ended = trial.note(trial.start(_without_privilege).wait())
    path.chmod(0o700)
    if ended.code == 0:
        trial.did("which nothing wrote to")


def too_large(trial: Trial) -> None:
    """No file may be larger than a limit, as a quota has it."""
    import resource

    _random_place(trial)
    most = int(trial.rng.integers(0, 40_000))
    trial.did(f"files of {most} bytes at most")

    def limit() -> None:
        # Notes of the trial are written by the same process.
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    trial.note(trial.start(limit).wait())


def _without_privilege() -> None:
    """Root may write everywhere; this process, and its threads, may not any more."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        sets = (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        for index in range(3):
            sets[index] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert libc.capset(header, sets) == 0, ctypes.get_errno()


# What is on the disk.


def damaged_checkpoint(trial: Trial) -> None:
    trial.begin(str(trial.rng.choice(["experts", "router"])))
    _damage(trial, sorted(trial.root.glob("*/checkpoints/**/*")))


def damaged_bundle(trial: Trial) -> None:
    trial.begin("done")
    _damage(trial, sorted(trial.root.glob("bundle/*")))


def damaged_data(trial: Trial) -> None:
    """ArrayRecord, tokens, packing plan: what is made once and read again."""
    trial.begin(str(trial.rng.choice(["data", "experts", "router"])))
    _damage(trial, sorted(trial.root.glob("data/**/*")))


def damaged_notes(trial: Trial) -> None:
    """config.json, run.json, metrics.jsonl."""
    trial.begin(str(trial.rng.choice(["experts", "router", "done"])))
    path = trial.root / str(trial.rng.choice(["config.json", "run.json", "metrics.jsonl"]))
    # Metrics are a log without a checksum: only their last line may be torn, as by a crash.
    _damage(trial, [path], only_end=path.suffix == ".jsonl")


def _damage(trial: Trial, paths: list[Path], *, only_end: bool = False) -> None:
    files = [path for path in paths if path.is_file() and path.stat().st_size]
    path = files[trial.rng.integers(len(files))]
    content = bytearray(path.read_bytes())
    if only_end or trial.rng.random() < 0.4:
        first = len(content) - min(len(content), 200) if only_end else 0
        length = int(trial.rng.integers(first, len(content)))
        trial.did(f"{path.relative_to(trial.root)} cut to {length} of {len(content)} bytes")
        path.write_bytes(content[:length])
    else:
        place, bit = int(trial.rng.integers(len(content))), int(trial.rng.integers(8))
        content[place] ^= 1 << bit
        trial.did(f"bit {bit} of byte {place} flipped in {path.relative_to(trial.root)}")
        path.write_bytes(content)


def changed_input(trial: Trial) -> None:
    """A file of the corpus or the base goes or changes, between two runs or in the midst of one."""
    files = [trial.home.corpus, *sorted(trial.home.base.iterdir())]
    path = files[trial.rng.integers(len(files))] if trial.rng.random() < 0.6 else files[0]
    kind = str(trial.rng.choice(["removed", "cut", "flipped", "flipped, dated back"]))
    change = int(trial.rng.integers(1 << 30))
    place = int(trial.rng.choice([-1, *range(len(trial.home.writes))]))
    if at_rest := bool(trial.rng.random() < 0.5):
        trial.begin(str(trial.rng.choice(["experts", "router", "done"])))
    else:
        trial.begin("nothing")
    trial.did(f"{path.name} {kind} {'at rest' if at_rest else f'at change {place}'}")

    def alter(number: int, _: str) -> None:
        if number == place + 1 and path.exists():
            _alter(path, kind, change)

    if at_rest:
        _alter(path, kind, change)
    try:
        ended = trial.note(trial.start(None if at_rest else on_writes(trial.root, alter)).wait())
        if ended.code == 0:
            _unless_declared(trial)
    finally:
        trial.home.restore_inputs()


def _alter(path: Path, kind: str, change: int) -> None:
    status, content = path.stat(), bytearray(path.read_bytes())
    if kind == "removed":
        path.unlink()
    elif kind == "cut":
        os.truncate(path, change % len(content))
    else:
        content[change % len(content)] ^= 1
        path.write_bytes(content)
        if "dated back" in kind:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _unless_declared(trial: Trial) -> None:
    """What came out of other inputs may differ where the bundle says that they are others."""
    found, wanted = outcome(trial.root)["provenance"], trial.home.outcome["provenance"]
    if found == wanted:
        trial.compare()
    else:
        trial.did("the bundle names its other inputs")


# Time, and company.


def jumping_clock(trial: Trial) -> None:
    """The clock jumps by up to ten years, back and forth, in a run and before the next one."""
    trial.begin("nothing")
    seed = int(trial.rng.integers(1 << 30))

    def prepare() -> None:
        rng, offset, tell = np.random.default_rng(seed), 0.0, time.time

        def now() -> float:
            nonlocal offset
            if rng.random() < 0.01:
                offset = rng.uniform(-1, 1) * 10.0 ** rng.integers(0, 9)
            return tell() + offset

        time.time, time.time_ns = now, lambda: int(now() * 1e9)

    attempt = trial.start(prepare)
    if (ended := attempt.wait(until=trial.rng.uniform(0.2, 1) * trial.home.seconds)) is None:
        number = signal.SIGKILL if trial.rng.random() < 0.5 else signal.SIGTERM
        attempt.send(number)
        trial.did(signal.Signals(number).name)
        ended = attempt.wait()
    trial.note(ended, killed=True)
    for path in trial.root.rglob("*"):
        when = time.time() + trial.rng.uniform(-1, 1) * 10.0 ** trial.rng.integers(0, 9)
        os.utime(path, (when, when))


def two_runs(trial: Trial) -> None:
    """A second run in the same work directory, at a random moment of the first."""
    _random_place(trial)
    first = trial.start()
    early = first.wait(until=trial.rng.uniform(0.0, 1.0) * trial.home.seconds)
    second = trial.start(notes="second")
    trial.note(second.wait())
    if early is None and trial.rng.random() < 0.5:
        first.send(signal.SIGKILL)
        trial.did("the first killed")
    trial.note(early or first.wait(), killed=True)


FAULTS: dict[str, tuple[str, Callable[[Trial], None]]] = {
    "killed": ("SIGKILL at a random moment", killed),
    "killed_twice": ("SIGKILL, and again in the second run", killed_twice),
    "killed_writing": ("SIGKILL before a random change to a file", killed_writing),
    "killed_in_checkpoint": ("SIGKILL within a checkpoint's write", killed_in_checkpoint),
    "terminated": ("SIGTERM at a random moment", terminated),
    "interrupted": ("Ctrl-C at a random moment", interrupted),
    "full_disk": ("disk full (a tmpfs of 40 to 900 KiB)", full_disk),
    "too_large": ("files limited to 0 to 40 kB", too_large),
    "read_only_disk": ("file system read-only", read_only_disk),
    "read_only_directory": ("a directory read-only", read_only_directory),
    "damaged_checkpoint": ("a file of the checkpoints cut, or a bit flipped", damaged_checkpoint),
    "damaged_bundle": ("the same in the bundle", damaged_bundle),
    "damaged_data": ("the same in built data", damaged_data),
    "damaged_notes": ("the same in config.json, run.json; metrics.jsonl cut", damaged_notes),
    "changed_input": ("a file of corpus or base removed, cut or changed", changed_input),
    "jumping_clock": ("clock jumps, files of other dates", jumping_clock),
    "two_runs": ("two runs in one work directory", two_runs),
}
MOUNT = ("full_disk", "read_only_disk")  # these need root
