"""What a run reports while it goes, and what it leaves."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial

from search.config.settings import StudyConfig
from search.promotion.gate import Winner
from search.study.ranking import Finalist
from search.study.trials import TrialSummary

if TYPE_CHECKING:
    import optuna

    from search.data.dataset import Dataset


class Progress:
    """What a run tells while it goes; this one keeps silent."""

    def loading(self, study_name: str) -> None:
        """The study was asked for; libraries, databases and data are being loaded."""

    def start(self, study: "optuna.Study", dataset: "Dataset", missing: int) -> None:
        """The study is open and `missing` trials are to run."""

    def trial(self, outcome: TrialSummary, best: float | None) -> None:
        """A trial ended; `best` is the best value of the study so far."""

    def warning(self, line: str) -> None:
        """Something is not as it should be, but the study goes on."""

    def workers(self, line: str) -> None:
        """Something about the workers is worth a line."""

    def repaired(self, lines: list[str]) -> None:
        """The Optuna study and the MLflow runs disagreed and were repaired."""

    def stopping(self) -> bool:
        """Whether no more trials shall start; those that run are waited for."""
        return False

    def finalists(self, chosen: "list[FrozenTrial]", repeats: int) -> None:
        """These trials are being trained again, each `repeats` times."""

    def repeat(self, number: int, repeat: int, value: float | None, left: int) -> None:
        """Trial `number` was trained again, with this val_accuracy or None; `left` are to go."""

    def retraining(self, trial: "FrozenTrial") -> None:
        """The winner is being trained anew."""


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    best: the COMPLETE trial with the highest val_accuracy, `best.value`; None only where the run
    was interrupted before one completed.
    finalists: the trials that were trained again on fresh seeds, the best mean first; the first one
    is the winner. Empty with `--finalists 0`: the best trial is the winner.
    reference: the study's trial of the reference configuration, None where it was not tried.
    winner: the best configuration trained anew on training and validation data, its accuracy on
    the test images and its version of the registered model; None where the run was interrupted.
    complete, pruned, failed: trials of the study in all; `ran` of them in this run. given_up: slots
    whose configuration failed by itself twice; they count as finished.
    stopped: why the search ended before its budget, if it did.
    repaired: the inconsistencies that were repaired. report: its file, None where none is written.
    """

    config: StudyConfig
    best: FrozenTrial | None
    finalists: list[Finalist]
    reference: FrozenTrial | None
    winner: Winner | None
    parent_run_id: str
    complete: int
    pruned: int
    failed: int
    given_up: int
    ran: int
    seconds: float
    stopped: str | None
    repaired: tuple[str, ...]
    report: Path | None
