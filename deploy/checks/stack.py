"""The services of compose.yaml, as podman-compose starts them."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

from checks.images import DEPLOY
from checks.podman import (
    Failure,
    await_that,
    call,
    expect_exit,
    has_ended,
    logs_on_failure,
    podman,
    step,
    succeeds,
)

STUDY = ["python", "-m", "study", "--scheduler=tcp://scheduler:8786"]
PASSWORD = "not:very\\secret"  # with the characters that a .pgpass has to escape
_CHECKED = ("postgres", "mlflow", "scheduler")  # have a health check


def container(service: str, number: int = 1) -> str:
    """The name that podman-compose gives a container of a service."""
    return f"search_{service}_{number}"


class Stack:
    """A copy of compose.yaml with another command of the study, and a number of workers."""

    def __init__(self, folder: Path, command: list[str] | None = None) -> None:
        self._folder = folder / "run" / "deploy"
        shutil.copytree(DEPLOY, self._folder, dirs_exist_ok=True)
        (self._folder / "secrets").mkdir(mode=0o700, exist_ok=True)
        (self._folder / "secrets" / "password").write_text(f"{PASSWORD}\n")
        self.command = command
        self.workers = 1

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The stores and the scheduler run in the block; show the logs if something fails."""
        with logs_on_failure():
            step("PostgreSQL, its two databases", lambda: self.start("postgres"))
            step("MLflow server, scheduler", lambda: self.start("mlflow", "scheduler"))
            yield
            step("taken down", lambda: self._compose("down", "--volumes"))

    def _compose(self, *arguments: str) -> None:
        """Run a command of podman-compose on compose.yaml and what differs here."""
        override = {"services": {"study": {"command": self.command}}}
        (self._folder / "check.yaml").write_text(json.dumps(override))
        files = [f"--file={self._folder / name}" for name in ("compose.yaml", "check.yaml")]
        call("podman-compose", *files, *arguments)

    def start(self, *services: str) -> None:
        """Start services, and wait until those with a health check are healthy.

        Podman without systemd does not repeat health checks, and podman-compose waits for none.
        """
        options = ("--detach", "--no-build", "--no-deps", f"--scale=worker={self.workers}")
        self._compose("up", *options, *services)
        for service in services:
            if service in _CHECKED:
                await_health(service)

    def finished(self) -> int:
        """How many trials the log of the running study names as finished."""
        if has_ended(container("study")):
            raise Failure("the study ended too early")
        return len(finished_trials())

    def await_end(self) -> None:
        """Wait until the study ends, successfully."""
        await_that("the study ends", partial(has_ended, container("study")))
        expect_exit(container("study"), 0)


def await_health(service: str) -> None:
    """Wait until the health check of a service succeeds."""
    healthy = partial(succeeds, "healthcheck", "run", container(service))
    await_that(f"{service} is healthy", healthy)


def finished_trials() -> list[float]:
    """When each trial finished that the study's log names, in seconds since 1970."""
    lines = podman("logs", "--timestamps", container("study")).splitlines()
    times = [line.split()[0] for line in lines if re.match(r"\S+ trial +\d+ +COMPLETE ", line)]
    return [datetime.fromisoformat(time).timestamp() for time in times]
