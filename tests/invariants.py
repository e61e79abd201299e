"""What must hold of both stores whenever a run has ended, whatever happened before."""

import sqlite3
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from search.study.trials import metrics_in
from search.task import METRICS, Metric
from search.tracking.schema import STATUS


def dump(folder: Path) -> dict[str, list[str]]:
    """Everything in both databases."""
    content = {}
    for name in ("study.db", "mlflow.db"):
        with closing(sqlite3.connect(folder / name)) as database:
            content[name] = list(database.iterdump())
    return content


def check(
    folder: Path,
    finished: int | None = None,
    *,
    study_name: str = "mnist-dnn",
    model_name: str = "MNIST_DNN_Model",
    registered: bool = True,
    url: str | None = None,
    tracking_uri: str | None = None,
) -> dict[str, Any]:
    """Assert that both stores agree; returns what was found.

    They are in `folder`, study.db and mlflow.db; `url` is the study's database where it is not, and
    `tracking_uri` MLflow's.
    """
    for name, other in (("study.db", url), ("mlflow.db", tracking_uri)):
        if other is not None:
            continue
        with closing(sqlite3.connect(folder / name)) as database:
            assert database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    storage = optuna.storages.RDBStorage(url or f"sqlite:///{folder / 'study.db'}")
    study = optuna.load_study(study_name=study_name, storage=storage)
    uri = tracking_uri or f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri, registry_uri=uri)
    experiments = [e for e in client.search_experiments() if e.name == "MNIST_Classification"]
    assert len(experiments) == 1
    runs = client.search_runs([experiments[0].experiment_id], max_results=5000)
    mine = [run for run in runs if run.data.tags.get("optuna.study_name") == study_name]
    parents = [run for run in mine if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    parent = parents[0]
    assert parent.info.run_id == study.user_attrs["mlflow_run_id"]
    assert parent.info.status != "RUNNING"
    children = [
        run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    by_trial, by_repeat = defaultdict(list), defaultdict(list)
    for run in children:
        assert run.info.status != "RUNNING"
        if "optuna.orphan" in run.data.tags:
            continue
        number = int(run.data.tags["optuna.trial_number"])
        if run.info.run_name.startswith("trial-"):
            by_trial[number].append(run)
        elif "optuna.finalist" in run.data.tags:
            by_repeat[number, int(run.data.tags["optuna.finalist"])].append(run)

    trials = study.get_trials()
    assert sorted(by_trial) == [trial.number for trial in trials]
    for trial in trials:
        assert trial.state.is_finished(), f"trial {trial.number} is {trial.state.name}"
        (run,) = by_trial[trial.number]
        check_pair(client, study, trial, run)
    check_repeats(client, trials, by_repeat)
    slots = sorted(
        [t.user_attrs["place"] for t in trials if t.state is not TrialState.FAIL] + given_up(trials)
    )
    assert len(set(slots)) == len(slots)
    if finished is not None:
        assert slots == list(range(finished))

    for baseline in study.user_attrs.get("baselines", []):
        for metric, value in baseline["metrics"].items():
            name = f"baseline_{baseline['name'].replace(' ', '_')}_{metric}"
            assert parent.data.metrics[name] == value

    winner = None
    if registered:
        winner = check_registered(client, study, children, model_name)
    storage.remove_session()
    storage.engine.dispose()
    return {
        "study": study,
        "trials": trials,
        "runs": {number: runs[0] for number, runs in by_trial.items()},
        "parent": parent,
        "children": children,
        "client": client,
        "winner": winner,
    }


def given_up(trials: list[Any]) -> list[int]:
    """The slots whose configuration failed by itself, twice and no more."""
    failed = [t.user_attrs["place"] for t in trials if t.user_attrs.get("failed_by_itself")]
    assert all(failed.count(slot) <= 2 for slot in failed)
    return [slot for slot in set(failed) if failed.count(slot) == 2]


def metric_of(study: Any) -> Metric:
    """The metric that a study goes by."""
    return METRICS[study.user_attrs["settings"].get("objective", "val_accuracy")]


def check_pair(client: MlflowClient, study: Any, trial: optuna.trial.FrozenTrial, run: Any) -> None:
    """Assert that a run is as its trial says."""
    assert trial.user_attrs["mlflow_run_id"] == run.info.run_id
    assert run.info.run_name == f"trial-{trial.number:04d}"
    assert run.info.status == STATUS[trial.state]
    assert run.data.tags["optuna.trial_state"] == trial.state.name
    for name, value in trial.params.items():
        assert run.data.params[name] == str(value)
    if trial.state is TrialState.FAIL:
        assert trial.user_attrs["failure"]
        assert run.data.tags["optuna.failure"] == trial.user_attrs["failure"]
    history = [
        entry
        for name in ("history", *(f"history_{block}" for block in range(1, 100)))
        for entry in trial.user_attrs.get(name, [])
    ]
    assert [entry["epoch"] for entry in history] == list(range(len(history)))
    objective = metric_of(study)
    for name in metrics_in(history[-1] if history else ()):
        logged = client.get_metric_history(run.info.run_id, name)
        assert [m.step for m in logged] == list(range(len(history)))
        assert [m.value for m in logged] == [entry[name] for entry in history]
    reported = trial.intermediate_values
    assert list(reported.values()) == [e[objective.name] for e in history][: len(reported)]
    if trial.state is not TrialState.FAIL:
        assert len(reported) == len(history) > 0
    if trial.state is TrialState.COMPLETE:
        assert run.data.metrics[objective.name] == history[-1][objective.name]
        best = trial.user_attrs.get("best_epoch", len(history) - 1)
        assert trial.value == history[best][objective.name]
        if "best_epoch" in trial.user_attrs:
            assert trial.value == objective.best(entry[objective.name] for entry in history)
            assert run.data.tags["optuna.best_epoch"] == str(best)


def check_repeats(client: MlflowClient, trials: list[Any], by_repeat: dict[Any, Any]) -> None:
    """Assert that every repeat of a finalist has its one run, with its curves."""
    kept = {
        (trial.number, int(name.removeprefix("finalist_"))): (trial, value)
        for trial in trials
        for name, value in trial.user_attrs.items()
        if name.startswith("finalist_")
    }
    assert sorted(by_repeat) == sorted(kept)
    for key, (trial, repeat) in kept.items():
        (run,) = by_repeat[key]
        assert run.info.run_id == repeat["mlflow_run_id"]
        assert run.info.run_name == f"finalist-{key[0]:04d}-{key[1]}"
        assert run.info.status == ("FAILED" if "failure" in repeat else "FINISHED")
        assert run.data.tags.get("optuna.failure") == repeat.get("failure")
        assert run.data.params["seed"] == str(repeat["seed"]) != str(trial.user_attrs["seed"])
        for name, value in trial.params.items():
            assert run.data.params[name] == str(value)
        for name in metrics_in(repeat["history"][-1] if repeat["history"] else ()):
            logged = client.get_metric_history(run.info.run_id, name)
            assert [m.value for m in logged] == [entry[name] for entry in repeat["history"]]


def winner_of(study: Any) -> Any:
    """The finalist with the best mean, or else the best trial; the earlier of equals."""
    goal = metric_of(study)
    choice = study.user_attrs.get("finalists") or {"trials": [], "repeats": 0}
    trials = study.get_trials()
    means = []
    for number in choice["trials"]:
        repeats = [trials[number].user_attrs[f"finalist_{i}"] for i in range(choice["repeats"])]
        values = [r["history"][-1][goal.name] for r in repeats if "failure" not in r]
        mean = sum(values) / len(values) if len(values) == len(repeats) else 0.0
        means.append((goal.sign * mean, goal.sign * trials[number].value, -number))
    if means:
        return trials[-max(means)[2]]
    complete = (trial for trial in trials if trial.state is TrialState.COMPLETE)
    return max(complete, key=lambda trial: (goal.sign * trial.value, -trial.number))


def check_registered(client: MlflowClient, study: Any, children: list[Any], name: str) -> Any:
    """Assert that one version is in production and that the winner is registered, with a verdict
    that fits; returns the winner's run."""
    versions = client.search_model_versions(f"name = '{name}'")
    production = [v for v in versions if v.current_stage == "Production"]
    assert len(production) == 1
    assert client.get_model_version_by_alias(name, "production").version == production[0].version
    best = winner_of(study)
    registered = {version.run_id: version for version in versions}
    assert len(registered) == len(versions)
    (run,) = [
        run
        for run in children
        if run.info.run_name == f"retrain-trial-{best.number:04d}" and run.info.run_id in registered
    ]
    version = registered[run.info.run_id]
    assert run.info.status == "FINISHED"
    assert f"test_{metric_of(study).stem}" in run.data.metrics
    assert best.user_attrs["model_version"] == f"{name}/{version.version}"
    assert version.tags["optuna.trial_number"] == str(best.number)
    if version.tags.get("promoted") != "true":  # another one is in production, and is better
        assert version.run_id != production[0].run_id
        assert version.tags["gate.decision"].startswith("not promoted: ")
    return run
