"""The errors a user can cause.

Each carries two lines: what is wrong and what to do about it. `cli` prints them without a
traceback and exits with `exit_code`. Neither line ever contains personal text: file names are
fine, their contents are not.
"""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program is not as it has to be (exit code 1).

    Args:
        what: one line that says what is wrong.
        fix: one line that says what to do.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n{self.fix}"


class NothingToLearn(UserError):
    """The pairs hold no contrast, or too few of them do."""


class UsageError(UserError):
    """The command line or a recipe asks for something that does not exist (exit code 2)."""

    exit_code = 2
