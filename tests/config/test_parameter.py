"""The notation of a hyperparameter's option, and what a trial gets from it."""

import random

import optuna
import pytest

from search.config import parameter as notation
from search.config.hyperparameters import HYPERPARAMETERS
from search.config.parameter import Choice, Parameter, Range, Value, text_of


def parse(name: str, text: str) -> Parameter:
    return notation.parse(HYPERPARAMETERS[name].domain, text)


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
        ("batch_size", "0", "must be auto, or whole numbers from 1 to 1000000000"),
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
    parse(name, HYPERPARAMETERS[name].space)


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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.001, "0.001"), (1e-4, "0.0001"), (1e-5, "1e-05"), (512.0, "512"), (0.1 + 0.2, "0.3")),
        *((512, "512"), (10**9, "1000000000"), (10**13, "1e+13"), (10**13 + 1, "10000000000001")),
        *((True, "true"), ("gelu", "gelu")),
    ],
)
def test_values_print_as_in_the_settings_of_studies_that_exist(value: Value, text: str) -> None:
    assert text_of(value) == text


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
