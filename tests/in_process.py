"""The command in this process: its digits, lines and exit code, without a process's beginning.

For tests of what the command does. Those of how it starts, what it imports, its workers, signals
and its end have a process: `conftest.command`.
"""

import contextlib
import gc
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from search import cli

_NOT_SHOWN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


def command(folder: Path, *options: str) -> tuple[int, str, str]:
    """As `conftest.command`; TensorFlow keeps the threads that it has started with."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        mock.patch.object(gc, "freeze"),  # the process lives on
        _errors_to(err),
        contextlib.redirect_stdout(out),
    ):
        code = cli.main([*options])
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def _errors_to(written: io.StringIO) -> Iterator[None]:
    """Write what Python, native code and warnings say on stderr to `written`."""
    with tempfile.TemporaryFile("w+") as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            with (
                contextlib.redirect_stderr(file),
                warnings.catch_warnings(record=True) as warned,
            ):
                warnings.simplefilter("default")  # as Python starts
                for kind in _NOT_SHOWN:
                    warnings.simplefilter("ignore", kind)
                yield
        finally:
            file.flush()
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            written.write(file.read())
    for each in warned:
        written.write(
            warnings.formatwarning(each.message, each.category, each.filename, each.lineno)
        )
