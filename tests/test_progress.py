import io
import itertools
import subprocess
import sys

import pytest
from rich.console import Console

from safemoe_jax import progress
from safemoe_jax.progress import Meter, track


@pytest.fixture
def screen(monkeypatch):
    """Puts another console in place and returns what is written to it."""

    def make(*, terminal: bool) -> io.StringIO:
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=100, highlight=False)
        monkeypatch.setattr(progress, "console", console)
        return file

    return make


@pytest.fixture
def clock(monkeypatch):
    """A clock that each look moves on by ten seconds."""
    seconds = itertools.count(0, 10)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))


@pytest.mark.parametrize("terminal", [True, False])
def test_all_items_pass_in_order(screen, terminal):
    screen(terminal=terminal)
    assert list(track(iter("abc"), total=3, description="count")) == ["a", "b", "c"]


def test_plain_lines_with_eta_off_a_terminal(screen, clock):
    written = screen(terminal=False)
    meter = Meter()
    for item in track(range(5), total=5, description="train", meter=meter):
        meter.note = f"loss {item}"
    # One line in 15 seconds at most, ten seconds an item; the note is the one of the item before.
    assert written.getvalue().splitlines() == [
        "train: 2/5, eta 30 s loss 1",
        "train: 4/5, eta 10 s loss 3",
        "train: 5/5, eta 0 s loss 4",
    ]


def test_a_line_stays_a_line_off_a_terminal(capfd):
    line = "one " * 60
    script = f"from safemoe_jax.progress import console; console.print({line!r})"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert capfd.readouterr().out == line + "\n"


def test_eta_counts_only_what_this_process_has_done(screen, clock):
    written = screen(terminal=False)
    list(track(range(96, 100), total=100, start=96, description="go on"))
    assert written.getvalue().splitlines()[0] == "go on: 98/100, eta 20 s"


def test_short_work_says_one_line_when_it_is_done(screen):
    written = screen(terminal=False)
    list(track(range(1000), total=1000, description="count"))
    assert written.getvalue() == "count: 1000/1000, eta 0 s\n"


def test_a_bar_on_a_terminal(screen):
    written = screen(terminal=True)
    meter = Meter()
    for _ in track(range(2, 4), total=4, start=2, description="train", meter=meter):
        meter.note = "loss 0.5"
    text = written.getvalue()
    assert "\x1b[" in text  # it is drawn in place
    assert "train" in text
    assert "4/4" in text
    assert "eta" in text
    assert "loss 0.5" in text
