"""Ends of a run that are told in one line, without a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: exit status 2.

    The message says what is wrong, what was got, what was expected, and the remedy.
    """


class FolderInUse(UserError):
    """Another training has the run folder, and did not end while this one waited for it."""


class Stopped(Exception):
    """A run was asked to stop, and left a checkpoint to go on from (raised on every rank)."""


class Unreachable(Exception):
    """Another process of the training did not do its part in time; a new start may go well."""
