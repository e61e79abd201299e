"""What breaks, and goes on."""

import urllib.request
from functools import partial
from pathlib import Path

from checks.images import CHECKS
from checks.podman import Failure, await_that, expect_exit, is_running, kill, log, podman, step
from checks.stack import STUDY, Stack, await_health, container

TRIALS = 12
SMALL = ["--epochs=2", "--hidden-units=8,16,32", "--pruner=none", f"--n-trials={TRIALS}"]
_PAGES = {5000: ("", "MLflow"), 8080: ("dashboard", "Optuna"), 8787: ("status", "Bokeh")}
_ERRORS = (("postgres", "metric_pk"), ("study", "import Git"), ("study", "Traceback"))


def check(folder: Path) -> None:
    """Run a small study with one worker, and kill or restart everything that it needs"""
    stack = Stack(folder, [*STUDY, *SMALL])
    with stack.running():
        step("study started, two trials", partial(_begin, stack))
        step("worker killed, two more trials", partial(_kill_worker, stack))
        step("PostgreSQL restarted, two more trials", partial(_restart, stack, "postgres"))
        step("MLflow server restarted, two more trials", partial(_restart, stack, "mlflow"))
        step("study ended by SIGTERM: exit code 143", _terminate)
        step("study started again, to its end: exit code 0", partial(_finish, stack))
        print(podman("logs", "--tail=16", container("study")), flush=True)
        step("both stores agree, the model in production predicts", _check_stores)
        step("pages answer", check_pages)
        step("logs show no errors", _check_logs)


def _begin(stack: Stack) -> None:
    stack.start("worker", "study", "dashboard")
    _await_trials(stack, 2)


def _await_trials(stack: Stack, more: int) -> None:
    target = stack.finished() + more
    await_that(f"the study has {target} finished trials", lambda: stack.finished() >= target)


def _kill_worker(stack: Stack) -> None:
    killed = kill(container("worker"))
    await_that("the worker runs again", lambda: is_running(container("worker"), but=killed))
    _await_trials(stack, 2)


def _restart(stack: Stack, service: str) -> None:
    podman("restart", container(service))
    _await_trials(stack, 2)


def _terminate() -> None:
    podman("stop", "--time=120", container("study"))
    expect_exit(container("study"), 143)


def _finish(stack: Stack) -> None:
    await_health("mlflow")
    podman("start", container("study"))
    stack.await_end()


def _check_stores() -> None:
    inside = ["exec", "--interactive", container("worker"), "entrypoint", "python"]
    podman(*inside, "-m", "study", "doctor")
    print(podman(*inside, "-", str(TRIALS), given=(CHECKS / "stores.py").read_text()))


def check_pages() -> None:
    """Raise Failure unless the pages that are published show what they should."""
    for port, (path, word) in _PAGES.items():
        page = f"http://127.0.0.1:{port}/{path}"
        await_that(f"{page} shows {word}", partial(shows, page, word))


def shows(page: str, word: str) -> bool:
    """Whether a page answers, and has the word in it."""
    try:
        with urllib.request.urlopen(page, timeout=10) as response:
            return word in response.read().decode()
    except OSError:
        return False


def _check_logs() -> None:
    for service, word in _ERRORS:
        found = [line for line in log(container(service)).splitlines() if word in line]
        if found:
            raise Failure(f"the log of {service} has: {found[0]}")
