"""What a study has found so far, read from its stores: for the terminal, scripts and both UIs."""

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.config.hyperparameters import REFERENCE, unusual
from search.config.parameter import Value
from search.config.settings import StudyConfig
from search.errors import printable, redact
from search.imports import undisturbed
from search.study import ranking, storage
from search.study.lock import find_holder, holds_study
from search.study.ranking import Finalist
from search.study.storage import METADATA, REASON, RUN_ID, SETTINGS, VERSION
from search.study.trials import FINISHED, history_of
from search.tracking.address import check_uri
from search.tracking.registered_model import Production, find_production

SCHEMA = 1
_TOP = 10
_ENOUGH = 10  # trials, below which an importance is noise


@dataclass(frozen=True)
class Row:
    """A trial: val_accuracy after the last of its `epochs`, and the seconds it took."""

    number: int
    state: str
    val_accuracy: float | None
    hyperparameters: dict[str, Value]
    epochs: int
    seconds: float | None
    run_id: str | None
    failure: str | None


@dataclass(frozen=True)
class Importances:
    """Each hyperparameter's share in the differences of val_accuracy; they sum to 1.

    Pruned trials are compared, too: by val_accuracy after `epoch`, from 1, which all `trials` have.
    By PED-ANOVA (Watanabe et al. 2023), Optuna's default.
    """

    epoch: int
    trials: int
    shares: dict[str, float]


@dataclass(frozen=True)
class Saved:
    """What pruning saved: epochs not trained, and their seconds, each at its trial's own speed."""

    epochs: int
    seconds: float


@dataclass(frozen=True)
class Overview:
    """A study at a glance.

    running: host and pid of another process that runs the study now, None where there is none.
    space: what each hyperparameter that is searched may be; fixed: what all trials have in common
    that a plain network has not. best: the COMPLETE trial with the highest val_accuracy.
    reference: the trial of the reference configuration. top: the best COMPLETE trials, best first.
    finalists: the trials that were trained again, the best mean first; it won. registered: the
    winner's model and version. failures: the FAIL trials. production: the version of the model
    that is in production, made by this study or another.
    """

    study: str
    storage: str
    tracking_uri: str
    parent_run_id: str | None
    running: str | None
    complete: int
    pruned: int
    failed: int
    unfinished: int
    space: dict[str, str]
    fixed: dict[str, Value]
    best: Row | None
    reference: Row | None
    top: list[Row]
    finalists: list[Finalist]
    registered: str | None
    importances: Importances | None
    saved: Saved
    failures: list[Row]
    production: Production | None

    def as_json(self) -> dict[str, Any]:
        """The schema in the README; a new key keeps its number, a changed one raises it."""
        return {"schema": SCHEMA, **asdict(self)}


@undisturbed()
def read(config: StudyConfig) -> Overview:
    """The overview of the study that `config` names; changes nothing.

    Raises InputError where there is none, RunError where a database fails.
    """
    try:
        storage.check(config)
        check_uri(config.tracking_uri)
        return of(storage.load_study(config), config)
    except storage.ERRORS as error:
        raise storage.failure(error) from error


def of(study: optuna.Study, config: StudyConfig, *, importances: bool = True) -> Overview:
    """The overview of `study`, whose model is registered as `config.model_name`.

    importances: whether they are wanted, which takes a second.
    """
    trials = study.get_trials(deepcopy=False)
    states = [trial.state for trial in trials]
    complete = ranking.ranked(trials)
    settings = study.user_attrs[SETTINGS]
    facts = study.user_attrs.get(METADATA, {})
    epochs = int(settings["epochs"])
    first, won = ranking.reference(study), ranking.winner(study)
    return Overview(
        study=study.study_name,
        storage=redact(config.storage),
        tracking_uri=redact(config.tracking_uri),
        parent_run_id=study.user_attrs.get(RUN_ID),
        running=None if holds_study(config) else find_holder(config),
        complete=len(complete),
        pruned=states.count(TrialState.PRUNED),
        failed=states.count(TrialState.FAIL),
        unfinished=len([state for state in states if not state.is_finished()]),
        space={name: settings[name] for name in facts.get("space", REFERENCE)},
        fixed=unusual(facts.get("params", {})),
        best=row(complete[0]) if complete else None,
        reference=None if first is None else row(first),
        top=[row(trial) for trial in complete[:_TOP]],
        finalists=ranking.standing(study),
        registered=None if won is None else won.user_attrs.get(VERSION),
        importances=importances_of(study) if importances else None,
        saved=_saved(trials, epochs),
        failures=[row(trial) for trial in trials if trial.state is TrialState.FAIL],
        production=find_production(config),
    )


def row(trial: FrozenTrial) -> Row:
    """What is shown of a trial."""
    history = history_of(trial)
    last = history[-1]["val_accuracy"] if history else None
    failure = trial.user_attrs.get(REASON)
    return Row(
        number=trial.number,
        state=trial.state.name,
        val_accuracy=trial.value if trial.state is TrialState.COMPLETE else last,
        hyperparameters=dict(trial.params),
        epochs=len(history),
        seconds=None if trial.duration is None else trial.duration.total_seconds(),
        run_id=trial.user_attrs.get(RUN_ID),
        failure=None if failure is None else printable(failure),
    )


def comparable(study: optuna.Study) -> tuple[int, optuna.Study]:
    """The last epoch, from 1, that every finished trial has, and a copy of the study as of then.

    In the copy, in memory, all finished trials are COMPLETE with their val_accuracy after that
    epoch: Optuna compares COMPLETE trials only, and a value after one epoch tells nothing beside
    one after five.
    """
    trials = study.get_trials(deepcopy=False, states=FINISHED)
    reached = [len(trial.intermediate_values) for trial in trials]
    epoch = min(reached, default=0)
    copy = optuna.create_study(study_name=study.study_name, direction="maximize")
    copy.add_trials(
        [
            create_trial(
                params=trial.params,
                distributions=trial.distributions,
                value=trial.intermediate_values[epoch - 1],
            )
            for trial in trials
            if epoch
        ]
    )
    return epoch, copy


def importances_of(study: optuna.Study) -> Importances | None:
    """Which hyperparameters matter; None where too few trials tell, or their values are equal."""
    epoch, copy = comparable(study)
    trials = copy.get_trials(deepcopy=False)
    varied = {  # what only some trials were asked for can't be compared
        name
        for trial in trials
        for name, distribution in trial.distributions.items()
        if not distribution.single() and all(name in other.params for other in trials)
    }
    if len(trials) < _ENOUGH or not varied:
        return None
    from optuna.importance import get_param_importances  # slow: it imports scikit-learn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Target and region quantiles select the same")
        try:
            shares = get_param_importances(copy, params=sorted(varied))
        except UserWarning:  # none of the values is below the best tenth's: nothing to explain
            return None
    return Importances(epoch, len(trials), {name: float(share) for name, share in shares.items()})


def _saved(trials: list[FrozenTrial], epochs: int) -> Saved:
    saved, seconds = 0, 0.0
    for trial in trials:
        shown = row(trial)
        if trial.state is TrialState.PRUNED and shown.epochs:
            left = epochs - shown.epochs
            saved += left
            seconds += left * (shown.seconds or 0) / shown.epochs
    return Saved(saved, round(seconds, 1))
