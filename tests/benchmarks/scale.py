"""How many trials a second the stores take: a whole trial whose training takes a millisecond.

    python tests/benchmarks/scale.py

Every worker is a process that runs `trial.run_trial` over and over, on PostgreSQL or SQLite,
with the curves in MLflow or without; then the same in a study that has 100, 1,000 and 10,000 trials
already. All of it shares this machine's cores: the workers, both databases and the MLflow server.
Prints a Markdown table; needs Debian's postgresql.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import psutil
import sqlalchemy
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import TrialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from servers import MlflowServer, Postgres, free_port

from search import StudyConfig
from search.data.load import load_dataset
from search.study import sampling, storage
from search.study.trials import SlottedStudy, owner_of_this_process
from search.task import KINDS as TASKS
from search.tracking.runs import Tracking
from search.tracking.schema import study_metadata
from search.training import environment
from search.workers import processes as pool

EPOCHS = 5
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the gRPC proxy is
DATABASES = ("sqlite", "postgresql", "sqlite + mlflow", "postgresql + mlflow", "postgresql by gRPC")
Spans = dict[str, list[float]]


def work(
    config: StudyConfig,
    parent: str,
    proxy: int | None,
    mirrored: bool,
    places: range,
    seconds: float,
    begin: Any,
    results: Any,
) -> None:
    """Run trials at `places` for so many seconds; send how many, and how long what took (s).

    Among these "cpu" is the processor time of a trial, and "memory" what the study took (MB).
    """
    from search.training import network, train
    from search.workers.trial import run_trial
    from search.workers.worker import Worker

    spans: Spans = defaultdict(list)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spans[name].append(time.perf_counter() - began)

        return call

    random = np.random.default_rng(places.start)

    def pretend(*_: Any, callbacks: Any, **__: Any) -> None:
        for callback in callbacks:
            callback.set_model(SimpleNamespace(stop_training=False))
        for epoch in range(EPOCHS):
            time.sleep(0.001 / EPOCHS)
            accuracy = 0.9 + 0.02 * epoch + 0.01 * float(random.random())
            names = ("loss", "accuracy", *TASKS["classification"].metrics)
            for callback in callbacks:
                callback.on_epoch_end(epoch, dict.fromkeys(names, accuracy))

    worker = Worker(config, parent, load_dataset(config.dataset, config.validation_split))
    if proxy is not None:
        worker.study = SlottedStudy(
            study_name=config.study_name,
            storage=optuna.storages.GrpcStorageProxy(port=proxy),
            pruner=sampling.pruner(config),
        )
    worker.rest_until = 0.0 if mirrored else float("inf")
    train.train = pretend  # type: ignore[assignment]
    network.network_for = lambda *_: None  # type: ignore[assignment]
    network.trainable_parameters = lambda _: 0  # type: ignore[assignment]
    SlottedStudy.ask = timed("ask", SlottedStudy.ask)  # type: ignore[method-assign]
    optuna.Trial.report = timed("report", optuna.Trial.report)  # type: ignore[method-assign]
    process = psutil.Process()
    before = process.memory_info().rss
    timed("load", worker.study.get_trials)(deepcopy=False)
    begin.wait()
    deadline = time.monotonic() + seconds
    cpu = time.process_time()
    done = 0
    for place in places:
        assert run_trial(worker, place).state in ("COMPLETE", "PRUNED")
        done += 1
        if time.monotonic() > deadline:
            break
    spans["cpu"] = [(time.process_time() - cpu) / done]
    spans["memory"] = [(process.memory_info().rss - before) / 2**20]
    results.put((done, time.monotonic() - deadline + seconds, dict(spans)))


def measure(
    config: StudyConfig,
    parent: str,
    workers: int,
    seconds: float,
    first: int,
    *,
    mirrored: bool = False,
    proxy: int | None = None,
    during: Callable[[], Any] = lambda: None,
) -> tuple[float, Spans, Any]:
    """Trials a second of so many workers, how long what took, and what `during` said."""
    context = pool._start_method()
    begin, results = context.Barrier(workers + 1), context.Queue()
    processes = [
        context.Process(
            target=work,
            args=(
                *(config, parent, proxy, mirrored),
                range(first + index, 10**9, workers),
                *(seconds, begin, results),
            ),
        )
        for index in range(workers)
    ]
    for process in processes:
        process.start()
    begin.wait()
    time.sleep(seconds / 2)
    said = during()
    ends = [results.get() for _ in processes]
    for process in processes:
        process.join()
    spans: Spans = defaultdict(list)
    for _, _, mine in ends:
        for name, values in mine.items():
            spans[name] += values
    return sum(done / took for done, took, _ in ends), spans, said


def serve(url: str, port: int) -> None:
    """Optuna's gRPC proxy."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.storages.run_grpc_proxy_server(storage.open_storage(url), host="127.0.0.1", port=port)


@contextmanager
def grpc_proxy(url: str) -> Iterator[int]:
    """Its port, while it runs."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(url, port))
    process.start()
    try:
        optuna.storages.GrpcStorageProxy(port=port).wait_server_ready(timeout=60)
        yield port
    finally:
        process.terminate()
        process.join()


def fill(study: optuna.Study, config: StudyConfig, total: int) -> None:
    """Add complete trials, with all that a trial keeps, until there are `total`.

    They are written in bulk: Optuna takes a transaction for each.
    """
    random = np.random.default_rng(total)
    known = {
        name: distribution_to_json(kind)
        for name, kind in sampling.distributions(config.space).items()
    }
    fixed = {
        "owner": owner_of_this_process(),
        "environment": environment.here(),
        "trainable_parameters": 1,
    }
    study_id, engine = study._study_id, study._storage._backend.engine
    first = len(study.get_trials(deepcopy=False))
    now = datetime.now(UTC).replace(tzinfo=None)
    trial = {
        "study_id": study_id,
        "state": TrialState.COMPLETE,
        "datetime_start": now,
        "datetime_complete": now,
    }
    with engine.begin() as connection:
        table = models.TrialModel.__table__
        numbers = [{**trial, "number": number} for number in range(first, total)]
        connection.execute(sqlalchemy.insert(table), numbers)
        ids = sqlalchemy.select(table.c.trial_id, table.c.number).where(
            table.c.study_id == study_id, table.c.number >= first
        )
        rows: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for trial_id, number in connection.execute(ids):
            curve = [0.9 + 0.02 * epoch + 0.01 * float(random.random()) for epoch in range(EPOCHS)]
            params = {
                "hidden_units": float(random.integers(4)),  # which of the choices
                "dropout_rate": float(random.uniform(0, 0.5)),
                "learning_rate": float(10 ** random.uniform(-4, -2)),
            }
            names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
            history = [
                {"epoch": epoch, "time_ms": 0, **dict.fromkeys(names, value)}
                for epoch, value in enumerate(curve)
            ]
            run = f"{random.integers(2**62):032x}"
            own = {"place": number, "seed": number, "mlflow_run_id": run, "history": history}
            rows[models.TrialParamModel] += [
                {"param_name": name, "param_value": value, "distribution_json": known[name]}
                | {"trial_id": trial_id}
                for name, value in params.items()
            ]
            rows[models.TrialValueModel].append(
                {"trial_id": trial_id, "objective": 0, "value": curve[-1], "value_type": "FINITE"}
            )
            rows[models.TrialIntermediateValueModel] += [
                {"trial_id": trial_id, "step": epoch, "intermediate_value": value}
                | {"intermediate_value_type": "FINITE"}
                for epoch, value in enumerate(curve)
            ]
            rows[models.TrialUserAttributeModel] += [
                {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
                for key, value in {**fixed, **own}.items()
            ]
            rows[models.TrialSystemAttributeModel].append(
                {
                    "trial_id": trial_id,
                    "key": "tpe:relative_params:0",
                    "value_json": json.dumps(params),
                }
            )
        for model, values in rows.items():
            connection.execute(sqlalchemy.insert(model.__table__), values)


def row(name: str, workers: int, before: int, rate: float, spans: Spans, said: Any = "") -> None:
    """Print a line of the table."""

    def shown(values: list[float]) -> str:
        worst = statistics.quantiles(values, n=100)[98] if len(values) > 1 else values[0]
        return f"{1000 * statistics.median(values):.0f} ms | {1000 * worst:.0f} ms"

    ask, report = shown(spans["ask"]), shown(spans["report"])
    load = f"{statistics.median(spans['load']):.2f} s"
    memory = f"{statistics.median(spans['memory']):.0f} MB"
    cpu = f"{1000 * statistics.median(spans['cpu']):.0f} ms"
    cells = (name, f"{before:,}", workers, f"{rate:.1f}", cpu, ask, report, load, memory, said)
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--trials", type=int, nargs="*", default=[100, 1_000, 10_000])
    parser.add_argument("--kinds", nargs="*", choices=DATABASES, default=DATABASES)
    asked = parser.parse_args()
    with_server = any(kind.startswith("postgresql") for kind in asked.kinds)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.chdir(folder)
        y = np.arange(60) % 3
        np.savez(
            "tiny.npz", x_train=np.ones((60, 4)), y_train=y, x_test=np.ones((6, 4)), y_test=y[:6]
        )
        if with_server:
            postgres = Postgres()
            stack.callback(postgres.remove)
            server = MlflowServer(folder, postgres.create("mlflow"))
            stack.callback(server.stop)
            engine = sqlalchemy.create_engine(postgres.url, isolation_level="AUTOCOMMIT")
            stack.callback(engine.dispose)

        def connections(name: str) -> int | None:
            if not with_server:
                return None
            query = "SELECT count(*) FROM pg_stat_activity WHERE datname = :name"
            with engine.connect() as connection:
                return int(connection.execute(sqlalchemy.text(query), {"name": name}).scalar_one())

        def study_at(kind: str, name: str) -> tuple[StudyConfig, optuna.Study, str]:
            url = f"sqlite:///{name}.db"
            if kind.startswith("postgresql"):
                url = postgres.create(name)
            uri = server.uri if kind.startswith("postgresql") else "sqlite:///mlflow.db"
            config = StudyConfig(
                storage=url, tracking_uri=uri, dataset="tiny.npz", study_name=name, epochs=EPOCHS
            )
            study = storage.open_study(config, config.settings("tiny"))
            dataset = load_dataset(config.dataset, config.validation_split)
            study.set_user_attr("facts", study_metadata(config, dataset))
            mirror = Tracking(config).open()
            return config, study, mirror.parent_run(study, {})

        print(
            "| where | trials before | workers | trials a second | CPU | ask, median | ask, 99 % |"
            " report, median | report, 99 % | first look | memory | connections |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|---|")
        for kind in asked.kinds:
            for workers in asked.workers:
                name = f"{kind}-{workers}".replace(" ", "").replace("+", "-").lower()
                config, study, parent = study_at(kind, name)
                fill(study, config, 20)
                with ExitStack() as inner:
                    proxy = None
                    if kind.endswith("gRPC"):
                        proxy = inner.enter_context(grpc_proxy(config.storage))
                    rate, spans, said = measure(
                        *(config, parent, workers, asked.seconds, 20),
                        mirrored=kind.endswith("mlflow"),
                        proxy=proxy,
                        during=lambda name=name: connections(name),  # type: ignore[misc]
                    )
                storage_is_server = kind.startswith("postgresql")
                row(kind, workers, 20, rate, spans, said if storage_is_server else "")
        for kind in (kind for kind in asked.kinds if kind in DATABASES[:2]):
            config, study, parent = study_at(kind, f"long-{kind}")
            for before in asked.trials:
                fill(study, config, before)
                rate, spans, _ = measure(config, parent, 4, asked.seconds, before)
                row(kind, 4, before, rate, spans)


if __name__ == "__main__":
    main()
