import contextlib
import gc
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import forks
import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

from search import StudyConfig
from search.config.hyperparameters import complete
from search.data.dataset import Dataset
from search.data.load import load_dataset
from search.task import Task
from search.workers import processes

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before any test module imports TensorFlow
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # in pytest's processes: there are enough
os.environ.setdefault("DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED", "False")  # shown nowhere
gc.set_threshold(50_000, 10, 10)  # TensorFlow makes millions of objects

TRIALS, EPOCHS = 12, 3
FINISHED = (*("--dataset", "digits.npz", "--epochs", str(EPOCHS), "--n-trials", str(TRIALS)),)
ROOT = Path(__file__).parents[1]
Process = forks.Python | subprocess.Popen[str]
Found = TypeVar("Found")


def arrays(**changed: Any) -> dict[str, NDArray[Any]]:
    """A small valid dataset: 40 and 10 examples of 4 numbers, 2 classes."""
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.normal(size=(40, 4)).astype(np.float32),
        "y_train": np.arange(40) % 2,
        "x_test": rng.normal(size=(10, 4)).astype(np.float32),
        "y_test": np.arange(10) % 2,
        **changed,
    }


def load(
    folder: Path,
    share: float = 0.1,
    split: str = "last",
    seed: int = 0,
    normalize: bool = False,
    **changed: Any,
) -> Dataset:
    """The dataset that a file of `arrays` is read as."""
    path = folder / "data.npz"
    np.savez(path, **arrays(**changed))
    return load_dataset(str(path), share, split=split, seed=seed, normalize=normalize)


def labelled(*counts: int) -> dict[str, NDArray[Any]]:
    """Training data sorted by class, so many examples of each; every example is its number."""
    y = np.repeat(np.arange(len(counts)), counts)
    return {"x_train": np.arange(len(y), dtype=np.float32)[:, None] * [[1, 1, 1, 1]], "y_train": y}


def small_dataset(**changed: Any) -> Dataset:
    """A dataset of no examples, of 5 features and 3 classes, but for what is `changed`."""
    x, y = np.zeros((0, 5), np.float32), np.zeros(0, np.int32)
    parts = {"x_all": x, "y_all": y, "x_test": x, "y_test": y, "train_size": 0}
    rest = {"name": "small", "digest": "", "sample_shape": (5,)}
    return Dataset(**{**parts, **rest, "task": Task("classification", 3), **changed})


def default_network(
    hidden_units: int = 512, dropout_rate: float = 0.2, learning_rate: float = 0.001, **others: Any
) -> dict[str, Any]:
    """The hyperparameters of the default network, except for those given."""
    core = {
        "hidden_units": hidden_units,
        "dropout_rate": dropout_rate,
        "learning_rate": learning_rate,
    }
    return dict(complete({**core, **others}))


def pytest_configure(config: pytest.Config) -> None:
    """One fork server for all processes of pytest, which are forked from it themselves."""
    if not hasattr(config, "workerinput"):
        running = contextlib.ExitStack()
        running.enter_context(forks.server())
        config.add_cleanup(running.close)
        forked = f"popen//python={shlex.join([sys.executable, forks.__file__])}"
        config.option.tx = [forked for _ in config.getoption("tx", None) or ()]


def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: tests wait for servers, time-outs and processes."""
    return processes.cpu_count() + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a finished study of real digits is slow."""
    for item in items:
        if "finished" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """No test inherits an address, or what a test before it told MLflow or TensorFlow."""
    for name in ("OPTUNA_STORAGE", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "TF_FORCE_GPU_ALLOW_GROWTH"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session", autouse=True)
def _templates() -> None:
    """In a process of pytest that was not forked, too (`-n 0`)."""
    import templates  # here, as pytest's first process runs no test and waits for no import

    templates.use()


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """The garbage collector passes over what is there, millions of TensorFlow's objects."""
    gc.freeze()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 2,000 real training digits and 400 test digits."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    with np.load(ROOT / "search" / "data" / "datasets" / "mnist.npz") as mnist:
        np.savez(
            path,
            x_train=mnist["x_train"][:2000],
            y_train=mnist["y_train"][:2000],
            x_test=mnist["x_test"][:400],
            y_test=mnist["y_test"][:400],
        )
    return path


@pytest.fixture(scope="session")
def clouds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clouds of points in four dimensions: trains in milliseconds."""
    path = tmp_path_factory.mktemp("data") / "clouds.npz"
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 4)) * 3

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.arange(count) % 3
        return (centres[y] + random.normal(size=(count, 4))).astype("float32"), y

    (x_train, y_train), (x_test, y_test) = draw(150), draw(30)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def made_once(
    factory: pytest.TempPathFactory, worker_id: str, name: str, make: Callable[[Path], None]
) -> Path:
    """The folder `name`, filled by `make` in the first of pytest's processes that asks for it."""
    base = factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            make(folder)
    return folder


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str, digits: Path
) -> dict[str, Any]:
    """A folder in which the command ran to its end, and what it printed; leave it as it is.

    That takes half a minute, so one process of pytest does it for all.
    """

    import invariants

    def make(folder: Path) -> None:
        shutil.copy(digits, folder / "digits.npz")
        code, out, err = command(folder, *FINISHED)
        assert (code, err) == (0, "")
        (folder / "out.txt").write_text(out)

    folder = made_once(tmp_path_factory, worker_id, "finished", make)
    out = (folder / "out.txt").read_text()
    return {"folder": folder, "options": FINISHED, "out": out, **invariants.check(folder, TRIALS)}


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own for temporary files, which every user reaches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o1777)
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.chdir(folder)
        yield folder


def as_nobody(act: Callable[[], None]) -> None:
    """Do `act` in a process of another user, who has to end well."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            act()
        except BaseException as error:
            os.write(writing, repr(error).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading) as said:
        assert said.read() == ""


of_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@contextlib.contextmanager
def mlflow_at(folder: Path) -> Iterator["MlflowClient"]:
    """MLflow's client of a folder; its functions that take no address work there, too."""
    import mlflow
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{folder / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield MlflowClient(uri, registry_uri=uri)
    finally:  # not as it was: MLflow gives one address for another where only one is set
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)


@pytest.fixture
def client(in_folder: Path) -> Iterator["MlflowClient"]:
    """MLflow's client of a fresh folder, whose functions that take no address work there, too."""
    import templates

    templates.copy_mlflows_tables(f"sqlite:///{in_folder / 'mlflow.db'}")
    with mlflow_at(in_folder) as found:
        yield found


def copy_databases(source: Path, target: Path) -> None:
    """Copy both databases; the artifacts stay where they are."""
    for name in ("study.db", "mlflow.db"):
        with (
            closing(sqlite3.connect(source / name)) as database,
            closing(sqlite3.connect(target / name)) as copy,
        ):
            database.backup(copy)


@pytest.fixture(scope="session")
def rivals(tmp_path_factory: pytest.TempPathFactory, worker_id: str, clouds: Path) -> Path:
    """A folder in which a poor model became version 1, and a good one, version 2, took its place.

    Leave it as it is: one process of pytest makes it for all. `registry.results` reads how both
    runs ended.
    """
    import registry

    def make(folder: Path) -> None:
        registry.let_a_good_model_follow_a_poor_one(folder, clouds)

    return made_once(tmp_path_factory, worker_id, "rivals", make)


@pytest.fixture
def held(rivals: Path, client: "MlflowClient") -> "MlflowClient":
    """The same, in this test's own folder; the artifacts stay where they are."""
    copy_databases(rivals, Path.cwd())
    return client


def start(folder: Path, *options: str) -> forks.Python:
    """The real command, in a process group of its own, as a shell would start it."""
    return forks.Python([str(ROOT / "study.py"), *options], cwd=folder)


def start_anew(folder: Path, *options: str) -> "subprocess.Popen[str]":
    """As `start`, in a new interpreter, which takes as long to start as it does for a user."""
    return subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "study.py"), *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=dict(os.environ),
    )


def command(
    folder: Path, *options: str, timeout: float = 600, by: Callable[..., Process] = start
) -> tuple[int, str, str]:
    """Run the real command to its end; returns exit code, standard output and error.

    by: `start`, or `start_anew`.
    """
    process = by(folder, *options)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    return process.wait(), out, err


def run_elsewhere(config: StudyConfig) -> None:
    """`pipeline.run` in a process of its own, whose workers are there at once."""
    given = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    code = "import json, search, sys; search.run(search.StudyConfig(**json.loads(sys.argv[1])))"
    process = forks.Python(["-c", code, json.dumps(given)], cwd=Path.cwd())
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """A winner's pictures are empty files: a sixth of the time that its registration takes."""
    from search.promotion import pictures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_figure", lambda path, _: path.touch())
        yield


@pytest.fixture
def graphs() -> Iterator[OrderedDict[str, Any]]:
    """TensorFlow's graphs of this test alone; afterwards all are kept, as tracing takes long."""
    from search.training.train import _of_thread

    others, _of_thread.graphs = _of_thread.graphs, OrderedDict()
    yield _of_thread.graphs
    _of_thread.graphs = OrderedDict({**_of_thread.graphs, **others})  # these are dropped first


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let TensorFlow see two GPUs; returns those whose memory may grow."""
    import tensorflow as tf

    from search.training import environment

    names: list[str] = []
    gpus = [tf.config.PhysicalDevice(f"/physical_device:GPU:{i}", "GPU") for i in range(2)]
    monkeypatch.setattr(environment, "gpu_device", lambda: "/dev/nvidia0")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr(
        tf.config.experimental, "set_memory_growth", lambda gpu, on: names.append(gpu.name)
    )
    details = {"device_name": "NVIDIA H100"}
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details)
    return names


CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, which asks for nothing but what a page asks for."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    quiet = ("background-networking", "component-update", "sync")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)],
        )
        yield chromium
        chromium.close()


def wait_until(
    condition: Callable[[], Found], process: Process | None = None, seconds: float = 120
) -> Found:
    """What `condition` finds, as soon as it finds something; the `process`, if any, has to run."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        late = time.monotonic() > deadline
        if process is not None:
            assert process.poll() is None, process.communicate()
            assert not late, whereabouts(process)
        assert not late
        time.sleep(0.02)
    return found


def whereabouts(process: Process) -> tuple[str, str]:
    """What a process that hangs has written; at the end of that, where its threads are."""
    if isinstance(process, forks.Python):
        process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)  # until it has written that
    os.killpg(process.pid, signal.SIGKILL)
    out, err = process.communicate()
    return out, err


def running_owners(folder: Path) -> set[int]:
    """The processes that have a trial in progress, some epochs into it."""
    query = (
        "SELECT value_json FROM trial_user_attributes JOIN trials USING (trial_id) "
        "WHERE key = 'owner' AND state = 'RUNNING' AND trial_id IN "
        "(SELECT trial_id FROM trial_intermediate_values)"
    )
    if not (folder / "study.db").exists():
        return set()
    with closing(sqlite3.connect(folder / "study.db", timeout=60)) as database:
        return {json.loads(row[0])["pid"] for row in database.execute(query)}
