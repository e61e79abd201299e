"""Make MLflow follow Optuna, whatever was interrupted; the doctor."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import optuna
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from optuna.trial import FrozenTrial, TrialState

from search.config.settings import StudyConfig
from search.errors import printable
from search.imports import undisturbed
from search.study import storage
from search.study.lock import study_lock
from search.study.ranking import repeat_attr
from search.study.storage import METADATA, REASON, RUN_ID, SETTINGS
from search.study.trials import LOST, amend_trial, fail_trial, history_of, is_lost, metrics_in
from search.tracking import schema
from search.tracking.address import check_tracking
from search.tracking.registered_model import follow_alias, wrong_stages
from search.tracking.runs import TRACKING_ERRORS, Tracking

UNKNOWN = "unknown: its process could not record the reason, e.g. on a full disk"
_PASSES = 4  # end lost trials, repair runs, replace those that can't be repaired, check
Pair = tuple[FrozenTrial, Run | None]
Key = tuple[int | None, int | None]  # a trial's number and, of a finalist, which repeat


@dataclass(frozen=True)
class Disagreement:
    """An inconsistency between the study and its runs, and its repair."""

    what: str
    repair: Callable[[], object]


@contextlib.contextmanager
def existing(config: StudyConfig) -> Iterator[tuple[optuna.Study, StudyConfig, Tracking]]:
    """The study, `config` with its experiment, and its tracking, not opened; closed afterwards.

    Raises InputError if there is no such study or a database can't be used.
    """
    storage.check(config)
    check_tracking(config.tracking_uri)
    with storage.loaded(config) as study, contextlib.ExitStack() as stack:
        config = replace(config, experiment=study.user_attrs[SETTINGS]["experiment"])
        tracking = Tracking(config)
        stack.callback(tracking.disconnect)
        yield study, config, tracking


class Stores:
    """Both stores: the trials of `study`, and `tracking`'s runs below the run `parent`.

    Constructing creates the parent run, the experiment and the database where they are missing.
    """

    def __init__(
        self, study: optuna.Study, config: StudyConfig, tracking: Tracking | None = None
    ) -> None:
        self.study = study
        self.config = config
        self.tracking = (tracking or Tracking(config)).open()
        self.parent = self.tracking.parent_run(study, study.user_attrs[SETTINGS])
        self._metadata = study.user_attrs[METADATA]
        self._repaired: set[Key] = set()

    def sync(self, interruption: str | None = None, *, at_rest: bool = False) -> list[str]:
        """Make MLflow follow Optuna; returns the inconsistencies that were repaired.

        interruption: why all running trials of this run have ended, if they have.
        at_rest: as for `disagreements`.
        Idempotent, and safe to kill at any point and run again.
        """
        # Optuna first: it does not need MLflow, which may not answer.
        found = list(self._lost(self.study.get_trials(deepcopy=False), interruption))
        self._repaired.clear()
        repaired = []
        for _ in range(_PASSES):
            for disagreement in found:
                disagreement.repair()
                repaired.append(disagreement.what)
            found = self.disagreements(at_rest=at_rest)
            if not found:
                break
        return repaired

    def disagreements(self, *, at_rest: bool = False) -> list[Disagreement]:
        """Where the runs do not follow from the trials; changes nothing.

        at_rest: no process runs the study, so its parent run must have ended. Every point of the
        curves is compared then, not only the last ones, which takes long.
        """
        runs = self.tracking.runs_of(self.parent)  # first: a trial started later has no run here
        trials = self.study.get_trials(deepcopy=False)
        pairs = list(self._pairs(schema.mirrored(trials), runs))
        return [
            *self._lost(trials, None),
            *self._strays(pairs, runs, at_rest),
            *self._mismatches(pairs, runs, at_rest),
            *self._baselines(),
            *self._stages(),
        ]

    def _pairs(self, trials: list[FrozenTrial], runs: list[Run]) -> Iterator[Pair]:
        """Every trial with its run: the linked one, or else the oldest one created for it."""
        by_id = {run.info.run_id: run for run in runs}
        by_key = {_key_of(run): run for run in runs if _is_mirror(run)}
        for trial in trials:
            named = trial.user_attrs.get(RUN_ID)
            run = by_id.get(named)
            if run is None and _key(trial) in by_key:
                run = by_key[_key(trial)]
            elif run is None and named is not None:
                run = self.tracking.find(named)  # under another parent?
            if run is not None and (
                run.info.lifecycle_stage == "deleted"
                or schema.ORPHAN in run.data.tags
                or _key_of(run) not in (_key(trial), (None, None))
            ):
                run = None
            yield trial, run

    def _lost(self, trials: list[FrozenTrial], interruption: str | None) -> Iterator[Disagreement]:
        """Trials whose process is gone, and failures without a recorded reason."""
        for trial in trials:
            label = f"trial {trial.number}"
            if trial.state is TrialState.FAIL and REASON not in trial.user_attrs:
                repair = partial(self.amend, trial, REASON, UNKNOWN)
                yield Disagreement(f"{label}: failed without a reason", repair)
            elif trial.state is TrialState.RUNNING and (interruption or is_lost(self.study, trial)):
                why = interruption or "left RUNNING by a process that is gone"
                end = partial(fail_trial, self.study, trial, interruption or LOST)
                yield Disagreement(f"{label}: {why}", end)

    def _strays(self, pairs: list[Pair], runs: list[Run], at_rest: bool) -> Iterator[Disagreement]:
        """Runs left running by a process that is gone, and runs without a trial."""
        kept = {run.info.run_id for _, run in pairs if run is not None}
        unfinished = {_key(trial) for trial, _ in pairs if not trial.state.is_finished()}
        if at_rest and self.tracking.client.get_run(self.parent).info.status == "RUNNING":
            yield self._left_running("the parent run", self.parent)
        for run in runs:
            label = f"run {run.info.run_name} ({run.info.run_id})"
            if not _is_mirror(run):
                if run.info.status == "RUNNING":
                    yield self._left_running(label, run.info.run_id)
            elif run.info.run_id not in kept and _key_of(run) not in unfinished:
                orphan = partial(self.tracking.orphan, run)
                yield Disagreement(f"{label}: belongs to no trial", orphan)

    def _left_running(self, label: str, run_id: str) -> Disagreement:
        end = partial(self.tracking.close, run_id, "KILLED")
        return Disagreement(f"{label}: left RUNNING", end)

    def _mismatches(
        self, pairs: list[Pair], runs: list[Run], at_rest: bool
    ) -> Iterator[Disagreement]:
        """Runs of finished trials that are missing or differ from their trial."""
        nested = {run.info.run_id for run in runs}
        for trial, run in pairs:
            if not trial.state.is_finished():
                continue
            label = f"trial {trial.number}"
            if "repeat" in trial.user_attrs:
                label += f", repeat {trial.user_attrs['repeat']}"
            if run is None:
                yield Disagreement(f"{label}: no run", partial(self.write, trial))
                continue
            run_id = run.info.run_id
            if run_id not in nested and run.data.tags.get(schema.PARENT) != self.parent:
                adopt = partial(self.tracking.adopt, run_id, self.parent)
                yield Disagreement(f"{label}: its run is nested under another parent run", adopt)
                continue
            if trial.user_attrs.get(RUN_ID) != run_id:
                link = partial(self._link, trial, run_id)
                yield Disagreement(f"{label}: not linked to its run", link)
            wrong = list(self._differences(trial, run, at_rest))
            if wrong:
                what = f"{label}: its run differs: {'; '.join(wrong)}"
                yield Disagreement(what, partial(self._repair, trial, run))

    def _baselines(self) -> Iterator[Disagreement]:
        """The metrics of the baselines, where the parent run lacks them."""
        expected = schema.baseline_metrics(self.study)
        if expected:
            found = self.tracking.client.get_run(self.parent).data.metrics
            if expected != {name: found.get(name) for name in expected}:
                what = "the parent run: its metrics of the baselines differ"
                yield Disagreement(what, self.write_baselines)

    def _stages(self) -> Iterator[Disagreement]:
        """Versions of the model whose stage does not follow the alias."""
        repair = partial(follow_alias, self.tracking, self.config)
        for version, stage in wrong_stages(self.tracking, self.config.model_name):
            label = f"version {version.version} of {self.config.model_name}"
            wrong = f"stage is {version.current_stage}, expected {stage}"
            yield Disagreement(f"{label}: {wrong}", repair)

    def _differences(self, trial: FrozenTrial, run: Run, every_point: bool) -> Iterator[str]:
        """How `run` differs from what its finished trial says, e.g. "loss is 1.0, expected 2.0"."""
        if run.info.status != schema.STATUS[trial.state]:
            yield f"status is {run.info.status}, expected {schema.STATUS[trial.state]}"
        for found, expected in (
            (run.data.tags, schema.tags_of(trial)),
            (run.data.params, schema.params_of(trial, self._metadata)),
        ):
            for name, value in expected.items():
                if found.get(name) != str(value):
                    yield printable(f"{name} is {found.get(name)}, expected {value}")
        history = history_of(trial)
        expected_names = metrics_in(history[-1] if history else ())
        for name in dict.fromkeys([*expected_names, *metrics_in(run.data.metrics)]):
            last = history[-1].get(name) if history else None
            if run.data.metrics.get(name) != last:
                yield f"{name} is {run.data.metrics.get(name)}, expected {last}"
            elif every_point:
                points = [(entry["epoch"], entry[name]) for entry in history]
                if self.tracking.curve(run.info.run_id, name) != points:
                    yield f"the curve of {name} differs"

    # ---- repairs -----------------------------------------------------------------------------

    def write(self, trial: FrozenTrial) -> None:
        """Write a new run of a finished trial or repeat."""
        started = trial.datetime_start
        run_id = self.tracking.create_run(
            self.parent,
            schema.run_name(trial),
            trial.number,
            {key: value for key, value in schema.tags_of(trial).items() if key == schema.FINALIST},
            start_ms=None if started is None else int(started.timestamp() * 1000),
        )
        self._link(trial, run_id)
        self.tracking.repair(run_id, trial, self._metadata)

    def write_baselines(self) -> None:
        """Write the metrics of the baselines into the parent run."""
        self.tracking.log_values(self.parent, schema.baseline_metrics(self.study))

    def _link(self, trial: FrozenTrial, run_id: str) -> None:
        if "repeat" not in trial.user_attrs:
            self.amend(trial, RUN_ID, run_id)
            return
        own = self.study.get_trials(deepcopy=False)[trial.number]
        name = repeat_attr(trial.user_attrs["repeat"])
        self.amend(own, name, {**own.user_attrs[name], "mlflow_run_id": run_id})

    def amend(self, trial: FrozenTrial, name: str, value: Any) -> None:
        """Write a user attribute of a trial, finished or not."""
        amend_trial(self.study, trial, name, value, self.config.storage)

    def _repair(self, trial: FrozenTrial, run: Run) -> None:
        """Write what is missing; replace the run where something wrong can't be changed."""
        if _key(trial) in self._repaired:  # it still differs
            self.tracking.orphan(run)
            self.write(trial)
            return
        try:
            self.tracking.repair(run.info.run_id, trial, self._metadata)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":  # params are immutable
                raise
        self._repaired.add(_key(trial))


def _key(trial: FrozenTrial) -> Key:
    return trial.number, trial.user_attrs.get("repeat")


def _key_of(run: Run) -> Key:
    number, repeat = (run.data.tags.get(name, "") for name in (schema.NUMBER, schema.FINALIST))
    return int(number) if number.isdigit() else None, int(repeat) if repeat.isdigit() else None


def _is_mirror(run: Run) -> bool:
    """Whether a run is of a trial or a repeat: neither a retraining's nor an orphan."""
    name = run.info.run_name or ""
    return name.startswith(("trial-", "finalist-")) and schema.ORPHAN not in run.data.tags


@undisturbed()
def doctor(config: StudyConfig, *, fix: bool) -> tuple[list[str], list[str]]:
    """The repaired and the remaining inconsistencies; without `fix`, nothing is changed.

    Every trial, run, curve and stage is compared, which takes some milliseconds a trial. Raises
    InputError if there is no study, RunError if it is being run or a database fails.
    """
    try:
        with existing(config) as (study, config, tracking), study_lock(config):
            if not fix and not (tracking.exists() and tracking.open().has_parent(study)):
                return [], ["the study has no parent run in MLflow"]
            stores = Stores(study, config, tracking)
            repaired = stores.sync(at_rest=True) if fix else []
            return repaired, [left.what for left in stores.disagreements(at_rest=True)]
    except (*storage.ERRORS, *TRACKING_ERRORS) as error:
        raise storage.failure(error) from error
