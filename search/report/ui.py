"""Serve MLflow's and Optuna's own user interfaces, on this machine only."""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from urllib.request import ProxyHandler, build_opener

import psutil

from search import signals
from search.config.settings import StudyConfig
from search.config.urls import sqlite_path, sqlite_url
from search.errors import InputError, RunError, redact
from search.study import storage
from search.tracking.runs import TRACKING_ERRORS
from search.tracking.sync import existing

HOST = "127.0.0.1"
_TIMEOUT = 120  # seconds for a server to answer


def serve(config: StudyConfig, report: Callable[[str], None]) -> None:
    """Start both, `report` their addresses, and serve until interrupted; then end both.

    Raises InputError if there is nothing to show, RunError if one of them ends by itself.
    """
    pages = _pages(config)
    with contextlib.ExitStack() as running:
        served = {
            "optuna-dashboard": running.enter_context(_dashboard(config)),
            "mlflow ui": running.enter_context(_mlflow(config)),
        }
        for name, (address, process) in served.items():
            _wait(name, address, process)
            report(f"{name:17s} {address}{pages[name]}")
        report("Ctrl-C ends both.")
        processes = [process for _, process in served.values() if process is not None]
        ended, _ = psutil.wait_procs(processes, timeout=0)
        while not ended:
            ended, _ = psutil.wait_procs(processes, timeout=1)
        raise RunError("one of the two servers ended unexpectedly; start them again")


def _pages(config: StudyConfig) -> dict[str, str]:
    """The study's page in each of them."""
    try:
        with existing(config) as (study, config, tracking):
            if not tracking.exists():
                raise InputError(
                    f"--tracking-uri must be where the study's runs are, but "
                    f"{redact(config.tracking_uri)} has no experiment {config.experiment}; "
                    "run the study again, or give another"
                )
            return {
                "optuna-dashboard": f"dashboard/studies/{study._study_id}",
                "mlflow ui": f"#/experiments/{tracking.open().experiment_id}/runs",
            }
    except (*storage.ERRORS, *TRACKING_ERRORS) as error:
        raise storage.failure(error) from error


Served = tuple[str, psutil.Process | None]


@contextlib.contextmanager
def _dashboard(config: StudyConfig) -> Iterator[Served]:
    """In a child process: on its command line, a password would be visible to other users."""
    port = _free_port()
    process = multiprocessing.get_context("spawn").Process(
        target=_run_dashboard, args=(config.storage, port), daemon=True
    )
    with signals.no_ctrl_c_for_children():  # the main process ends it
        process.start()
    server = psutil.Process(process.pid)
    try:
        yield f"http://{HOST}:{port}/", server
    finally:
        _end(server)
        process.join()


def _run_dashboard(url: str, port: int) -> None:
    import logging

    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    logging.disable()
    from optuna_dashboard import run_server

    run_server(storage.open_storage(url), host=HOST, port=port)


@contextlib.contextmanager
def _mlflow(config: StudyConfig) -> Iterator[Served]:
    if config.tracking_uri.startswith("http"):
        yield f"{redact(config.tracking_uri).rstrip('/')}/", None
        return
    path = sqlite_path(config.tracking_uri)
    port = _free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--host", HOST, "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--workers", "1"],
        env={
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # ten more processes, for LLM judges
            "MLFLOW_BACKEND_STORE_URI": config.tracking_uri if path is None else sqlite_url(path),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C must reach only the main process, which ends this one
    )
    server = psutil.Process(process.pid)
    try:
        yield f"http://{HOST}:{port}/", server
    finally:
        _end(server)
        process.wait()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as listening:
        return int(listening.getsockname()[1])


def _wait(name: str, address: str, process: psutil.Process | None) -> None:
    """Wait until the server answers. Raises RunError if it does not."""
    deadline = time.monotonic() + _TIMEOUT
    direct = build_opener(ProxyHandler({}))  # regardless of http_proxy
    while process is not None:
        with contextlib.suppress(OSError), direct.open(address, timeout=5):
            return
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise RunError(f"{name} ended before it answered; start it by hand to see why")
        if time.monotonic() > deadline:
            raise RunError(
                f"{name} did not answer within {_TIMEOUT} s; start it by hand to see why"
            )
        time.sleep(0.1)


def _end(server: psutil.Process) -> None:
    """End a server and the processes that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*server.children(recursive=True), server]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            process.kill()
