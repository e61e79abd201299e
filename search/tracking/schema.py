"""The MLflow schema: tags and params of runs, as they follow from a study's trials."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from search.config.hyperparameters import shared
from search.config.settings import StudyConfig
from search.data.dataset import OWN_SPLIT, Dataset
from search.errors import printable
from search.study.ranking import repeats_of
from search.study.storage import BASELINES, REASON, SEED, VERSION
from search.task import METRICS

PARENT, STUDY, STUDY_UID = "mlflow.parentRunId", "optuna.study_name", "optuna.study_uid"
NUMBER, STATE, FAILURE = "optuna.trial_number", "optuna.trial_state", "optuna.failure"
ORPHAN, FINALIST, MODEL = "optuna.orphan", "optuna.finalist", "optuna.model_version"
BEST_EPOCH = "optuna.best_epoch"  # from 0; of a trial with early stopping
MODEL_URI = "model_uri"  # of a retraining's run that is complete
NOT_MADE = "evaluation.failure"  # of a retraining's run: what could not be evaluated, and why
BASELINE = "evaluation.baseline"  # of a retraining's run: its comparison with the best baseline
COMMIT = "mlflow.source.git.commit"
DATASET = "lineage.dataset"  # the digest of the data
LINEAGE = (  # a model's origin: tags of its run and version, and the model's metadata
    *(STUDY, STUDY_UID, NUMBER),
    *("lineage.hyperparameters", "lineage.seed", "lineage.settings"),
    *(f"lineage.{name}" for name in METRICS),  # the objective
    *(DATASET, "lineage.environment", COMMIT),
)
NOTE, SUMMARY = "mlflow.note.content", "optuna.summary"
STATUS = {
    TrialState.RUNNING: "RUNNING",
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.FAIL: "FAILED",
}
Metadata = Mapping[str, Mapping[str, Any]]


def mirrored(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials and the repeats of finalists: each has a run."""
    return [seen for trial in trials for seen in (trial, *repeats_of(trial).values())]


def run_name(trial: FrozenTrial) -> str:
    """The name of the run of a trial or a repeat."""
    repeat = trial.user_attrs.get("repeat")
    number = f"{trial.number:04d}"
    return f"trial-{number}" if repeat is None else f"finalist-{number}-{repeat}"


def tags_of(trial: FrozenTrial) -> dict[str, str]:
    """The tags that the run of a finished trial or repeat must have."""
    tags = {NUMBER: str(trial.number)}
    if "repeat" in trial.user_attrs:
        tags[FINALIST] = str(trial.user_attrs["repeat"])
    else:
        tags[STATE] = trial.state.name
    if "best_epoch" in trial.user_attrs:
        tags[BEST_EPOCH] = str(trial.user_attrs["best_epoch"])
    if VERSION in trial.user_attrs:
        tags[MODEL] = trial.user_attrs[VERSION]
    if trial.state is TrialState.FAIL:
        # earlier versions stored characters that databases refuse
        tags[FAILURE] = printable(trial.user_attrs.get(REASON, "unknown"))
    return tags


def params_of(trial: FrozenTrial, metadata: Metadata) -> dict[str, Any]:
    """The params that the run of `trial` must have."""
    own = (SEED, "trainable_parameters")
    attrs = {name: value for name, value in trial.user_attrs.items() if name in own}
    return {**trial.params, **metadata["params"], **attrs}


def test_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of the run of a retraining that are of the test examples, as `test_loss`."""
    return {name: value for name, value in metrics.items() if name.startswith("test_")}


def baseline_metrics(study: optuna.Study) -> dict[str, float]:
    """The metrics of the study's baselines, which its parent run must have."""
    return {
        f"baseline_{baseline['name'].replace(' ', '_')}_{name}": value
        for baseline in study.user_attrs.get(BASELINES, [])
        for name, value in baseline["metrics"].items()
    }


def study_metadata(config: StudyConfig, dataset: Dataset) -> Metadata:
    """What all trials of a study share, as stored in the study: params, dataset, space."""
    from mlflow.data.numpy_dataset import from_numpy  # slow: pandas

    count = dataset.train_examples  # of a pipeline, more than are in memory: only shapes are stored
    x, y = (np.broadcast_to(part[:1], (count, *part.shape[1:])) for part in dataset.train)
    decided, own = dataset.task.decides, dataset.split == OWN_SPLIT
    described = from_numpy(
        features=x, targets=y, name=Path(dataset.name).name, digest=dataset.digest[:8]
    )
    return {
        "params": {
            "epochs": config.trial_epochs,
            **shared(config.space),
            **({} if own else {"validation_split": config.validation_split}),
            **({} if dataset.split == "last" else {"split": dataset.split}),
            **({} if dataset.normalization is None else {"normalize": "auto"}),
            **({} if config.class_weight == "none" else {"class_weight": config.class_weight}),
            **({} if config.model else {"output_activation": decided.output_activation}),
            **({"model": config.model} if config.model else {}),
            "loss": decided.loss,
            "dataset": config.dataset,
            **config.table,
            **({} if config.test is None else {"test": config.test}),
            "train_samples": dataset.train_examples,
            "validation_samples": len(dataset.validation[1]),
            "test_samples": len(dataset.x_test),
            **({} if dataset.task.is_number else {"num_classes": dataset.task.outputs}),
            **dataset.source,
        },
        "dataset": described.to_dict(),
        "space": {name: str(p) for name, p in config.space.searched().items()},
        "reference": config.space.reference() or {},
    }
