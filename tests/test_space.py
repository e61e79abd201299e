"""The notation of the search space, and what a trial gets from it."""

import random
from itertools import pairwise

import optuna
import pytest

from search import space
from search.recipe import HYPERPARAMETERS, REFERENCE, space_of
from search.space import Choice, Parameter, Range, Space, Value

DEFAULTS = {name: known.default for name, known in HYPERPARAMETERS.items()}
SPACE = space_of(DEFAULTS)


def parse(name: str, text: str) -> Parameter:
    return space.parse(HYPERPARAMETERS[name].domain, text)


def space_with(**changed: str) -> Space:
    return space_of({**DEFAULTS, **changed})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("dropout_rate", "0.2", Choice((0.2,))),
        ("dropout_rate", "0", Choice((0.0,))),
        ("dropout_rate", " 0.1 , 0.3 ", Choice((0.1, 0.3))),
        ("dropout_rate", "0.0:0.5", Range(0.0, 0.5)),
        ("dropout_rate", "0:0.5:0.1", Range(0.0, 0.5, step=0.1)),
        ("dropout_rate", "0.1 : 0.4 : log", Range(0.1, 0.4, log=True)),
        ("hidden_units", "64", Choice((64,))),
        ("hidden_units", "128,256,512,1024", Choice((128, 256, 512, 1024))),
        ("hidden_units", "64:1024:64", Range(64, 1024, step=64)),
        ("hidden_units", "16:2048:log", Range(16, 2048, log=True)),
        ("hidden_units", "1:65536", Range(1, 65536)),
        ("learning_rate", "0.001", Choice((0.001,))),
        ("learning_rate", "1e-4:1e-2:log", Range(1e-4, 1e-2, log=True)),
        ("learning_rate", "10", Choice((10.0,))),
        ("activation", "gelu", Choice(("gelu",))),
        ("activation", "relu , silu", Choice(("relu", "silu"))),
        ("batch_normalization", "false,true", Choice((False, True))),
        ("early_stopping", "off", Choice((0,))),
        ("early_stopping", "off,3", Choice((0, 3))),
        ("early_stopping", "2:6:2", Range(2, 6, step=2)),
        ("batch_size", "32,64", Choice((32, 64))),
    ],
)
def test_the_notation_is_read(name: str, text: str, expected: Parameter) -> None:
    assert parse(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("hidden_units", "0", "must be whole numbers from 1 to 65536"),
        ("hidden_units", "65537", "must be whole numbers from 1 to 65536"),
        ("hidden_units", "1.5", "must be whole numbers from 1 to 65536"),
        ("hidden_units", "", "must be whole numbers from 1 to 65536"),
        ("hidden_units", "64,", "must be whole numbers from 1 to 65536"),
        ("hidden_units", "64,64", "must not name a value twice"),
        ("hidden_units", "64:1024:65", "must have a step above 0 that divides the range"),
        ("hidden_units", "64:1024:-64", "must have a step above 0 that divides the range"),
        ("hidden_units", "64:1024:1.5", "must end in a step or in log"),
        ("hidden_units", "64:64", "must be a range from low to high"),
        ("dropout_rate", "1", "must be numbers from 0 to below 1"),
        ("dropout_rate", "-0.1", "must be numbers from 0 to below 1"),
        ("dropout_rate", "nan", "must be numbers from 0 to below 1"),
        ("dropout_rate", "0.5:0.1", "must be a range from low to high"),
        ("dropout_rate", "0:0.5:log", "must start above 0 on a log scale"),
        ("dropout_rate", "0.1:0.5:ln", "must end in a step or in log"),
        ("dropout_rate", "0.1:0.5:nan", "must have a step above 0 that divides the range"),
        ("dropout_rate", "0.1:0.5:log:0.1", "must be a value, a list"),
        ("dropout_rate", "0.1,0.2:0.3", "must be a value, a list"),
        ("learning_rate", "0", "must be numbers above 0, at most 10"),
        ("learning_rate", "inf", "must be numbers above 0, at most 10"),
        ("learning_rate", "11", "must be numbers above 0, at most 10"),
        (
            "activation",
            "tanh",
            "must be one of relu, leaky_relu, elu, gelu, silu (a value or a list)",
        ),
        ("activation", "relu:gelu", "must be one of relu, leaky_relu, elu, gelu, silu"),
        ("batch_normalization", "1", "must be true or false (a value or a list)"),
        ("hidden_layers", "6", "must be whole numbers from 1 to 5"),
        ("conv_blocks", "1", "must be whole numbers, 2 or 3"),
        ("early_stopping", "never", "must be off or whole numbers, 1 or more"),
        ("early_stopping", "-1", "must be off or whole numbers, 1 or more"),
        ("batch_size", "0", "must be whole numbers from 1 to 1000000000"),
        ("weight_decay", "-0.1", "must be numbers from 0 to 1"),
        ("label_smoothing", "1", "must be numbers from 0 to below 1"),
        ("augmentation_strength", "0", "must be numbers above 0, at most 4"),
    ],
)
def test_a_refusal_names_the_rule_the_value_and_an_example(name: str, text: str, rule: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse(name, text)
    assert str(refusal.value).startswith(rule)
    assert f"but got {text!r}" in str(refusal.value)
    assert f"; for example {HYPERPARAMETERS[name].domain.example}" in str(refusal.value)


def test_a_step_too_small_to_count_is_refused() -> None:
    with pytest.raises(ValueError, match="must have a step above 0 that divides the range"):
        parse("dropout_rate", "0:0.5:1e-320")


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_an_example_is_accepted(name: str) -> None:
    parse(name, HYPERPARAMETERS[name].domain.example)
    parse(name, DEFAULTS[name])


def test_a_misspelt_word_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="got 'cosin', did you mean cosine"):
        parse("schedule", "cosin")


def test_random_text_is_read_or_refused_and_nothing_else() -> None:
    rng = random.Random(0)
    for _ in range(20_000):
        text = "".join(rng.choices("0159.,:-e lognaif", k=rng.randrange(12)))
        name = rng.choice(list(HYPERPARAMETERS))
        try:
            parameter = parse(name, text)
        except ValueError as refusal:
            assert repr(text) in str(refusal)
        else:
            assert parse(name, str(parameter)) == parameter


@pytest.mark.parametrize(
    "text", ["0.2", "0.1,0.3", "0:0.5", "0.1:0.5:log", "0:0.5:0.1", "1e-05:0.5:log"]
)
def test_a_parameter_prints_as_the_notation_that_makes_it(text: str) -> None:
    assert str(parse("dropout_rate", text)) == text


def test_equal_spaces_print_alike_however_they_were_written() -> None:
    assert str(parse("learning_rate", "0.0001:0.01:log")) == str(
        parse("learning_rate", " 1e-4 : 1E-2 : log")
    )


def suggested(parameter: Parameter, trials: int = 60) -> list[int | float]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    return [parameter.suggest(study.ask(), "value") for _ in range(trials)]


def test_a_choice_suggests_each_of_its_values_and_no_other() -> None:
    assert set(suggested(Choice((128, 256, 512)))) == {128, 256, 512}


def test_a_fixed_value_is_suggested_and_so_recorded() -> None:
    trial = optuna.create_study().ask()
    assert Choice((0.2,)).suggest(trial, "dropout_rate") == 0.2
    assert trial.params == {"dropout_rate": 0.2}


def test_a_range_of_whole_numbers_suggests_whole_numbers_on_its_steps() -> None:
    values = suggested(Range(64, 256, step=64))
    assert set(values) == {64, 128, 192, 256}
    assert all(isinstance(value, int) for value in values)


def test_a_range_of_numbers_stays_between_its_ends() -> None:
    values = suggested(Range(0.0, 0.5))
    assert all(0 <= value <= 0.5 for value in values)
    assert len(set(values)) == len(values)


def test_a_log_range_visits_every_decade_about_equally() -> None:
    values = suggested(Range(1e-4, 1e-2, log=True), trials=400)
    assert 150 < sum(value < 1e-3 for value in values) < 250


@pytest.mark.parametrize(
    ("parameter", "inside", "outside"),
    [
        (Choice((128, 512)), [128, 512], [127, 256]),
        (Range(0.0, 0.5), [0, 0.25, 0.5], [-0.01, 0.51]),
        (Range(0.0, 0.5, step=0.1), [0.0, 0.1, 0.3, 0.5], [0.05, 0.55]),
        (Range(64, 256, step=64), [64, 192, 256], [65, 320]),
        (Range(1e-4, 1e-2, log=True), [1e-4, 1e-3, 1e-2], [0, 1e-5, 0.02]),
    ],
)
def test_a_parameter_knows_its_values(
    parameter: Parameter, inside: list[float], outside: list[float]
) -> None:
    assert all(value in parameter for value in inside)
    assert not any(value in parameter for value in outside)


def ask(space: Space, seed: int = 0) -> tuple[dict[str, Value], dict[str, Value]]:
    """What a random trial of `space` tries, and what of it is recorded."""
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    return space.suggest(trial), trial.params


def test_a_trial_gets_all_hyperparameters_in_their_types() -> None:
    tried, params = ask(SPACE)
    assert params in SPACE
    assert {name: tried[name] for name in params} == params
    assert [type(value) for value in params.values()] == [int, float, float]
    assert list(params) == ["hidden_units", "dropout_rate", "learning_rate"]
    plain = {name: known.plain for name, known in HYPERPARAMETERS.items()}
    conditional = {"conv_blocks", "filters", "augmentation_strength"}
    assert tried == {**{k: v for k, v in plain.items() if k not in conditional}, **params}


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


def test_a_conditional_hyperparameter_is_asked_for_only_where_it_matters() -> None:
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


def test_what_is_the_same_for_all_trials_is_not_asked_for() -> None:
    space = space_with(optimizer="sgd", architecture="cnn", filters="16")
    _, params = ask(space)
    assert set(params) == set(REFERENCE)
    assert not space.is_conditional()
    fixed = space.fixed()
    assert (fixed["optimizer"], fixed["architecture"], fixed["filters"]) == ("sgd", "cnn", 16)
    assert not set(fixed) & set(params)
    assert "augmentation_strength" not in fixed


def test_a_fixed_child_of_an_open_parent_is_recorded_where_it_matters() -> None:
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
def test_the_reference_is_plain_but_for_what_is_fixed(
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
def test_a_space_without_the_plain_value_has_no_reference(changed: dict[str, str]) -> None:
    assert space_with(**changed).reference() is None


# ---- grids -------------------------------------------------------------------------------------


def test_a_grid_holds_every_combination_once_the_reference_first() -> None:
    space = space_with(
        hidden_units="128,512", dropout_rate="0.1,0.2,0.3", learning_rate="0.01,0.001"
    )
    grid = space.grid()
    assert len(grid) == len({tuple(point.items()) for point in grid}) == 12
    assert grid[0] == REFERENCE
    assert all(point in space for point in grid)
    rest = [(p["hidden_units"], p["dropout_rate"], -float(p["learning_rate"])) for p in grid[1:]]
    assert all(one < other for one, other in pairwise(rest))


def test_a_grid_branches_where_its_parents_do() -> None:
    grid = space_with(
        hidden_units="8",
        dropout_rate="0",
        learning_rate="0.1",
        architecture="dense,cnn",
        filters="4,8",
        augmentation="none,shift",
    ).grid()
    assert [
        (p["architecture"], p.get("filters"), p.get("augmentation_strength")) for p in grid
    ] == [
        ("dense", None, None),
        ("dense", None, 1.0),
        ("cnn", 4, None),
        ("cnn", 4, 1.0),
        ("cnn", 8, None),
        ("cnn", 8, 1.0),
    ]


def test_a_grid_without_the_reference_keeps_the_written_order() -> None:
    grid = space_with(hidden_units="8,4", dropout_rate="0.5", learning_rate="0.1").grid()
    assert [point["hidden_units"] for point in grid] == [8, 4]


def test_a_grid_refuses_a_range_by_name() -> None:
    with pytest.raises(ValueError, match=r"lists and values only, but dropout_rate .* 0:0\.5"):
        SPACE.grid()
