"""How a search stands, live, below the lines that it prints on a terminal."""

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

from search.config.hyperparameters import describe
from search.config.parameter import Value
from search.report.terminal import COLOURS, Lines, Quiet
from search.study.storage import OWNER, SETTINGS
from search.study.trials import TrialSummary

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from search.data.dataset import Dataset

_REFRESH = 0.25  # seconds
_POLL = 1.0  # seconds between two looks at the running trials
_REST = 20  # times as long as a look took, which after thousands of epochs takes a while
_SHOWN = 8  # running trials; a cluster may have hundreds
_BAR = 24  # characters
_END = "\0the end of the panel\n"


class Panel(Lines):
    """The lines, and below them, on a terminal, how the search stands at this moment.

    One thread alone writes to the terminal. What this process, its workers and their libraries
    write to stdout and stderr comes to it by a pipe, so that no line tears another. The running
    trials are read from the study, so it does not matter who runs them.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._began = 0.0
        self._epochs = self._total = self._before = self._done = 0
        self._counts = dict.fromkeys(COLOURS, 0)
        self._standing: dict[str, str] = {}
        self._reference: Mapping[str, Value] = {}
        self._best: float | None = None
        self._running: list[FrozenTrial] = []
        self._doing = "the workers are starting"
        self._waiting: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._writer: threading.Thread | None = None
        self._terminal = contextlib.ExitStack()
        self._loading = False

    def loading(self, study_name: str) -> None:
        """Say what takes the first seconds, in a line that the first one printed replaces."""
        text = f"study {study_name}: loading the libraries, the data and both databases"
        self._console.print(_short(text), end="", soft_wrap=False)
        self._loading = True

    def start(self, study: "optuna.Study", dataset: "Dataset", missing: int) -> None:
        """Show the panel, where there is something to search."""
        super().start(study, dataset, missing)
        if not missing:
            return
        from search.study import ranking
        from search.study.trials import given_up

        trials = study.get_trials(deepcopy=False)
        best, self._reference = ranking.best(trials), ranking.reference_params(study)
        for title, trial in (("best", best), ("reference", ranking.reference(study))):
            if trial is not None and trial.value is not None:
                self._standing[title] = _stands(trial.value, trial.number, trial.params)
        self._best = None if best is None else best.value
        for trial in trials:
            if trial.state.name in self._counts:
                self._counts[trial.state.name] += 1
        self._before = self._counts["COMPLETE"] + self._counts["PRUNED"]
        self._before += len(given_up(study))
        self._total = self._before + missing
        self._epochs = int(study.user_attrs[SETTINGS]["epochs"])
        self._began = time.monotonic()
        self._terminal.enter_context(_no_echo_of_control_keys())
        screen = self._terminal.enter_context(_lines_to(self._waiting))
        self._writer = threading.Thread(target=self._write, args=(screen,), daemon=True)
        self._writer.start()
        threading.Thread(target=self._watch, args=(study,), daemon=True).start()

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
        """Print what waits, and the panel below it, until the end."""
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
            began = time.monotonic()
            with contextlib.suppress(Exception):  # a database may be busy; look again
                self._running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            took = time.monotonic() - began

    def trial(self, outcome: TrialSummary, best: float | None) -> None:
        """A line, and the counts."""
        super().trial(outcome, best)
        self._doing = ""
        self._counts[outcome.state] += 1
        self._done += outcome.state != "FAIL" or outcome.given_up
        if outcome.value is not None:
            stands = _stands(outcome.value, outcome.number, outcome.hyperparameters)
            if self._best is None or outcome.value > self._best:
                self._best, self._standing["best"] = outcome.value, stands
            if outcome.hyperparameters == self._reference:
                self._standing.setdefault("reference", stands)

    def finalists(self, chosen: "list[FrozenTrial]", repeats: int) -> None:
        """A line, and below how many trainings are to go."""
        super().finalists(chosen, repeats)
        self._doing = "training the finalists again"

    def repeat(self, number: int, repeat: int, value: float | None, left: int) -> None:
        """A line, and below how many trainings are to go."""
        super().repeat(number, repeat, value, left)
        self._doing = f"training the finalists again, {left} to go" if left else ""

    def retraining(self, trial: "FrozenTrial") -> None:
        """A line, and the same below."""
        super().retraining(trial)
        self._doing = f"training trial {trial.number}'s configuration anew"

    def close(self) -> None:
        """Take the panel away."""
        self._loaded()
        self._closed.set()
        if self._writer is not None:
            self._writer.join(timeout=2)
        self._terminal.close()

    def _render(self) -> RenderableType:
        passed = time.monotonic() - self._began
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

        for title in ("best", "reference"):
            if title in self._standing:
                yield f"{title:9s}  {self._standing[title]}"
        running = sorted(self._running, key=lambda trial: trial.number)
        for trial in running[:_SHOWN]:
            history = history_of(trial)
            worker = trial.user_attrs.get(OWNER, {}).get("pid", "")
            last = f"val_accuracy {history[-1]['val_accuracy']:.4f}" if history else ""
            epoch = min(len(history) + 1, self._epochs)
            yield f"worker {worker}  trial {trial.number}  epoch {epoch}/{self._epochs}  {last}"
        if len(running) > _SHOWN:
            yield f"and {len(running) - _SHOWN} more"
        if self._doing and not running:
            yield self._doing


def _stands(value: float, number: int, params: Mapping[str, Value] | None) -> str:
    return f"{value:.4f}  trial {number}  {describe(params or {})}"


def _short(line: str) -> Text:
    return Text(line, style="dim", overflow="ellipsis", no_wrap=True)


def choose_progress(console: Console, *, quiet: bool) -> Quiet:
    """What fits: nothing, a panel on a terminal, or lines."""
    if quiet:
        return Quiet()
    capable = console.is_terminal and not console.is_dumb_terminal and os.isatty(1)
    return Panel(console) if capable else Lines(console)


def _clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))


@contextlib.contextmanager
def _no_echo_of_control_keys() -> Iterator[None]:
    """The terminal itself writes ^C where the cursor is, which would tear the panel."""
    if not os.isatty(0) or os.tcgetpgrp(0) != os.getpgrp():  # in the background we may not
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
    """Put every line that comes to stdout, or to stderr on a terminal, into `waiting`.

    Gives what writes to the terminal itself.
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
        os.write(1, _END.encode())  # others, like multiprocessing's, may keep the pipe open
        for number, terminal in saved.items():
            os.dup2(terminal, number)
            os.close(terminal)
        copying.join(timeout=1)
        with contextlib.suppress(queue.Empty):
            while True:
                print(waiting.get_nowait()[0])
