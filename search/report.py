"""What the user reads: a line a trial while the study runs, and the summary at its end."""

import shlex
from datetime import timedelta

import optuna
from optuna.trial import FrozenTrial
from rich.console import Console

from search.config import redact
from search.data import Dataset
from search.outcome import Outcome
from search.pipeline import Listener, Result
from search.space import Hyperparameters

_COLOURS = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red"}


class Lines(Listener):
    """Prints one line a trial."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stopping = False

    def stop(self) -> None:
        """Let the running trials finish and start no more."""
        self._stopping = True
        self._print("stopping when the running trials have finished; Ctrl-C again ends them now")

    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def start(self, study: optuna.Study, dataset: Dataset, missing: int) -> None:
        """Say what will be done."""
        self._print(str(dataset))
        done = len(study.get_trials(deepcopy=False)) if missing else 0
        if not missing:
            self._print(f"study {study.study_name}: all trials are there, nothing to search")
        elif done:
            self._print(f"study {study.study_name}: {missing} trials to go on with")
        else:
            self._print(f"study {study.study_name}: {missing} trials to run")

    def trial(self, outcome: Outcome, best: float | None) -> None:
        """One line: number, state, val_accuracy, hyperparameters, seconds, best so far."""
        value = "    --" if outcome.last is None else f"{outcome.last:.4f}"
        text = (
            f"trial {outcome.number:4d}  {outcome.state:8s}  val_accuracy {value}"
            f"  {outcome.hyperparameters or ''}  {outcome.epochs} ep {outcome.seconds:5.1f} s"
            f"  best {'--' if best is None else f'{best:.4f}'}"
        )
        if outcome.failure:
            text += f"  ({outcome.failure})"
        self._print(text, _COLOURS.get(outcome.state, ""))

    def mended(self, lines: list[str]) -> None:
        """Say what an earlier run had left behind."""
        for line in lines:
            self._print(f"mended: {line}", "yellow")

    def retraining(self, trial: FrozenTrial) -> None:
        """Say what takes the time now."""
        self._print(
            f"training trial {trial.number}'s configuration anew on training and validation data"
        )


def summary(result: Result) -> str:
    """The end of a run in a dozen lines."""
    config, best, winner = result.config, result.best, result.winner
    took = timedelta(seconds=round(result.seconds))
    lines = [
        "",
        f"{result.complete + result.pruned} finished trials: {result.complete} complete, "
        f"{result.pruned} pruned; {result.failed} failed. {result.ran} run now, in {took}.",
    ]
    if result.stopped:
        lines.append(f"Stopped early: {result.stopped}.")
    if best is not None:
        lines += ["", _row(f"best: trial {best.number}", best)]
        if result.reference is not None:
            lines.append(_row(f"reference: trial {result.reference.number}", result.reference))
            lines.append(_gain(best, result.reference, result.complete))
    if winner is None:
        return "\n".join([*lines, "", "Run the same command again to go on."])
    verb = "Registered as" if winner.new else "Already registered as"
    lines += [
        "",
        f"Trained anew on all training data: test accuracy {winner.test_accuracy:.4f}, "
        f"test loss {winner.test_loss:.4f} (the test images were used this once).",
        f"{verb} {config.model_name} version {winner.version}: alias production, stage Production.",
        "",
        "Look further:",
        f"  mlflow ui{_mlflow_option(config.tracking_uri)}",
        f"  optuna-dashboard {shlex.quote(redact(config.storage))}",
    ]
    return "\n".join(lines)


def _row(title: str, trial: FrozenTrial) -> str:
    return f"{title:22s} val_accuracy {trial.value:.4f}  {Hyperparameters(**trial.params)}"


def _gain(best: FrozenTrial, reference: FrozenTrial, complete: int) -> str:
    if best.number == reference.number:
        return "The search found nothing better than the reference configuration."
    gain = (best.value or 0) - (reference.value or 0)
    return (
        f"The search gained {gain:+.4f} val_accuracy over the reference. It is the best of "
        f"{complete} noisy results, so part of that is luck."
    )


def _mlflow_option(uri: str) -> str:
    if uri == "sqlite:///mlflow.db":
        return ""
    if uri.startswith("http"):
        return f"  (already served at {redact(uri)})"
    return f" --backend-store-uri {shlex.quote(redact(uri))}"
