"""How a run ends that can't go on: one line for whatever a user can cause, and an exit code."""

import re

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff]"
)  # control characters, lone surrogates


class InputError(Exception):
    """Something the user gave cannot be used; nothing was created or changed. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """The run had to stop; what it had finished is kept. Exit code 1."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """The user or the system ended the run; `exit_code` is 128 + the signal's number."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


def printable(text: str) -> str:
    """`text` without what terminals obey and databases refuse: such a character becomes its escape.

    Letters of every language stay as they are.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
