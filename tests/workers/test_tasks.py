"""Tasks in this process."""

from collections.abc import Callable
from concurrent.futures import Future

import pytest

from search.workers.tasks import InProcess


def test_in_process_a_task_runs_at_once_and_its_error_is_in_the_future() -> None:
    with InProcess() as executor:
        done: list[int] = []
        future: Future[None] = executor.submit(done.append, 1)
        assert (done, future.done()) == ([1], True)
        assert executor.submit(divmod, 7, 2).result() == (3, 1)
        failed = executor.submit(divmod, 7, 0)
        with pytest.raises(ZeroDivisionError):
            failed.result()


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted_in_a_bare_except() -> None:
    try:
        interrupt()
    except:  # noqa: E722 - as in libraries
        raise TypeError("no such type")  # noqa: B904


@pytest.mark.parametrize("task", [interrupt, interrupted_in_a_bare_except])
def test_in_process_an_interruption_is_raised_at_once(task: Callable[[], None]) -> None:
    with InProcess() as executor, pytest.raises(KeyboardInterrupt):
        executor.submit(task)
