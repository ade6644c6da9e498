"""The one error that a user can cause."""


class UserError(ValueError):
    """A mistake in the user's input: what is wrong, the values, and the remedy, in one line.

    The command line prints it without a traceback and exits with code 2. Everything else that is
    raised is a fault of this package and keeps its traceback.
    """
