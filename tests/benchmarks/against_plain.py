"""Time study.py against the plain script: python tests/benchmarks/against_plain.py --rounds 3

Whole processes both, in turns on the same machine, each in a folder of its own. Two comparisons:
`work`, 12 trials of 512 units without pruning, so that both do the same training; and `search`,
50 trials, both with their defaults, a seed a round. Prints a row a run, then the ratios.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).parents[2]
PLAIN = [sys.executable, str(ROOT / "tests" / "benchmarks" / "plain.py")]
OURS = [sys.executable, str(ROOT / "study.py")]
CASES = {
    "work": (
        ["--n-trials", "12", "--hidden-units", "512", "--no-pruning"],
        ["--n-trials", "12", "--hidden-units", "512", "--pruner", "none"],
    ),
    "search": (["--n-trials", "50"], ["--n-trials", "50"]),
}


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds of the whole process, and the test accuracy that it printed."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - began
    found = re.search(r"test accuracy (0\.\d+)", done.stdout)
    assert found is not None, done.stdout
    return seconds, float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=[*CASES, "both"], default="both")
    arguments = parser.parse_args()
    cases = CASES if arguments.case == "both" else {arguments.case: CASES[arguments.case]}

    print("| case | seed | plain s | study.py s | ratio | plain test | study.py test |")
    print("|---|---|---|---|---|---|---|")
    for case, (plain_options, our_options) in cases.items():
        rows = []
        for seed in range(arguments.rounds):
            plain = measure([*PLAIN, *plain_options, "--seed", str(seed)])
            ours = measure([*OURS, *our_options, "--seed", str(seed)])
            rows.append((*plain, *ours))
            print(
                f"| {case} | {seed} | {plain[0]:.0f} | {ours[0]:.0f} | {ours[0] / plain[0]:.2f} "
                f"| {plain[1]:.4f} | {ours[1]:.4f} |",
                flush=True,
            )
        ratio = median(ours / plain for plain, _, ours, _ in rows)
        plain_test, our_test = mean(row[1] for row in rows), mean(row[3] for row in rows)
        print(
            f"| **{case}** | | | | median {ratio:.2f} | mean {plain_test:.4f} "
            f"| mean {our_test:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
