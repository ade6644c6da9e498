"""The keyboard of `safemoe chat`."""

import contextlib
import sys
import termios
from collections.abc import Iterator


def edit_lines() -> None:
    """From here on `input` edits lines, and a paste is one text, however many lines it has."""
    with contextlib.suppress(ImportError):
        import readline

        # Python turns this off, and each line of a paste would be a turn of its own.
        readline.parse_and_bind("set enable-bracketed-paste on")


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """What is typed in this context on standard input, a terminal, shows only where it is read.

    Shown at once it would be drawn into what moves on the screen, and leave pieces of it behind.
    """
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = list(before)
    silent[3] &= ~termios.ECHO  # [3]: the local modes
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
