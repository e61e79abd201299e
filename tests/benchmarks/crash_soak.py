"""Kill studies at random until so many kills are done: python tests/benchmarks/crash_soak.py

Studies of millisecond trainings on 1, 2 and 4 workers in turn. SIGKILL comes to the main process
or to one of its workers at a random moment of a run; the command is given again until it ends by
itself. After each kill no finished trial may be gone and both databases must be sound; after each
study all of tests/invariants.py must hold and running it again must change nothing. Prints a row a
number of workers.
"""

import argparse
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import closing
from pathlib import Path

import psutil

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import invariants  # noqa: E402
from overhead import write_points  # noqa: E402

TRIALS = 60
LONGEST = 16.0  # seconds: about what a whole run takes


def command(folder: Path, workers: int) -> list[str]:
    """The study."""
    options = ["--n-trials", str(TRIALS), "--epochs", "3", "--hidden-units", "4,8"]
    dataset = ["--dataset", str(folder / "points.npz"), "--workers", str(workers)]
    return [sys.executable, str(TESTS.parent / "study.py"), *options, *dataset]


def finished(folder: Path) -> set[tuple[object, ...]]:
    """The finished trials of a study that may be in any state; both databases must be sound."""
    for name in ("study.db", "mlflow.db"):
        if (folder / name).exists():
            with closing(sqlite3.connect(folder / name)) as database:
                assert database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    if not (folder / "study.db").exists():
        return set()
    with closing(sqlite3.connect(folder / "study.db")) as database:
        return set(
            database.execute(
                "SELECT number, state, datetime_complete FROM trials "
                "WHERE state IN ('COMPLETE', 'PRUNED')"
            )
        )


def kill_once(process: "subprocess.Popen[str]", chance: random.Random) -> str | None:
    """SIGKILL the main process or a worker at a random moment; None where it ended before."""
    try:
        process.wait(timeout=chance.uniform(0, LONGEST))
        return None
    except subprocess.TimeoutExpired:
        pass
    main = psutil.Process(process.pid)
    workers = [child for child in main.children(recursive=True) if child.ppid() != main.pid]
    if workers and chance.random() < 0.5:
        chance.choice(workers).kill()
        return "worker"
    main.kill()
    return "main"


def soak(folder: Path, workers: int, chance: random.Random, budget: int) -> Counter[str]:
    """One study, killed up to `budget` times until it is done; returns what happened."""
    count: Counter[str] = Counter(studies=1)
    write_points(folder / "points.npz")
    done: set[tuple[object, ...]] = set()
    while True:
        process = subprocess.Popen(
            command(folder, workers),
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        victim = kill_once(process, chance) if count["main"] + count["worker"] < budget else None
        if victim is not None:
            count[victim] += 1
        _, err = process.communicate()
        assert "Traceback" not in err, err
        now = finished(folder)
        assert done <= now, f"finished trials are gone: {done - now}"
        done = now
        if process.returncode == 0:
            break
        assert victim is not None or "workers died" in err, (process.returncode, err)
    invariants.check(folder, TRIALS)
    before = invariants.dump(folder)
    subprocess.run(command(folder, workers), cwd=folder, stdout=subprocess.DEVNULL, check=True)
    assert invariants.dump(folder) == before, "running it again changed something"
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no study after")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    counts = {workers: Counter[str]() for workers in (1, 2, 4)}
    began = time.monotonic()

    def kills() -> int:
        return sum(count["main"] + count["worker"] for count in counts.values())

    while kills() < arguments.kills:
        for workers, count in counts.items():
            left = arguments.kills - kills()
            if left == 0 or time.monotonic() - began > 60 * arguments.minutes:
                return table(counts)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    count.update(soak(Path(folder), workers, chance, min(12, left)))
                except AssertionError:
                    traceback.print_exc()
                    count["violations"] += 1
            print(f"{time.monotonic() - began:6.0f} s, {kills()} kills", file=sys.stderr)

    table(counts)


def table(counts: dict[int, Counter[str]]) -> None:
    """Print what happened; exit code 1 if an invariant did not hold."""
    print("| workers | studies | kills of the main process | kills of a worker | violations |")
    print("|---|---|---|---|---|")
    for workers, count in counts.items():
        print(
            f"| {workers} | {count['studies']} | {count['main']} | {count['worker']} "
            f"| {count['violations']} |"
        )
    sys.exit(any(count["violations"] for count in counts.values()))


if __name__ == "__main__":
    main()
