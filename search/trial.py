"""One trial: suggest, train, report, prune, mirror.

A worker process builds a `Worker` once and runs one trial a task. The Optuna trial is written
first and is the truth; the MLflow run follows as well as it can, and `reconcile` writes later
what a failing tracking server did not take.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import optuna
from optuna.trial import FrozenTrial, TrialState
from optuna_integration import KerasPruningCallback

from search import (
    data,
    environment,
    model,
    outline,
    own_model,
    owner,
    promotion,
    registry,
    sampling,
    storage,
    training,
)
from search.config import RunError, StudyConfig, one_line
from search.contract import (
    HISTORY_BLOCK,
    LOST,
    METRICS,
    STATE,
    Facts,
    best_epoch,
    history_attr,
    history_of,
)
from search.errors import printable
from search.outcome import Outcome
from search.recipe import complete
from search.tracking import Tracking

_PATIENCE = 10  # seconds that a trial spends on its run before it leaves it to `reconcile`
_LOOK = 1.0  # seconds
_REST = 20  # times as long as a failure of MLflow took, it is left alone


class Worker:
    """What a process needs to run trials: the study, the dataset and the tracking, opened once."""

    def __init__(
        self, config: StudyConfig, parent_run: str, dataset: data.Dataset, threads: int = 1
    ) -> None:
        """threads: how many workers this process has, each a thread of its own."""
        training.one_thread_each(threads)
        self.config = config
        self.parent_run = parent_run
        self.dataset = dataset
        self.study = storage.PlacedStudy(
            study_name=config.study_name,
            storage=outline.OutlineStorage(storage.open_storage(config.storage)),
            pruner=sampling.pruner(config),
        )
        if config.model is not None:
            own_model.check(config.model, self.study.user_attrs["settings"]["model"])
        self.tracking = Tracking(config).open()
        self.facts = self.study.user_attrs["facts"]
        self.owner = {**owner.mark(), "thread": threading.get_ident()}
        self.environment = environment.here()
        self.closed = False
        self.rest_until = 0.0  # by the monotonic clock: MLflow failed, and is left alone

    def close(self) -> None:
        """Close the connections, and begin nothing more."""
        self.closed = True
        storage.close_study(self.study)

    def run_trial(self, place: int) -> Outcome:
        """Run the trial at `place` to its end, whatever that is, unless one has finished there.

        Raises RunError where Optuna's database fails: then nothing can be recorded.
        """
        if place > 0:
            self._let_the_first_begin()
        found = self._find(place)
        if found is not None:
            return self._outcome_of(storage.whole(self.study, found.number))
        try:
            return self._run_trial(place)
        except storage.PlaceTaken:
            return self.run_trial(place)

    def _outcome_of(self, trial: FrozenTrial) -> Outcome:
        """How a finished trial went."""
        if trial.state is not TrialState.FAIL:
            return outcome_of(trial)
        last = storage.given_up(self.study).get(trial.user_attrs["place"])
        return outcome_of(trial, given_up=last is not None and last.number == trial.number)

    def _find(self, place: int) -> FrozenTrial | None:
        """The trial that finished the slot `place`, or with which the slot was given up.

        One that runs is waited for, unless it is lost.
        """
        while not self.closed:
            begun = storage.trials_at(self.study, place)
            if not begun:
                return storage.given_up(self.study).get(place)
            alive = False
            for trial in begun:
                if trial.state.is_finished():
                    return trial
                if trial.user_attrs["owner"] == self.owner or storage.is_lost(self.study, trial):
                    storage.fail(self.study, trial, LOST)  # unless it has finished meanwhile
                else:
                    alive = True
            if alive:
                time.sleep(_LOOK)  # at what another process writes
        raise RunError("the run has ended")

    def _run_trial(self, place: int) -> Outcome:
        _, seed = sampling.seeds(self.config.seed, place)
        self.study.marks = {
            "place": place,
            "seed": seed,
            "owner": self.owner,
            "environment": self.environment,
        }
        self.study.sampler = sampling.sampler(self.config, place)
        attempt = _Attempt(self)
        try:
            self.study.optimize(attempt.objective, n_trials=1, catch=(Exception,))
        except storage.PlaceTaken:
            raise
        except Exception as error:
            # Optuna 5 answers an interruption or a failing database, where it ends the trial, with
            # errors of its own on top.
            interruption = _interruption_behind(error)
            if interruption is not None:
                raise interruption from None
            if not attempt.was_ended():
                raise storage.failure(error) from error
        finally:
            attempt.end()
        return self._outcome_of(attempt.frozen())

    def _let_the_first_begin(self) -> None:
        """A study's first trial is the one at place 0, whichever worker is ready first."""
        deadline = time.monotonic() + 60
        while not self.study.get_trials(deepcopy=False) and time.monotonic() < deadline:
            time.sleep(0.02)

    def repeat(self, number: int, repeat: int) -> dict[str, Any]:
        """Train the configuration of trial `number` on a fresh seed; writes to neither ledger.

        Returns what the trial keeps of it: seed, history, when it began and ended (ms), and the
        failure, where the training diverged.
        """
        trial = storage.whole(self.study, number)
        seed = sampling.repeat_seed(self.config.seed, trial.user_attrs["place"], repeat)
        kept: dict[str, Any] = {"seed": seed, "history": [], "began": _now()}
        try:
            kept["value"] = train_again(
                self.config, self.dataset, trial, self.facts, seed, kept["history"]
            )
        except training.TrainingDiverged as error:
            kept["failure"] = _reason(error)
        except Exception as error:
            raise RunError(
                f"trial {number} could not be trained again ({_reason(error)}); mend the cause "
                "and run the same command again"
            ) from error
        return {**kept, "ended": _now()}

    def retrain(self, number: int) -> str:
        """Train the configuration of trial `number` anew, log it and return its run."""
        return registry.retrain(
            self.config, self.dataset, self.tracking, self.parent_run, self.study, number
        )

    def compare(self, challenger: int, champion: int) -> promotion.Comparison | str:
        """Compare two versions of the registered model on the test examples."""
        return promotion.compare(self.config, self.dataset, self.tracking, challenger, champion)


def train_again(
    config: StudyConfig,
    dataset: data.Dataset,
    trial: FrozenTrial,
    facts: Facts,
    seed: int,
    history: list[dict[str, float]],
    only: int | None = None,
) -> float:
    """Train what `trial` tried as a trial is trained; `history` gets an entry an epoch.

    facts: what all trials of the study have in common. only: end after so many epochs.
    Returns its value.
    """
    tried = complete(trial.params, facts["params"])
    network = model.build(tried, dataset.sample_shape, dataset.classes, seed, config.custom_model)

    def record(epoch: int, logs: dict[str, float]) -> None:
        history.append(_entry(epoch, logs))

    _train(config, dataset, tried, network, seed, record, only=only)
    return _value(tried, history)


def _train(
    config: StudyConfig,
    dataset: data.Dataset,
    tried: Mapping[str, Any],
    network: keras.Sequential,
    seed: int,
    record: Callable[[int, dict[str, float]], None],
    *more: keras.callbacks.Callback,
    only: int | None = None,
) -> None:
    training.train(
        network,
        dataset.train,
        tried,
        epochs=config.trial_epochs,
        seed=seed,
        shape=dataset.sample_shape,
        validation=dataset.validation,
        only=only,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=record), *more],
    )


def _value(tried: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> float:
    """val_accuracy of the weights that a training ends with."""
    return history[best_epoch(history, stopping=bool(tried["early_stopping"]))]["val_accuracy"]


def _entry(epoch: int, logs: dict[str, float]) -> dict[str, float]:
    """An epoch of a trial's history."""
    measured = {ours: float(logs[keras_name]) for keras_name, ours in METRICS.items()}
    if "learning_rate" in logs:  # of a schedule that goes by the validation set
        measured["learning_rate"] = float(logs["learning_rate"])
    return {"epoch": epoch, "time_ms": _now(), **measured}


def _now() -> int:
    return int(time.time() * 1000)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _interruption_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interruption that `error` was raised in the handling of, if it was."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


class _Pruning(KerasPruningCallback):  # type: ignore[misc]
    """Prunes on val_accuracy after every epoch but the last one, where it would save nothing."""

    def __init__(self, trial: optuna.Trial, epochs: int) -> None:
        super().__init__(sampling.Judged(trial), "val_accuracy")
        self._last = epochs - 1

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if epoch == self._last or self.model.stop_training:
            self._trial.report(float((logs or {})["val_accuracy"]), step=epoch)
        else:
            super().on_epoch_end(epoch, logs)


class _Attempt:
    """A trial in progress, and its run."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._number: int | None = None
        self._history: list[dict[str, float]] = []
        self._run_id: str | None = None
        self._mirrored = time.monotonic() >= worker.rest_until
        self._spent = 0.0

    def objective(self, trial: optuna.Trial) -> float:
        """Train what `trial` proposes; returns val_accuracy of the weights that it ends with."""
        try:
            return self._train(trial)
        except optuna.TrialPruned:
            raise
        except KeyboardInterrupt as interruption:
            trial.set_user_attr("failure", printable(str(interruption)) or "interrupted")
            raise
        except Exception as error:
            trial.set_user_attr("failure", _reason(error))
            if not isinstance(error, storage.ERRORS):  # those say nothing of the configuration
                trial.set_user_attr(outline.BY_ITSELF, True)
            raise

    def _train(self, trial: optuna.Trial) -> float:
        worker, config = self._worker, self._worker.config
        seed = worker.study.marks["seed"]
        self._number = trial.number
        tried, dataset = config.space.suggest(trial), worker.dataset
        own = config.custom_model
        network = model.build(tried, dataset.sample_shape, dataset.classes, seed, own)
        if own is not None:
            model.check_probabilities(own, network)
        trial.set_user_attr("trainable_parameters", model.trainable_parameters(network))
        self._mirror(self._open_run, trial)

        def record(epoch: int, logs: dict[str, float]) -> None:
            self._record(trial, epoch, logs)

        pruning = _Pruning(trial, config.trial_epochs)
        _train(config, dataset, tried, network, seed, record, pruning)
        if tried["early_stopping"]:
            trial.set_user_attr("best_epoch", best_epoch(self._history, stopping=True))
        return _value(tried, self._history)

    def _record(self, trial: optuna.Trial, epoch: int, logs: dict[str, float]) -> None:
        entry = _entry(epoch, logs)
        self._history.append(entry)
        block = self._history[epoch // HISTORY_BLOCK * HISTORY_BLOCK :]
        trial.set_user_attr(history_attr(epoch), block)
        self._mirror(lambda: self._worker.tracking.log_epoch(str(self._run_id), entry))

    def _open_run(self, trial: optuna.Trial) -> None:
        worker = self._worker
        self._run_id = worker.tracking.create_run(
            worker.parent_run, f"trial-{trial.number:04d}", trial.number, {STATE: "RUNNING"}
        )
        trial.set_user_attr("mlflow_run_id", self._run_id)
        frozen = worker.study._storage.get_trial(trial._trial_id)
        worker.tracking.log_start(self._run_id, frozen, worker.facts)

    def _mirror(self, write: Callable[..., Any], *arguments: Any) -> None:
        """Write to MLflow unless this trial's run has already missed something.

        A server that fails or is slow costs a trial half a minute at most, `_PATIENCE` and two
        requests, and all trials together about a share of 1 / `_REST`.
        """
        if not self._mirrored:
            return
        began = time.monotonic()
        try:
            write(*arguments)
        except Exception:  # whatever the server does, the trial goes on; reconcile repairs the run
            self._mirrored = False
        spent = time.monotonic() - began
        self._spent += spent
        if self._spent > _PATIENCE:
            self._mirrored = False
        if not self._mirrored:
            self._worker.rest_until = time.monotonic() + _REST * self._spent

    def end(self) -> None:
        """End the run as the trial ended."""
        if self._number is not None and self._run_id is not None:
            self._mirror(lambda: self._worker.tracking.finish(str(self._run_id), self.frozen()))

    def frozen(self) -> FrozenTrial:
        """The trial, as it is recorded."""
        assert self._number is not None
        return storage.whole(self._worker.study, self._number)

    def was_ended(self) -> bool:
        """Whether the trial has an end, from here or from where it was taken for lost."""
        with contextlib.suppress(Exception):  # the database may be what failed
            return self._number is not None and self.frozen().state.is_finished()
        return False


def outcome_of(trial: FrozenTrial, *, given_up: bool = False) -> Outcome:
    """How a finished trial went."""
    history = history_of(trial)
    return Outcome(
        number=trial.number,
        place=trial.user_attrs["place"],
        state=trial.state.name,
        value=trial.value if trial.state is TrialState.COMPLETE else None,
        last=history[-1]["val_accuracy"] if history else None,
        hyperparameters=dict(trial.params) or None,
        epochs=len(history),
        seconds=trial.duration.total_seconds() if trial.duration else 0.0,
        failure=trial.user_attrs.get("failure"),
        given_up=given_up,
    )
