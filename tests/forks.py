"""Python processes that are ready at once: forked from one that has imported the large libraries.

Importing TensorFlow, MLflow and Optuna takes ten seconds of processor, and hundreds of processes
under test need them, as do pytest's own. So `Python([...])` stands for
`subprocess.Popen([sys.executable, ...])`, and this file, run as a program, for `python`:

    process = Python(["study.py", "--n-trials", "3"], cwd=folder)
    out, err = process.communicate()

It asks the *fork server*, of which a session of pytest has one, for a process. The server imports
what is in LIBRARIES when it is first asked, and nothing else ever happens in it; a process forked
from it runs the file, `-c` code, `-m` module or what it reads (`-`) in a session of its own, with
the working directory, environment and open files that it was given. There `multiprocessing`'s fork
server, from which the command forks its workers, is forked as well.

The differences to a new interpreter: the libraries are imported already; MLflow's tables are copied
in place of made; the name in the list of processes is this file's; what Python and the libraries
read from the environment at their start is as in the server (another value is refused). A test of
one of these starts a new interpreter.
"""

import atexit
import contextlib
import faulthandler
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

LIBRARIES = (  # what commands import, and in their order, and what tests' own processes do
    "optuna.importance",
    "search.cli",
    "search.report.text",
    "search.report.live",
    "search.pipeline",
    "search.workers.reproduce",
    "search.report.html",
    "optuna.terminator",
    "optuna_dashboard",
    "alembic.command",
    "scipy.stats",
    "git",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "PIL.PngImagePlugin",
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "sqlalchemy.dialects.sqlite",
    "sqlalchemy.dialects.postgresql.psycopg",
    "search.workers.preload",
    "mlflow.keras",
    "mlflow.cli",
    "psycopg",
    "distributed.cli.dask_worker",
    "distributed.cli.dask_scheduler",
    "fastapi",
    "uvicorn",
    "flask",
    "graphene",
)
OF_OWN_DATA = ("sklearn.linear_model", "search.data.table", "pyarrow.csv", "pyarrow.parquet")
AT_THE_START = ("PYTHON", "LC_", "LANG", "TF_", "KERAS_", "MALLOC_", "LD_", "OMP_")
ADDRESS = "SEARCH_TESTS_FORKS"  # names the server's socket to the processes of pytest
FOLDER = "SEARCH_TESTS_FOLDER"  # a folder for what they share, which ends with the server
_SERVE = "--serve"  # this file's argument as the server; with others it stands for `python`


class Python:
    """As `subprocess.Popen([sys.executable, *arguments], text=True, start_new_session=True)`.

    stdin, stdout, stderr: file descriptors, or subprocess.PIPE. Where stdin is a terminal, the
    process controls it. first: a statement that the process executes before all else, as Popen's
    preexec_fn. A process whose object is gone is killed.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path | str,
        env: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        first: str = "",
    ) -> None:
        request = {
            "arguments": list(map(str, arguments)),
            "cwd": str(cwd),
            "env": dict(os.environ if env is None else env),
            "first": first,
        }
        self.args = [sys.executable, *request["arguments"]]
        self.returncode: int | None = None
        self._readers: list[_Reader] = []
        with contextlib.ExitStack() as stack:

            def own(descriptor: int) -> int:
                stack.callback(os.close, descriptor)
                return descriptor

            def pipe(given: int, mode: str) -> tuple[int, IO[str] | None]:
                if given == subprocess.DEVNULL:
                    return own(os.open(os.devnull, os.O_RDWR)), None
                if given != subprocess.PIPE:
                    return given, None
                reading, writing = os.pipe()
                theirs, ours = (writing, reading) if mode == "r" else (reading, writing)
                return own(theirs), open(ours, mode)

            its_in, self.stdin = pipe(stdin, "w")
            its_out, self.stdout = pipe(stdout, "r")
            its_err, self.stderr = pipe(stderr, "r")
            self._connection = socket.socket(socket.AF_UNIX)
            self._connection.connect(os.environ[ADDRESS])
            socket.send_fds(self._connection, [b" "], [its_in, its_out, its_err])
            _write(self._connection, request)
        answer = _read(self._connection)
        if "refused" in answer:
            raise ValueError(answer["refused"])
        self.pid: int = answer["pid"]

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = _read(self._connection)["ended"]
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; returns what it wrote. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.stdin is not None:
            self.stdin.close()
        self._readers = self._readers or [_Reader(self.stdout), _Reader(self.stderr)]
        for reader in self._readers:
            reader.join(None if deadline is None else max(0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if deadline is None else max(0, deadline - time.monotonic()))
        out, err = (reader.text for reader in self._readers)
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


class _Reader(threading.Thread):
    """Reads a stream to its end."""

    def __init__(self, stream: IO[str] | None) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self._stream = stream
        self.start()

    def run(self) -> None:
        if self._stream is not None and not self._stream.closed:
            with self._stream:
                self.text = self._stream.read()


@contextlib.contextmanager
def server() -> Iterator[None]:
    """Run the fork server, which ends, and ends its processes, with the process that started it."""
    folder = tempfile.mkdtemp(prefix="forks-")
    path = f"{folder}/socket"
    os.environ |= {ADDRESS: path, FOLDER: folder}
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(100)
        listening.set_inheritable(True)
        process = subprocess.Popen(
            [sys.executable, "-u", __file__, _SERVE, str(listening.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
            start_new_session=True,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
    try:
        yield
    finally:
        del os.environ[ADDRESS], os.environ[FOLDER]
        process.communicate()


# ---- messages ------------------------------------------------------------------------------------


def _write(connection: socket.socket, message: dict[str, Any]) -> None:
    text = json.dumps(message).encode()
    connection.sendall(len(text).to_bytes(8, "big") + text)


def _read(connection: socket.socket) -> dict[str, Any]:
    with connection.makefile("rb", buffering=0) as file:

        def exactly(count: int) -> bytes:
            found = b""
            while len(found) < count:
                piece = file.read(count - len(found))
                if not piece:
                    raise ConnectionError("the fork server has ended")
                found += piece
            return found

        message: dict[str, Any] = json.loads(exactly(int.from_bytes(exactly(8), "big")))
        return message


# ---- the server ----------------------------------------------------------------------------------


@functools.cache
def _import_libraries() -> None:
    from search.imports import hidden, silent_stderr

    gc.disable()  # there is no garbage
    with hidden("sklearn"), silent_stderr():  # as the command does
        for name in LIBRARIES:
            importlib.import_module(name)
    for name in OF_OWN_DATA:  # scikit-learn, too
        importlib.import_module(name)
    import templates

    templates.use()
    sys.path.remove(str(Path(__file__).parent))  # a new interpreter finds nothing there
    gc.enable()
    gc.freeze()  # it touches no page that the processes share


def _serve(listening: socket.socket) -> dict[str, Any]:
    """Fork a process for every request; returns in these, with the request they are for."""
    connections: dict[int, socket.socket] = {}  # by process
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    for file in (sys.stdin, listening, woken):
        selector.register(file, selectors.EVENT_READ)

    def end(pid: int) -> None:
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)

    def bury() -> None:
        while connections and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with connections.pop(ended[0]) as connection:
                with contextlib.suppress(KeyError):
                    selector.unregister(connection)
                with contextlib.suppress(OSError):  # nobody waits for it any more
                    _write(connection, {"ended": os.waitstatus_to_exitcode(ended[1])})

    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:  # pytest has ended
                for pid in connections:
                    end(pid)
                shutil.rmtree(os.environ[FOLDER], ignore_errors=True)
                sys.exit()
            elif key.fileobj is woken:
                woken.recv(4096)
                bury()
            elif key.fileobj is not listening:
                selector.unregister(key.fileobj)
                end(key.data)
            else:
                connection, _ = listening.accept()
                _, files, _, _ = socket.recv_fds(connection, 1, 3)
                request = _read(connection)
                different = _different_at_the_start(request["env"])
                if different:
                    with connection:
                        _write(connection, {"refused": f"the server has another {different}"})
                else:
                    _import_libraries()
                    pid = os.fork()
                    if pid == 0:
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        for file in (selector, listening, woken, wake, *connections.values()):
                            file.close()
                        return {**request, "files": files, "connection": connection}
                    connections[pid] = connection
                    selector.register(connection, selectors.EVENT_READ, pid)
                for descriptor in files:
                    os.close(descriptor)


def _different_at_the_start(environment: dict[str, str]) -> list[str]:
    return [
        name
        for name in {*environment, *os.environ}
        if name.startswith(AT_THE_START) and environment.get(name) != os.environ.get(name)
    ]


# ---- a process that was forked -------------------------------------------------------------------


def _become(request: dict[str, Any]) -> None:
    """Make this process the one that was asked for."""
    os.setsid()
    for number, descriptor in enumerate(request["files"]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    tempfile.tempdir = None  # what the environment said then
    faulthandler.register(signal.SIGUSR1)  # shows where all threads are
    exec(request["first"], {})
    with request["connection"] as connection:
        _write(connection, {"pid": os.getpid()})


def _run(arguments: list[str]) -> None:
    """What a new interpreter with these arguments does."""
    program, *rest = arguments
    if program == "-u":  # of pytest-xdist, which writes to the descriptors themselves
        program, *rest = rest
    if program in ("-", "-c"):
        code = sys.stdin.read() if program == "-" else rest.pop(0)
        sys.argv = [program, *rest]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        name = "<stdin>" if program == "-" else "<string>"
        exec(compile(code, name, "exec"), main.__dict__)
    elif program == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")


def _fork_the_fork_server() -> None:
    """Let the fork server of `multiprocessing`, should it be started here, be a process forked now.

    It must not be forked when it is started: there may be threads and open databases by then.
    """
    from multiprocessing import util

    mine, its = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            signal.pthread_sigmask(
                signal.SIG_BLOCK, {signal.SIGINT}
            )  # as search.workers.processes starts it
            mine.close()
            _be_the_fork_server(its)
        finally:
            os._exit(0)
    its.close()
    original = util.spawnv_passfds

    def spawn(path: Any, arguments: list[str], descriptors: Sequence[int]) -> int:
        code = arguments[-1]
        if "multiprocessing.forkserver" not in code:
            return original(path, arguments, descriptors)
        util.spawnv_passfds = original  # should it be killed and started again
        message = json.dumps([code, list(descriptors)]).encode()
        with mine:
            socket.send_fds(mine, [message], descriptors)
        return pid

    util.spawnv_passfds = spawn


def _be_the_fork_server(asked: socket.socket) -> None:
    with asked:
        message, received, _, _ = socket.recv_fds(asked, 1 << 16, 16)
    if message:
        code, numbers = json.loads(message)
        free = max(numbers) + 1
        spare = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, free) for descriptor in received]
        for descriptor, number in zip(spare, numbers, strict=True):
            os.dup2(descriptor, number)
        for descriptor in {*spare, *received} - set(numbers):
            os.close(descriptor)
        exec(code, {})


_status: int | None = None  # with which this process is to exit


def _leave() -> None:
    """Exit at once: to take the libraries apart, object by object, takes long."""
    if _status is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(_status)


def _stand_for_python(arguments: list[str]) -> int:
    """Let a forked process run these, with this one's terminal and signals; its exit status."""
    process = Python(arguments, cwd=Path.cwd(), stdin=0, stdout=1, stderr=2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: process.send_signal(number))
    return process.wait()


def main() -> None:
    """Serve; in the processes forked from this one, run what was asked for."""
    global _status
    if sys.argv[1] != _SERVE:
        sys.exit(_stand_for_python(sys.argv[1:]))
    atexit.register(_leave)  # before any library does, so it is called after theirs
    with socket.socket(fileno=int(sys.argv[2])) as listening:
        request = _serve(listening)
    _become(request)
    _fork_the_fork_server()
    try:
        _run(request["arguments"])
        _status = 0
    except SystemExit as end:
        _status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except Exception:
        _status = 1
        raise


if __name__ == "__main__":
    main()
