"""What the MLflow runs of a study shall hold, as it follows from the study's trials alone."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial

from search.errors import printable

PARENT, STUDY, STUDY_UID = "mlflow.parentRunId", "optuna.study_name", "optuna.study_uid"
NUMBER, STATE, FAILURE = "optuna.trial_number", "optuna.trial_state", "optuna.failure"
ORPHAN, FINALIST, MODEL = "optuna.orphan", "optuna.finalist", "optuna.model_version"
BEST_EPOCH = "optuna.best_epoch"  # from 0; of a trial with early stopping
MODEL_URI = "model_uri"  # of a retraining's run: it was carried through
NOT_MADE = "evaluation.failure"  # of a retraining's run: what of its evaluation, and why
COMMIT = "mlflow.source.git.commit"
DATASET = "lineage.dataset"  # the digest of the data
LINEAGE = (  # whence a model is: tags of its run and its version, and metadata of the model itself
    *(STUDY, STUDY_UID, NUMBER),
    *("lineage.hyperparameters", "lineage.val_accuracy", "lineage.seed", "lineage.settings"),
    *(DATASET, "lineage.environment", COMMIT),
)
LOST = "lost: its process ended without a word (killed, crashed or switched off)"
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
HISTORY_BLOCK = 100  # epochs

# A trial's history, an entry an epoch, is kept in user attributes of so many epochs each: what is
# written after an epoch does not grow with the epochs before it.


def history_attr(epoch: int) -> str:
    """The user attribute of a trial that keeps the entry of `epoch`, from 0."""
    block = epoch // HISTORY_BLOCK
    return f"history_{block}" if block else "history"


def history_of(trial: FrozenTrial) -> list[dict[str, float]]:
    """The whole history of a trial or a repeat, also where it was kept in one attribute."""
    found = list(trial.user_attrs.get("history", ()))
    block = 1
    while f"history_{block}" in trial.user_attrs:
        found += trial.user_attrs[f"history_{block}"]
        block += 1
    return found


# A finalist's repeats, its trainings on fresh seeds, are kept in user attributes of its trial. For
# the mirror each is seen as a trial of its own: with the number of its trial, and `repeat`.


def repeat_attr(repeat: int) -> str:
    """The user attribute of a trial that keeps its repeat `repeat`, from 0."""
    return f"finalist_{repeat}"


def repeats_of(trial: FrozenTrial) -> dict[int, FrozenTrial]:
    """The repeats of a finalist."""
    found = {}
    for name, kept in trial.user_attrs.items():
        if name.startswith("finalist_"):
            repeat = int(name.removeprefix("finalist_"))
            found[repeat] = _as_trial(trial, repeat, kept)
    return found


def _as_trial(trial: FrozenTrial, repeat: int, kept: Mapping[str, Any]) -> FrozenTrial:
    own = ("seed", "history", "mlflow_run_id", "failure")
    failed = "failure" in kept
    seen = create_trial(
        state=TrialState.FAIL if failed else TrialState.COMPLETE,
        value=None if failed else kept.get("value", kept["history"][-1]["val_accuracy"]),
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={
            "repeat": repeat,
            "trainable_parameters": trial.user_attrs["trainable_parameters"],
            **{name: kept[name] for name in own if name in kept},
        },
    )
    seen.number = trial.number
    seen.datetime_start = datetime.fromtimestamp(kept["began"] / 1000)
    seen.datetime_complete = datetime.fromtimestamp(kept["ended"] / 1000)
    return seen


def mirrored(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """What has a run each: the trials and the repeats of finalists."""
    return [seen for trial in trials for seen in (trial, *repeats_of(trial).values())]


def run_name(trial: FrozenTrial) -> str:
    """The name of the run of a trial or a repeat."""
    repeat = trial.user_attrs.get("repeat")
    number = f"{trial.number:04d}"
    return f"trial-{number}" if repeat is None else f"finalist-{number}-{repeat}"


def tags_of(trial: FrozenTrial) -> dict[str, str]:
    """The tags that the run of a finished trial, or a repeat, shall hold."""
    tags = {NUMBER: str(trial.number)}
    if "repeat" in trial.user_attrs:
        tags[FINALIST] = str(trial.user_attrs["repeat"])
    else:
        tags[STATE] = trial.state.name
    if "best_epoch" in trial.user_attrs:
        tags[BEST_EPOCH] = str(trial.user_attrs["best_epoch"])
    if "model_version" in trial.user_attrs:
        tags[MODEL] = trial.user_attrs["model_version"]
    if trial.state is TrialState.FAIL:
        # `reconcile` writes one; what an earlier version wrote may hold what databases refuse
        tags[FAILURE] = printable(trial.user_attrs.get("failure", "unknown"))
    return tags


def best_epoch(history: Sequence[Mapping[str, float]], *, stopping: bool) -> int:
    """The epoch, from 0, whose weights a training ends with.

    The last one, or with early stopping the first of those with the highest val_accuracy.
    """
    if not stopping:
        return len(history) - 1
    return max(range(len(history)), key=lambda epoch: history[epoch]["val_accuracy"])


def params_of(trial: FrozenTrial, facts: Facts) -> dict[str, Any]:
    """The params that the run of `trial` shall hold."""
    own = ("seed", "trainable_parameters")
    attrs = {name: value for name, value in trial.user_attrs.items() if name in own}
    return {**trial.params, **facts["params"], **attrs}
