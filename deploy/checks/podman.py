"""Podman, which writes to one folder and needs no systemd."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NEEDED = {
    "podman": "apt-get install podman crun netavark aardvark-dns iptables catatonit",
    "mmdebstrap": "apt-get install mmdebstrap",
    "podman-compose": "pip install 'podman-compose>=1.6'",
    "unshare": "apt-get install util-linux",
    "ip": "apt-get install iproute2",
}
LIMIT = 900  # seconds for any step


class Failure(Exception):
    """What does not hold, in one line."""


def check_needs() -> None:
    """Raise Failure if something is missing."""
    for program, remedy in NEEDED.items():
        if shutil.which(program) is None:
            raise Failure(f"deploy/check needs {program}, which is not installed; {remedy}")
    if os.getuid() != 0:
        raise Failure("deploy/check needs root, for namespaces of its own; sudo deploy/check")


def configure(folder: Path) -> None:
    """Let Podman keep all that it writes in `folder`, where only images are left from before."""
    for left in ("run", "images/overlay-containers", "images/libpod"):
        shutil.rmtree(folder / left, ignore_errors=True)
    (folder / "tmp").mkdir(exist_ok=True)
    (folder / "containers.conf").write_text(
        f"""
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{folder}/run/tmp"
volume_path = "{folder}/run/volumes"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/run/networks"
"""
    )
    (folder / "storage.conf").write_text(
        f"""
[storage]
driver = "overlay"
graphroot = "{folder}/images"
runroot = "{folder}/run/storage"
"""
    )
    os.environ["CONTAINERS_CONF"] = str(folder / "containers.conf")
    os.environ["CONTAINERS_STORAGE_CONF"] = str(folder / "storage.conf")
    os.environ["TMPDIR"] = str(folder / "tmp")


def privately(command: list[str], *namespaces: str) -> list[str]:
    """The command in namespaces of its own, where crun accepts the control groups."""
    before = "umount /sys/fs/cgroup/unified 2> /dev/null"
    if "--net" in namespaces:
        before += "; ip link set lo up; mount -t tmpfs tmpfs /run"
    return ["unshare", "--mount", *namespaces, "sh", "-c", f'{before}; exec "$@"', "sh", *command]


def call(*command: str, given: str | None = None) -> str:
    """The output of a command. Raises Failure if it fails, with its last lines."""
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode != 0:
        last = " / ".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise Failure(f"{' '.join(command)[:200]} ended with {done.returncode}: {last}")
    return done.stdout.strip()


def podman(*arguments: str, given: str | None = None) -> str:
    """The output of a Podman command."""
    return call("podman", *arguments, given=given)


def succeeds(*arguments: str) -> bool:
    """Whether a Podman command succeeds."""
    return subprocess.run(["podman", *arguments], capture_output=True).returncode == 0


def log(name: str) -> str:
    """Both outputs of a container."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(["podman", "logs", name], **both).stdout


@contextlib.contextmanager
def logs_on_failure() -> Iterator[None]:
    """Show the ends of all containers' logs if the block fails."""
    try:
        yield
    except Failure:
        for name in podman("ps", "--all", "--format={{.Names}}").splitlines():
            print(f"---- the end of the log of {name}:")
            print("\n".join(log(name).splitlines()[-30:]), flush=True)
        raise


def kill(name: str) -> str:
    """Kill the container's process, as a crash would; returns its number."""
    pid = podman("inspect", "--format={{.State.Pid}}", name)
    if pid != "0":  # else it is being started again
        os.kill(int(pid), signal.SIGKILL)
    return pid


def is_running(name: str, but: str = "") -> bool:
    """Whether the container runs, in another process than `but`."""
    state = podman("inspect", "--format={{.State.Running}} {{.State.Pid}}", name).split()
    return state[0] == "true" and state[1] != but


def has_ended(name: str) -> bool:
    """Whether the container ended, and is not about to be started again."""
    return podman("inspect", "--format={{.State.Status}}", name) == "exited"


def expect_exit(name: str, expected: int) -> None:
    """Raise Failure unless the container ended with this exit code."""
    code = podman("inspect", "--format={{.State.ExitCode}}", name)
    if code != str(expected):
        raise Failure(f"the exit code of {name} is {code}, expected {expected}")


def await_that(what: str, holds: Callable[[], bool]) -> None:
    """Wait until it holds. Raises Failure after LIMIT."""
    deadline = time.monotonic() + LIMIT
    while not holds():
        if time.monotonic() > deadline:
            raise Failure(f"{what}: not within {LIMIT} s")
        time.sleep(0.5)


def step(name: str, action: Callable[[], object]) -> None:
    """Do it, and print how long it took."""
    started = time.monotonic()
    action()
    print(f"{time.monotonic() - started:6.1f} s {name}", flush=True)
