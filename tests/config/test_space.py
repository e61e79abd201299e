"""What a trial gets from a search space."""

from itertools import pairwise

import optuna
import pytest

from search.config.hyperparameters import HYPERPARAMETERS, REFERENCE, space_of
from search.config.parameter import Choice, Value
from search.config.space import Condition, Space

DEFAULTS = {name: known.space for name, known in HYPERPARAMETERS.items()}
SPACE = space_of(DEFAULTS)


def points(space: Space) -> list[dict[str, Value]]:
    """The whole grid of `space`."""
    return [space.grid_point(index) for index in range(space.grid_size())]


def space_with(**changed: str) -> Space:
    return space_of({**DEFAULTS, **changed})


def ask(space: Space, seed: int = 0) -> tuple[dict[str, Value], dict[str, Value]]:
    """The hyperparameters of a random trial of `space`, and its recorded parameters."""
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    return space.suggest(trial), trial.params


def test_a_trial_gets_all_hyperparameters_in_their_types() -> None:
    tried, params = ask(SPACE)
    assert params in SPACE
    assert {name: tried[name] for name in params} == params
    assert [type(value) for value in params.values()] == [int, float, float]
    assert list(params) == ["hidden_units", "dropout_rate", "learning_rate"]
    usual = {name: known.default for name, known in HYPERPARAMETERS.items()}
    conditional = {"conv_blocks", "filters", "augmentation_strength"}
    assert tried == {**{k: v for k, v in usual.items() if k not in conditional}, **params}


def test_the_reference_lies_in_the_default_space() -> None:
    assert REFERENCE in SPACE
    assert SPACE.reference() == REFERENCE
    assert {**REFERENCE, "hidden_units": 100} not in SPACE


# ---- what matters in some trials only ----------------------------------------------------------

BRANCHING = {
    "architecture": "dense,cnn",
    "filters": "16:32",
    "augmentation": "none,shift",
    "augmentation_strength": "0.5:1.5",
}


def test_a_conditional_hyperparameter_is_suggested_only_where_it_matters() -> None:
    space = space_with(**BRANCHING)
    assert space.is_conditional()
    seen = set()
    for seed in range(40):
        tried, params = ask(space, seed)
        assert params in space
        assert {**params, "hidden_layers": 1} not in space
        convolutional, distorted = tried["architecture"] == "cnn", tried["augmentation"] != "none"
        seen.add((convolutional, distorted))
        for names in (tried, params):
            assert ("filters" in names) == ("conv_blocks" in names) == convolutional
            assert ("augmentation_strength" in names) == distorted
    assert len(seen) == 4


def test_what_is_the_same_for_all_trials_is_not_suggested() -> None:
    space = space_with(optimizer="sgd", architecture="cnn", filters="16")
    _, params = ask(space)
    assert set(params) == set(REFERENCE)
    assert not space.is_conditional()
    fixed = space.fixed()
    assert (fixed["optimizer"], fixed["architecture"], fixed["filters"]) == ("sgd", "cnn", 16)
    assert not set(fixed) & set(params)
    assert "augmentation_strength" not in fixed


def test_a_fixed_child_of_a_searched_parent_is_recorded_where_it_matters() -> None:
    space = space_with(architecture="dense,cnn")
    for seed in range(9):
        tried, params = ask(space, seed)
        assert ("filters" in params) == (tried["architecture"] == "cnn")
        assert params.get("filters", 32) == 32


@pytest.mark.parametrize(
    ("changed", "more"),
    [
        ({"optimizer": "sgd"}, {}),
        ({"optimizer": "sgd,adam"}, {"optimizer": "adam"}),
        ({"architecture": "cnn", "filters": "16,32"}, {"filters": 32}),
        ({"augmentation": "none,shift"}, {"augmentation": "none"}),
        ({"weight_decay": "0:0.1"}, {"weight_decay": 0.0}),
    ],
)
def test_the_reference_has_the_defaults_except_for_fixed_values(
    changed: dict[str, str], more: dict[str, Value]
) -> None:
    space = space_with(**changed)
    assert space.reference() == {**REFERENCE, **more}
    assert space.reference() in space


@pytest.mark.parametrize(
    "changed",
    [
        {"dropout_rate": "0.3"},
        {"optimizer": "sgd,nadam"},
        {"weight_decay": "0.01:0.1"},
        {"architecture": "cnn", "filters": "8,16"},
    ],
)
def test_a_space_without_the_default_value_has_no_reference(changed: dict[str, str]) -> None:
    assert space_with(**changed).reference() is None


# ---- grids -------------------------------------------------------------------------------------


def test_a_grid_holds_every_combination_once_the_reference_first() -> None:
    space = space_with(
        hidden_units="128,512", dropout_rate="0.1,0.2,0.3", learning_rate="0.01,0.001"
    )
    grid = points(space)
    assert len(grid) == len({tuple(point.items()) for point in grid}) == 12
    assert grid[0] == REFERENCE
    assert all(point in space for point in grid)
    rest = [(p["hidden_units"], p["dropout_rate"], -float(p["learning_rate"])) for p in grid[1:]]
    assert all(one < other for one, other in pairwise(rest))


def test_a_grid_branches_where_its_parents_do() -> None:
    space = space_with(
        hidden_units="8",
        dropout_rate="0",
        learning_rate="0.1",
        architecture="dense,cnn",
        filters="4,8",
        augmentation="none,shift",
    )
    assert [
        (p["architecture"], p.get("filters"), p.get("augmentation_strength")) for p in points(space)
    ] == [
        ("dense", None, None),
        ("dense", None, 1.0),
        ("cnn", 4, None),
        ("cnn", 4, 1.0),
        ("cnn", 8, None),
        ("cnn", 8, 1.0),
    ]


def test_a_grid_without_the_reference_keeps_the_written_order() -> None:
    grid = points(space_with(hidden_units="8,4", dropout_rate="0.5", learning_rate="0.1"))
    assert [point["hidden_units"] for point in grid] == [8, 4]


def test_a_grid_refuses_a_range_by_name() -> None:
    with pytest.raises(ValueError, match=r"lists and values only, but dropout_rate .* 0:0\.5"):
        SPACE.grid_size()


def all_at_once(space: Space) -> list[dict[str, Value]]:
    """The grid, built at once: the points of each parameter from those of the earlier ones."""
    made: list[dict[str, Value]] = [space.fixed()]
    for name, parameter in space.searched().items():
        assert isinstance(parameter, Choice)
        made = [
            further
            for point in made
            for further in (
                [{**point, name: value} for value in parameter.values]
                if space._matters(name, point)
                else [point]
            )
        ]
    asked = [{k: v for k, v in point.items() if k in space.searched()} for point in made]
    reference = space.reference()
    return sorted(asked, key=lambda point: point != reference)


CORE = {"hidden_units": "128,512", "dropout_rate": "0.1,0.2,0.3", "learning_rate": "0.01,0.001"}
MANY = {
    **CORE,
    "architecture": "dense,cnn",
    "conv_blocks": "2,3",
    "filters": "16,32",
    "augmentation": "none,shift,elastic",
    "augmentation_strength": "0.5,1",
    "optimizer": "adam,sgd",
    "batch_size": "32,128",
}
NESTED = Space(
    {
        "a": Choice((1, 2, 3)),
        "b": Choice(("x", "y")),
        "c": Choice((0.1, 0.2, 0.3)),
        "d": Choice((True, False)),
        "e": Choice((7,)),
        "f": Choice((5, 6)),
    },
    {"c": Condition("a", (2, 3)), "d": Condition("c", (0.2,)), "f": Condition("e", (7,))},
    frozenset("abcdf"),
    {"a": 2, "b": "y", "c": 0.2, "d": False, "f": 6},
)


@pytest.mark.parametrize(
    "space",
    [
        space_with(**CORE),
        space_with(**{**CORE, "dropout_rate": "0.1,0.3"}),
        space_with(**{**CORE, **BRANCHING, "filters": "16,32", "augmentation_strength": "0.5,1"}),
        space_with(**{**MANY, "architecture": "cnn"}),
        space_with(**MANY),
        space_with(hidden_units="8", dropout_rate="0", learning_rate="0.1"),
        NESTED,
    ],
)
def test_a_grid_has_the_points_and_the_order_of_one_that_is_built_at_once(space: Space) -> None:
    expected = all_at_once(space)
    found = points(space)
    assert found == expected
    assert [list(point) for point in found] == [list(point) for point in expected]
    with pytest.raises(IndexError):
        space.grid_point(space.grid_size())


def test_a_huge_grid_has_its_first_and_its_last_point_at_once() -> None:
    many = ",".join(str(number) for number in range(1, 1001))
    rates = ",".join(f"{number / 1000:g}" for number in range(1000))
    space = space_with(hidden_units=many, dropout_rate=rates, learning_rate="0.1,0.001")
    assert space.grid_size() == 2_000_000
    last = {"hidden_units": 1000, "dropout_rate": 0.999, "learning_rate": 0.001}
    assert space.grid_point(0) == REFERENCE
    assert space.grid_point(1) == {"hidden_units": 1, "dropout_rate": 0.0, "learning_rate": 0.1}
    assert space.grid_point(1_999_999) == last
