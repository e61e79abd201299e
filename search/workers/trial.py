"""One trial: suggest, train, report, prune, mirror.

The Optuna trial is written first and is the source of truth. The MLflow run follows as far as the
tracking server accepts it; `Stores.sync` writes later what the server has missed.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.data.load import class_weights
from search.errors import RunError, interruption_behind, one_line, printable
from search.study import sampling, storage, trials
from search.study.storage import BY_ITSELF, ENVIRONMENT, OWNER, REASON, RUN_ID, SEED, SLOT
from search.study.trials import TrialSummary, read_trial
from search.tracking.schema import STATE
from search.workers.worker import Worker

if TYPE_CHECKING:  # the main process needs no Keras
    import keras

_LOOK = 1.0  # seconds
_TOGETHER = 0.5  # seconds between two writes of epochs to a run
_PATIENCE = 10  # seconds that a trial spends on its run before it leaves it to `Stores.sync`
_REST = 20  # times as long as a failure of MLflow took, it is left alone


def run_trial(worker: Worker, slot: int) -> TrialSummary:
    """Run the trial of `slot` until it ends in some way, unless one has finished there.

    Raises RunError if Optuna's database fails, since nothing can be recorded then.
    """
    if slot > 0:
        _let_the_first_begin(worker)
    found = _find(worker, slot)
    if found is not None:
        return _summary(worker, read_trial(worker.study, found.number))
    try:
        return _run(worker, slot)
    except trials.SlotTaken:
        return run_trial(worker, slot)


def _let_the_first_begin(worker: Worker) -> None:
    """The first trial of a study is that of slot 0, whichever worker is ready first."""
    deadline = time.monotonic() + 60
    while not worker.study.get_trials(deepcopy=False) and time.monotonic() < deadline:
        time.sleep(0.02)


def _find(worker: Worker, slot: int) -> FrozenTrial | None:
    """The trial that finished `slot`, or with which the slot was given up.

    Waits for a running one, unless it is lost.
    """
    study = worker.study
    while not worker.closed:
        started = trials.trials_in_slot(study, slot)
        if not started:
            return trials.given_up(study).get(slot)
        alive = False
        for trial in started:
            if trial.state.is_finished():
                return trial
            if trial.user_attrs[OWNER] == worker.owner or trials.is_lost(study, trial):
                # Does nothing if the trial has finished in the meantime.
                trials.fail_trial(study, trial, trials.LOST)
            else:
                alive = True
        if alive:
            time.sleep(_LOOK)  # the database does not notify
    raise RunError("the run has ended")


def _summary(worker: Worker, trial: FrozenTrial) -> TrialSummary:
    """How a finished trial went."""
    if trial.state is not TrialState.FAIL:
        return trials.summarize(trial)
    last = trials.given_up(worker.study).get(trial.user_attrs[SLOT])
    return trials.summarize(trial, given_up=last is not None and last.number == trial.number)


def _run(worker: Worker, slot: int) -> TrialSummary:
    study = worker.study
    _, seed = sampling.seeds(worker.config.seed, slot)
    study.attrs = {
        SLOT: slot,
        SEED: seed,
        OWNER: worker.owner,
        ENVIRONMENT: worker.environment,
    }
    study.sampler = sampling.sampler(worker.config, slot)
    attempt = Attempt(worker)
    try:
        study.optimize(attempt.objective, n_trials=1, catch=(Exception,))
    except trials.SlotTaken:
        raise
    except Exception as error:
        # Where it ends the trial, Optuna 5 replaces an interruption or a database's error by an
        # error of its own.
        interruption = interruption_behind(error)
        if interruption is not None:
            raise interruption from None
        if not attempt.was_ended():
            raise storage.failure(error) from error
    finally:
        attempt.end()
    return _summary(worker, attempt.frozen())


class Attempt:
    """A trial in progress, and its run."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._number: int | None = None
        self._history: list[dict[str, float]] = []
        self._run_id: str | None = None
        self._written = 0  # entries of the history, to the run
        self._next_write = 0.0
        self._mirrored = time.monotonic() >= worker.rest_until
        self._spent = 0.0

    def objective(self, trial: optuna.Trial) -> float:
        """Train what `trial` suggests; returns the objective of the final weights."""
        try:
            return self._train(trial)
        except optuna.TrialPruned:
            raise
        except (KeyboardInterrupt, Exception) as error:
            interruption = interruption_behind(error)
            if interruption is not None:
                trial.set_user_attr(REASON, printable(str(interruption)) or "interrupted")
                raise interruption from None
            trial.set_user_attr(REASON, reason_of(error))
            if not isinstance(error, storage.ERRORS):  # those do not depend on the configuration
                trial.set_user_attr(BY_ITSELF, True)
            raise

    def _train(self, trial: optuna.Trial) -> float:
        from search.training.network import check_output, network_for, trainable_parameters

        config, dataset = self._worker.config, self._worker.dataset
        seed = self._worker.study.attrs[SEED]
        self._number = trial.number
        tried = config.space.suggest(trial)
        own = config.custom_model
        network = network_for(dataset, tried, seed, own)
        if own is not None:
            check_output(own, network)
        trial.set_user_attr("trainable_parameters", trainable_parameters(network))
        self._mirror(self._open_run, trial)
        objective = dataset.task.objective(config.objective).name
        record = partial(self._record, trial)
        pruning = _pruning(trial, objective, config.trial_epochs)
        best = train_network(config, dataset, tried, network, seed, self._history, record, pruning)
        if tried["early_stopping"]:
            trial.set_user_attr("best_epoch", best)
        return self._history[best][objective]

    def _record(self, trial: optuna.Trial) -> None:
        epoch = len(self._history) - 1
        block = self._history[epoch // trials.HISTORY_BLOCK * trials.HISTORY_BLOCK :]
        trial.set_user_attr(trials.history_attr(epoch), block)
        if time.monotonic() >= self._next_write:
            self._mirror(self._write_epochs)

    def _write_epochs(self) -> None:
        self._worker.tracking.log_epochs(str(self._run_id), self._history[self._written :])
        self._written = len(self._history)
        self._next_write = time.monotonic() + _TOGETHER

    def _open_run(self, trial: optuna.Trial) -> None:
        tracking, name = self._worker.tracking, f"trial-{trial.number:04d}"
        parent, tags = self._worker.parent_run, {STATE: "RUNNING"}
        self._run_id = tracking.create_run(parent, name, trial.number, tags)
        trial.set_user_attr(RUN_ID, self._run_id)
        tracking.log_start(self._run_id, self.frozen(), self._worker.metadata)

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
            self._worker.rest_until = time.monotonic() + _REST * self._spent

    def end(self) -> None:
        """End the MLflow run with its last epochs and the status of the trial."""
        if self._number is not None and (run_id := self._run_id) is not None:
            if self._written < len(self._history):
                self._mirror(self._write_epochs)
            self._mirror(lambda: self._worker.tracking.finish(run_id, self.frozen()))

    def frozen(self) -> FrozenTrial:
        """The trial, as it is stored."""
        assert self._number is not None
        return read_trial(self._worker.study, self._number)

    def was_ended(self) -> bool:
        """Whether the trial has ended, here or by a process that considered it lost."""
        with contextlib.suppress(Exception):  # the database may be what failed
            return self._number is not None and self.frozen().state.is_finished()
        return False


def _pruning(trial: optuna.Trial, objective: str, epochs: int) -> "keras.callbacks.Callback":
    """Prunes on the objective after every epoch except the last, where it would save nothing."""
    from optuna_integration import KerasPruningCallback

    class Pruning(KerasPruningCallback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            if epoch == epochs - 1 or self.model.stop_training:
                judged.report(float((logs or {})[objective]), step=epoch)
            else:
                super().on_epoch_end(epoch, logs)

    judged = sampling.Judged(trial)
    return Pruning(judged, objective)


def train_network(
    config: StudyConfig,
    dataset: Dataset,
    tried: Mapping[str, Any],
    network: "keras.Sequential",
    seed: int,
    history: list[dict[str, float]],
    on_epoch: Callable[[], object] = lambda: None,
    *callbacks: "keras.callbacks.Callback",
    only: int | None = None,
) -> int:
    """Train `network` as a trial is trained, and append an entry to `history` after every epoch.

    tried: a value for every hyperparameter. on_epoch: is then called, before the `callbacks`.
    only: end after so many epochs. Returns the epoch of the final weights, from 0.
    """
    import keras

    from search.training.train import train

    objective = dataset.task.objective(config.objective)

    def record(epoch: int, logs: dict[str, float]) -> None:
        measured = dataset.task.measured(logs)
        if "learning_rate" in logs:  # of a schedule that depends on the validation loss
            measured["learning_rate"] = float(logs["learning_rate"])
        history.append({"epoch": epoch, "time_ms": trials.now_ms(), **measured})
        on_epoch()

    train(
        network,
        dataset.training,
        tried,
        epochs=config.trial_epochs,
        seed=seed,
        shape=dataset.sample_shape,
        validation=dataset.validation,
        objective=objective,
        class_weights=class_weights(config, dataset),
        only=only,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=record), *callbacks],
    )
    return trials.best_epoch(history, objective, stopping=bool(tried["early_stopping"]))


def reason_of(error: BaseException) -> str:
    """Why a trial failed, in one line."""
    return f"{type(error).__name__}: {one_line(error)}"
