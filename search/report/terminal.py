"""What the terminal shows while a study runs: one line per trial."""

import contextlib
import signal
from typing import TYPE_CHECKING

from rich.console import Console

from search.config.hyperparameters import describe
from search.errors import Interrupted
from search.report.progress import Progress
from search.study.storage import SETTINGS
from search.study.trials import TrialSummary

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from search.data.dataset import Dataset

COLOURS = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red"}


class Output(Console):
    """Where a run prints. Where nobody reads on, as after `| head`, the run is interrupted."""

    def on_broken_pipe(self) -> None:
        """Say nothing more, and end the run as Ctrl-C does."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()
        raise Interrupted("nobody reads the output", 128 + signal.SIGPIPE)


class Quiet(Progress):
    """Shows nothing; keeps whether to stop."""

    def __init__(self) -> None:
        self._stopping = False

    def stop(self) -> None:
        """Let the running trials finish and start no more."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    def close(self) -> None:
        """Leave the terminal as it was found; may be called twice, and from any thread."""


class Lines(Quiet):
    """Prints one line a trial."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def stop(self) -> None:
        """Let the running trials finish and start no more."""
        super().stop()
        self._print("stopping when the running trials have finished; Ctrl-C again ends them now")

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def start(self, study: "optuna.Study", dataset: "Dataset", missing: int) -> None:
        """Say what will be done."""
        self._print(str(dataset))
        done = len(study.get_trials(deepcopy=False)) if missing else 0
        if not missing:
            self._print(f"study {study.study_name}: all trials are there, nothing to search")
        else:
            trials = f"{missing} trials of {study.user_attrs[SETTINGS]['epochs']} epochs"
            self._print(f"study {study.study_name}: {trials} to {'go on with' if done else 'run'}")

    def trial(self, outcome: TrialSummary, best: float | None) -> None:
        """One line: number, state, val_accuracy, hyperparameters, seconds, best so far."""
        last = outcome.last if outcome.value is None else outcome.value
        value = "    --" if last is None else f"{last:.4f}"
        tried = describe(outcome.hyperparameters or {})
        text = (
            f"trial {outcome.number:4d}  {outcome.state:8s}  val_accuracy {value}"
            f"  {tried}  {outcome.epochs} ep {outcome.seconds:5.1f} s"
            f"  best {'--' if best is None else f'{best:.4f}'}"
        )
        if outcome.failure:
            text += f"  ({outcome.failure})"
        self._print(text, COLOURS.get(outcome.state, ""))

    def warning(self, line: str) -> None:
        """The line, marked as a warning."""
        self._print(f"warning: {line}", "yellow")

    def workers(self, line: str) -> None:
        """The line."""
        self._print(line)

    def repaired(self, lines: list[str]) -> None:
        """Say what an earlier run had left behind."""
        for line in lines:
            self._print(f"repaired: {line}", "yellow")

    def finalists(self, chosen: "list[FrozenTrial]", repeats: int) -> None:
        """Say what takes the time now."""
        numbers = ", ".join(str(trial.number) for trial in chosen)
        self._print(f"training the finalists, trials {numbers}, on {repeats} fresh seeds each")

    def repeat(self, number: int, repeat: int, value: float | None, left: int) -> None:
        """One line: trial, which of its repeats, val_accuracy, how many are to go."""
        shown = "failed" if value is None else f"val_accuracy {value:.4f}"
        self._print(f"finalist {number:4d}  repeat {repeat}  {shown}  {left} to go")

    def retraining(self, trial: "FrozenTrial") -> None:
        """Say what takes the time now."""
        self._print(
            f"training trial {trial.number}'s configuration anew on training and validation data"
        )
