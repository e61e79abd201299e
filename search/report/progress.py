"""What a run reports while it goes, and its result."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # only types, so that the first line is printed before the libraries are loaded
    import optuna
    from optuna.trial import FrozenTrial

    from search.config.settings import StudyConfig
    from search.data.dataset import Dataset
    from search.promotion.baselines import Baseline
    from search.promotion.gate import Winner
    from search.study.ranking import Finalist
    from search.study.trials import TrialSummary


class Progress:
    """Gets what a run reports and decides when it stops; this one shows nothing."""

    _stopping = False

    def stop(self) -> None:
        """Let the running trials finish and start no more."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether no more trials must start; those that run are waited for."""
        return self._stopping

    def close(self) -> None:
        """Leave the terminal as it was found; may be called twice, and from any thread."""

    def loading(self, study_name: str) -> None:
        """Libraries, databases and data of the study are being loaded."""

    def start(self, study: "optuna.Study", dataset: "Dataset", missing: int) -> None:
        """The study is open and `missing` trials are to run."""

    def baselines(self, baselines: "list[Baseline]") -> None:
        """The simple models that the network is compared with are known."""

    def trial(self, outcome: "TrialSummary", best: float | None) -> None:
        """A trial ended; `best` is the best value of the study so far."""

    def warning(self, line: str) -> None:
        """Something is wrong, but the study goes on."""

    def workers(self, line: str) -> None:
        """A message about the workers."""

    def repaired(self, lines: list[str]) -> None:
        """The Optuna study and the MLflow runs disagreed and were repaired."""

    def finalists(self, chosen: "list[FrozenTrial]", repeats: int) -> None:
        """These trials are being trained again, each `repeats` times."""

    def repeat(self, number: int, repeat: int, value: float | None, left: int) -> None:
        """Trial `number` was trained again, with this value or None; `left` are to go."""

    def retraining(self, trial: "FrozenTrial") -> None:
        """The winner is being retrained."""


@dataclass(frozen=True)
class Result:
    """The result of a run.

    best: the COMPLETE trial with the best objective, `best.value`; None only if the run was
    interrupted before one completed.
    finalists: the trials that were trained again on fresh seeds, the best mean first, which is the
    winner. Empty with `--finalists 0`: the best trial is the winner.
    reference: the study's trial of the reference configuration, None if there is none.
    baselines: simple models on the same data. against_baseline: how the winner compares with the
    best of them on the test examples, as in docs/results.md; None if it was not compared.
    winner: the best configuration, retrained on training and validation data, its metrics on the
    test examples and its version of the registered model; None if the run was interrupted.
    complete, pruned, failed: numbers of trials in the study; `ran` of them in this run. given_up:
    slots whose configuration failed by itself twice; they count as finished.
    seconds: how long the run took. stopped: why the search ended before its budget, if it did.
    repaired: what the two stores disagreed about. report: its file, None if none is written.
    """

    config: "StudyConfig"
    best: "FrozenTrial | None"
    finalists: "list[Finalist]"
    reference: "FrozenTrial | None"
    winner: "Winner | None"
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
    baselines: "list[Baseline]" = field(default_factory=list)
    against_baseline: dict[str, Any] | None = None
