"""What a user or a machine can cause, and is said in one line."""

import errno
import os
import re
import sys

_IN_THE_WAY = "name another path, or move away what is there"
_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or have the quota raised",
    errno.EFBIG: "allow larger files there",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it readable and writable for this user",
    errno.EPERM: "make it readable and writable for this user",
    errno.EIO: "see whether the disk is well",
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
}
# tensorstore writes by itself, and its errors are texts.
_TENSORSTORE = re.compile(r"\[os_error_code='(\d+)'\]")


class UserError(ValueError):
    """A mistake in the user's input: what is wrong, the values, and the remedy, in one line.

    The command line prints it without a traceback and exits with code 2. Everything else that is
    raised is a fault of this package and keeps its traceback, but for what the machine refuses
    (`refused_by_the_machine`).
    """


class Unreachable(UserError):
    """Storage behind a URL does not take what it took before: no mistake, perhaps, but an outage.

    The command line exits with code 1, so that a launcher starts the same command again.
    """


def refused_by_the_machine(error: BaseException | None) -> str | None:
    """A line on a full disk, a file in a directory's place and the like; None for anything else.

    Args:
      error: what was raised; whatever it was raised from or in handling of counts, too.
    """
    while error is not None:
        number, place = None, None
        if isinstance(error, OSError):
            number, place = error.errno, error.filename2 or error.filename  # the target of a move
        elif found := _TENSORSTORE.search(str(error)):
            number = int(found[1])
        elif isinstance(error, RuntimeError):  # as writers in C++ raise it, ArrayRecord's for one
            said = [number for number in _REMEDIES if os.strerror(number) in str(error)]
            number = said[0] if said else None
        if number in _REMEDIES:
            where = f" ({place})" if place else ""
            return (
                f"{os.strerror(number)}{where}; {_REMEDIES[number]}, and the same command goes on "
                "from what is done"
            )
        error = error.__cause__ or error.__context__
    return None


def without_echoes(unraisable: "sys.UnraisableHookArgs") -> None:
    """A `sys.unraisablehook` that prints all but the echoes of a save that failed.

    tensorstore goes on with the pieces of it, and each, when it ends, wants to tell an event loop
    that Orbax has closed by then: a traceback each, and no fault of its own.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
