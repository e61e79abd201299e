"""What TPE proposes is Optuna's proposal to the last digit, from arrays and from trials alike."""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.sampler import _RELATIVE_PARAMS_KEY
from optuna.trial import TrialState, create_trial
from test_sqlite import SETTINGS

from search import StudyConfig
from search.study import sampling, storage, tpe
from search.study.outline import OutlineStorage
from search.study.trials import SlottedStudy

UNITS = CategoricalDistribution((128, 256, 512))
DROPOUT = FloatDistribution(0, 0.5)
RATE = FloatDistribution(1e-4, 1e-2, log=True)
FEW = {"units": UNITS, "dropout": DROPOUT, "rate": RATE}
SPACES: dict[str, dict[str, BaseDistribution]] = {
    "numbers and choices": FEW,
    "one choice": {"units": UNITS},
    "two numbers": {"rate": RATE, "dropout": DROPOUT},
    "steps": {**FEW, "batch": IntDistribution(8, 512, step=8)},
    "seven numbers": {f"x{index}": FloatDistribution(0, 1 + index) for index in range(7)},
    "nine numbers": {f"x{index}": FloatDistribution(0, 1 + index) for index in range(9)},
}


def drawn(kind: BaseDistribution, random: np.random.Generator) -> Any:
    if isinstance(kind, CategoricalDistribution):
        return kind.choices[int(random.integers(len(kind.choices)))]
    if isinstance(kind, IntDistribution):
        return int(random.integers(kind.low, kind.high + 1)) // kind.step * kind.step
    assert isinstance(kind, FloatDistribution)
    value = kind.low + (kind.high - kind.low) * random.beta(0.3, 0.3)  # many near the bounds
    return float(min(kind.high, max(kind.low, value)))


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("known", [0, 1, 30, 2000])
def test_a_density_is_optunas(space: dict[str, BaseDistribution], known: int) -> None:
    random = np.random.default_rng(known)
    parameters = TPESampler()._parzen_estimator_parameters
    seen = {
        name: np.asarray([kind.to_internal_repr(drawn(kind, random)) for _ in range(known)], float)
        for name, kind in space.items()
    }
    own = tpe._Estimator(seen, space, parameters)
    optunas = _ParzenEstimator(seen, space, parameters)
    elsewhere = {name: column[:3] for name, column in seen.items()}
    for estimator in (optunas, _ParzenEstimator(elsewhere, space, parameters)):
        samples = estimator.sample(np.random.RandomState(1), 24)
        assert own.log_pdf(samples).tolist() == optunas.log_pdf(samples).tolist()


BRANCHING = {
    "architecture": "dense,cnn",
    "filters": "16:64",
    "weight_decay": "1e-4:1e-1:log",
    "dropout_rate": "0:0.5:0.05",
    "augmentation": "none,shift",
    "augmentation_strength": "0.5:1.5",
}


def fill(study: optuna.Study, config: StudyConfig, complete: int) -> None:
    """Add 38 trials, 28 of them finished, so many of these COMPLETE; others failed or run."""
    random = np.random.default_rng(complete)
    states = [TrialState.COMPLETE] * complete + [TrialState.PRUNED] * (28 - complete)
    states += [TrialState.FAIL] * 2 + [TrialState.RUNNING] * 8
    suggestions = optuna.create_study(sampler=optuna.samplers.RandomSampler(complete))
    for number in random.permutation(len(states)):
        proposed = suggestions.ask()
        config.space.suggest(proposed)
        epochs = int(random.integers(1, 4))
        value = round(float(random.random()), 1)  # some are equal
        state = states[number]
        study.add_trial(
            create_trial(
                state=state,
                value=value if state is TrialState.COMPLETE else None,
                params={} if state is TrialState.RUNNING else proposed.params,
                distributions={} if state is TrialState.RUNNING else proposed.distributions,
                system_attrs={f"{_RELATIVE_PARAMS_KEY}:0": json.dumps(proposed.params)},
                intermediate_values={e: float(random.random()) for e in range(epochs)},
                user_attrs={"place": 0},
            )
        )


@pytest.fixture(
    scope="module",
    params=[
        (space, complete, objective)
        for objective in ("val_accuracy", "val_loss")  # maximized, minimized
        for space, complete in (("plain", 20), ("plain", 2), ("branching", 20))
    ],
    ids=str,
)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[StudyConfig, list[optuna.Study]]]:
    """A study as Optuna reads it, and as a worker does, with a trial of this process last."""
    space, complete, objective = request.param
    folder: Path = tmp_path_factory.mktemp("study")
    options: Mapping[str, Any] = BRANCHING if space == "branching" else {}
    config = StudyConfig(storage=f"sqlite:///{folder / 'study.db'}", **options)
    study = storage.open_study(config, {**SETTINGS, "objective": objective})
    fill(study, config, complete)
    backend = OutlineStorage(storage.open_storage(config.storage))
    worker = SlottedStudy(study_name=config.study_name, storage=backend)
    worker.ask()
    yield config, [study, worker]
    for each in (study, worker):
        storage.close_study(each)


@pytest.mark.parametrize("seed", range(3))
def test_a_proposal_is_optunas(both: tuple[StudyConfig, list[optuna.Study]], seed: int) -> None:
    config, (study, worker) = both
    grouped = config.space.is_conditional()
    options: dict[str, Any] = {"multivariate": True, "group": True} if grouped else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optunas = TPESampler(seed=seed, **options)
    own = sampling._tpe(seed, conditional=grouped)
    proposals = []
    for sampler, reader in ((optunas, study), (own, worker)):
        trial = study.get_trials(deepcopy=False)[-1]
        reader._thread_local.cached_all_trials = None
        asked = sampler.infer_relative_search_space(reader, trial)
        proposed = sampler.sample_relative(reader, trial, asked)
        kind = FloatDistribution(0, 1)
        alone = sampler.sample_independent(reader, trial, "another", kind)
        proposals.append((asked, list(asked), proposed, alone))
    assert proposals[0] == proposals[1]
    assert (
        set(proposals[0][2]) == {n for n, k in proposals[0][0].items() if not k.single()} != set()
    )
