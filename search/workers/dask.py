"""The workers of a Dask cluster: which of them may run tasks, and what each receives once.

This module assigns each task to a worker itself, so that a task ends with its worker and Dask does
not rerun it unnoticed. Where a worker has only lost its connection to the scheduler and is still
alive, `Worker.run_trial` prevents a slot of the study from being run twice.
"""

import contextlib
import importlib.metadata
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from dataclasses import dataclass, field
from typing import Any

from distributed.client import ClosedClientError, FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker

from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.errors import RunError, one_line
from search.training import environment
from search.workers import tasks
from search.workers.scheduler import PATIENCE, connect, run_on

_LOOK = 1.0  # seconds between two checks of the cluster's workers
_TIMEOUT = 10  # seconds that the scheduler has to answer
_SENDING = 600  # seconds to send a dataset to all workers
_PACKAGES = ("search", "tensorflow", "keras", "optuna", "mlflow")
_TRIM = "MALLOC_TRIM_THRESHOLD_"
_SMALL = 2**20  # bytes
_SETTINGS = f"{_TRIM}=1073741824 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TOP_PAD_=67108864"
_DEATHS = (CancelledError, FutureCancelledError, KilledWorker, CommClosedError)
_NOT_STARTED = (tasks.NotPrepared, tasks.Unfit, ClosedClientError)


@dataclass
class _Member:
    """A worker that may run tasks, `threads` at once."""

    threads: int
    executor: Executor
    closed: float | None = None  # since when it accepts no tasks, by the monotonic clock
    running: set["Future[Any]"] = field(default_factory=set)


@dataclass(frozen=True)
class _Refusal:
    """Why a worker may not run tasks, and until when, by the monotonic clock."""

    why: str
    until: float


class DaskBackend:
    """The workers of `config.scheduler`; they may join and leave during the run."""

    most_deaths = 5  # a cluster may reclaim its workers
    remedy = "(out of memory?); give the cluster's workers more memory or fewer threads"

    def __init__(
        self, config: StudyConfig, parent_run: str, dataset: Dataset, report: Callable[[str], None]
    ) -> None:
        assert config.scheduler is not None
        self._address = config.scheduler
        self._limit = config.workers
        self._prepare = parent_run, config, dataset
        self._report = report
        self._client = connect(config.scheduler)
        self._members: dict[str, _Member] = {}
        self._refused: dict[str, _Refusal] = {}
        self._has_worked = False  # a worker has finished a task
        self._warned = False
        self._connection_lost = False
        self._next_look = 0.0
        self._reported: tuple[int, int] | None = None

    def slots(self) -> int:
        """How many tasks run at once: as many as the open workers have threads."""
        self._look()
        total = sum(member.threads for member in self._open())
        if self._refused and not self._members and not self._has_worked:
            address, refusal = next(iter(self._refused.items()))
            raise RunError(f"no worker of {self._address} can be used: {address}: {refusal.why}")
        return total if self._limit is None else min(total, self._limit)

    def submit(self, task: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Start `task` on the worker with the most free threads."""
        member = max(self._open(), key=lambda member: member.threads - len(member.running))
        try:
            future: Future[Any] = member.executor.submit(task, *arguments)
        except _DEATHS as error:
            future = Future()
            future.set_exception(error)
        member.running.add(future)
        return future

    def wait(self, running: "Collection[Future[Any]]") -> "Iterator[tuple[Future[Any], tasks.End]]":
        """Those of the `running` tasks that have ended, and how; or none, after a second."""
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
                self._note_end(address, future)
        for future in done:
            end = tasks.end_of(future, _DEATHS, _NOT_STARTED)
            if isinstance(end, tasks.Died):
                self._next_look = 0.0  # check at once which are left
            yield future, end

    def close(self, *, now: bool) -> None:
        """Leave the cluster; `now`: a running trial notices at its next write that it was ended."""
        with contextlib.suppress(Exception):  # the next run starts with the same step
            run_on(self._client, tasks.forget, self._prepare[0], workers=list(self._members))
        self._client.close(timeout=5)

    # ---- which workers there are -------------------------------------------------------------

    def _open(self) -> list[_Member]:
        return [member for member in self._members.values() if member.closed is None]

    def _look(self) -> None:
        """Drop the workers that have left, and admit those that have joined."""
        if time.monotonic() < self._next_look:
            return
        present = self._present()
        now = time.monotonic()
        for address, member in list(self._members.items()):
            is_open = address in present and present[address]["status"] == "running"
            member.closed = None if is_open else member.closed or now
            waited = member.closed is not None and now - member.closed > PATIENCE
            if self._connection_lost or waited or address not in present:
                self._drop(address)
        self._connection_lost = False
        self._refused = {
            address: refusal
            for address, refusal in self._refused.items()
            if address in present and now < refusal.until
        }
        new = {
            address: int(worker["nthreads"])
            for address, worker in present.items()
            if worker["status"] == "running"
            and address not in self._members
            and address not in self._refused
        }
        if new:
            with contextlib.suppress(OSError, TimeoutError):  # retried at the next check
                self._admit(new)
        self._report_workers()
        self._next_look = time.monotonic() + _LOOK

    def _present(self) -> Mapping[str, Any]:
        """What the scheduler knows of each worker; waits for a scheduler that is restarted."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                scheduler = self._client.scheduler
                if self._client.status != "running" or scheduler is None:
                    raise ConnectionError("no connection")
                found = self._client.sync(
                    scheduler.identity, n_workers=-1, callback_timeout=_TIMEOUT
                )
                workers: Mapping[str, Any] = found["workers"]
                return workers
            except (OSError, TimeoutError) as error:
                self._connection_lost = True  # Dask's client cancels all that runs
                if time.monotonic() > deadline or self._client.status == "closed":
                    raise RunError(
                        f"the connection to the Dask scheduler {self._address} is lost and was not "
                        f"restored within {PATIENCE} s ({one_line(error)}); start the scheduler "
                        "and run the same command again"
                    ) from None
                time.sleep(_LOOK)

    def _drop(self, address: str) -> None:
        """Drop a worker; `Worker.run_trial` finds what it finishes nevertheless."""
        member = self._members.pop(address, None)
        for future in () if member is None else member.running:
            future.cancel()

    def _admit(self, new: Mapping[str, int]) -> None:
        """Check new workers, and send the suitable ones the configuration and the dataset."""
        for address, why, seconds in self._reasons_to_refuse(list(new)):
            if address not in self._refused:
                self._refuse(address, why, seconds)
        for threads in set(new.values()):
            alike = [at for at in new if at not in self._refused and new[at] == threads]
            if not alike:
                continue
            prepared = run_on(
                self._client,
                tasks.prepare,
                *self._prepare,
                threads,
                workers=alike,
                timeout=_SENDING,
            )
            for address, error in prepared.items():
                if error is None:
                    executor = self._client.get_executor(workers=[address], pure=False)
                    self._members[address] = _Member(threads, executor)

    def _reasons_to_refuse(self, addresses: list[str]) -> Iterator[tuple[str, str, float]]:
        """Which of these workers can't be used, why, and for how long (s).

        Uses only functions of the standard library, which every worker has.
        """
        for package in _PACKAGES:
            wanted = environment.version(package)
            found = self._versions(package, addresses)
            for address, version in found.items():
                if isinstance(version, importlib.metadata.PackageNotFoundError):
                    has = f"it has no {package}"
                elif isinstance(version, Exception):
                    yield address, f"it does not answer ({one_line(version)})", PATIENCE
                    continue
                elif version != wanted:
                    has = f"it has {package} {version}"
                else:
                    continue
                yield (
                    address,
                    f"{has}, and this process has {package} {wanted}; install the same there, and "
                    "start it again",
                    math.inf,
                )
        trims = run_on(self._client, os.getenv, _TRIM, workers=addresses)
        slow = [trim for trim in trims.values() if str(trim).isdigit() and int(trim) < _SMALL]
        if slow and not self._warned:
            self._warned = True
            self._report(
                f"{len(slow)} of {len(trims)} workers have {_TRIM}={slow[0]}, which Dask sets, and "
                f"train about 1.5 times as slowly as with {_SETTINGS} in their environment"
            )

    def _versions(self, package: str, addresses: list[str]) -> dict[str, Any]:
        """The version of `package` on each of these workers, or the error in place of it."""
        found: dict[str, Any] = {}
        left = addresses
        for name in environment.names(package):
            found |= run_on(self._client, importlib.metadata.version, name, workers=left)
            missing = importlib.metadata.PackageNotFoundError
            if not (left := [at for at in left if isinstance(found.get(at), missing)]):
                break
        return found

    def _refuse(self, address: str, why: str, seconds: float) -> None:
        self._refused[address] = _Refusal(why, time.monotonic() + seconds)
        self._report(f"worker {address} is refused: {why}")

    def _note_end(self, address: str, future: "Future[Any]") -> None:
        """Note what the end of a task says about its worker."""
        error = None if future.cancelled() else future.exception()
        if isinstance(error, tasks.NotPrepared | tasks.Unfit):
            self._drop(address)
            if isinstance(error, tasks.Unfit) and address not in self._refused:
                self._refuse(address, str(error), PATIENCE)
        elif not future.cancelled():
            self._has_worked = True

    def _report_workers(self) -> None:
        """Report how many workers there are, if that has changed."""
        now = len(self._open()), sum(member.threads for member in self._open())
        if now != self._reported:
            self._reported = now
            workers, threads = now
            self._report(
                f"{self._address}: {workers} worker{'s' * (workers != 1)}, "
                f"{threads} trial{'s' * (threads != 1)} at once"
                + ("" if workers else "; waiting for some, Ctrl-C ends that")
            )
