"""Errors meant for people: one sentence that says what is wrong and where.

The command line prints the sentence on stderr and exits with code 2; Python
callers catch `StreamerError`.
"""


class StreamerError(Exception):
    """Something the user can act on. `str(error)` is one line."""


class CheckpointError(StreamerError):
    """A checkpoint that is missing, damaged or of a form that cannot be read."""


class LayoutError(CheckpointError):
    """A checkpoint whose experts cannot be paged in place; convert it first."""


class BudgetError(StreamerError):
    """A memory budget that the model cannot run in."""


class UsageError(StreamerError):
    """An option whose value makes no sense."""
