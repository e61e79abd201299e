"""A real MLflow server that a test stops, freezes and starts, and a proxy that spoils it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import forks
import requests
import sqlalchemy
import templates

Process = forks.Python | subprocess.Popen[bytes]


def wait_for(address: str, process: Process, log: Path) -> None:
    """Wait until something answers at `address`; `process`, which writes `log`, has to live."""
    deadline = time.monotonic() + 120
    while True:
        try:
            requests.get(address, timeout=5).raise_for_status()
            return
        except requests.RequestException:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"nothing answers at {address}"
            time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SERVE = """
import os, runpy, sys
import mlflow.cli, mlflow.server

def serve(command, extra_env, **_):  # in this process, in place of another interpreter
    os.environ.update(extra_env)
    sys.argv = command[2:]
    runpy.run_module(command[2], run_name="__main__", alter_sys=True)

mlflow.server._exec_cmd = serve
mlflow.cli.cli(["server", "--workers", "1", *sys.argv[1:]])
"""


class MlflowServer:
    """`mlflow server` in a process group of its own, its artifacts in `folder`.

    store: its database, by default one in `folder`.
    """

    def __init__(self, folder: Path, store: str | None = None) -> None:
        self._folder = folder
        self._store = store or f"sqlite:///{folder / 'mlflow.db'}"
        if store is None and not (folder / "mlflow.db").exists():
            templates.copy_mlflows_tables(self._store)
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: forks.Python | None = None
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = forks.Python(
                [
                    *("-c", SERVE, "--host", "127.0.0.1", "--port", str(self._port)),
                    *("--backend-store-uri", self._store),
                    *("--artifacts-destination", str(self._folder / "mlruns")),
                ],
                cwd=self._folder,
                stdout=log.fileno(),
                stderr=log.fileno(),
                # Else ten more processes start, for judges of language models.
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        wait_for(f"{self.uri}/health", self._process, self._folder / "server.log")

    def stop(self) -> None:
        """Kill it and its children, and wait for it."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It takes connections and answers no more."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on where it was."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)


# As in a shell in which the virtual environment is active.
SHELL = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@contextlib.contextmanager
def model_server(folder: Path, commands: str) -> Iterator[str]:
    """The port of the model's server that a page's `commands` start, there on port 5001."""
    port = str(free_port())
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", commands.replace("5001", port)],
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=SHELL,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", process, folder / "server.log")
        yield port
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask_model_server(folder: Path, commands: str, port: str) -> str:
    """What the page's `commands` print that ask it."""
    ask = ["bash", "-ec", commands.replace("5001", port)]
    return subprocess.run(
        ask, cwd=folder, capture_output=True, text=True, check=True, env=SHELL
    ).stdout


BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


class Postgres:
    """A throw-away PostgreSQL, which does not run as root."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._port = free_port()
        self.url = f"postgresql+psycopg://study@127.0.0.1:{self._port}/postgres"
        if os.getuid() == 0:
            shutil.chown(self._folder, "postgres")
        data, encoding = str(self._folder / "data"), "--encoding=UTF8"  # whatever the locale
        self._call("initdb", "-D", data, "-U", "study", "--auth=trust", "--no-sync", encoding)
        self.start()

    def _call(self, program: str, *options: str) -> None:
        done = subprocess.run(
            [str(BINARIES[-1] / program), *options],
            cwd=self._folder,
            stdout=subprocess.DEVNULL,  # the server would hold a pipe open
            stderr=subprocess.DEVNULL,
            user="postgres" if os.getuid() == 0 else None,
        )
        assert done.returncode == 0, (program, (self._folder / "log").read_text())

    def create(self, name: str) -> str:
        """Make the database `name`; returns its URL."""
        port = ("-h", "127.0.0.1", "-p", str(self._port))
        self._call("createdb", *port, "-U", "study", name)
        return self.url.replace("/postgres", f"/{name}")

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c fsync=off -k {self._folder}"
        data, log = str(self._folder / "data"), str(self._folder / "log")
        self._call("pg_ctl", "start", "-w", "-D", data, "-l", log, "-o", options)

    def stop(self) -> None:
        """Let it drop everything at once, as a crash would."""
        self._call("pg_ctl", "stop", "-m", "immediate", "-D", str(self._folder / "data"))

    def remove(self) -> None:
        """Stop it for good."""
        if (self._folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._folder)


def ask(url: str, query: str, **values: Any) -> list[Any]:
    """What the database at `url` answers, as tuples."""
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        found = connection.execute(sqlalchemy.text(query), values)
        rows = [tuple(row) for row in found] if found.returns_rows else []
    engine.dispose()
    return rows


class Proxy:
    """Forwards to a server. `status`: answers that instead; `delay`: seconds it holds an answer."""

    def __init__(self, target: str) -> None:
        self.status: int | None = None
        self.delay = 0.0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if proxy.status is not None:
                    self.send_response(proxy.status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
                delay = proxy.delay
                try:
                    answer = requests.request(
                        self.command, target + self.path, data=body, headers=headers, timeout=60
                    )
                except requests.ConnectionError:  # nobody listens there: so it seems here
                    self.connection.close()
                    return
                time.sleep(delay)  # the fault itself: the server has done it, the answer is late
                try:
                    self.send_response(answer.status_code)
                    self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
                    self.send_header("Content-Length", str(len(answer.content)))
                    self.end_headers()
                    self.wfile.write(answer.content)
                except OSError:
                    pass  # the client has given up

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


HOLD = """
import time
from pathlib import Path
from search.workers import trial
hold, record = Path({file!r}), trial.Attempt._record
def held(attempt, *arguments):
    while hold.exists() and attempt._number >= {number} and len(attempt._history) > 1:
        time.sleep(0.01)
    record(attempt, *arguments)
trial.Attempt._record = held
"""  # while the file exists, trials from that number on wait when they have recorded an epoch


class Dask:
    """`dask scheduler` and, as asked for, `dask worker`s, each in a process group of its own.

    hold: a file; while it exists, trials wait for its end when they have recorded an epoch.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.hold = folder / "hold"
        self._port = free_port()
        self.address = f"tcp://127.0.0.1:{self._port}"
        self._processes: list[forks.Python] = []
        self.start_scheduler()

    def _start(self, log: str, *command: str, first: str = "") -> forks.Python:
        with (self._folder / log).open("ab") as file:
            process = forks.Python(
                ["-m", f"distributed.cli.dask_{command[0]}", *command[1:]],
                cwd=self._folder,
                stdout=file.fileno(),
                stderr=file.fileno(),
                first=first,
            )
        self._processes.append(process)
        return process

    def start_scheduler(self) -> None:
        """Start it, on its port, and wait until it answers."""
        page = free_port()
        self.scheduler = self._start(
            "scheduler.log",
            *("scheduler", "--host", "127.0.0.1", "--port", str(self._port)),
            *("--dashboard-address", f"127.0.0.1:{page}"),
        )
        log = self._folder / "scheduler.log"
        wait_for(f"http://127.0.0.1:{page}/health", self.scheduler, log)

    def start_worker(
        self, threads: int = 1, scheduler: str | None = None, first: str = ""
    ) -> forks.Python:
        """Start a worker, without a nanny, which would start it again; it may take a while.

        first: a statement that its process executes before all else.
        """
        folder = tempfile.mkdtemp(prefix="worker-", dir=self._folder)
        return self._start(
            "workers.log",
            *("worker", scheduler or self.address, "--host", "127.0.0.1", "--no-nanny"),
            *("--nthreads", str(threads), "--no-dashboard", "--local-directory", folder),
            first=HOLD.format(file=str(self.hold), number=0) + first,
        )

    def stop(self) -> None:
        """End all of it."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class TcpProxy:
    """Forwards connections to a `tcp://` address until it is stopped, which cuts them all."""

    def __init__(self, target: str) -> None:
        self._target = target.removeprefix("tcp://").split(":")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            far = socket.create_connection((self._target[0], int(self._target[1])))
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            _cut(end)

    def stop(self) -> None:
        """Take no more connections, and cut those that there are."""
        _cut(self._listening)
        self._listening.close()
        for end in self._open:
            _cut(end)


def _cut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is cut already
        end.shutdown(socket.SHUT_RDWR)
