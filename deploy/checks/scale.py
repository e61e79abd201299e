"""How fast several workers are, and what is lost if they are killed."""

import json
import time
from functools import partial
from pathlib import Path

from checks.podman import Failure, await_that, expect_exit, kill, podman, step, succeeds
from checks.stack import STUDY, Stack, container, finished_trials

MEASURED = 100  # trials
KILLING, EVERY = 300, 10  # seconds


def measure(folder: Path) -> None:
    """Measure 1, 2 and 4 workers, and kill one of 4 every 10 s for five minutes"""
    stack = Stack(folder)
    with stack.running():
        for stack.workers in (1, 2, 4):
            _start(stack, f"workers-{stack.workers}", MEASURED)
            stack.await_end()
            times = finished_trials()
            rate = (len(times) - 1) / (times[-1] - times[0])
            print(f"{'':9s}{stack.workers} workers: {rate:.2f} trials a second", flush=True)
        step(f"a worker killed every {EVERY} s for {KILLING} s", partial(_kill_for_long, stack))


def _start(stack: Stack, name: str, trials: int) -> None:
    """Replace the study's container by one of a study whose trials train for a millisecond."""
    data = (
        "import numpy as n; x = n.random.default_rng(0).random((60, 4), n.float32); "
        "y = n.arange(60) % 3; n.savez('tiny.npz', x_train=x, y_train=y, x_test=x, y_test=y)"
    )
    tiny = ["--dataset=tiny.npz", "--hidden-units=8,16,32", "--sampler=random", "--pruner=none"]
    named = [f"--study-name={name}", f"--model-name={name}", f"--n-trials={trials}"]
    rest = ["--baselines=none", "--report=none", "--epochs=5"]
    script = 'python -c "$0" && exec "$@"'
    stack.command = ["sh", "-c", script, data, *STUDY, *tiny, *named, *rest]
    succeeds("rm", "--force", container("study"))
    stack.start("worker", "study")


def _kill_for_long(stack: Stack) -> None:
    """Kill workers, end the study, let it finish some more; print how many trials it has."""
    _start(stack, "killed", 10**6)
    await_that("the study has trials", lambda: stack.finished() > 0)
    killed, deadline = 0, time.monotonic() + KILLING
    while time.monotonic() < deadline:
        kill(container("worker", killed % stack.workers + 1))
        killed += 1
        time.sleep(EVERY)
    podman("stop", "--time=120", container("study"))
    expect_exit(container("study"), 143)
    budget = len(finished_trials()) + 20
    _start(stack, "killed", budget)
    stack.await_end()
    inside = ["exec", container("mlflow"), "entrypoint", "python", "-m", "study"]
    podman(*inside, "doctor", "--study-name=killed", "--model-name=killed")
    found = json.loads(podman(*inside, "show", "--json", "--study-name=killed"))
    finished = found["complete"] + found["pruned"]
    print(
        f"{'':9s}{killed} workers killed: {finished} of {budget} trials finished, "
        f"{found['failed']} attempts died and were repeated, {budget - finished} trials lost"
    )
    if finished != budget:
        raise Failure(f"{budget - finished} trials were lost")
