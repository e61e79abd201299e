"""What the terminal shows while a study runs: a line a trial."""

import contextlib
import signal
from typing import TYPE_CHECKING

from rich.console import Console

from search.config.hyperparameters import describe
from search.errors import Interrupted
from search.report.progress import Progress
from search.report.text import listed
from search.task import DEFAULT_OBJECTIVE, metric_among

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from search.data.dataset import Dataset
    from search.promotion.baselines import Baseline
    from search.study.trials import TrialSummary

COLOURS = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red"}


class Output(Console):
    """A console on which a closed pipe, as after `| head`, interrupts the run."""

    def on_broken_pipe(self) -> None:
        """Print nothing more, and end the run as Ctrl-C does."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()
        raise Interrupted("nobody reads the output", 128 + signal.SIGPIPE)


class Lines(Progress):
    """Prints one line a trial."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._objective = DEFAULT_OBJECTIVE

    def stop(self) -> None:
        """Confirm it in a line."""
        super().stop()
        self._print("stopping when the running trials have finished; Ctrl-C again ends them now")

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def start(self, study: "optuna.Study", dataset: "Dataset", missing: int) -> None:
        """The dataset, and what is to be done."""
        from search.study.storage import objective

        self._objective = objective(study)
        self._print(str(dataset))
        to_do = "all trials are finished, nothing to search"
        if missing:
            more = "more " if study.get_trials(deepcopy=False) else ""
            epochs = study.user_attrs["settings"]["epochs"]
            to_do = f"{missing} {more}trials of {epochs} epochs to run"
        self._print(f"study {study.study_name}: {to_do}")

    def baselines(self, baselines: "list[Baseline]") -> None:
        """Their names and validation accuracies, in one line."""
        if baselines:
            label = metric_among(baselines[0].metrics, self._objective).label
            self._print(f"baselines: {listed(baselines, self._objective)} (validation {label})")

    def trial(self, outcome: "TrialSummary", best: float | None) -> None:
        """One line: number, state, objective, hyperparameters, seconds, best so far."""
        metric = self._objective
        value = "    --" if outcome.value is None else metric.text(outcome.value)
        text = (
            f"trial {outcome.number:4d}  {outcome.state:8s}  {metric.name} {value}"
            f"  {describe(outcome.hyperparameters)}  {outcome.epochs} ep"
            f" {outcome.seconds or 0:5.1f} s  best {'--' if best is None else metric.text(best)}"
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
        """A line for each inconsistency that was repaired."""
        for line in lines:
            self._print(f"repaired: {line}", "yellow")

    def finalists(self, chosen: "list[FrozenTrial]", repeats: int) -> None:
        """Which trials are trained again, and how often."""
        numbers = ", ".join(str(trial.number) for trial in chosen)
        self._print(f"training the finalists, trials {numbers}, on {repeats} fresh seeds each")

    def repeat(self, number: int, repeat: int, value: float | None, left: int) -> None:
        """One line: trial, repeat, objective, how many are to go."""
        metric = self._objective
        shown = "failed" if value is None else f"{metric.name} {metric.text(value)}"
        self._print(f"finalist {number:4d}  repeat {repeat}  {shown}  {left} to go")

    def retraining(self, trial: "FrozenTrial") -> None:
        """Which trial is retrained, and on what."""
        self._print(f"retraining trial {trial.number} on training and validation data")
