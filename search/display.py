"""What the terminal shows: lines or a live panel while a study runs, its summary, its overview."""

import contextlib
import shlex
import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console

from search.config import Interrupted
from search.listener import Listener
from search.outcome import Outcome
from search.recipe import describe, short
from search.urls import redact

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from search.data import Dataset
    from search.overview import Overview
    from search.pipeline import Result, Winner

COLOURS = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red"}
_BAR = 24  # characters


class Output(Console):
    """Where a run prints. Where nobody reads on, as after `| head`, the run is interrupted."""

    def on_broken_pipe(self) -> None:
        """Say nothing more, and end the run as Ctrl-C does."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()
        raise Interrupted("nobody reads the output", 128 + signal.SIGPIPE)


class Quiet(Listener):
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
            trials = f"{missing} trials of {study.user_attrs['settings']['epochs']} epochs"
            self._print(f"study {study.study_name}: {trials} to {'go on with' if done else 'run'}")

    def trial(self, outcome: Outcome, best: float | None) -> None:
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

    def mended(self, lines: list[str]) -> None:
        """Say what an earlier run had left behind."""
        for line in lines:
            self._print(f"mended: {line}", "yellow")

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


# ---- the end of a run ------------------------------------------------------------------------


def summary(result: "Result") -> str:
    """The end of a run in a dozen lines."""
    from search import overview
    from search.presentation import report_path

    config, best, winner = result.config, result.best, result.winner
    took = timedelta(seconds=round(result.seconds))
    lines = [
        "",
        f"{result.complete + result.pruned + result.given_up} finished trials: "
        f"{result.complete} complete, {result.pruned} pruned"
        + (f", {result.given_up} given up (failed twice)" if result.given_up else "")
        + f"; {result.failed} failed. {result.ran} run now, in {took}.",
    ]
    if result.stopped:
        lines.append(f"Stopped early: {result.stopped}.")
    if best is not None:
        shown = overview.row(best)
        lines += ["", _row(f"best: trial {best.number}", best)]
        if result.reference is not None:
            lines.append(_row(f"reference: trial {result.reference.number}", result.reference))
            first = overview.row(result.reference)
            lines.append(overview.gain(shown, first, result.complete))
    if result.finalists:
        repeats = len(result.finalists[0].val_accuracies)
        lines += ["", f"finalists, the mean of {repeats} fresh seeds; the first is the winner:"]
        lines += [f"  {finalist}" for finalist in result.finalists]
    if winner is None:
        return "\n".join([*lines, "", "Run the same command again to go on."])
    now = winner.in_production
    where = f"not in production, where version {now} is" if now else "not in production"
    if now == winner.version:
        where = "alias production, stage Production"
    verb = "Registered as" if winner.new else "Already registered as"
    lines += [
        "",
        _chosen(result, winner),
        f"Trained anew on all training data: test accuracy {winner.test_accuracy:.4f}, "
        f"test loss {winner.test_loss:.4f} (the test images were used this once, and by the gate).",
        f"{verb} {config.model_name} version {winner.version}: {where}.",
        f"Gate: {winner.verdict}.",
        "",
        "Look further:",
        *([f"  {report_path(config.report, config.study_name)}"] * (config.report != "none")),
        f"  mlflow ui{_mlflow_option(config.tracking_uri)}",
        f"  optuna-dashboard {shlex.quote(redact(config.storage))}",
    ]
    return "\n".join(lines)


def _chosen(result: "Result", winner: "Winner") -> str:
    """The winner and the validation accuracy that chose it, which is the more flattering figure."""
    if result.finalists:
        return f"winner: {result.finalists[0]}, by which it was chosen"
    return (
        f"winner: trial {winner.trial}, val_accuracy {winner.val_accuracy:.4f}, by which it was "
        "chosen, so it flatters"
    )


def _row(title: str, trial: "FrozenTrial") -> str:
    return f"{title:22s} val_accuracy {trial.value:.4f}  {describe(trial.params)}"


def _mlflow_option(uri: str) -> str:
    if uri == "sqlite:///mlflow.db":
        return ""
    if uri.startswith("http"):
        return f"  (already served at {redact(uri)})"
    return f" --backend-store-uri {shlex.quote(redact(uri))}"


# ---- python study.py show ----------------------------------------------------------------------


def show(console: Console, found: "Overview") -> None:
    """Print a study at a glance."""

    def line(text: str = "", style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    from search import overview

    for sentence in overview.sentences(found):
        line(sentence)
    if found.top:
        line()
        for text in _top(found):
            line(text)
    bar = "█" if console.encoding.startswith("utf") else "#"
    if found.importances is not None:
        line(
            f"\nImportance for val_accuracy after epoch {found.importances.epoch}, "
            f"{found.importances.trials} trials:"
        )
        for name, share in found.importances.shares.items():
            line(f"  {name:15s} {share:4.0%} {bar * round(share * _BAR)}")
    if found.saved.epochs:
        line(
            f"\nPruning saved {found.saved.epochs} epochs, about "
            f"{timedelta(seconds=round(found.saved.seconds))} of one worker."
        )
    if found.failures:
        line("\nFailed:")
        for failed in found.failures:
            line(f"  trial {failed.number}: {failed.failure or 'unknown'}", "red")
    line()
    if found.registered is not None:
        line(f"Its winner is registered as {found.registered}.")
    line(overview.in_production(found))
    if found.unfinished and found.running is None:
        line("Its run was interrupted; run the same command again to go on.")


def _top(found: "Overview") -> Iterator[str]:
    """A table as plain lines, whatever the width: scripts and eyes want whole run ids."""
    names = list(found.space)
    widths = [max(len(name), 8) for name in names]
    yield "  ".join(
        ["trial", "val_accuracy", *map(str.rjust, names, widths), "epochs", "seconds", "run"]
    )
    first = found.reference
    for row in [*found.top, *([] if first is None or first in found.top else [first])]:
        tried = (short(row.hyperparameters.get(name)) for name in names)
        cells = [f"{row.number:5d}", f"{row.val_accuracy:12.4f}", *map(str.rjust, tried, widths)]
        note = " (reference)" if row == first else ""
        yield "  ".join([*cells, f"{row.epochs:6d}", f"{row.seconds:7.1f}", f"{row.run_id}{note}"])
