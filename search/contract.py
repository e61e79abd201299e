"""What the MLflow run of a trial shall hold, as it follows from the trial and its study alone."""

from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState

PARENT, STUDY, STUDY_UID = "mlflow.parentRunId", "optuna.study_name", "optuna.study_uid"
NUMBER, STATE, FAILURE = "optuna.trial_number", "optuna.trial_state", "optuna.failure"
ORPHAN = "optuna.orphan"
NOTE, SUMMARY = "mlflow.note.content", "optuna.summary"
STATUS = {
    TrialState.RUNNING: "RUNNING",
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.FAIL: "FAILED",
}
METRICS = {  # Keras' name -> ours
    "loss": "train_loss",
    "accuracy": "train_accuracy",
    "val_loss": "val_loss",
    "val_accuracy": "val_accuracy",
}
Facts = Mapping[str, Mapping[str, Any]]


def tags_of(trial: FrozenTrial) -> dict[str, str]:
    """The tags that the run of the finished `trial` shall hold."""
    tags = {NUMBER: str(trial.number), STATE: trial.state.name}
    if trial.state is TrialState.FAIL:
        tags[FAILURE] = trial.user_attrs.get("failure", "unknown")  # `reconcile` writes one
    return tags


def params_of(trial: FrozenTrial, facts: Facts) -> dict[str, Any]:
    """The params that the run of `trial` shall hold."""
    own = ("seed", "trainable_parameters")
    attrs = {name: value for name, value in trial.user_attrs.items() if name in own}
    return {**trial.params, **facts["params"], **attrs}
