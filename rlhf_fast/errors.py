# SPDX-License-Identifier: Apache-2.0
"""What the trainer raises on purpose. The command line shows either as one message without a traceback."""


class UserError(Exception):
    """Something the user can put right: a wrong key, a bad data line, a folder that exists. Exit code 2.

    The message says what was wanted, what came, and what to do about it.
    """

    on_every_rank = False  # True once every process of the run has raised it


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came, and everything was saved before this was raised. Exit code 130."""
