"""Measure the memory of a study: python tests/benchmarks/shared_memory.py --gigabytes 1

Runs the command with two workers on MNIST and on examples of that size, bytes and float32, in
temporary folders. Prints the most megabytes that all of its processes have together (the sum of
their proportional set sizes), before the first trial ends and from then on, and what that is beyond
MNIST.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

STUDY = Path(__file__).parents[2] / "study.py"
OPTIONS = [
    "--n-trials",
    "4",
    "--epochs",
    "1",
    "--hidden-units",
    "16,32",
    "--workers",
    "2",
    "--report",
    "none",
]


def write(path: Path, gigabytes: float, kind: str) -> None:
    """Examples of 10,000 random numbers, a tenth of them for the test."""
    count = int(gigabytes * 1e9 / 10_000 / np.dtype(kind).itemsize)
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (count, 10_000), dtype=np.uint8).astype(kind)
    y = np.arange(count) % 2
    x[:, :100] += y[:, None].astype(kind)
    test = count // 10
    np.savez(path, x_train=x[test:], y_train=y[test:], x_test=x[:test], y_test=y[:test])


def megabytes(main: psutil.Process) -> float:
    """Of the process and its descendants, shared pages divided among those that share them."""
    total = 0.0
    for process in [main, *main.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss / 1e6
        except psutil.Error:
            continue
    return total


def measure(dataset: str, folder: str) -> tuple[float, float]:
    """The most megabytes before the first trial has ended, and from then on."""
    command = [sys.executable, "-u", str(STUDY), "--dataset", dataset, *OPTIONS]
    said, most = Path(folder, "out.txt"), [0.0, 0.0]
    with said.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, text=True)
        main = psutil.Process(process.pid)
        while process.poll() is None:
            phase = int("trial " in said.read_text())
            most[phase] = max(most[phase], megabytes(main))
            time.sleep(0.1)
    assert process.returncode == 0, said.read_text()
    return most[0], most[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1)
    gigabytes = parser.parse_args().gigabytes
    print("| data | before the first trial ends, MB | from then on | most beyond MNIST |")
    print("|---|---|---|---|", flush=True)
    usual = 0.0
    for kind in ("mnist", "uint8", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            dataset = kind
            if kind != "mnist":
                dataset = f"{folder}/data.npz"
                write(Path(dataset), gigabytes, kind)
            before, after = measure(dataset, folder)
        usual = usual or max(before, after)
        beyond = max(before, after) - usual
        print(f"| {kind} | {before:.0f} | {after:.0f} | {beyond:.0f} |", flush=True)


if __name__ == "__main__":
    main()
