"""What a slot proposes and whom a pruner ends is the same in one go, resumed, or with failures."""

import hashlib
import tracemalloc
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from search.config.hyperparameters import REFERENCE
from search.config.settings import StudyConfig
from search.study import sampling
from search.study.outline import OutlineStorage
from search.study.storage import close, open_storage
from search.study.trials import SlottedStudy

SAMPLERS = ("tpe", "random", "qmc")
PRUNERS = ("percentile", "median", "halving", "hyperband")
BRANCHING = {
    "architecture": "dense,cnn",
    "filters": "16:64",
    "activation": "relu,gelu,silu",
    "weight_decay": "1e-4:1e-1:log",
    "augmentation": "none,shift,elastic",
    "augmentation_strength": "0.5:1.5",
}
GRID = {"sampler": "grid", "hidden_units": "8,512", "dropout_rate": "0.1,0.2,0.3"}
EPOCHS, SLOTS = 9, 24


Direction = Literal["maximize", "minimize"]


class Broken(Exception):
    """A trial that fails."""


def config(**changed: Any) -> StudyConfig:
    return StudyConfig(**{"pruner": "none", "epochs": EPOCHS, "n_trials": SLOTS, **changed})


def session(
    settings: StudyConfig, storage: BaseStorage, direction: Direction = "maximize"
) -> SlottedStudy:
    """The study as a worker opens it: a pruner of its own, the sampler of every trial new."""
    optuna.create_study(study_name="s", storage=storage, direction=direction, load_if_exists=True)
    return SlottedStudy(study_name="s", storage=storage, pruner=sampling.pruner(settings))


def accuracy(tried: Mapping[str, Any], slot: int, epoch: int) -> float:
    """A made-up learning curve; curves of different slots cross."""
    digest = hashlib.sha256(f"{slot} {epoch}".encode()).digest()
    best = 1 - abs(tried["dropout_rate"] - 0.35) - abs(tried["learning_rate"] - 0.004) * 50
    return best * (1 - 0.6 ** (epoch + 1)) + digest[0] / 1000 + 1e-5 * tried["hidden_units"]


def run_trial(study: SlottedStudy, settings: StudyConfig, slot: int, *, broken: bool) -> None:
    sign = 1 if study.direction is optuna.study.StudyDirection.MAXIMIZE else -1

    def objective(trial: optuna.Trial) -> float:
        tried = settings.space.suggest(trial)
        judged = sampling.Judged(trial)
        for epoch in range(settings.epochs):
            judged.report(sign * accuracy(tried, slot, epoch), epoch)
            if broken and epoch == 4:
                raise Broken
            if judged.should_prune() and not broken:
                raise optuna.TrialPruned
        return sign * accuracy(tried, slot, settings.epochs - 1)

    study.attrs = {"place": slot, "seed": sampling.seeds(settings.seed, slot)[1]}
    study.sampler = sampling.sampler(settings, slot)
    study.optimize(objective, n_trials=1, catch=(Broken,))


def search(
    settings: StudyConfig,
    *,
    broken: Collection[int] = (),
    impossible: Collection[int] = (),
    sessions: Collection[int] = (),
    slots: int = SLOTS,
    storage: BaseStorage | None = None,
    direction: Direction = "maximize",
) -> dict[int, FrozenTrial]:
    """The finished trials by slot.

    broken: slots that fail once; impossible: that fail twice, and are given up; sessions: where one
    begins. storage: in memory by default.
    """
    storage = storage or InMemoryStorage()
    study = session(settings, storage, direction)
    for slot in range(slots):
        if slot in sessions:
            study = session(settings, storage)
        if slot in impossible:
            run_trial(study, settings, slot, broken=True)
            if slot in broken:
                study = session(settings, storage)
            run_trial(study, settings, slot, broken=True)
            continue
        if slot in broken:
            run_trial(study, settings, slot, broken=True)
        run_trial(study, settings, slot, broken=False)
    trials = study.get_trials()
    states = Counter(trial.state for trial in trials)
    assert states[TrialState.FAIL] == len(set(broken) - set(impossible)) + 2 * len(impossible)
    finished = {t.user_attrs["place"]: t for t in trials if t.state is not TrialState.FAIL}
    assert sorted(finished) == [slot for slot in range(slots) if slot not in impossible]
    return finished


def proposals(trials: dict[int, FrozenTrial]) -> list[dict[str, Any]]:
    return [trial.params for _, trial in sorted(trials.items())]


def decisions(trials: dict[int, FrozenTrial]) -> list[tuple[str, list[float]]]:
    return [
        (trial.state.name, list(trial.intermediate_values.values()))
        for _, trial in sorted(trials.items())
    ]


# ---- slots and seeds --------------------------------------------------------------------------


def test_every_slot_has_two_seeds_of_its_own() -> None:
    pairs = [sampling.seeds(seed, slot) for seed in range(5) for slot in range(200)]
    flat = [seed for pair in pairs for seed in pair]
    assert len(set(flat)) == len(flat) == 2000
    assert all(0 <= seed < 2**31 for seed in flat)
    assert pairs == [sampling.seeds(seed, slot) for seed in range(5) for slot in range(200)]


def test_fresh_seeds_are_fresh() -> None:
    used = {seed for place in range(100) for seed in sampling.seeds(0, place)}
    fresh = [sampling.repeat_seed(0, place, repeat) for place in range(100) for repeat in range(9)]
    assert len(set(fresh)) == 900
    assert not used & set(fresh)


# ---- proposals ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["none", *PRUNERS])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_proposes_the_same_resumed_or_with_failed_trials_replaced(
    name: str, pruner: str
) -> None:
    settings = config(sampler=name, pruner=pruner)
    in_one_go = proposals(search(settings))
    assert proposals(search(settings, sessions=(1, 7, 15))) == in_one_go
    assert proposals(search(settings, broken=(0, 3, 6, 14, 18), sessions=(7, 18))) == in_one_go
    assert len({tuple(point.values()) for point in in_one_go}) == SLOTS


@pytest.mark.parametrize("pruner", ["none", "halving", "hyperband"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_with_slots_given_up_a_study_goes_on_the_same_in_one_go_or_resumed(
    name: str, pruner: str
) -> None:
    settings = config(sampler=name, pruner=pruner)
    in_one_go = search(settings, impossible=(0, 5, 12))
    resumed = search(settings, impossible=(0, 5, 12), broken=(5, 7), sessions=(1, 12, 13))
    assert proposals(resumed) == proposals(in_one_go)
    assert decisions(resumed) == decisions(in_one_go)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_branching_space_is_proposed_the_same_and_only_what_matters(name: str) -> None:
    settings = config(sampler=name, **BRANCHING)
    in_one_go = proposals(search(settings))
    assert proposals(search(settings, sessions=(1, 7, 15), broken=(3, 14))) == in_one_go
    assert all(point in settings.space for point in in_one_go)
    with_filters = [point for point in in_one_go if "filters" in point]
    assert 0 < len(with_filters) < SLOTS
    assert len({point["filters"] for point in with_filters}) > len(with_filters) / 2
    assert {len(point) for point in in_one_go} == {7, 8, 9, 10}


@pytest.mark.parametrize("name", SAMPLERS)
def test_another_seed_gives_other_proposals(name: str) -> None:
    one = proposals(search(config(sampler=name), slots=6))
    other = proposals(search(config(sampler=name, seed=1), slots=6))
    assert one[0] == other[0] == REFERENCE
    assert all(a != b for a, b in zip(one[1:], other[1:], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["none", *PRUNERS])
def test_tpe_learns_from_the_trials_before(pruner: str) -> None:
    def late_mean(name: str, pruner: str) -> float:
        settings = config(sampler=name, pruner=pruner, seed=5)
        late = proposals(search(settings, slots=60))[30:]
        return sum(accuracy(p, 0, EPOCHS - 1) for p in late) / len(late)

    assert late_mean("tpe", pruner) > late_mean("random", "none") + 0.05  # it minds no pruner


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_first_slot_proposes_the_reference(name: str) -> None:
    settings = config(sampler=name)
    assert REFERENCE in settings.space
    assert proposals(search(settings, slots=1)) == [REFERENCE]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "other", [{"hidden_units": "8,16"}, {"dropout_rate": "0.3:0.5"}, {"learning_rate": "0.01"}]
)
def test_the_first_slot_stays_in_a_space_without_the_reference(
    name: str, other: dict[str, str]
) -> None:
    settings = config(sampler=name, **other)
    (point,) = proposals(search(settings, slots=1))
    assert point != REFERENCE
    assert point in settings.space


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_proposal_lies_in_the_space(name: str) -> None:
    settings = config(
        sampler=name, hidden_units="64:512:64", dropout_rate="0.2", learning_rate="1e-4:1e-2:log"
    )
    points = proposals(search(settings))
    assert all(point in settings.space for point in points)
    assert len({point["hidden_units"] for point in points}) > 3


def test_qmc_covers_every_choice_evenly() -> None:
    for seed in range(4):
        points = proposals(search(config(sampler="qmc", seed=seed), slots=17))[1:]
        units = Counter(point["hidden_units"] for point in points)
        assert set(units) == {128, 256, 512, 1024}
        assert max(units.values()) - min(units.values()) <= 1
        halves = Counter(point["dropout_rate"] < 0.25 for point in points)
        assert abs(halves[True] - 8) <= 1


# ---- the grid ----------------------------------------------------------------------------------


def test_a_grid_covers_every_point_once_the_reference_first() -> None:
    settings = config(**GRID, learning_rate="0.001,0.01", n_trials=50)
    assert sampling.budget(settings) == 12
    points = proposals(search(settings, slots=12, broken=(0, 5), sessions=(4,)))
    assert points[0] == REFERENCE
    expected = {(u, d, r) for u in (8, 512) for d in (0.1, 0.2, 0.3) for r in (0.001, 0.01)}
    assert len(points) == 12
    assert {tuple(point.values()) for point in points} == expected


def test_the_budget_is_what_was_given_if_the_grid_is_larger() -> None:
    assert sampling.budget(config(**GRID, learning_rate="0.001,0.01", n_trials=7)) == 7
    assert sampling.budget(config(n_trials=70)) == 70


def test_a_trial_of_a_large_grid_needs_no_memory_for_the_other_points() -> None:
    many = ",".join(str(number) for number in range(1, 201))
    rates = ",".join(f"{number / 200:g}" for number in range(200))
    settings = config(sampler="grid", hidden_units=many, dropout_rate=rates, learning_rate="0.1")
    tracemalloc.start()
    try:
        sampling.sampler(settings, 39_999)
        assert sampling.budget(settings) == SLOTS
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # bytes; all points: 38 million
    finally:
        tracemalloc.stop()


# ---- pruners -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_pruner_decides_the_same_resumed_or_with_failed_trials_replaced(pruner: str) -> None:
    settings = config(sampler="random", pruner=pruner)
    in_one_go = decisions(search(settings))
    states = Counter(state for state, _ in in_one_go)
    assert states["PRUNED"] > 2
    assert states["COMPLETE"] > 2
    assert decisions(search(settings, sessions=(1, 7, 15))) == in_one_go
    assert decisions(search(settings, broken=(0, 3, 4, 14))) == in_one_go
    assert decisions(search(settings, broken=range(SLOTS), sessions=range(SLOTS))) == in_one_go


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_pruner_that_is_shown_little_decides_as_one_that_is_shown_everything(
    monkeypatch: pytest.MonkeyPatch, pruner: str
) -> None:
    settings = config(sampler="random", pruner=pruner, epochs=40)
    found = decisions(search(settings, slots=40))
    assert {state for state, _ in found} == {"COMPLETE", "PRUNED"}
    monkeypatch.setattr(sampling, "_is_at_rung", lambda *_: True)
    monkeypatch.setattr(sampling, "Judged", lambda trial: trial)  # as Optuna shows itself
    assert decisions(search(settings, slots=40)) == found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pruner", "space", "direction"),
    [
        ("percentile", {}, "maximize"),
        ("median", BRANCHING, "minimize"),
        ("halving", BRANCHING, "maximize"),
        ("hyperband", {}, "minimize"),
    ],
    ids=PRUNERS,
)
def test_what_a_worker_reads_of_a_file_leads_to_the_same_trials_as_all_of_them_in_memory(
    in_folder: Path, pruner: str, space: dict[str, str], direction: Direction
) -> None:
    settings = config(pruner=pruner, **space)
    backend = open_storage("sqlite:///study.db")
    trials = search(settings, broken=(3,), slots=14, storage=OutlineStorage(backend))
    close(backend)
    in_memory = search(settings, broken=(3,), slots=14)
    assert proposals(trials) == proposals(in_memory)
    assert decisions(trials) == decisions(in_memory)


@pytest.mark.parametrize("pruner", ["none", *PRUNERS])
def test_minimizing_is_maximizing_upside_down(pruner: str) -> None:
    settings = config(pruner=pruner)
    up, down = search(settings), search(settings, direction="minimize")
    assert proposals(down) == proposals(up)
    assert [state for state, _ in decisions(down)] == [state for state, _ in decisions(up)]
    assert pruner == "none" or len({state for state, _ in decisions(up)}) > 1


def test_without_a_pruner_every_trial_completes() -> None:
    trials = search(config(sampler="random", pruner="none"))
    assert {trial.state for trial in trials.values()} == {TrialState.COMPLETE}


def test_the_median_pruner_waits_for_five_trials() -> None:
    states = [state for state, _ in decisions(search(config(sampler="random", pruner="median")))]
    assert set(states[:5]) == {"COMPLETE"}
    assert "PRUNED" in states[5:]
