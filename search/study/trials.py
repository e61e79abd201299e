"""The trials of a study: slot, owner, history, end and summary of each."""

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.config.parameter import Value
from search.errors import printable
from search.study.outline import OutlineStorage
from search.study.postgres import server_storage
from search.study.storage import BY_ITSELF, OWNER, REASON, SLOT, close, open_storage

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


# ---- trials ----------------------------------------------------------------------------------


class SlotTaken(Exception):
    """Another process has begun a trial at the same place, a moment earlier."""


class SlottedStudy(optuna.Study):
    """A study whose trials are created with their marks (place, seed, owner), in one write."""

    marks: Mapping[str, Any] = MappingProxyType({})

    def ask(self, fixed_distributions: dict[str, Any] | None = None) -> optuna.Trial:
        """Create the next trial; one that was enqueued elsewhere is left alone.

        Raises PlaceTaken where its place was taken meanwhile; the trial has ended then.
        """
        self._thread_local.cached_all_trials = None
        template = create_trial(state=TrialState.RUNNING, user_attrs=dict(self.marks))
        trial = optuna.Trial(self, self._storage.create_new_trial(self._study_id, template))
        if server_storage(self) is not None:  # several hosts may run tasks of the study
            self._check_place(trial.number)
        return trial

    def _check_place(self, number: int) -> None:
        begun = {t.number: t for t in trials_in_slot(self, self.marks[SLOT]) if t.number <= number}
        mine = begun.pop(number, None)
        if mine is None:  # ended from outside, as by a second Ctrl-C
            raise SlotTaken
        for trial in begun.values():
            if trial.state.is_finished() or trial.user_attrs[OWNER] != self.marks[OWNER]:
                fail_trial(
                    self, mine, f"trial {trial.number} was begun in its place a moment earlier"
                )
                raise SlotTaken
            fail_trial(self, trial, f"a cut connection hid that it was begun; see trial {number}")


def trials_in_slot(study: optuna.Study, place: int) -> list[FrozenTrial]:
    """The trials at `place` that run or have finished, the oldest first."""
    if isinstance(study._storage, OutlineStorage):
        trials = study._storage.at(study._study_id, place)
    else:
        trials = study.get_trials(deepcopy=False)
    states = (TrialState.RUNNING, *FINISHED)
    return [t for t in trials if t.user_attrs.get(SLOT) == place and t.state in states]


def is_lost(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Whether a RUNNING trial's process is gone, as far as this host can tell.

    A study has one runner at a time. In a file, it alone runs trials, but for what is left of a
    killed one. On a server, workers on other hosts may run them too, and give signs of life.
    """
    mark = trial.user_attrs.get(OWNER)
    if mark is None:
        return True
    here = is_of_this_host(mark)
    if here and has_ended(mark):
        return True
    server = server_storage(study)
    return (
        not here if server is None else trial._trial_id in server.without_heartbeat(study._study_id)
    )


def read_trial(study: optuna.Study, number: int) -> FrozenTrial:
    """The trial with that number and all that it keeps, also where `study` has only outlines."""
    backend, study_id = study._storage, study._study_id
    return backend.get_trial(backend.get_trial_id_from_study_id_trial_number(study_id, number))


def given_up(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The slots that are finished without a result, each with its last trial.

    A configuration that has failed by itself twice is not tried again. A lost trial says nothing
    of its configuration, and neither does one that another version of this tool recorded.
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
    trial.user_attrs[name] = value  # Optuna keeps finished trials, and reads no more


def missing_slots(study: optuna.Study, total: int) -> list[int]:
    """The slots, of 0 to `total` - 1, that are not finished yet, as far as the budget goes.

    A slot (stored as `place`) is finished by a COMPLETE or PRUNED trial, or by being given up.
    """
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    taken = {trial.user_attrs.get(SLOT) for trial in finished} | set(given_up(study))
    missing = [place for place in range(total) if place not in taken]
    return missing[: max(0, total - len(taken))]  # fewer where the budget was lowered


LOST = "lost: its process ended without a word (killed, crashed or switched off)"
METRICS = {  # Keras' name -> ours
    "loss": "train_loss",
    "accuracy": "train_accuracy",
    "val_loss": "val_loss",
    "val_accuracy": "val_accuracy",
}
HISTORY_BLOCK = 100  # epochs


# A trial's history, an entry an epoch, is kept in user attributes of so many epochs each: what is
# written after an epoch does not grow with the epochs before it.


def history_attr(epoch: int) -> str:
    """The user attribute of a trial that keeps the entry of `epoch`, from 0."""
    block = epoch // HISTORY_BLOCK
    return f"history_{block}" if block else "history"


def history_of(trial: FrozenTrial) -> list[dict[str, float]]:
    """The whole history of a trial or a repeat, also where it was kept in one attribute."""
    found = list(trial.user_attrs.get("history", ()))
    block = 1
    while f"history_{block}" in trial.user_attrs:
        found += trial.user_attrs[f"history_{block}"]
        block += 1
    return found


# A finalist's repeats, its trainings on fresh seeds, are kept in user attributes of its trial. For
# the mirror each is seen as a trial of its own: with the number of its trial, and `repeat`.


def repeat_attr(repeat: int) -> str:
    """The user attribute of a trial that keeps its repeat `repeat`, from 0."""
    return f"finalist_{repeat}"


def repeats_of(trial: FrozenTrial) -> dict[int, FrozenTrial]:
    """The repeats of a finalist."""
    found = {}
    for name, kept in trial.user_attrs.items():
        if name.startswith("finalist_"):
            repeat = int(name.removeprefix("finalist_"))
            found[repeat] = _as_trial(trial, repeat, kept)
    return found


def _as_trial(trial: FrozenTrial, repeat: int, kept: Mapping[str, Any]) -> FrozenTrial:
    own = ("seed", "history", "mlflow_run_id", "failure")
    failed = "failure" in kept
    seen = create_trial(
        state=TrialState.FAIL if failed else TrialState.COMPLETE,
        value=None if failed else kept.get("value", kept["history"][-1]["val_accuracy"]),
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={
            "repeat": repeat,
            "trainable_parameters": trial.user_attrs["trainable_parameters"],
            **{name: kept[name] for name in own if name in kept},
        },
    )
    seen.number = trial.number
    seen.datetime_start = datetime.fromtimestamp(kept["began"] / 1000)
    seen.datetime_complete = datetime.fromtimestamp(kept["ended"] / 1000)
    return seen


def best_epoch(history: Sequence[Mapping[str, float]], *, stopping: bool) -> int:
    """The epoch, from 0, whose weights a training ends with.

    The last one, or with early stopping the first of those with the highest val_accuracy.
    """
    if not stopping:
        return len(history) - 1
    return max(range(len(history)), key=lambda epoch: history[epoch]["val_accuracy"])


def owner_of_this_process() -> dict[str, Any]:
    """This process's mark on a trial: host, pid and start, which no later process shares."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pids": _pids(),
        "pid": process.pid,
        "started": round(process.create_time(), 2),
        "ticks": _ticks(process.pid),
    }


def _pids() -> str | None:
    """Whose pids this process's is one of: containers may share a host's name and not its pids."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _ticks(pid: int) -> str | None:
    """When a process started, since which start of the system; None where that isn't known.

    Setting the clock moves every process's start as a time, and with it those of living ones.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return f"{int(after_name[19])} {boot}"  # the 22nd field: proc(5)


def is_of_this_host(mark: Mapping[str, Any]) -> bool:
    """Whether `mark` was made on this host, among the processes that this one can see."""
    return (mark["host"], mark.get("pids")) == (socket.gethostname(), _pids())


def has_ended(mark: Mapping[str, Any]) -> bool:
    """Whether the process of this host that made `mark` has ended."""
    try:
        process = psutil.Process(mark["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        if mark.get("ticks") is not None:
            return bool(_ticks(mark["pid"]) != mark["ticks"])
        return bool(abs(process.create_time() - mark["started"]) > 1)
    except psutil.NoSuchProcess:
        return True


@dataclass(frozen=True)
class TrialSummary:
    """How a trial ended, as the engine and the display need it.

    value: val_accuracy of the weights that a COMPLETE trial ended with.
    last: val_accuracy after the last epoch that was run, where there was one.
    given_up: it failed by itself, as a trial of its slot had before, so the slot is finished.
    """

    number: int
    place: int
    state: str
    value: float | None
    last: float | None
    hyperparameters: Mapping[str, Value] | None
    epochs: int
    seconds: float
    failure: str | None
    given_up: bool = False


def summarize(trial: FrozenTrial, *, given_up: bool = False) -> TrialSummary:
    """How a finished trial went."""
    history = history_of(trial)
    return TrialSummary(
        number=trial.number,
        place=trial.user_attrs[SLOT],
        state=trial.state.name,
        value=trial.value if trial.state is TrialState.COMPLETE else None,
        last=history[-1]["val_accuracy"] if history else None,
        hyperparameters=dict(trial.params) or None,
        epochs=len(history),
        seconds=trial.duration.total_seconds() if trial.duration else 0.0,
        failure=trial.user_attrs.get(REASON),
        given_up=given_up,
    )
