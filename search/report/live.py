"""The live panel: the state of the search, below the lines that it prints on a terminal."""

import contextlib
import os
import queue
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from search import signals
from search.config.hyperparameters import describe
from search.config.parameter import Value
from search.report.progress import Progress
from search.report.terminal import COLOURS, Lines

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from search.data.dataset import Dataset
    from search.study.trials import TrialSummary

_REFRESH = 0.25  # seconds
_POLL = 1.0  # least number of seconds between two readings of the running trials
_REST = 20  # times the duration of a reading, which takes long after thousands of epochs
_SHOWN = 8  # running trials; a cluster may have hundreds
_BAR = 24  # characters
_END = "\0the end of the panel\n"


class Panel(Lines):
    """The lines, and below them the current state of the search.

    Only one thread writes to the terminal. It gets what this process, its workers and their
    libraries write to stdout and stderr through a pipe, so that lines are not mixed. The running
    trials are read from the study, whichever process runs them.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._started = 0.0
        self._epochs = self._total = self._before = self._done = 0
        self._counts = dict.fromkeys(COLOURS, 0)
        self._wanted: Mapping[str, Value] = {}  # the hyperparameters of the reference
        self._best: TrialSummary | None = None
        self._reference: TrialSummary | None = None
        self._running: list[FrozenTrial] = []
        self._activity = "the workers are starting"
        self._waiting: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._writer: threading.Thread | None = None
        self._terminal = contextlib.ExitStack()
        self._loading = False

    def loading(self, study_name: str) -> None:
        """A line for the first seconds, which the first line printed replaces."""
        text = f"study {study_name}: loading the libraries, the data and both databases"
        self._console.print(_short(text), end="", soft_wrap=False)
        self._loading = True

    def start(self, study: "optuna.Study", dataset: "Dataset", missing: int) -> None:
        """Show the panel, if there is something to search."""
        super().start(study, dataset, missing)
        if not missing:
            return
        from search.study.ranking import reference_params
        from search.study.trials import given_up, summarize

        self._wanted = reference_params(study)
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished():
                self._count(summarize(trial))
        self._before = self._counts["COMPLETE"] + self._counts["PRUNED"]
        self._before += len(given_up(study))
        self._total = self._before + missing
        self._epochs = int(study.user_attrs["settings"]["epochs"])
        self._started = time.monotonic()
        self._terminal.enter_context(_no_echo_of_control_keys())
        screen = self._terminal.enter_context(_lines_to(self._waiting))
        self._writer = threading.Thread(target=self._write, args=(screen,), daemon=True)
        with signals.deferred():
            self._writer.start()
        threading.Thread(target=self._watch, args=(study,), daemon=True).start()

    def _count(self, trial: "TrialSummary") -> None:
        self._counts[trial.state] += 1
        if trial.value is not None and trial.state == "COMPLETE":
            sign, best = self._objective.sign, self._best
            if best is None or sign * trial.value > sign * (best.value or 0):
                self._best = trial
            if self._reference is None and trial.hyperparameters == self._wanted:
                self._reference = trial

    def _loaded(self) -> None:
        if self._loading:
            self._loading = False
            self._console.control(
                Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
            )

    def _print(self, text: str, style: str = "") -> None:
        self._loaded()
        if self._writer is None or self._closed.is_set():
            super()._print(text, style)
        else:
            self._waiting.put((text, style))

    def _write(self, screen: TextIO) -> None:
        """Print the waiting lines, and the panel below them, until the end."""
        console = Console(file=screen, soft_wrap=True)
        with Live(
            get_renderable=self._render,
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as live:
            ending = False
            while not ending:
                ending = self._closed.wait(_REFRESH)
                with contextlib.suppress(queue.Empty):
                    while True:
                        text, style = self._waiting.get_nowait()
                        console.print(text, style=style, markup=False, highlight=False)
                live.refresh()

    def _watch(self, study: "optuna.Study") -> None:
        from optuna.trial import TrialState

        took = 0.0
        while not self._closed.wait(max(_POLL, _REST * took)):
            started = time.monotonic()
            with contextlib.suppress(Exception):  # a database may be busy; try again
                self._running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            took = time.monotonic() - started

    def trial(self, outcome: "TrialSummary", best: float | None) -> None:
        """A line, and the counts."""
        super().trial(outcome, best)
        self._activity = ""
        self._count(outcome)
        self._done += outcome.state != "FAIL" or outcome.given_up

    def finalists(self, chosen: "list[FrozenTrial]", repeats: int) -> None:
        """A line, and how many trainings are to go in the panel."""
        super().finalists(chosen, repeats)
        self._activity = "training the finalists again"

    def repeat(self, number: int, repeat: int, value: float | None, left: int) -> None:
        """A line, and how many trainings are to go in the panel."""
        super().repeat(number, repeat, value, left)
        self._activity = f"training the finalists again, {left} to go" if left else ""

    def retraining(self, trial: "FrozenTrial") -> None:
        """The same in a line and in the panel."""
        super().retraining(trial)
        self._activity = f"retraining trial {trial.number}"

    def close(self) -> None:
        """Remove the panel."""
        self._loaded()
        self._closed.set()
        if self._writer is not None:
            self._writer.join(timeout=2)
        self._terminal.close()

    def _render(self) -> RenderableType:
        passed = time.monotonic() - self._started
        finished = self._before + self._done
        left = None if not self._done else passed / self._done * (self._total - finished)
        progress = Table.grid(padding=(0, 2))
        progress.add_row(
            ProgressBar(total=self._total, completed=finished, width=_BAR),
            f"{finished} of {self._total} trials",
            f"{_clock(passed)} passed",
            "" if finished == self._total else f"{_clock(left)} to go",
        )
        counts = Text()
        for state, colour in COLOURS.items():
            name = {"FAIL": "failed"}.get(state, state.lower())
            counts.append(f"{self._counts[state]} {name}  ", colour)
        return Group(progress, counts, *(_short(line) for line in self._below()))

    def _below(self) -> Iterator[str]:
        from search.study.trials import history_of

        for title, trial in (("best", self._best), ("reference", self._reference)):
            if trial is not None:
                hyperparameters = describe(trial.hyperparameters)
                value = self._objective.text(trial.value or 0)
                yield f"{title:9s}  {value}  trial {trial.number}  {hyperparameters}"
        running = sorted(self._running, key=lambda trial: trial.number)
        for current in running[:_SHOWN]:
            history = history_of(current)
            worker = current.user_attrs.get("owner", {}).get("pid", "")
            name, text = self._objective.name, self._objective.text
            last = f"{name} {text(history[-1][name])}" if history else ""
            epoch = min(len(history) + 1, self._epochs)
            yield f"worker {worker}  trial {current.number}  epoch {epoch}/{self._epochs}  {last}"
        if len(running) > _SHOWN:
            yield f"and {len(running) - _SHOWN} more"
        if self._activity and not running:
            yield self._activity


def _short(line: str) -> Text:
    return Text(line, style="dim", overflow="ellipsis", no_wrap=True)


def choose_progress(console: Console, *, quiet: bool) -> Progress:
    """Nothing if `quiet`, else the panel on a capable terminal, else lines."""
    if quiet:
        return Progress()
    capable = console.is_terminal and not console.is_dumb_terminal and os.isatty(1)
    return Panel(console) if capable else Lines(console)


def _clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))


@contextlib.contextmanager
def _no_echo_of_control_keys() -> Iterator[None]:
    """Stop the terminal from writing ^C at the cursor, into the panel."""
    if not os.isatty(0) or os.tcgetpgrp(0) != os.getpgrp():  # not allowed in the background
        yield
        return
    before = termios.tcgetattr(0)
    changed: list[Any] = list(before)
    changed[3] &= ~termios.ECHOCTL
    termios.tcsetattr(0, termios.TCSANOW, changed)
    try:
        yield
    finally:
        if os.tcgetpgrp(0) == os.getpgrp():
            termios.tcsetattr(0, termios.TCSANOW, before)


@contextlib.contextmanager
def _lines_to(waiting: "queue.SimpleQueue[tuple[str, str]]") -> Iterator[TextIO]:
    """Put every line written to stdout, or to stderr if it is a terminal, into `waiting`.

    Yields a file that writes to the terminal itself.
    """
    sys.stdout.flush()
    reading, writing = os.pipe()
    saved = {number: os.dup(number) for number in (1, 2) if os.isatty(number)}
    for number in saved:
        os.dup2(writing, number)
    os.close(writing)

    def copy() -> None:
        with open(reading, errors="replace") as lines:
            for line in lines:
                if line == _END:
                    return
                waiting.put((line.rstrip("\n"), ""))

    copying = threading.Thread(target=copy, daemon=True)
    copying.start()
    try:
        yield os.fdopen(os.dup(saved[1]), "w", errors="replace")
    finally:
        sys.stdout.flush()
        os.write(1, _END.encode())  # other processes may keep the pipe open
        for number, terminal in saved.items():
            os.dup2(terminal, number)
            os.close(terminal)
        copying.join(timeout=1)
        with contextlib.suppress(queue.Empty):
            while True:
                print(waiting.get_nowait()[0])
