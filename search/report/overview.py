"""The findings of a study as data: for the terminal, scripts, the report and both UIs."""

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.config.hyperparameters import REFERENCE, unusual
from search.config.parameter import Value
from search.config.settings import StudyConfig
from search.errors import redact
from search.imports import undisturbed
from search.promotion.baselines import Baseline
from search.study import ranking, storage
from search.study.lock import find_holder, holds_study
from search.study.ranking import Finalist
from search.study.trials import FINISHED, TrialSummary, summarize
from search.task import METRICS, Metric
from search.tracking.address import check_uri
from search.tracking.registered_model import Production, find_production

SCHEMA = 2
_TOP = 10
_ENOUGH = 10  # trials below which an importance is noise
_INTERNAL = ("slot", "given_up")  # fields of a trial's summary that are not in the JSON


@dataclass(frozen=True)
class Importances:
    """How much each hyperparameter affects the objective, in shares that sum to 1.

    By PED-ANOVA (Watanabe et al. 2023), Optuna's default. All finished trials, also pruned ones,
    are compared by the objective after `epoch` (from 1), the last one that all `trials` have.
    """

    epoch: int
    trials: int
    shares: dict[str, float]


@dataclass(frozen=True)
class Saved:
    """What pruning saved: epochs not trained, and their seconds, estimated from each trial."""

    epochs: int
    seconds: float


@dataclass(frozen=True)
class Overview:
    """A study at a glance.

    running: host and pid of another process that runs the study now, None if there is none.
    space: the values or range of each hyperparameter that is searched. fixed: what all trials have
    in common that differs from the default network. objective: the metric that the study goes by;
    direction: maximize or minimize. best: the COMPLETE trial with the best value. reference: the
    trial of the reference configuration. baselines: simple models on the same data.
    against_baseline: how the retrained winner compares with the best of them, None if it was not
    compared. top: the best COMPLETE trials, best first. finalists: the trials that were trained
    again, the best mean first, which is the winner. registered: the winner's model and version.
    failures: the FAIL trials. production: the version of the model that is in production, of this
    study or another.
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
    objective: str
    direction: str
    best: TrialSummary | None
    reference: TrialSummary | None
    baselines: list[Baseline]
    against_baseline: dict[str, Any] | None
    top: list[TrialSummary]
    finalists: list[Finalist]
    registered: str | None
    importances: Importances | None
    saved: Saved
    failures: list[TrialSummary]
    production: Production | None

    @property
    def metric(self) -> Metric:
        """The objective."""
        return METRICS[self.objective]

    def as_json(self) -> dict[str, Any]:
        """As in docs/results.md; a changed key needs a new SCHEMA, an added one does not."""

        def public(fields: list[tuple[str, Any]]) -> dict[str, Any]:
            return {name: value for name, value in fields if name not in _INTERNAL}

        return {"schema": SCHEMA, **asdict(self, dict_factory=public)}


@undisturbed()
def read(config: StudyConfig) -> Overview:
    """The overview of the study that `config` names; changes nothing.

    Raises InputError if there is none, RunError if a database fails.
    """
    try:
        storage.check(config)
        check_uri(config.tracking_uri)
        with storage.loaded(config) as study:
            return of(study, config)
    except storage.ERRORS as error:
        raise storage.failure(error) from error


def of(study: optuna.Study, config: StudyConfig, *, importances: bool = True) -> Overview:
    """The overview of `study`, whose model is registered as `config.model_name`.

    importances: whether to compute them, which takes a second.
    """
    trials = study.get_trials(deepcopy=False)
    states = [trial.state for trial in trials]
    objective = storage.objective(study)
    complete = ranking.ranked(trials, objective)
    settings = study.user_attrs["settings"]
    metadata = study.user_attrs.get("facts", {})
    epochs = int(settings["epochs"])
    first, won = ranking.reference(study), ranking.winner(study)
    return Overview(
        study=study.study_name,
        storage=redact(config.storage),
        tracking_uri=redact(config.tracking_uri),
        parent_run_id=study.user_attrs.get(storage.RUN_ID),
        running=None if holds_study(config) else find_holder(config),
        complete=len(complete),
        pruned=states.count(TrialState.PRUNED),
        failed=states.count(TrialState.FAIL),
        unfinished=len([state for state in states if not state.is_finished()]),
        space={name: settings[name] for name in metadata.get("space", REFERENCE)},
        fixed=unusual(metadata.get("params", {})),
        objective=objective.name,
        direction=objective.direction,
        best=summarize(complete[0]) if complete else None,
        reference=None if first is None else summarize(first),
        baselines=baselines_of(study),
        against_baseline=against_baseline_of(study),
        top=[summarize(trial) for trial in complete[:_TOP]],
        finalists=ranking.standing(study),
        registered=None if won is None else won.user_attrs.get(storage.VERSION),
        importances=importances_of(study) if importances else None,
        saved=_saved(trials, epochs),
        failures=[summarize(trial) for trial in trials if trial.state is TrialState.FAIL],
        production=find_production(config),
    )


def baselines_of(study: optuna.Study) -> list[Baseline]:
    """The study's baselines; empty if none are stored."""
    return [Baseline(**kept) for kept in study.user_attrs.get(storage.BASELINES, [])]


def against_baseline_of(study: optuna.Study) -> dict[str, Any] | None:
    """How the retrained winner compares with the best baseline; None if it was not compared."""
    won = ranking.winner(study)
    found: dict[str, Any] | None = None if won is None else won.user_attrs.get(storage.AGAINST)
    return found


def comparable(study: optuna.Study) -> tuple[int, optuna.Study]:
    """The last epoch, from 1, that every finished trial has, and a copy of the study at it.

    In the copy, in memory, all finished trials are COMPLETE with their value after that
    epoch: Optuna compares COMPLETE trials only, and a value after one epoch can't be compared with
    one after five.
    """
    trials = study.get_trials(deepcopy=False, states=FINISHED)
    reached = [len(trial.intermediate_values) for trial in trials]
    epoch = min(reached, default=0)
    copy = optuna.create_study(study_name=study.study_name, direction=study.direction)
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


def varied(study: optuna.Study) -> tuple[set[str], set[str]]:
    """The hyperparameters with more than one possible value, and those of them in every trial."""
    trials = study.get_trials(deepcopy=False)
    found = {
        name
        for trial in trials
        for name, distribution in trial.distributions.items()
        if not distribution.single()
    }
    return found, {name for name in found if all(name in trial.params for trial in trials)}


def importances_of(study: optuna.Study) -> Importances | None:
    """Which hyperparameters matter; None if there are too few trials, or their values are equal."""
    epoch, copy = comparable(study)
    trials, (_, common) = len(copy.get_trials(deepcopy=False)), varied(copy)
    if trials < _ENOUGH or not common:
        return None
    from optuna.importance import get_param_importances  # slow: it imports scikit-learn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Target and region quantiles select the same")
        try:
            shares = get_param_importances(copy, params=sorted(common))
        except UserWarning:  # no value is below those of the best tenth: nothing to explain
            return None
    return Importances(epoch, trials, {name: float(share) for name, share in shares.items()})


def _saved(trials: list[FrozenTrial], epochs: int) -> Saved:
    saved, seconds = 0, 0.0
    for trial in trials:
        pruned = summarize(trial)
        if pruned.state == "PRUNED" and pruned.epochs:
            left = epochs - pruned.epochs
            saved += left
            seconds += left * (pruned.seconds or 0) / pruned.epochs
    return Saved(saved, round(seconds, 1))
