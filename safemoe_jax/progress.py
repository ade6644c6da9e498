"""Progress of long work: a bar with ETA on a terminal, plain lines elsewhere."""

import time
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False)
# In a log a line stays a line; without this it would be broken at 80 columns.
console.soft_wrap = not console.is_terminal

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 15.0


class Meter:
    """What the caller of `track` uses to show a note beside the bar."""

    def __init__(self) -> None:
        self.note = ""


def track(
    items: Iterable[Item],
    *,
    total: int,
    start: int = 0,
    description: str,
    meter: Meter | None = None,
) -> Iterator[Item]:
    """Yields `items` and shows how far it is.

    Args:
      items: what to go through.
      total: how many there are when all is done, those before `start` included.
      start: how many were done earlier.
      description: what is being done, a few words; where it is empty, only a terminal shows it.
      meter: its `note` is shown beside the count; the caller may change it as it goes.
    """
    meter = meter or Meter()
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(description, total=total, completed=start, note=meter.note)
            for item in items:
                yield item
                progress.update(task, advance=1, note=meter.note)
        return

    began = last = time.monotonic()
    for done, item in enumerate(items, start=start + 1):
        yield item
        now = time.monotonic()
        if description and (now - last >= _SECONDS_BETWEEN_LINES or done == total):
            eta = (now - began) / (done - start) * (total - done)
            console.print(f"{description}: {done}/{total}, eta {eta:.0f} s {meter.note}".rstrip())
            last = now


def printable(text: str) -> str:
    """Text whose control characters, with which it could steer a terminal, are visible."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c
        for c in text
    )
