"""What a run tells while it goes."""

from typing import TYPE_CHECKING

from search.outcome import Outcome

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from search.data import Dataset


class Listener:
    """What a run tells while it goes; this one keeps silent."""

    def loading(self, study_name: str) -> None:
        """The study was asked for; libraries, databases and data are being loaded."""

    def start(self, study: "optuna.Study", dataset: "Dataset", missing: int) -> None:
        """The study is open and `missing` trials are to run."""

    def trial(self, outcome: Outcome, best: float | None) -> None:
        """A trial ended; `best` is the best value of the study so far."""

    def warning(self, line: str) -> None:
        """Something is not as it should be, but the study goes on."""

    def workers(self, line: str) -> None:
        """Something about the workers is worth a line."""

    def mended(self, lines: list[str]) -> None:
        """The ledgers disagreed and were mended."""

    def stopping(self) -> bool:
        """Whether no more trials shall start; those that run are waited for."""
        return False

    def finalists(self, chosen: "list[FrozenTrial]", repeats: int) -> None:
        """These trials are being trained again, each `repeats` times."""

    def repeat(self, number: int, repeat: int, value: float | None, left: int) -> None:
        """Trial `number` was trained again, with this val_accuracy or None; `left` are to go."""

    def retraining(self, trial: "FrozenTrial") -> None:
        """The winner is being trained anew."""
