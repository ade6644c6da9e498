"""`safemoe chat`: a conversation in the terminal, with the router's gates under each answer."""

import contextlib
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from rich.cells import cell_len, chop_cells
from rich.columns import Columns
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.errors import UserError
from safemoe_jax.generate import check_sampling, check_unicode
from safemoe_jax.inference.engine import Engine, Request
from safemoe_jax.loaded import on_devices
from safemoe_jax.model.lora import Routed
from safemoe_jax.progress import console, printable
from safemoe_jax.serving import keyboard
from safemoe_jax.serving.text import TextStream
from safemoe_jax.weights.bundle import read_bundle

_BAR = 10  # characters from no gate to a whole one
_HELP = "Ctrl-C stops an answer, Ctrl-D ends, /new begins anew"
# Of one word, so that what begins with a path can still be asked.
_COMMAND = re.compile(r"/\w*")


def chat(
    directory: Path,
    *,
    system: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    """Talks until Ctrl-D, or Ctrl-C where no answer runs; Ctrl-C in an answer ends the answer.

    Nothing of it is written to disk.

    Args:
      directory: the bundle.
      system: a first turn by the system; none if empty.
      max_new_tokens, temperature, top_p, seed: see `inference.engine.Request`.

    Raises:
      UserError: without a terminal, on a bundle that is refused, or bad settings.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    check_unicode(system, "--system")
    if not (console.is_terminal and sys.stdin.isatty()):
        raise UserError("chat needs a terminal; `safemoe generate` reads standard input")
    keyboard.edit_lines()
    # SIGINT is an answer's; whoever wants an end of all sends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    bundle = read_bundle(directory, None)
    with console.status(Text(f"loading {directory} and its base {bundle.base.source}")):
        loaded = on_devices(directory, bundle)
    with jax.set_mesh(loaded.mesh):
        speaker = Speaker(
            Engine(loaded.model, loaded.variables, Routed(), slots=1),
            ChatFormat(loaded.base.tokenizer),
            bundle.config.data.domains,
        )
        console.print(_HELP, style="dim")
        start = [{"role": "system", "content": system}] if system else []
        turns = list(start)
        while (text := _read()) is not None:
            if text == "/new":
                turns = list(start)
                console.print("a new conversation", style="dim")
                continue
            if _COMMAND.fullmatch(text):
                console.print(_HELP, style="dim" if text == "/help" else "yellow")
                continue
            asked = [*turns, {"role": "user", "content": text}]
            prompt = speaker.format.prompt_ids(asked)
            most = loaded.model.spec.max_positions
            room = most - len(prompt)
            if room < 1:
                remedy = "say less" if turns == start else "say less, or begin anew by /new"
                console.print(
                    f"with that it has {len(prompt)} tokens, of {most} at most; {remedy}",
                    style="yellow",
                )
                continue
            settings = (min(max_new_tokens, room), temperature, top_p, seed)
            said = speaker.say(Request(prompt, speaker.format.ends, *settings))
            if said.strip():
                turns = [*asked, {"role": "assistant", "content": said}]


def _read() -> str | None:
    """The user's next turn; None at the end."""
    while True:
        try:
            text = input("> ").strip()
            text.encode()  # raises UnicodeEncodeError for bytes that are no text
        except (EOFError, KeyboardInterrupt):
            console.print()
            return None
        except UnicodeError:
            console.print("that is no UTF-8; say it again", style="yellow")
            continue
        if text:
            return text


class Speaker:
    """Answers one request at a time, and shows the answer while it comes."""

    def __init__(self, engine: Engine, format: ChatFormat, domains: Sequence[str]) -> None:
        self.format, self._engine, self._domains = format, engine, domains

    def say(self, request: Request) -> str:
        """Prints an answer, why it broke off if it did, and its mean gates -> the answer."""
        text, said, line, finish = TextStream(self.format.text), "", "", None
        gates_TE: list[np.ndarray] = []
        self._engine.submit(request)
        with (
            _interruptible(request),
            keyboard.unseen(),
            Live(
                # The first prompt of each length waits for the compiler.
                Text("reading the prompt", style="dim"),
                console=console,
                transient=True,
                refresh_per_second=12,
            ) as live,
        ):
            while self._engine.busy:
                for event in self._engine.step():
                    finish = event.finish
                    assert event.gates_LE is not None  # the router's, which `chat` decodes with
                    gates_TE.append(event.gates_LE.mean(axis=0))
                    if event.token is None:
                        continue
                    piece = text.add(event.token)
                    said += piece
                    finished, line = _lines(line + piece, console.width)
                    for one in finished:
                        console.print(Text(one))
                    live.update(self._view(line, gates_TE[-1]))
        rest = text.end()
        finished, line = _lines(line + rest, console.width)
        for one in (*finished, line) if line else finished:
            console.print(Text(one))
        if finish is None:
            console.print("stopped", style="dim")
        elif finish == "length":
            console.print(f"cut off after {request.max_new_tokens} tokens", style="dim")
        if gates_TE:
            gates = zip(self._domains, np.mean(gates_TE, axis=0), strict=True)
            shown = ("gates, mean:", *(f"{domain} {_number(gate)}" for domain, gate in gates))
            console.print(Columns([Text(one, style="dim") for one in shown], padding=(0, 2)))
        return said + rest

    def _view(self, line: str, gates_E: np.ndarray) -> Group:
        """What moves under the lines that are finished: the next one, and the newest gates."""
        table = Table.grid(padding=(0, 1))
        for domain, gate in zip(self._domains, gates_E, strict=True):
            table.add_row(Text(domain, style="dim"), _bar(gate), Text(_number(gate), style="dim"))
        return Group(Text(line), table)


def _number(gate: float) -> str:
    return f"{gate:+z.2f}"  # z: no -0.00


def _bar(gate: float) -> Text:
    """A gate in [-1, 1]: to the right what is added, to the left what is subtracted."""
    size = min(round(abs(gate) * _BAR), _BAR)
    left, right = ("" if gate >= 0 else "█" * size), ("█" * size if gate >= 0 else "")
    return Text.assemble((left.rjust(_BAR), "magenta"), ("│", "dim"), (right.ljust(_BAR), "green"))


def _lines(text: str, width: int) -> tuple[list[str], str]:
    """Cuts printable text into lines that are finished, at most `width` wide, and the one that is
    not."""
    *lines, rest = printable(text).expandtabs(4).split("\n")
    while cell_len(rest) > width:
        fits = chop_cells(rest, width)[0]
        cut = fits.rfind(" ") + 1 or len(fits)
        lines.append(rest[:cut])
        rest = rest[cut:]
    return lines, rest


@contextlib.contextmanager
def _interruptible(request: Request):
    """Ctrl-C ends the answer between two steps; a second one, while that takes long, ends all.

    An exception inside a step would lose the cache that the step was given.
    """

    asked = False  # an answer may be over before its last step is

    def stop(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        request.over = asked = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
