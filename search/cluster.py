"""The workers of a Dask cluster: who may run tasks, and what each is given once.

Which worker runs a task is decided here, so that a task ends with its worker and is not run again
behind the engine's back. `trial.Worker.run_trial` sees to it that no place of a study is run twice
where such a worker lives on, cut off from the scheduler alone.
"""

import asyncio
import importlib.metadata
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, Security
from distributed.client import FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.core import rpc
from distributed.scheduler import KilledWorker

from search import tasks
from search.config import InputError, RunError, StudyConfig, one_line
from search.data import Dataset

_LOOK = 1.0  # seconds between two looks at who is there
_TIMEOUT = 10  # seconds to find the scheduler at first
_PATIENCE = 60  # seconds that a scheduler which went away gets to come back
_PACKAGES = ("search", "tensorflow", "keras", "optuna", "mlflow")
_TRIM = "MALLOC_TRIM_THRESHOLD_"
_SMALL = 2**20  # bytes
_SETTINGS = f"{_TRIM}=1073741824 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TOP_PAD_=67108864"


@dataclass
class _Member:
    """A worker that may run tasks, `threads` at once; `open`: and takes new ones."""

    threads: int
    executor: Executor
    open: bool = True
    running: set["Future[Any]"] = field(default_factory=set)


class Cluster:
    """The workers behind `config.scheduler`; they may come and go while it runs."""

    deaths = (
        *(CancelledError, FutureCancelledError, KilledWorker, CommClosedError),
        tasks.NotPrepared,
        tasks.Unfit,
    )
    remedy = "(out of memory?); give the cluster's workers more memory or fewer threads"

    def __init__(
        self,
        config: StudyConfig,
        parent_run: str,
        dataset: Dataset,
        say: Callable[[str], None],
    ) -> None:
        assert config.scheduler is not None
        self._address = config.scheduler
        self._limit = config.workers
        self._prepare = parent_run, config, dataset
        self._say = say
        self._client = connect(config.scheduler)
        self._members: dict[str, _Member] = {}
        self._refused: dict[str, str] = {}
        self._next_look = 0.0
        self._told: tuple[int, int] | None = None

    def slots(self) -> int:
        """How many tasks run at once: as many as the open workers have threads."""
        self._look()
        total = sum(m.threads for m in self._members.values() if m.open)
        if not total and self._refused and not any(m.running for m in self._members.values()):
            address, why = next(iter(self._refused.items()))
            raise RunError(f"no worker of {self._address} can be used: {address}: {why}")
        return total if self._limit is None else min(total, self._limit)

    def submit(self, task: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Start `task` on the worker with the most free threads."""
        member = max(
            (m for m in self._members.values() if m.open), key=lambda m: m.threads - len(m.running)
        )
        future = member.executor.submit(task, *arguments)
        member.running.add(future)
        return future

    def wait(self, running: "Collection[Future[Any]]") -> "set[Future[Any]]":
        """Those that have ended, their workers' end included; or none, after a while."""
        if running:
            wait(running, timeout=_LOOK, return_when=FIRST_COMPLETED)
        else:
            time.sleep(_LOOK)  # no worker is there
        self._look()
        done = {future for future in running if future.done()}
        for address, member in list(self._members.items()):
            ended = done & member.running
            member.running -= ended
            for future in ended:
                self._learn(address, future)
        return done

    def bury(self) -> None:
        """Look at once who is left."""
        self._next_look = 0.0

    def close(self, *, now: bool) -> None:
        """Leave the cluster; `now`: what runs there finds at its next write that it was ended."""
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        try:
            if not now and self._members:
                self._run(tasks.forget, self._prepare[0], workers=list(self._members))
        finally:
            self._client.close(timeout=5)

    # ---- who is there ------------------------------------------------------------------------

    def _look(self) -> None:
        """Let go of the workers that have left, and take in those that have come."""
        if time.monotonic() < self._next_look:
            return
        present = self._present()
        for address in [address for address in self._members if address not in present]:
            self._leave(address)
        self._refused = {at: why for at, why in self._refused.items() if at in present}
        for address, member in self._members.items():
            member.open = present[address]["status"] == "running"
        new = {
            address: int(worker["nthreads"])
            for address, worker in present.items()
            if worker["status"] == "running"
            and address not in self._members
            and address not in self._refused
        }
        if new:
            self._take_in(new)
        self._tell()
        self._next_look = time.monotonic() + _LOOK

    def _present(self) -> Mapping[str, Any]:
        """What the scheduler says of every worker; it gets a while to come back."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                found: Mapping[str, Any] = self._client.scheduler_info()["workers"]
                return found
            except Exception as error:  # of a lost connection Dask raises many kinds
                if time.monotonic() > deadline or self._client.status == "closed":
                    raise RunError(
                        f"the Dask scheduler {self._address} went away and did not come back "
                        f"({one_line(error)}); start it and run the same command again"
                    ) from None
                time.sleep(_LOOK)

    def _leave(self, address: str) -> None:
        for future in self._members.pop(address).running:
            future.cancel()

    def _take_in(self, new: Mapping[str, int]) -> None:
        """Check new workers, and give the fit ones the configuration and the dataset."""
        for address, why in self._unfit(list(new)):
            if address not in self._refused:
                self._refuse(address, why)
        fit = [address for address in new if address not in self._refused]
        for threads in set(new.values()):
            alike = [address for address in fit if new[address] == threads]
            if alike:
                self._run(tasks.prepare, *self._prepare, threads, workers=alike)
        for address in fit:
            pinned = {"workers": [address], "pure": False}
            executor = self._client.get_executor(**pinned)
            self._members[address] = _Member(new[address], executor)

    def _unfit(self, addresses: list[str]) -> Iterator[tuple[str, str]]:
        """Which of these workers can't be used, and why, in one line with what to do.

        They are asked by the standard library's functions, which are everywhere.
        """
        for package in _PACKAGES:
            wanted = importlib.metadata.version(package)
            found = self._run(importlib.metadata.version, package, workers=addresses)
            for address, version in found.items():
                if isinstance(version, importlib.metadata.PackageNotFoundError):
                    has = f"it has no {package}"
                elif isinstance(version, Exception):
                    has = f"it does not answer ({one_line(version)})"
                elif version != wanted:
                    has = f"it has {package} {version}"
                else:
                    continue
                yield (
                    address,
                    f"{has}, and this process has {package} {wanted}; install the same there, and "
                    "start it again",
                )
        trims = self._run(os.getenv, _TRIM, workers=addresses)
        slow = [trim for trim in trims.values() if str(trim).isdigit() and int(trim) < _SMALL]
        if slow:
            self._say(
                f"{len(slow)} of {len(trims)} workers have {_TRIM}={slow[0]}, which Dask sets, and "
                f"train about 1.5 times as slowly as with {_SETTINGS} in their environment"
            )

    def _run(
        self, function: Callable[..., Any], *arguments: Any, workers: list[str]
    ) -> dict[str, Any]:
        """What `function` returns, or raises, in each of the workers."""
        found: dict[str, Any] = self._client.run(
            function, *arguments, workers=workers, on_error="return"
        )
        return found

    def _refuse(self, address: str, why: str) -> None:
        self._refused[address] = why
        self._say(f"worker {address} is refused: {why}")

    def _learn(self, address: str, future: "Future[Any]") -> None:
        """Take note of what a task's end says of its worker."""
        error = None if future.cancelled() else future.exception()
        if isinstance(error, tasks.NotPrepared | tasks.Unfit):
            self._leave(address)
            if isinstance(error, tasks.Unfit):
                self._refuse(address, str(error))

    def _tell(self) -> None:
        """Say how many workers there are, where that has changed."""
        now = len(self._members), sum(member.threads for member in self._members.values())
        if now != self._told:
            self._told = now
            workers, threads = now
            self._say(
                f"{self._address}: {workers} worker{'s' * (workers != 1)}, "
                f"{threads} trial{'s' * (threads != 1)} at once"
                + ("" if workers else "; waiting for some, Ctrl-C ends that")
            )


def connect(address: str) -> Client:
    """A client of the scheduler at `address`, which comes back to a scheduler that does."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # errors are raised as well
    return Client(address, timeout=_PATIENCE, set_as_default=False)


def check(address: str) -> None:
    """Raise InputError where no scheduler answers at `address`."""

    async def ask() -> str:
        arguments = Security().get_connection_args("client")
        async with rpc(address, timeout=_TIMEOUT, connection_args=arguments) as there:
            return str((await there.identity())["type"])

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    try:
        found = asyncio.run(ask())
        problem = "" if found == "Scheduler" else f"a {found.lower()} is there"
    except Exception as error:  # a bad address, a refused connection, TLS
        problem = one_line(error)
    if problem:
        raise InputError(
            f"--scheduler must be the address of a running Dask scheduler, but {address!r} is not: "
            f"{problem}; start one with dask scheduler, or leave the option out"
        )
