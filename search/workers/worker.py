"""What a process opens once to run trials: the study, the dataset and the tracking."""

import threading
import time
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from search.config import custom_model
from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.errors import RunError
from search.promotion.comparison import compare_versions
from search.promotion.gate import Found
from search.promotion.retrain import retrain
from search.study import outline, sampling, storage, trials
from search.study.storage import ENVIRONMENT, METADATA, OWNER, SEED, SETTINGS, SLOT
from search.tracking.runs import Tracking
from search.training import environment
from search.training.train import TrainingDiverged, use_one_thread_each
from search.workers.trial import (
    Attempt,
    Context,
    interruption_behind,
    now_ms,
    reason_of,
    train_again,
)

_LOOK = 1.0  # seconds


class Worker:
    """What a process needs to run trials: the study, the dataset and the tracking, opened once."""

    def __init__(
        self, config: StudyConfig, parent_run: str, dataset: Dataset, threads: int = 1
    ) -> None:
        """threads: how many workers this process has, each a thread of its own."""
        use_one_thread_each(threads)
        self.config = config
        self.dataset = dataset
        self.study = trials.SlottedStudy(
            study_name=config.study_name,
            storage=outline.OutlineStorage(storage.open_storage(config.storage)),
            pruner=sampling.pruner(config),
        )
        if config.model is not None:
            custom_model.check(config.model, self.study.user_attrs[SETTINGS]["model"])
        if dataset.pipeline is not None:
            dataset.pipeline.check()
        self.tracking = Tracking(config).open()
        self.owner = {**trials.owner_of_this_process(), "thread": threading.get_ident()}
        self.environment = environment.here()
        self.closed = False
        facts = self.study.user_attrs[METADATA]
        self.context = Context(config, dataset, self.study, self.tracking, parent_run, facts)

    def close(self) -> None:
        """Close the connections; no further trial is started."""
        self.closed = True
        storage.close_study(self.study)

    def run_trial(self, slot: int) -> trials.TrialSummary:
        """Run the trial of `slot` until it ends in some way, unless one has finished there.

        Raises RunError if Optuna's database fails, since nothing can be recorded then.
        """
        if slot > 0:
            self._let_the_first_begin()
        found = self._find(slot)
        if found is not None:
            return self._outcome_of(trials.read_trial(self.study, found.number))
        try:
            return self._run_trial(slot)
        except trials.SlotTaken:
            return self.run_trial(slot)

    def _outcome_of(self, trial: FrozenTrial) -> trials.TrialSummary:
        """How a finished trial went."""
        if trial.state is not TrialState.FAIL:
            return trials.summarize(trial)
        last = trials.given_up(self.study).get(trial.user_attrs[SLOT])
        return trials.summarize(trial, given_up=last is not None and last.number == trial.number)

    def _find(self, slot: int) -> FrozenTrial | None:
        """The trial that finished `slot`, or with which the slot was given up.

        Waits for a running one, unless it is lost.
        """
        while not self.closed:
            started = trials.trials_in_slot(self.study, slot)
            if not started:
                return trials.given_up(self.study).get(slot)
            alive = False
            for trial in started:
                if trial.state.is_finished():
                    return trial
                if trial.user_attrs[OWNER] == self.owner or trials.is_lost(self.study, trial):
                    # Does nothing if the trial has finished in the meantime.
                    trials.fail_trial(self.study, trial, trials.LOST)
                else:
                    alive = True
            if alive:
                time.sleep(_LOOK)  # the database does not notify
        raise RunError("the run has ended")

    def _run_trial(self, slot: int) -> trials.TrialSummary:
        _, seed = sampling.seeds(self.config.seed, slot)
        self.study.attrs = {
            SLOT: slot,
            SEED: seed,
            OWNER: self.owner,
            ENVIRONMENT: self.environment,
        }
        self.study.sampler = sampling.sampler(self.config, slot)
        attempt = Attempt(self.context)
        try:
            self.study.optimize(attempt.objective, n_trials=1, catch=(Exception,))
        except trials.SlotTaken:
            raise
        except Exception as error:
            # Where it ends the trial, Optuna 5 replaces an interruption or a database's error by
            # an error of its own.
            interruption = interruption_behind(error)
            if interruption is not None:
                raise interruption from None
            if not attempt.was_ended():
                raise storage.failure(error) from error
        finally:
            attempt.end()
        return self._outcome_of(attempt.frozen())

    def _let_the_first_begin(self) -> None:
        """The first trial of a study is that of slot 0, whichever worker is ready first."""
        deadline = time.monotonic() + 60
        while not self.study.get_trials(deepcopy=False) and time.monotonic() < deadline:
            time.sleep(0.02)

    def repeat(self, number: int, repeat: int) -> dict[str, Any]:
        """Train the configuration of trial `number` on a fresh seed; writes to neither store.

        Returns what the trial stores of it: seed, history, start and end (ms), and the failure if
        the training diverged.
        """
        trial = trials.read_trial(self.study, number)
        seed = sampling.repeat_seed(self.config.seed, trial.user_attrs[SLOT], repeat)
        kept: dict[str, Any] = {"seed": seed, "history": [], "began": now_ms()}
        try:
            kept["value"] = train_again(
                self.config, self.dataset, trial, self.context.facts, seed, kept["history"]
            )
        except TrainingDiverged as error:
            kept["failure"] = reason_of(error)
        except Exception as error:
            raise RunError(
                f"trial {number} could not be trained again ({reason_of(error)}); fix the cause "
                "and run the same command again"
            ) from error
        return {**kept, "ended": now_ms()}

    def retrain(self, number: int) -> str:
        """Retrain trial `number` on all training data, log the model and return its run."""
        return retrain(
            self.config, self.dataset, self.tracking, self.context.parent_run, self.study, number
        )

    def compare(self, challenger: int, champion: int) -> Found:
        """Compare two versions of the registered model on the test examples."""
        return compare_versions(self.config, self.dataset, self.tracking, challenger, champion)
