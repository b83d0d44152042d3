"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in what the user gave: shown as one line, without a traceback, with exit status 2.

    The message says what is wrong, what was got, what was expected, and the remedy.
    """
