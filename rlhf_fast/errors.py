# SPDX-License-Identifier: Apache-2.0
"""The trainer's own exceptions. The command line shows them as one message without a traceback."""


class UserError(Exception):
    """Something that the user can fix: a wrong key, a bad data line, a folder that exists. Exit code 2.

    The message says what was expected, what was given, and what to do about it.
    """

    on_every_rank = False  # True once every process of the run has raised it


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; everything was saved before this was raised. Exit code 130."""


def first_line(error: Exception) -> str:
    """The first line of the message of another library's error; its type if it has none (`TimeoutError()`)."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
