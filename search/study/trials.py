"""The trials of a study: slot, owner, history, end and summary of each."""

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.config.parameter import Value
from search.errors import printable
from search.study.outline import outlines_of
from search.study.postgres import server_storage
from search.study.storage import BY_ITSELF, OWNER, REASON, RUN_ID, SLOT, close, open_storage
from search.task import Metric

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
LOST = "lost: the worker process died (killed, crashed or powered off)"


# ---- creating and ending ---------------------------------------------------------------------


class SlotTaken(Exception):
    """Another process has started a trial in the same slot a moment earlier."""


class SlottedStudy(optuna.Study):
    """A study that creates a trial together with its user attributes, in one write.

    attrs: those of the next trial; slot and owner at least.
    """

    attrs: Mapping[str, Any] = MappingProxyType({})

    def ask(self, fixed_distributions: dict[str, Any] | None = None) -> optuna.Trial:
        """Create the next trial; unlike Optuna's, never take a trial that somebody enqueued.

        Raises SlotTaken if another process was faster; the new trial has ended then.
        """
        self._thread_local.cached_all_trials = None  # as in Optuna's own
        template = create_trial(state=TrialState.RUNNING, user_attrs=dict(self.attrs))
        trial = optuna.Trial(self, self._storage.create_new_trial(self._study_id, template))
        if server_storage(self) is not None:  # several hosts may run tasks of the study
            self._check_slot(trial.number)
        return trial

    def _check_slot(self, number: int) -> None:
        """Raise SlotTaken if an earlier trial has the slot; end earlier duplicates of our own."""
        others = {t.number: t for t in trials_in_slot(self, self.attrs[SLOT]) if t.number <= number}
        mine = others.pop(number, None)
        if mine is None:  # ended from outside, as by a second Ctrl-C
            raise SlotTaken
        for trial in others.values():
            if trial.state.is_finished() or trial.user_attrs[OWNER] != self.attrs[OWNER]:
                reason = f"trial {trial.number} was started in the same slot a moment earlier"
                fail_trial(self, mine, reason)
                raise SlotTaken
            fail_trial(self, trial, f"a cut connection hid its start; replaced by trial {number}")


def trials_in_slot(study: optuna.Study, slot: int) -> list[FrozenTrial]:
    """The RUNNING, COMPLETE and PRUNED trials in `slot`, the oldest first."""
    outlines = outlines_of(study)
    trials = study.get_trials(deepcopy=False) if outlines is None else outlines.at(slot)
    states = (TrialState.RUNNING, *FINISHED)
    return [t for t in trials if t.user_attrs.get(SLOT) == slot and t.state in states]


def read_trial(study: optuna.Study, number: int) -> FrozenTrial:
    """The whole trial `number`, also if `study` reads only outlines."""
    backend, study_id = study._storage, study._study_id
    return backend.get_trial(backend.get_trial_id_from_study_id_trial_number(study_id, number))


def fail_trial(study: optuna.Study, trial: FrozenTrial, reason: str) -> None:
    """End a RUNNING trial as FAIL, unless it has just ended.

    The reason is written first, so that no failure lacks one.
    """
    with contextlib.suppress(UpdateFinishedTrialError):
        study._storage.set_trial_user_attr(trial._trial_id, REASON, printable(reason))
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def amend_trial(study: optuna.Study, trial: FrozenTrial, name: str, value: Any, url: str) -> None:
    """Write a user attribute of `trial`, finished or not."""
    if not trial.state.is_finished():
        study._storage.set_trial_user_attr(trial._trial_id, name, value)
        return
    storage = open_storage(url)
    try:
        storage.check_trial_is_updatable = lambda *_: None  # type: ignore[method-assign]
        storage.set_trial_user_attr(trial._trial_id, name, value)
    finally:
        close(storage)
    trial.user_attrs[name] = value  # Optuna caches finished trials


def missing_slots(study: optuna.Study, total: int) -> list[int]:
    """The slots, of 0 to `total` - 1, that are not finished yet, as far as the budget goes.

    A slot is finished by a COMPLETE or PRUNED trial, or by being given up.
    """
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    taken = {trial.user_attrs.get(SLOT) for trial in finished} | set(given_up(study))
    missing = [slot for slot in range(total) if slot not in taken]
    return missing[: max(0, total - len(taken))]  # fewer if the budget was lowered


def given_up(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The slots that were given up after two failures, each with its last trial.

    A configuration whose training raised an error twice is not run again. Lost trials say nothing
    about their configuration and do not count; neither do those that earlier versions recorded.
    """
    first: set[int] = set()
    found = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
        if trial.user_attrs.get(BY_ITSELF):
            slot = trial.user_attrs[SLOT]
            if slot in first:
                found[slot] = trial
            first.add(slot)
    return found


# Stored in user attributes of so many epochs each, so that what is written after an epoch does not
# grow with the number of epochs before it.
HISTORY_BLOCK = 100


def now_ms() -> int:
    """The time in milliseconds since 1970, as an entry of a history has it."""
    return int(time.time() * 1000)


def history_attr(epoch: int) -> str:
    """The key of the user attribute that holds the entry of `epoch`, from 0."""
    block = epoch // HISTORY_BLOCK
    return f"history_{block}" if block else "history"


def history_of(trial: FrozenTrial) -> list[dict[str, float]]:
    """The whole history of a trial or a repeat: an entry an epoch, in order."""
    found = list(trial.user_attrs.get("history", ()))
    block = 1
    while f"history_{block}" in trial.user_attrs:
        found += trial.user_attrs[f"history_{block}"]
        block += 1
    return found


def metrics_in(names: Iterable[str]) -> list[str]:
    """Those of `names` that are metrics of training or validation data, in their order.

    Studies of earlier versions have stored fewer metrics, so an entry of a history says which.
    """
    return [name for name in names if name.startswith(("train_", "val_"))]


def best_epoch(history: Sequence[Mapping[str, float]], objective: Metric, *, stopping: bool) -> int:
    """The epoch, from 0, whose weights a training ends with: the last one.

    With early stopping, the first one with the best value of the `objective`.
    """
    if not stopping:
        return len(history) - 1
    values = [entry[objective.name] for entry in history]
    return values.index(objective.best(values))


# ---- owners ----------------------------------------------------------------------------------


def is_lost(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Whether the process of a RUNNING trial is gone, as far as this host can tell.

    A study is run by one main process. If its storage is a file, all its workers are on that host,
    so a trial of another host is lost. On a server, workers of other hosts send heartbeats.
    """
    owner = trial.user_attrs.get(OWNER)
    if owner is None:
        return True
    here = is_of_this_host(owner)
    if here and has_ended(owner):
        return True
    server = server_storage(study)
    if server is None:
        return not here
    return trial._trial_id in server.without_heartbeat(study._study_id)


def owner_of_this_process() -> dict[str, Any]:
    """What identifies this process as a trial's owner; no later process shares it."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pids": _pid_namespace(),
        "pid": process.pid,
        "started": round(process.create_time(), 2),
        "ticks": _ticks(process.pid),
    }


def _pid_namespace() -> str | None:
    """The namespace of this process's pid: containers may share a host's name, but not its pids."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _ticks(pid: int) -> str | None:
    """A process's start in clock ticks since boot, and the boot's id; None if unknown.

    Unlike the start as a time, it does not change when the clock is set.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return f"{int(after_name[19])} {boot}"  # the 22nd field: proc(5)


def is_of_this_host(owner: Mapping[str, Any]) -> bool:
    """Whether `owner` is a process of this host, in the pid namespace of this process."""
    return (owner["host"], owner.get("pids")) == (socket.gethostname(), _pid_namespace())


def has_ended(owner: Mapping[str, Any]) -> bool:
    """Whether `owner`, a process of this host, has ended."""
    try:
        process = psutil.Process(owner["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        if owner.get("ticks") is not None:
            return bool(_ticks(owner["pid"]) != owner["ticks"])
        return bool(abs(process.create_time() - owner["started"]) > 1)
    except psutil.NoSuchProcess:
        return True


@dataclass(frozen=True)
class TrialSummary:
    """What is reported of a trial.

    value: the objective of the weights that a COMPLETE trial ended with; of any other, after its
    last epoch. hyperparameters: those sampled. seconds: its duration. given_up: it failed by
    itself, as a trial of its slot had before, so the slot is finished. metrics: all of the same
    epoch as the value, by name.
    """

    number: int
    slot: int
    state: str
    value: float | None
    hyperparameters: Mapping[str, Value]
    epochs: int
    seconds: float | None
    run_id: str | None
    failure: str | None
    given_up: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def final(self) -> float | None:
        """The value of a COMPLETE trial, by which it is ranked."""
        return self.value if self.state == "COMPLETE" else None


def summarize(trial: FrozenTrial, *, given_up: bool = False) -> TrialSummary:
    """The summary of `trial`, finished or not."""
    history = history_of(trial)
    reported = trial.intermediate_values
    last = reported[max(reported)] if reported else None
    ended_with = history[trial.user_attrs.get("best_epoch", -1)] if history else {}
    failure = trial.user_attrs.get("failure")
    return TrialSummary(
        number=trial.number,
        slot=trial.user_attrs.get(SLOT, trial.number),
        state=trial.state.name,
        value=trial.value if trial.state is TrialState.COMPLETE else last,
        hyperparameters=dict(trial.params),
        epochs=len(history),
        seconds=None if trial.duration is None else trial.duration.total_seconds(),
        run_id=trial.user_attrs.get(RUN_ID),
        failure=None if failure is None else printable(failure),
        given_up=given_up,
        metrics={name: ended_with[name] for name in metrics_in(ended_with)},
    )
