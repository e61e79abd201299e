"""What a user waits for around the training: whole commands of this version and an older one.

    python tests/benchmarks/latency.py COMMIT [--turns 3]

Both versions run the same commands in turns, each as a whole process on a terminal: in a fresh
folder a first study of four trials of one epoch, then there the same command again, `show`,
`report` and `doctor`. Prints a Markdown table of medians in seconds, and of the ratios turn by
turn.
"""

import argparse
import contextlib
import io
import os
import pty
import sqlite3
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from contextlib import closing
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUDY = ("--n-trials", "4", "--epochs", "1", "--hidden-units", "128")
VERBS = ("show", "report", "doctor")
Times = dict[str, float]


def check_out(commit: str, folder: Path) -> Path:
    """The files of `commit`, in `folder`."""
    archive = subprocess.run(
        ["git", "archive", commit], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def run(source: Path, folder: Path, *options: str) -> tuple[float, float, float]:
    """Run a command on a terminal; returns when it began, when it showed its first line, its end.

    A terminal that is read as it is written: what the command shows there is not looked at.
    """
    mine, theirs = pty.openpty()
    began = time.time()
    process = subprocess.Popen(
        [sys.executable, str(source / "study.py"), *options],
        cwd=folder,
        stdout=theirs,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(theirs)
    shown = None
    with contextlib.suppress(OSError):  # the command was the last who had the terminal
        while os.read(mine, 1 << 16):
            shown = shown or time.time()
    os.close(mine)
    if process.wait() != 0 or shown is None:
        raise RuntimeError(f"{options} of {source} ended with {process.returncode}")
    return began, shown, time.time()


def first_start(source: Path, folder: Path) -> Times:
    """The phases of a first study, from what it leaves in both databases."""
    began, printed, ended = run(source, folder, *STUDY)
    with closing(sqlite3.connect(folder / "study.db")) as database:
        query = "SELECT min(datetime_start), max(datetime_complete) FROM trials"
        starts, ends = (datetime.fromisoformat(t) for t in database.execute(query).fetchone())
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        query = (
            "SELECT min(r.start_time), min(m.timestamp) FROM runs r JOIN metrics m "
            "ON m.run_uuid = r.run_uuid WHERE r.name LIKE 'retrain-%'"
        )
        retraining, trained = (t / 1000 for t in database.execute(query).fetchone())
    return {
        "first line": printed - began,
        "first trial starts": starts.timestamp() - began,
        "last trial ends": ends.timestamp() - began,
        "from then to the prompt, without the retraining's epochs": (
            ended - ends.timestamp() - (trained - retraining)
        ),
        "whole process": ended - began,
    }


def measure(source: Path) -> Times:
    """Every command, in a fresh folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times = first_start(source, folder)
        for title, options in (("the same again", STUDY), *((verb, (verb,)) for verb in VERBS)):
            began, _, ended = run(source, folder, *options)
            times[title] = ended - began
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit", help="the older version")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        old = check_out(given.commit, Path(name))
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for turn in range(given.turns):
            before, now = measure(old), measure(ROOT)
            for title in now:
                found[title].append((before[title], now[title]))
            print(f"turn {turn + 1} of {given.turns}", file=sys.stderr)
    print(
        f"| seconds, medians of {given.turns} | {given.commit} | now | ratio |\n|---|---|---|---|"
    )
    for title, pairs in found.items():
        before, now = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
        print(f"| {title} | {before:.2f} | {now:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
