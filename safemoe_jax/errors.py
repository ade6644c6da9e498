"""What a user or a machine can cause, and is said in one line."""

import errno
import os
import re

_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or have the quota raised",
    errno.EFBIG: "allow larger files there",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it readable and writable for this user",
    errno.EPERM: "make it readable and writable for this user",
    errno.EIO: "see whether the disk is well",
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
    """A line on a full disk, a read-only one and their like; None where it is something else.

    Args:
      error: what was raised; whatever it was raised from or in handling of counts, too.
    """
    while error is not None:
        number, place = None, None
        if isinstance(error, OSError):
            number, place = error.errno, error.filename
        elif found := _TENSORSTORE.search(str(error)):
            number = int(found[1])
        if number in _REMEDIES:
            where = f" ({place})" if place else ""
            return (
                f"{os.strerror(number)}{where}; {_REMEDIES[number]}, and the same command goes on "
                "from what is done"
            )
        error = error.__cause__ or error.__context__
    return None
