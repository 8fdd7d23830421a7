"""The one exception whose message is meant for the person at the terminal; raised everywhere.

The command line prints a `UserError` as its single sentence and exits with status 2; any other
exception is a defect of Etude and keeps its traceback.
"""


class UserError(ValueError):
    """Bad input or a missing part: one sentence that says what, where, and what to type."""
