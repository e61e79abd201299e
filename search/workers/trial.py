"""One trial: suggest, train, report, prune, mirror.

The Optuna trial is written first and is the source of truth. The MLflow run follows as far as the
tracking server accepts it; `Stores.sync` writes later what the server has missed.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import optuna
from optuna.trial import FrozenTrial
from optuna_integration import KerasPruningCallback

from search.config.hyperparameters import complete
from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.data.load import class_weights
from search.errors import one_line, printable
from search.study import sampling, storage
from search.study.storage import BY_ITSELF, REASON, RUN_ID, SEED
from search.study.trials import (
    HISTORY_BLOCK,
    SlottedStudy,
    best_epoch,
    history_attr,
    read_trial,
)
from search.task import Metric
from search.tracking.runs import Tracking
from search.tracking.schema import STATE, Metadata
from search.training.network import check_output, network_for, trainable_parameters
from search.training.train import train

_PATIENCE = 10  # seconds that a trial spends on its run before it leaves it to `Stores.sync`
_REST = 20  # times as long as a failure of MLflow took, it is left alone


def train_again(
    config: StudyConfig,
    dataset: Dataset,
    trial: FrozenTrial,
    facts: Metadata,
    seed: int,
    history: list[dict[str, float]],
    only: int | None = None,
) -> float:
    """Train the configuration of `trial` as a trial is trained, appending each epoch to `history`.

    facts: the metadata that all trials of the study share. only: end after so many epochs.
    Returns the objective of the final weights.
    """
    tried = complete(trial.params, facts["params"])
    network = network_for(dataset, tried, seed, config.custom_model)

    def record(epoch: int, logs: dict[str, float]) -> None:
        history.append(_entry(dataset, epoch, logs))

    _train(config, dataset, tried, network, seed, record, only=only)
    return _value(dataset.task.objective(config.objective), tried, history)


def _train(
    config: StudyConfig,
    dataset: Dataset,
    tried: Mapping[str, Any],
    network: keras.Sequential,
    seed: int,
    record: Callable[[int, dict[str, float]], None],
    *more: keras.callbacks.Callback,
    only: int | None = None,
) -> None:
    train(
        network,
        dataset.training,
        tried,
        epochs=config.trial_epochs,
        seed=seed,
        shape=dataset.sample_shape,
        validation=dataset.validation,
        objective=dataset.task.objective(config.objective),
        class_weights=class_weights(config, dataset),
        only=only,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=record), *more],
    )


def _value(
    objective: Metric, tried: Mapping[str, Any], history: Sequence[Mapping[str, float]]
) -> float:
    """The objective of the final weights."""
    epoch = best_epoch(history, objective, stopping=bool(tried["early_stopping"]))
    return history[epoch][objective.name]


def _entry(dataset: Dataset, epoch: int, logs: dict[str, float]) -> dict[str, float]:
    """One entry of a trial's history."""
    measured = dataset.task.measured(logs)
    if "learning_rate" in logs:  # of a schedule that depends on the validation loss
        measured["learning_rate"] = float(logs["learning_rate"])
    return {"epoch": epoch, "time_ms": now_ms(), **measured}


def now_ms() -> int:
    """The time in milliseconds since 1970."""
    return int(time.time() * 1000)


def reason_of(error: BaseException) -> str:
    """Why a trial failed, in one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def interruption_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interruption that `error` was raised in the handling of, if it was."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


class _Pruning(KerasPruningCallback):  # type: ignore[misc]
    """Prunes on the objective after every epoch except the last, where it would save nothing."""

    def __init__(self, trial: optuna.Trial, objective: str, epochs: int) -> None:
        super().__init__(sampling.Judged(trial), objective)
        self._objective = objective
        self._last = epochs - 1

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if epoch == self._last or self.model.stop_training:
            self._trial.report(float((logs or {})[self._objective]), step=epoch)
        else:
            super().on_epoch_end(epoch, logs)


@dataclass
class Context:
    """What the trials of a worker have in common.

    rest_until: by the monotonic clock; until then MLflow, which has failed, is left alone.
    """

    config: StudyConfig
    dataset: Dataset
    study: SlottedStudy
    tracking: Tracking
    parent_run: str
    facts: Metadata
    rest_until: float = 0.0


class Attempt:
    """A trial in progress, and its run."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._number: int | None = None
        self._history: list[dict[str, float]] = []
        self._run_id: str | None = None
        self._mirrored = time.monotonic() >= context.rest_until
        self._spent = 0.0

    def objective(self, trial: optuna.Trial) -> float:
        """Train what `trial` suggests; returns the objective of the final weights."""
        try:
            return self._train(trial)
        except optuna.TrialPruned:
            raise
        except KeyboardInterrupt as interruption:
            trial.set_user_attr(REASON, printable(str(interruption)) or "interrupted")
            raise
        except Exception as error:
            trial.set_user_attr(REASON, reason_of(error))
            if not isinstance(error, storage.ERRORS):  # those do not depend on the configuration
                trial.set_user_attr(BY_ITSELF, True)
            raise

    def _train(self, trial: optuna.Trial) -> float:
        context, config = self._context, self._context.config
        seed = context.study.attrs[SEED]
        self._number = trial.number
        tried, dataset = config.space.suggest(trial), context.dataset
        own = config.custom_model
        network = network_for(dataset, tried, seed, own)
        if own is not None:
            check_output(own, network)
        trial.set_user_attr("trainable_parameters", trainable_parameters(network))
        self._mirror(self._open_run, trial)

        def record(epoch: int, logs: dict[str, float]) -> None:
            self._record(trial, epoch, logs)

        objective = dataset.task.objective(config.objective)
        pruning = _Pruning(trial, objective.name, config.trial_epochs)
        _train(config, dataset, tried, network, seed, record, pruning)
        if tried["early_stopping"]:
            trial.set_user_attr("best_epoch", best_epoch(self._history, objective, stopping=True))
        return _value(objective, tried, self._history)

    def _record(self, trial: optuna.Trial, epoch: int, logs: dict[str, float]) -> None:
        entry = _entry(self._context.dataset, epoch, logs)
        self._history.append(entry)
        block = self._history[epoch // HISTORY_BLOCK * HISTORY_BLOCK :]
        trial.set_user_attr(history_attr(epoch), block)
        self._mirror(lambda: self._context.tracking.log_epoch(str(self._run_id), entry))

    def _open_run(self, trial: optuna.Trial) -> None:
        context = self._context
        self._run_id = context.tracking.create_run(
            context.parent_run, f"trial-{trial.number:04d}", trial.number, {STATE: "RUNNING"}
        )
        trial.set_user_attr(RUN_ID, self._run_id)
        context.tracking.log_start(self._run_id, self.frozen(), context.facts)

    def _mirror(self, write: Callable[..., Any], *arguments: Any) -> None:
        """Call `write`, unless a write of this trial to MLflow has already failed.

        A server that fails or is slow costs a trial half a minute at most (`_PATIENCE` and two
        requests), and all trials together about a fraction of 1 / `_REST` of their time.
        """
        if not self._mirrored:
            return
        began = time.monotonic()
        try:
            write(*arguments)
        except Exception:  # the trial goes on; `Stores.sync` repairs the run
            self._mirrored = False
        spent = time.monotonic() - began
        self._spent += spent
        if self._spent > _PATIENCE:
            self._mirrored = False
        if not self._mirrored:
            self._context.rest_until = time.monotonic() + _REST * self._spent

    def end(self) -> None:
        """End the MLflow run with the status of the trial."""
        if self._number is not None and self._run_id is not None:
            self._mirror(lambda: self._context.tracking.finish(str(self._run_id), self.frozen()))

    def frozen(self) -> FrozenTrial:
        """The trial, as it is stored."""
        assert self._number is not None
        return read_trial(self._context.study, self._number)

    def was_ended(self) -> bool:
        """Whether the trial has ended, here or by a process that considered it lost."""
        with contextlib.suppress(Exception):  # the database may be what failed
            return self._number is not None and self.frozen().state.is_finished()
        return False
