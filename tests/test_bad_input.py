"""Bad input: one line on stderr (rule, value, remedy), exit code 2, nothing created or changed."""

import functools
import http.server
import io
import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import typer
from conftest import arrays
from numpy.typing import NDArray

from search import cli
from search.config import files
from search.config.settings import StudyConfig, options
from search.data.load import load_dataset
from search.errors import InputError
from search.preflight import _check_scheduler
from search.study import storage
from search.workers import scheduler
from search.workers.scheduler import check_scheduler

ROOT = Path(__file__).parent.parent
NAME = "tiny"
NEW = "give another file, for example --storage sqlite:///new.db"
NEW_TRACKING = "give another file, for example --tracking-uri sqlite:///new.db"
ANOTHER_NAME = f"give another --study-name, for example --study-name {NAME}-2"
VERBS = [verb.__name__ for verb, names in cli._VERBS.items() if "tracking_uri" in names]
SETTINGS = {
    "hidden_units": "4,8",
    "dropout_rate": "0.1,0.3",
    "learning_rate": "0.01",
    "epochs": "1",
    "batch_size": "8",
    "seed": "0",
    "validation_split": "0.1",
}
OVERWRITTEN_PAGES = range(0, 28, 3)


def command(**changed: str) -> list[str]:
    """A small valid study's arguments, but for what is `changed`."""
    small = {"n_trials": "1", "workers": "1", "study_name": NAME, "dataset": "tiny.npz"}
    settings = {**small, **SETTINGS, **changed}
    return [
        word for name, text in settings.items() for word in ("--" + name.replace("_", "-"), text)
    ]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path under `folder` with its bytes; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def tiny() -> bytes:
    """A valid dataset's file."""
    file = io.BytesIO()
    np.savez(file, **arrays())
    return file.getvalue()


@pytest.fixture(scope="module", autouse=True)
def _one_command() -> Iterator[None]:
    """Typer makes the command line of the whole program for every call; here once for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: bytes) -> Path:
    """The working directory: it holds a valid dataset, and TensorFlow cannot be imported."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPTUNA_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (tmp_path / "tiny.npz").write_bytes(tiny)
    return tmp_path


Refused = Callable[..., str]


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run the command line, see that it refuses as it must, and return its one line."""

    def run(arguments: list[str], *fragments: str) -> str:
        before = contents(folder)
        code = cli.main(arguments)
        output = capsys.readouterr()
        assert code == 2, output.err
        check_refusal(output.out, output.err, fragments)
        assert contents(folder) == before
        return output.err

    return run


def check_refusal(stdout: str, stderr: str, fragments: tuple[str, ...]) -> None:
    assert stdout == ""
    assert "Traceback" not in stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    for fragment in fragments:
        assert fragment in stderr


# ---- options ---------------------------------------------------------------------------------

TRIALS = ("--n-trials must be a whole number", "for example --n-trials 50")
EPOCHS = ("--epochs must be auto or a whole number", "for example --epochs 5")
BATCH = (
    "--batch-size must be auto, or whole numbers from 1 to 1000000000",
    "for example 64,128,256",
)
SCHEDULE = ("--schedule must be one of constant, cosine, one_cycle, plateau", "constant,cosine")
SWITCH = ("--batch-normalization must be true or false (a value or a list)", "true,false")
LAYERS = ("--hidden-layers must be whole numbers from 1 to 5", "for example 1:5")
STOPPING = ("--early-stopping must be off or whole numbers, 1 or more", "for example 3")
DECAY = ("--weight-decay must be numbers from 0 to 1", "for example 1e-4:1e-1:log")
MODEL_OF = (
    "--model must be MODULE:FUNCTION, a module that Python finds",
    "for example --model mine:build",
)
SEED = ("--seed must be a whole number from 0 to 2147483647", "for example --seed 0")
PATIENCE = ("--patience must be a whole number", "for example --patience 2")
WORKERS = ("--workers must be auto or a whole number from 1 to 256", "for example --workers 2")
FAILURES = ("--max-failures must be a whole number", "for example --max-failures 5")
TIMEOUT = ("--timeout must be a number, 0 or more", "for example --timeout 2")
SPLIT = (
    "--validation-split must be a number between 0 and 1",
    "for example --validation-split 0.1",
)
SAMPLER = ("--sampler must be one of tpe, random, qmc, grid", "for example --sampler tpe")
PRUNER = (
    "--pruner must be one of percentile, median, halving, hyperband, none",
    "for example --pruner percentile",
)
NAMES = "must be letters, digits"
STUDY = (f"--study-name {NAMES}", "for example --study-name mnist-dnn")
EXPERIMENT = (f"--experiment {NAMES}", "for example --experiment MNIST_Classification")
MODEL = (f"--model-name {NAMES}", "for example --model-name MNIST_DNN_Model")
UNITS_EXAMPLE = "for example 128,256,512,1024"
UNITS = ("--hidden-units must be whole numbers from 1 to 65536", UNITS_EXAMPLE)
UNITS_STEP = ("--hidden-units must have a step above 0 that divides the range", UNITS_EXAMPLE)
UNITS_FORM = ("--hidden-units must be a value, a list a,b,c or a range", UNITS_EXAMPLE)
DROPOUT_EXAMPLE = "for example 0.0:0.5"
DROPOUT = ("--dropout-rate must be numbers from 0 to below 1", DROPOUT_EXAMPLE)
DROPOUT_ENDS = ("--dropout-rate must be a range from low to high", DROPOUT_EXAMPLE)
DROPOUT_STEP = ("--dropout-rate must have a step above 0 that divides the range", DROPOUT_EXAMPLE)
DROPOUT_LAST = ("--dropout-rate must end in a step or in log", DROPOUT_EXAMPLE)
DROPOUT_FORM = ("--dropout-rate must be a value, a list a,b,c or a range", DROPOUT_EXAMPLE)
RATE_EXAMPLE = "for example 1e-4:1e-2:log"
RATE = ("--learning-rate must be numbers above 0, at most 10", RATE_EXAMPLE)

VALUES = [
    ("hidden_units", "", ("--hidden-units must be text, not empty", "--hidden-units 128,")),
    ("dropout_rate", "", ("--dropout-rate must be text, not empty", "--dropout-rate 0.0:0.5")),
    ("learning_rate", "", ("--learning-rate must be text, not empty", "--learning-rate 1e-4:")),
    *[("n_trials", text, TRIALS) for text in ("0", "-1", "1.5", "abc", "", " ", "1e3", "0x10")],
    *[("n_trials", text, TRIALS) for text in ("inf", "nan", "5 trials", "½", "--n-trials")],
    *[("epochs", text, EPOCHS) for text in ("0", "-5", "2.0", "five", "")],
    ("batch_size", "", ("--batch-size must be text, not empty", "--batch-size 128")),
    *[("batch_size", text, BATCH) for text in ("0", "-128", "12.5", "big")],
    *[("schedule", text, SCHEDULE) for text in ("linear", "Cosine", "cosine,", "constant:cosine")],
    *[("batch_normalization", text, SWITCH) for text in ("yes", "1", "True", "true:false")],
    *[("hidden_layers", text, LAYERS) for text in ("0", "6", "1:9", "two")],
    *[("early_stopping", text, STOPPING) for text in ("never", "-1", "off:3", "2.5")],
    *[("weight_decay", text, DECAY) for text in ("-1", "2", "nan", "adamw")],
    *[("model", text, MODEL_OF) for text in ("mine", "mine.py:build", "a/b:c", "mine:", ":build")],
    *[("seed", text, SEED) for text in ("-1", "2147483648", "0.5", "random", "")],
    *[("workers", text, WORKERS) for text in ("0", "-1", "257", "1.5", "all", "")],
    *[("max_failures", text, FAILURES) for text in ("0", "-1", "none", "")],
    *[("patience", text, PATIENCE) for text in ("0", "-1", "2.5", "much", "")],
    *[("timeout", text, TIMEOUT) for text in ("-1", "nan", "inf", "-inf", "60s", "1:00", "")],
    *[("validation_split", text, SPLIT) for text in ("0", "1", "nan", "-0.1", "1.5", "inf")],
    *[("validation_split", text, SPLIT) for text in ("10%", "", "1/10", "0,1")],
    *[("sampler", text, SAMPLER) for text in ("bayesian", "", "TPE")],
    *[("pruner", text, PRUNER) for text in ("patient", "", "NONE")],
    *[("study_name", text, STUDY) for text in ("a/b", "../a", "a b", "", "naïve", "研究", "a:b")],
    *[("study_name", text, STUDY) for text in ("a\nb", "a\n", "{a}", "a'b", "a;b", "a%b")],
    *[("experiment", text, EXPERIMENT) for text in ("a/b", "a b", "", "é", "a\tb")],
    *[("model_name", text, MODEL) for text in ("a/b", "models:/a", "a b", "", "模型", "a@b")],
    *[("hidden_units", text, UNITS) for text in ("12a", "0", "-1", "1.5", "65537", "1e3")],
    *[("hidden_units", text, UNITS) for text in ("128,", ",128", "128;256", "[128, 256]", "64:")],
    *[("hidden_units", text, UNITS) for text in ("0:64", "64:100000", "nan", "inf", "64 128")],
    ("hidden_units", "128,128", ("--hidden-units must not name a value twice", UNITS_EXAMPLE)),
    *[("hidden_units", text, UNITS_STEP) for text in ("64:1024:65", "64:1024:0", "64:1024:-64")],
    ("hidden_units", "64:128:65", UNITS_STEP),
    ("hidden_units", "64:128:1.5", ("--hidden-units must end in a step or in log", UNITS_EXAMPLE)),
    ("hidden_units", "1024:64", ("--hidden-units must be a range from low to high", UNITS_EXAMPLE)),
    *[("hidden_units", text, UNITS_FORM) for text in ("1:2:3:4", "1,2:4", "1:4,8")],
    *[("dropout_rate", text, DROPOUT) for text in ("1", "1.2", "-0.1", "nan", "inf", "50%")],
    *[("dropout_rate", text, DROPOUT) for text in ("0:1", "0.1,", "0.1..0.5", "0,5 0,6", ":", "x")],
    *[("dropout_rate", text, DROPOUT_ENDS) for text in ("0.5:0.1", "0.2:0.2")],
    *[("dropout_rate", text, DROPOUT_STEP) for text in ("0.1:0.5:0", "0.1:0.5:-0.1", "0.1:0.5:1")],
    *[("dropout_rate", text, DROPOUT_STEP) for text in ("0.1:0.5:0.3", "0.1:0.5:nan", "0:0.5:inf")],
    ("dropout_rate", "0:0.5:1e-320", DROPOUT_STEP),
    *[("dropout_rate", text, DROPOUT_LAST) for text in ("0.1:0.5:ln", "0.1:0.5:LOG", "0.1:0.5:")],
    ("dropout_rate", "0.1:0.5:log:x", DROPOUT_FORM),
    (
        "dropout_rate",
        "0:0.5:log",
        ("--dropout-rate must start above 0 on a log scale", DROPOUT_EXAMPLE),
    ),
    *[("learning_rate", text, RATE) for text in ("0", "-1", "0:1:log", "11", "nan", "inf")],
    *[("learning_rate", text, RATE) for text in ("1e-400", "1e-4:", "fast", "1e-4:100")],
    (
        "learning_rate",
        "0.001,1e-3",
        ("--learning-rate must not name a value twice", RATE_EXAMPLE),
    ),
]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [pytest.param(*case, id=f"{case[0]}={case[1]!a}") for case in VALUES],
)
def test_a_value_outside_its_rule_is_refused(
    refused: Refused, name: str, text: str, said: tuple[str, str]
) -> None:
    rule, remedy = said
    got = options()[name].parse(text)
    refused(command(**{name: text}), f"error: {rule}", f"but got {got!r}", remedy)


@pytest.mark.parametrize(
    ("name", "text", "near"),
    [
        ("sampler", "tpe ", "did you mean tpe?"),
        ("sampler", "tpee", "did you mean tpe?"),
        ("sampler", "rand", "did you mean random?"),
        ("pruner", "medain", "did you mean median?"),
        ("pruner", "hyper-band", "did you mean hyperband?"),
    ],
)
def test_a_misspelt_choice_is_refused_with_the_nearest(
    refused: Refused, name: str, text: str, near: str
) -> None:
    refused(command(**{name: text}), f"--{name} must be one of", f"but got {text!r}", near)


@pytest.mark.parametrize("name", ["n_trials", "epochs", "batch_size", "seed"])
@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_a_number_too_large_to_use_is_refused(refused: Refused, name: str, digits: int) -> None:
    text = "9" * digits
    with pytest.raises(InputError):  # first, since a run of so many trials would fill the memory
        StudyConfig(**{name: options()[name].parse(text)})
    option = "--" + name.replace("_", "-")
    rules = {"batch_size": "auto, or whole numbers", "epochs": "auto or a whole number"}
    rule = rules.get(name, "a whole number")
    refused(command(**{name: text}), f"error: {option} must be {rule}", "but got")


@pytest.mark.parametrize("name", ["study_name", "experiment", "model_name"])
def test_a_name_too_long_to_store_is_refused(refused: Refused, name: str) -> None:
    option = "--" + name.replace("_", "-")
    refused(command(**{name: "a" * 600}), f"error: {option} must be", "but got 'aaa", "for example")


@pytest.mark.parametrize("name", [".", ".."])
def test_an_experiment_named_like_a_folder_above_is_refused(refused: Refused, name: str) -> None:
    refused(command(experiment=name), "error: --experiment must be", f"but got {name!r}")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        pytest.param(["--n-trial", "5"], "No such option: --n-trial", id="misspelt-option"),
        pytest.param(["--workerz=2"], "No such option: --workerz", id="unknown-option"),
        pytest.param(["-n", "5"], "No such option: -n", id="short-option"),
        pytest.param(["--n-trials"], "'--n-trials' requires an argument", id="no-value"),
        pytest.param(["serch"], "No such command 'serch'", id="unknown-verb"),
        pytest.param(["--seed", "1", "extra"], "No such command 'extra'", id="extra-word"),
        pytest.param(["--seed", "1", "2"], "No such command '2'", id="extra-number"),
        pytest.param([""], "No such command ''", id="empty-verb"),
        pytest.param(["a\nb"], "No such command", id="verb-of-two-lines"),
        pytest.param(["--study\nname", "a"], "No such option", id="option-of-two-lines"),
    ],
)
def test_an_unknown_word_is_refused_and_points_to_the_help(
    refused: Refused, arguments: list[str], found: str
) -> None:
    refused(arguments, found, "see python study.py --help")


def test_a_grid_of_ranges_is_refused(refused: Refused) -> None:
    refused(
        command(sampler="grid", dropout_rate="0.0:0.5"),
        "error: --sampler grid: a grid takes lists and values only",
        "but dropout_rate is the range 0:0.5",
        "give lists, for example --dropout-rate 0,0.5",
    )
    refused(
        ["--preset", "wide", "--sampler", "grid", "--dropout-rate", "0.1", "--hidden-layers", "2"],
        "for example --learning-rate 0.0003,0.03 --label-smoothing 0,0.2 --augmentation-strength",
    )


# ---- what would change nothing ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "fragments"),
    [
        (
            {"filters": "8,16"},
            ("--filters matters only with architecture cnn", "'8,16'", "--architecture cnn, too"),
        ),
        ({"conv_blocks": "3"}, ("--conv-blocks matters only with architecture cnn", "dense")),
        (
            {"augmentation_strength": "0.5"},
            ("only with augmentation shift or affine or elastic", "--augmentation elastic, too"),
        ),
    ],
)
def test_a_hyperparameter_that_matters_in_no_trial_is_refused(
    refused: Refused, changed: dict[str, str], fragments: tuple[str, ...]
) -> None:
    refused(command(**changed), *fragments)


def test_a_presets_own_hyperparameter_that_does_not_matter_is_left_out(folder: Path) -> None:
    config = files.build_config({"preset": "wide", "augmentation": "none"})
    assert "augmentation_strength" not in config.space.searched()


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"architecture": "dense,cnn"}, "--architecture"),
        ({"augmentation": "shift"}, "--augmentation"),
    ],
)
def test_what_needs_images_is_refused_for_other_examples(
    refused: Refused, changed: dict[str, str], option: str
) -> None:
    refused(
        command(**changed),
        f"error: {option} {changed[option[2:]].split(',')[-1]} needs images",
        "those of tiny.npz have the shape (4,)",
        f"leave {option} at its default",
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wid", "did you mean wide?"),
        ("../wide", "did you mean wide?"),
        ("", "list them with python study.py presets"),
    ],
)
def test_an_unknown_preset_is_refused(refused: Refused, name: str, said: str) -> None:
    rule = "error: --preset must be one of cnn, default, grid, table, wide"
    refused(command(preset=name), rule, f"but got {name!r}", said)


# ---- one's own model -------------------------------------------------------------------------

SPACED = "SPACE = {'units': '2,4'}\n"
BUILD = "def build(hyperparameters, shape, classes): ...\n"


@pytest.mark.parametrize(
    ("source", "fragments"),
    [
        (None, ("a module that can be imported (ModuleNotFoundError: No module", "its folder")),
        ("import nothing_like_it", ("(ModuleNotFoundError: No module named 'nothing_like_it')",)),
        ("1 / 0", ("(ZeroDivisionError: division by zero)", "fix it")),
        ("def build(:", ("(SyntaxError: invalid syntax", "fix it")),
        (SPACED, ("has no function build", "define it")),
        (SPACED + "build = 3", ("has no function build", "define it")),
        (BUILD, ("has no SPACE", "declare it, for example SPACE = {")),
        (BUILD + "SPACE = ['units']", ("has no SPACE", "declare it")),
        (BUILD + "SPACE = {'units': '2:'}", ("SPACE is valid: units must be", "but got '2:'")),
        (BUILD + "SPACE = {'units': '4:2'}", ("units must be a range from low to high", "'4:2'")),
        (BUILD + "SPACE = {'epochs': '2'}", ("names that are free, but 'epochs' is not",)),
        (BUILD + "SPACE = {'learning_rate': 1}", ("but 'learning_rate' is not", "another name")),
        (BUILD + "SPACE = {'a b': 1}", ("names that are free, but 'a b' is not",)),
        (BUILD + "SPACE = {1: 1}", ("names that are free, but 1 is not",)),
        (BUILD + "SPACE = {'units': None}", ("or lists of them, but units is None", "for example")),
        (BUILD + "SPACE = {'units': {32}}", ("texts, numbers or lists", "but units is {32}")),
        (BUILD + "SPACE = {'units': range(2)}", ("but units is range(0, 2)",)),
        (BUILD + "SPACE = {'units': [0.1, None]}", ("but units is [0.1, None]",)),
        ("raise SystemExit", ("a module that can be imported (SystemExit", "fix it")),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(
    folder: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    source: str | None,
    fragments: tuple[str, ...],
) -> None:
    module = f"own_{abs(hash(request.node.name))}"
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if source is not None:
        (folder / f"{module}.py").write_text(source)
    name = f"{module}:build"
    arguments = [word for word in command(model=name) if word not in ("--hidden-units", "4,8")]
    arguments = [word for word in arguments if word not in ("--dropout-rate", "0.1,0.3")]
    refused(arguments, "error: --model must name", f"but got {name!r}", *fragments)


def test_a_networks_option_is_refused_beside_a_custom_model(
    folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "own_whole.py").write_text(BUILD + SPACED)
    refused(
        command(model="own_whole:build"),
        "error: --hidden-units must be left out with --model",
        "but got '4,8'",
        "declare it there",
    )


def test_adamw_without_a_weight_decay_is_refused(refused: Refused) -> None:
    refused(
        command(optimizer="adam,adamw"),
        "error: --optimizer adamw must have a weight decay, without which it is adam",
        "but --weight-decay is 0; give one",
    )


# ---- URLs of the stores -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("sqlite:///a.db", "sqlite:///a.db"),
        ("sqlite:///a.db", "sqlite:///./a.db"),
        ("sqlite:///a.db", "sqlite+pysqlite:///a.db"),
        ("sqlite:///link.db", "sqlite:///there.db"),
        ("sqlite:///hard.db", "sqlite:///there.db"),
        ("postgresql://u:hunter2@127.0.0.1:9/d", "postgresql://u:hunter2@127.0.0.1:9/d"),
    ],
)
def test_one_database_for_both_stores_is_refused(
    folder: Path, refused: Refused, one: str, other: str
) -> None:
    (folder / "there.db").touch()
    (folder / "link.db").symlink_to("there.db")
    (folder / "hard.db").hardlink_to("there.db")
    line = refused(
        command(storage=one, tracking_uri=other),
        "--storage and --tracking-uri must be two databases",
        one.split(":")[0],
        "give one another file name",
    )
    assert "hunter2" not in line


# ---- a cluster -------------------------------------------------------------------------------

SERVERS = {
    "storage": "postgresql+psycopg://u:hunter2@127.0.0.1:9/d",
    "tracking_uri": "http://u:hunter2@127.0.0.1:9",
}
NO_DISK = "with --scheduler, because the workers of a cluster share no disk, but got "


@pytest.mark.parametrize(
    ("changed", "fragments"),
    [
        (
            {"storage": "sqlite:///study.db"},
            ("--storage must be PostgreSQL's", "sqlite:///study.db", "for example --storage"),
        ),
        (
            {"tracking_uri": "sqlite:///mlflow.db"},
            ("--tracking-uri must be an MLflow server", "sqlite:///mlflow.db", "http://HOST:5000"),
        ),
        (
            {"tracking_uri": "postgresql://u:hunter2@127.0.0.1:9/m"},
            ("--tracking-uri must be an MLflow server", "postgresql://u:***@127.0.0.1:9/m", "give"),
        ),
    ],
)
def test_a_store_on_a_disk_is_refused_with_a_cluster(
    refused: Refused, changed: dict[str, str], fragments: tuple[str, ...]
) -> None:
    given = {**SERVERS, **changed, "scheduler": "tcp://127.0.0.1:9"}
    assert "hunter2" not in refused(command(**given), NO_DISK, *fragments)


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("nonsense", "missing port number"),
        ("http://127.0.0.1:8786", "unknown address scheme"),
        ("tcp://127.0.0.1:port", "invalid literal"),
        ("tcp://127.0.0.1:9", "Timed out trying to connect"),
    ],
)
def test_an_address_without_a_scheduler_is_refused(
    address: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_TIMEOUT", 1)
    with pytest.raises(InputError) as caught:
        check_scheduler(address)
    line = str(caught.value)
    assert line.startswith("--scheduler must be the address of a running Dask scheduler, but ")
    assert found in line
    assert line.endswith("; start one with dask scheduler, or leave the option out")


def test_a_cluster_without_dask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "search.workers.scheduler", raising=False)
    monkeypatch.delattr("search.workers.scheduler", raising=False)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"needs Dask's.*; pip install -e '\.\[cluster\]'"):
        _check_scheduler("tcp://127.0.0.1:9")


STORAGE_OPENS = "--storage must be a database that can be opened"
STORAGE_FILE = "--storage must be sqlite:///PATH, a file without '?'"
FOLDER = "must be in an existing folder"


@pytest.mark.parametrize(
    ("url", "rule", "remedy"),
    [
        ("", "--storage must be text, not empty", "for example --storage sqlite:///study.db"),
        ("  ", "--storage must be text, not empty", "for example --storage sqlite:///study.db"),
        ("study.db", STORAGE_OPENS, "sqlite:///study.db"),
        ("./study.db", STORAGE_OPENS, "sqlite:///study.db"),
        ("nonsense", STORAGE_OPENS, "sqlite:///study.db"),
        ("a b", STORAGE_OPENS, "sqlite:///study.db"),
        ("://", STORAGE_OPENS, "sqlite:///study.db"),
        ("a\nb", STORAGE_OPENS, "sqlite:///study.db"),
        ("sqlite:study.db", "--storage must be", "sqlite:///study.db"),
        ("sqlite:/study.db", "--storage must be", "sqlite:///study.db"),
        ("sqlite://study.db", "--storage must be", "sqlite:///study.db"),
        ("sqllite:///study.db", STORAGE_OPENS, "sqlite:///study.db"),
        ("redis://127.0.0.1:9/0", STORAGE_OPENS, "check the URL and the server"),
        ("http://127.0.0.1:9/", STORAGE_OPENS, "check the URL and the server"),
        ("postgresql://127.0.0.1:port/d", STORAGE_OPENS, "check the URL and the server"),
        ("mysql://u:hunter2@127.0.0.1:9/d", STORAGE_OPENS, "No module named 'MySQLdb'"),
        ("postgresql+nonsense://127.0.0.1:9/d", STORAGE_OPENS, "check the URL and the server"),
        ("sqlite://", "--storage must be", "sqlite:///study.db"),
        ("sqlite:///", "--storage must be", "sqlite:///"),
        ("sqlite+pysqlite://", "--storage must be", "sqlite:///study.db"),
        ("sqlite:///:memory:", STORAGE_FILE, "for example --storage sqlite:///memory.db"),
        ("sqlite:///file::memory:?uri=true", STORAGE_FILE, "for example --storage sqlite:///"),
        ("sqlite:///file:study.db?mode=memory&uri=true", STORAGE_FILE, "for example --storage"),
        ("sqlite:///study.db?mode=ro", STORAGE_FILE, "for example --storage sqlite:///study"),
        ("sqlite:///wh?t.db", STORAGE_FILE, "for example --storage sqlite:///wh"),
        ("sqlite:///missing/study.db", f"--storage {FOLDER}", "create it first"),
        ("sqlite:////missing/study.db", f"--storage {FOLDER}", "create it first"),
        ("sqlite:///tiny.npz/study.db", f"--storage {FOLDER}", "create it first"),
        ("sqlite:///a\nb/study.db", f"--storage {FOLDER}", "create it first"),
        ("sqlite:///.", "--storage must be a file, but", "name a file"),
        ("sqlite:///here", "--storage must be a file, but", "name a file"),
        ("sqlite:///here/", "--storage must be a file, but", "name a file"),
        ("sqlite:////dev/null", "--storage must be a file, but", "name a file"),
        ("sqlite:///tiny.npz", "--storage must be a sound SQLite database, but", NEW),
        (f"sqlite:///{'a' * 300}.db", "--storage must be", "for example --storage sqlite:///"),
        ("postgresql://u:hunter2@127.0.0.1:9/d", STORAGE_OPENS, "check the URL and the server"),
        (
            "postgresql://127.0.0.1:9/d?user=u&password=hunter2",
            STORAGE_OPENS,
            "check the URL and the server",
        ),
    ],
    ids=ascii,
)
def test_a_storage_that_is_no_database_is_refused(
    folder: Path, refused: Refused, url: str, rule: str, remedy: str
) -> None:
    (folder / "here").mkdir()
    line = refused(command(storage=url), f"error: {rule}", remedy)
    assert "hunter2" not in line
    words = re.findall(r"\w+", url.partition("://")[2] or url)
    assert not words or any(word[:200] in line for word in words)


TRACKING = "--tracking-uri must be sqlite:///FILE, a database URL or http(s)://SERVER"
TRACKING_FILE = "--tracking-uri must be sqlite:///PATH, a file without '?'"
SERVER = "--tracking-uri must be a running MLflow server"
START = "start it, or give sqlite:///mlflow.db"
INSTEAD = "sqlite:///mlflow.db"


@pytest.mark.parametrize(
    ("uri", "rule", "remedy"),
    [
        ("", "--tracking-uri must be text, not empty", f"for example --tracking-uri {INSTEAD}"),
        ("nonsense", TRACKING, INSTEAD),
        ("mlruns", TRACKING, INSTEAD),
        ("./mlruns", TRACKING, INSTEAD),
        ("mlflow.db", TRACKING, INSTEAD),
        ("file:///tmp/mlruns", TRACKING, INSTEAD),
        ("databricks", TRACKING, INSTEAD),
        ("databricks://profile", TRACKING, INSTEAD),
        ("ftp://127.0.0.1/", TRACKING, INSTEAD),
        ("s3://bucket/mlruns", TRACKING, INSTEAD),
        ("://", TRACKING, INSTEAD),
        ("a\nb", TRACKING, INSTEAD),
        ("sqlite://", TRACKING, INSTEAD),
        ("sqlite:///", TRACKING, INSTEAD),
        ("sqlite:mlflow.db", TRACKING, INSTEAD),
        ("http", TRACKING, INSTEAD),
        ("http:127.0.0.1", TRACKING, INSTEAD),
        ("http:/127.0.0.1", TRACKING, INSTEAD),
        ("sqlite:///:memory:", TRACKING_FILE, "for example --tracking-uri sqlite:///memory.db"),
        ("sqlite:///mlflow.db?mode=ro", TRACKING_FILE, "for example --tracking-uri sqlite:///"),
        ("sqlite:///missing/mlflow.db", f"--tracking-uri {FOLDER}", "create it first"),
        ("sqlite:///here", "--tracking-uri must be a file, but", "name a file"),
        ("sqlite:///tiny.npz", "--tracking-uri must be a sound SQLite database", NEW_TRACKING),
        ("http://127.0.0.1:9", SERVER, START),
        ("https://127.0.0.1:9", SERVER, START),
        ("http://127.0.0.1:9/", SERVER, START),
        ("http://127.0.0.1:9\n", SERVER, START),
        ("http://u:hunter2@127.0.0.1:9", SERVER, START),
        ("http://", SERVER, START),
        ("http://127.0.0.1:port", SERVER, START),
        ("http://127.0.0.1:99999", SERVER, START),
        ("http://[::1", SERVER, START),
        ("http://a..b", SERVER, START),
        (f"http://{'a' * 64}.b", SERVER, START),
        ("postgresql+nonsense://127.0.0.1:9/d", "--tracking-uri must be", "check the URL"),
        ("postgresql://127.0.0.1:port/d", "--tracking-uri must be", "check the URL"),
        ("postgresql://u:hunter2@127.0.0.1:9/d", "--tracking-uri must be", "check the URL"),
    ],
    ids=ascii,
)
def test_a_tracking_uri_that_is_no_store_is_refused(
    folder: Path, refused: Refused, uri: str, rule: str, remedy: str
) -> None:
    (folder / "here").mkdir()
    assert "hunter2" not in refused(command(tracking_uri=uri), f"error: {rule}", remedy)


class Page(http.server.BaseHTTPRequestHandler):
    """A web server that is not MLflow's: a page under every address, or under none."""

    status = 200

    def do_GET(self) -> None:
        body = b"<html>welcome</html>"
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


class Missing(Page):
    status = 404


@pytest.mark.parametrize("handler", [Page, Missing])
def test_a_web_server_that_is_not_mlflows_is_refused(refused: Refused, handler: type[Page]) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            uri = f"http://127.0.0.1:{server.server_port}"
            refused(command(tracking_uri=uri), f"error: {SERVER}, but {uri} is not", START)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("variable", "value", "option"),
    [
        ("OPTUNA_STORAGE", "nonsense", "--storage"),
        ("OPTUNA_STORAGE", "sqlite:///missing/study.db", "--storage"),
        ("MLFLOW_TRACKING_URI", "nonsense", "--tracking-uri"),
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:9", "--tracking-uri"),
    ],
)
def test_a_bad_address_in_the_environment_is_refused(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, option: str
) -> None:
    monkeypatch.setenv(variable, value)
    refused(command(), f"error: {option} must", value.removeprefix("sqlite:///").split("/study")[0])


# ---- settings files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("n-trails = 5", ("'n-trails'", "did you mean n-trials?")),
        ("n_trail = 5", ("'n_trail'", "did you mean n-trials?")),
        ("epoch = 5", ("'epoch'", "did you mean epochs?")),
        ("batchsize = 5", ("'batchsize'", "did you mean batch-size?")),
        ("dropout = 0.5", ("'dropout'", "did you mean dropout-rate?")),
        ("Seed = 5", ("'Seed'", "did you mean seed?")),
        ('"" = 5', ("''", "did you mean")),
        ('"a\\nb" = 5', ("'a\\nb'", "did you mean")),
        ("[study]\nn-trials = 5", ("'study'", "did you mean study-name?")),
        ("[[epochs]]\nn = 5", (EPOCHS[0], "[{'n': 5}]", EPOCHS[1])),
        ('config = "other.toml"', ("'config'", "give --config on the command line")),
        ('preset = "cnn"', ("'preset'", "give --preset on the command line")),
        ('n-trials = "five"', (TRIALS[0], "but got 'five'", TRIALS[1])),
        ("n-trials = 5.0", (TRIALS[0], "but got 5.0", TRIALS[1])),
        ("n-trials = true", (TRIALS[0], "but got True", TRIALS[1])),
        ("n-trials = [5]", (TRIALS[0], "but got [5]", TRIALS[1])),
        ("n-trials = {}", (TRIALS[0], "but got {}", TRIALS[1])),
        ("n-trials = 2026-01-01", (TRIALS[0], "but got datetime.date", TRIALS[1])),
        ("n-trials = nan", (TRIALS[0], "but got nan", TRIALS[1])),
        ("n-trials = 0", (TRIALS[0], "but got 0", TRIALS[1])),
        (f"epochs = {'9' * 400}", (EPOCHS[0], "but got 999", EPOCHS[1])),
        (f"n-trials = {'9' * 5000}", ("--config", "study.toml")),
        ("seed = -1", (SEED[0], "but got -1", SEED[1])),
        ("seed = false", (SEED[0], "but got False", SEED[1])),
        ("timeout = inf", (TIMEOUT[0], "but got inf", TIMEOUT[1])),
        ("timeout = nan", (TIMEOUT[0], "but got nan", TIMEOUT[1])),
        ("timeout = 12:00:00", (TIMEOUT[0], "but got datetime.time", TIMEOUT[1])),
        ('timeout = "never"', (TIMEOUT[0], "but got 'never'", TIMEOUT[1])),
        ("validation-split = true", (SPLIT[0], "but got True", SPLIT[1])),
        ("validation-split = 1", (SPLIT[0], "but got 1", SPLIT[1])),
        ("validation-split = [0.1]", (SPLIT[0], "but got [0.1]", SPLIT[1])),
        ("study-name = 5", (STUDY[0], "but got 5", STUDY[1])),
        ('study-name = "a\\nb"', (STUDY[0], "but got 'a\\nb'", STUDY[1])),
        ("sampler = 1", (SAMPLER[0], "but got 1", SAMPLER[1])),
        ('sampler = ["tpe"]', (SAMPLER[0], "but got ['tpe']", SAMPLER[1])),
        ("dataset = true", ("--dataset must be text", "but got True", "for example")),
        ('dataset = "a\\u0000.npz"', ("--dataset must be text", "'a\\x00.npz'", "for example")),
        ("storage = []", ("--storage must be text", "but got []", "for example")),
        ("hidden-units = []", ("--hidden-units must be", "but got ''", "for example")),
        ("hidden-units = [64, 64]", ("--hidden-units must not name a value twice", "'64,64'")),
        ("hidden-units = [64, 0.5]", (UNITS[0], "but got '64,0.5'", UNITS[1])),
        ("hidden-units = [64, true]", (UNITS[0], "but got '64,true'", UNITS[1])),
        ("hidden-units = [[64], [128]]", (UNITS[0], "[64]", UNITS[1])),
        ("hidden-units = true", (UNITS[0], "but got 'true'", UNITS[1])),
        ("early-stopping = false", (STOPPING[0], "but got 'false'", STOPPING[1])),
        ("hidden-units = {low = 1}", ("--hidden-units must be", "{'low': 1}", "for example")),
        ("hidden-units = 64.0", (UNITS[0], "but got '64.0'", UNITS[1])),
        ("dropout-rate = 1", (DROPOUT[0], "but got '1'", DROPOUT[1])),
        ("dropout-rate = nan", (DROPOUT[0], "but got 'nan'", DROPOUT[1])),
        ('learning-rate = ["0.1:0.2", 1]', ("--learning-rate must", "'0.1:0.2,1'", "for example")),
        ("learning-rate = 0", (RATE[0], "but got '0'", RATE[1])),
        ("n-trials 5", ("--config must name a TOML file", "study.toml", "n-trials = 50")),
        ("n-trials = ", ("--config must name a TOML file", "study.toml", "n-trials = 50")),
        ("n-trials: 5\nepochs: 3", ("--config must name a TOML file", "n-trials = 50")),
        ('{"n-trials": 5}', ("--config must name a TOML file", "n-trials = 50")),
        ("seed = 1\nseed = 2", ("--config must name a TOML file", "n-trials = 50")),
        (f"seed = {'[' * 5000}", ("--config must name a TOML file", "n-trials = 50")),
        ("seed = 1\nepochs 2\npatience = 3", ("--config must name a TOML file", "line 2")),
    ],
    ids=lambda value: ascii(value[:40]) if isinstance(value, str) else "",
)
def test_a_bad_settings_file_is_refused(
    folder: Path, refused: Refused, text: str, fragments: tuple[str, ...]
) -> None:
    (folder / "study.toml").write_text(text + "\n", encoding="utf-8")
    refused(["--config", "study.toml", "--workers", "1"], *fragments)


def test_a_misspelt_key_says_the_file_and_the_rule(folder: Path, refused: Refused) -> None:
    (folder / "study.toml").write_text("n-trails = 5\n")
    refused(
        ["--config", "study.toml"],
        "error: --config study.toml: every key must be a setting's name, but got 'n-trails'; "
        "did you mean n-trials?",
    )


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("binary.toml", bytes(range(256))),
        ("latin.toml", "study-name = 'é'".encode("latin-1")),
        ("wide.toml", "n-trials = 5".encode("utf-16")),
        ("zeros.toml", bytes(1000)),
        ("data.toml", b"PK\x03\x04" + bytes(100)),
    ],
)
def test_a_settings_file_that_is_not_text_is_refused(
    folder: Path, refused: Refused, name: str, written: bytes
) -> None:
    (folder / name).write_bytes(written)
    refused(
        ["--config", name],
        "error: --config must name a TOML file",
        f"but {name!r} is not",
        "write lines like n-trials = 50",
    )


@pytest.mark.parametrize(
    "path", ["missing.toml", "missing/study.toml", "", ".", "tiny.npz/a.toml", "a\nb.toml"]
)
def test_a_settings_file_that_cannot_be_read_is_refused(refused: Refused, path: str) -> None:
    refused(
        ["--config", path],
        "error: --config must name a readable TOML file",
        f"but {path!r} is not",
        "check the path",
    )


def test_a_misspelt_key_in_a_file_with_a_strange_name_is_one_line(
    folder: Path, refused: Refused
) -> None:
    (folder / "a\nb.toml").write_text("n-trails = 5\n")
    refused(["--config", "a\nb.toml"], "did you mean n-trials?")


# ---- datasets --------------------------------------------------------------------------------

KNOWN = (
    "--dataset must be mnist, fashion_mnist, cifar10, cifar100, the path of an .npz file, a "
    "folder of images or MODULE:FUNCTION"
)
PATH = "check the path"
SAVEZ = "write it with np.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)"
NUMERIC = "convert it with .astype('float32') and .astype('int64') before saving"
LABELS = "number the classes 0, 1, 2, ... without a gap, each with training examples"
ROWS = "check how the arrays were made"
OBJECTS = "must hold arrays of numbers, but has an array of objects"


@pytest.mark.parametrize(
    "name", ["emnist", "MNIST", "fashion-mnist", "tiny", "mnist.np", "cifar", "データ", "a\nb"]
)
def test_an_unknown_dataset_is_refused(refused: Refused, name: str) -> None:
    refused(command(dataset=name), f"error: {KNOWN}, but got {name!r}", "check the spelling")


@pytest.mark.parametrize(
    "path",
    [
        "missing.npz",
        "missing/tiny.npz",
        "./missing",
        "here.npz",
        "tiny.npz/a.npz",
        f"{'a' * 300}.npz",
        "dangling.npz",
    ],
    ids=lambda path: path[:30],
)
def test_a_dataset_that_cannot_be_read_is_refused(
    folder: Path, refused: Refused, path: str
) -> None:
    (folder / "here.npz").mkdir()
    (folder / "dangling.npz").symlink_to("nowhere.npz")
    refused(
        command(dataset=path), f"error: --dataset {path}: must be a readable .npz file, but", PATH
    )


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("missing/", "must be a readable folder, but found no such file"),
        ("empty", "must hold one folder of images for each class, but found no folder in empty"),
        ("one/", "must have two classes or more, but found only one/cat"),
        ("loop", "must be a readable folder, but found too many levels of symbolic links: loop"),
        ("text", "every image must be readable, but found a damaged one, text/cat/a.png (cannot"),
    ],
)
def test_a_folder_that_holds_no_images_of_classes_is_refused(
    folder: Path, refused: Refused, path: str, rule: str
) -> None:
    for name in ("empty", "one/cat", "text/cat", "text/dog"):
        (folder / name).mkdir(parents=True)
        for image in ("a.png", "b.png") if "/" in name else ():
            (folder / name / image).write_text("no image")
    (folder / "loop").symlink_to("loop")
    refused(command(dataset=path), f"error: --dataset {path}: {rule}")


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        ("nowhere:load", "--dataset must name a module that can be imported (ModuleNotFoundError"),
        ("own:other", "--dataset must name a function, but own has no function other, but got"),
        (
            "own:load",
            "--dataset own:load: must return its data, but it raised KeyError: 'x'; fix it",
        ),
    ],
)
def test_a_function_that_brings_no_data_is_refused(
    folder: Path, refused: Refused, function: str, rule: str
) -> None:
    (folder / "own.py").write_text("def load():\n    return {}['x']\n")
    refused(command(dataset=function), f"error: {rule}")


def test_a_missing_dataset_with_a_line_break_in_its_name_is_one_line(refused: Refused) -> None:
    refused(command(dataset="a\nb.npz"), "error: --dataset ", PATH)


def saved(**given: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **given)
    return buffer.getvalue()


def single_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((40, 4)))
    return buffer.getvalue()


def archive(x_train: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of the tiny dataset with `x_train` as the bytes of its first member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("x_train.npy", x_train)
        for key, array in arrays().items():
            if key != "x_train":
                with file.open(f"{key}.npy", "w") as member:
                    np.lib.format.write_array(member, array)
    return buffer.getvalue()


def npy(shape: str, dtype: str = "<f8") -> bytes:
    """An array's header that promises `shape`, and nothing after it."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


WHOLE = saved(**arrays())


def overwritten(whole: bytes, start: int, length: int) -> bytes:
    noise = random.Random(start).randbytes(length)
    return whole[:start] + noise + whole[start + length :]


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        pytest.param(b"", "must be a whole .npz file, but", id="empty"),
        pytest.param(b"x,y\n1,2\n", "must be a", id="text"),
        pytest.param(bytes(1000), "must be a", id="zeros"),
        pytest.param(random.Random(0).randbytes(1000), "must be a", id="noise"),
        pytest.param(b"\x80\x04K\x01.", "must", id="a-pickle"),
        *[
            pytest.param(WHOLE[:size], "must be a", id=f"truncated-to-{size}")
            for size in (1, 2, 4, 30, 200, len(WHOLE) // 2, len(WHOLE) - 200, len(WHOLE) - 1)
        ],
        pytest.param(WHOLE[100:], "must be a whole .npz file, but", id="without-its-beginning"),
        pytest.param(single_array(), "must be an .npz archive, but has a single array", id="npy"),
        pytest.param(saved(), "must hold x_train, y_train, x_test, y_test, but", id="no-arrays"),
        pytest.param(archive(b"hello"), "must", id="text-for-an-array"),
        pytest.param(archive(b""), "must", id="nothing-for-an-array"),
        pytest.param(archive(npy("(40, 4)")), "must be a whole .npz file, but", id="no-numbers"),
        pytest.param(
            archive(npy("(10**15, 4)")), "must be a whole .npz file, but", id="broken-shape"
        ),
        pytest.param(
            archive(npy("(1000000000000000, 4)")), "must be a whole .npz file, but", id="huge-shape"
        ),
        pytest.param(
            archive(npy("(-40, 4)")), "must be a whole .npz file, but", id="negative-shape"
        ),
        pytest.param(archive(npy("(40, 4)", "<q9")), "must be a whole .npz file, but", id="dtype"),
        pytest.param(archive(b"\x93NUMPY\x09\x00"), "must be a whole .npz file, but", id="version"),
        *[
            pytest.param(overwritten(WHOLE, start, 64), "must be a whole", id=f"noise-at-{start}")
            for start in (200, 600, len(WHOLE) - 300)
        ],
    ],
)
def test_a_damaged_dataset_is_refused(
    folder: Path, refused: Refused, written: bytes, rule: str
) -> None:
    (folder / "data.npz").write_bytes(written)
    line = refused(command(dataset="data.npz"), f"error: --dataset data.npz: {rule}", SAVEZ)
    assert line.count("data.npz") == 1
    assert "pickle" not in line


def without(*keys: str) -> dict[str, NDArray[Any]]:
    return {key: array for key, array in arrays().items() if key not in keys}


@pytest.mark.parametrize("keys", [("x_train",), ("y_test",), ("x_test", "y_test")])
def test_a_dataset_without_all_arrays_is_refused(
    folder: Path, refused: Refused, keys: tuple[str, ...]
) -> None:
    np.savez(folder / "data.npz", **without(*keys))
    line = refused(
        command(dataset="data.npz"),
        "error: --dataset data.npz: must hold x_train, y_train, x_test, y_test, but has no "
        f"{', '.join(keys)}; {SAVEZ}",
    )
    assert line.count("--dataset") == 1


X = np.zeros((40, 4), dtype=np.float32)
Y = np.arange(40) % 2
FLAGS = np.stack([Y, Y, 1 - Y], axis=1)


def with_value(value: float, kind: type = np.float32) -> NDArray[Any]:
    x = X.astype(kind)
    x[17, 2] = value
    return x


X_NUMBERS = "x_train must hold numbers in shape (n, ...), but has"
Y_NUMBERS = "y_train must hold whole numbers in shape (n,), but has"
FINITE = "x_train must hold finite numbers (float32), but has"
ONE_SHAPE = "x_train and x_test must hold examples of one shape and type, but has"
CLASSES = "y_train must hold labels 0 to C-1, C >= 2, but has labels"
TEST_CLASSES = "y_test must hold labels 0 to 1, as y_train does, but has labels from"


@pytest.mark.parametrize(
    ("changed", "rule", "remedy"),
    [
        pytest.param({"x_train": X.astype(object)}, OBJECTS, NUMERIC, id="x-objects"),
        pytest.param({"y_train": Y.astype(object)}, OBJECTS, NUMERIC, id="y-objects"),
        pytest.param({"x_test": X[:10].astype(object)}, OBJECTS, NUMERIC, id="x-test-objects"),
        pytest.param({"x_train": X.astype(str)}, f"{X_NUMBERS} <U", NUMERIC, id="x-text"),
        pytest.param({"x_train": X.astype("S8")}, f"{X_NUMBERS} |S8", NUMERIC, id="x-bytes"),
        pytest.param({"x_train": X.astype("c8")}, f"{X_NUMBERS} complex64", NUMERIC, id="complex"),
        pytest.param(
            {"x_train": X.astype("M8[s]")}, f"{X_NUMBERS} datetime64[s]", NUMERIC, id="x-dates"
        ),
        pytest.param(
            {"x_train": np.zeros((40, 4), [("a", "f4")])}, X_NUMBERS, NUMERIC, id="x-records"
        ),
        pytest.param({"x_train": X[:, 0]}, f"{X_NUMBERS} float32(40,)", NUMERIC, id="x-1-d"),
        pytest.param(
            {"x_train": np.float32(1)}, f"{X_NUMBERS} float32()", NUMERIC, id="x-one-number"
        ),
        pytest.param(
            {"x_test": X[:10, 0]},
            "x_test must hold numbers in shape (n, ...), but has float32(10,)",
            NUMERIC,
            id="x-test-1-d",
        ),
        pytest.param({"y_train": Y.astype("f4")}, f"{Y_NUMBERS} float32", NUMERIC, id="y-floats"),
        pytest.param({"y_train": Y.astype(bool)}, f"{Y_NUMBERS} bool", NUMERIC, id="y-bools"),
        pytest.param({"y_train": Y.astype(str)}, f"{Y_NUMBERS} <U", NUMERIC, id="y-text"),
        pytest.param({"y_train": Y.astype("M8[s]")}, f"{Y_NUMBERS} date", NUMERIC, id="y-dates"),
        pytest.param(
            {"y_train": np.eye(2, dtype=int)[Y]},
            f"{Y_NUMBERS} int64(40, 2)",
            "take the class of each row with .argmax(axis=1), or give --task multilabel",
            id="one-hot",
        ),
        pytest.param(
            {"y_train": FLAGS, "y_test": FLAGS[:10, :1]},
            "y_test must hold 0 or 1 for each label in shape (n, labels), but has int64(10, 1)",
            "give a column of 0 and 1 for each label, or leave --task out",
            id="one-test-label",
        ),
        pytest.param(
            {"y_train": FLAGS, "y_test": FLAGS[:10, :2]},
            "y_test must hold the labels of y_train, but has 2 columns, and y_train has 3",
            ROWS,
            id="fewer-test-labels",
        ),
        pytest.param(
            {"y_train": FLAGS, "y_test": FLAGS[:10] * 2},
            "y_test must hold 0 or 1 for each label, but has 2",
            ROWS,
            id="labels-of-2",
        ),
        pytest.param(
            {"y_train": FLAGS, "y_test": np.where(FLAGS[:10], np.nan, 0)},
            "y_test must hold 0 or 1 for each label, but has nan",
            ROWS,
            id="missing-labels",
        ),
        pytest.param(
            {"y_train": np.stack([Y, Y * 0, Y], axis=1), "y_test": FLAGS[:10]},
            "y_train must hold 0 and 1 for each label, but has only 0 in column 1",
            "leave that label out, or give examples of both",
            id="a-label-of-none",
        ),
        pytest.param({"y_train": Y[None]}, f"{Y_NUMBERS} int64(1, 40)", NUMERIC, id="y-in-one-row"),
        pytest.param({"y_train": np.int64(1)}, f"{Y_NUMBERS} int64()", NUMERIC, id="y-one-number"),
        pytest.param(
            {"y_test": Y[:10].astype("f8")},
            "y_test must hold whole numbers in shape (n,), but has float64",
            NUMERIC,
            id="y-test-floats",
        ),
        pytest.param(
            {"y_train": Y[:39]},
            "x_train and y_train must be of one length, but has 40 and 39",
            ROWS,
            id="unequal-lengths",
        ),
        pytest.param(
            {"y_test": Y[:11]},
            "x_test and y_test must be of one length, but has 10 and 11",
            ROWS,
            id="unequal-test-lengths",
        ),
        pytest.param({"x_train": with_value(np.nan)}, f"{FINITE} NaN", ROWS, id="nan"),
        pytest.param({"x_train": with_value(np.inf)}, f"{FINITE} NaN or inf", ROWS, id="inf"),
        pytest.param({"x_train": with_value(-np.inf)}, f"{FINITE} NaN or inf", ROWS, id="-inf"),
        pytest.param({"x_train": with_value(1e39, np.float64)}, FINITE, ROWS, id="overflow"),
        pytest.param({"x_train": with_value(-1e300, np.float64)}, FINITE, ROWS, id="-overflow"),
        pytest.param(
            {"x_test": with_value(np.nan)[10:20]},
            "x_test must hold finite numbers (float32), but has NaN",
            ROWS,
            id="test-nan",
        ),
        pytest.param({"y_train": Y - 1}, f"{CLASSES} -1, 0", LABELS, id="negative-labels"),
        pytest.param({"y_train": Y * 2}, f"{CLASSES} 0, 2", LABELS, id="gapped-labels"),
        pytest.param({"y_train": Y + 1}, f"{CLASSES} 1, 2", LABELS, id="labels-from-1"),
        pytest.param({"y_train": Y * 0}, f"{CLASSES} 0", LABELS, id="one-class"),
        pytest.param({"y_train": np.arange(40) * 3}, f"{CLASSES} 0, 3, 6", LABELS, id="many-gaps"),
        pytest.param(
            {"y_train": np.where(Y, np.uint64(2**63), np.uint64(0))},
            f"{CLASSES} 0, 9223372036854775808",
            LABELS,
            id="huge-labels",
        ),
        pytest.param({"y_test": Y[:10] + 1}, f"{TEST_CLASSES} 1 to 2", LABELS, id="new-test-label"),
        pytest.param({"y_test": Y[:10] - 1}, f"{TEST_CLASSES} -1 to 0", LABELS, id="test-label--1"),
        pytest.param(
            {"x_train": X[:0], "y_train": Y[:0]}, "x_train must have examples", ROWS, id="no-rows"
        ),
        pytest.param(
            {"x_test": X[:0], "y_test": Y[:0]}, "x_test must have examples", ROWS, id="no-test-rows"
        ),
        pytest.param(
            {"x_train": X[:, :0], "x_test": X[:10, :0]},
            "x_train must have examples",
            ROWS,
            id="no-features",
        ),
        pytest.param(
            {"x_test": X[:10, :3]}, f"{ONE_SHAPE} float32(4,) and float32(3,)", ROWS, id="shapes"
        ),
        pytest.param(
            {"x_test": X[:10].reshape(10, 2, 2)},
            f"{ONE_SHAPE} float32(4,) and float32(2, 2)",
            ROWS,
            id="dimensions",
        ),
        pytest.param(
            {"x_train": X.astype(np.uint8)},
            f"{ONE_SHAPE} uint8(4,) and float32(4,)",
            ROWS,
            id="bytes-and-floats",
        ),
        pytest.param(
            {"x_test": X[:10].astype(np.uint8)},
            f"{ONE_SHAPE} float32(4,) and uint8(4,)",
            ROWS,
            id="floats-and-bytes",
        ),
    ],
)
def test_a_dataset_that_cannot_be_learned_is_refused(
    folder: Path, refused: Refused, changed: dict[str, Any], rule: str, remedy: str
) -> None:
    np.savez(folder / "data.npz", **arrays(**changed))
    refused(command(dataset="data.npz"), f"error: --dataset data.npz: {rule}", remedy)


@pytest.mark.parametrize("share", ["1e-300", "1e-17", "0.98", "0.999999"])
def test_a_split_that_leaves_no_examples_is_refused(refused: Refused, share: str) -> None:
    refused(
        command(validation_split=share),
        "error: --validation-split must leave examples to train and to validate",
        f"but {float(share)} of 40 leaves",
        "give a fraction nearer to 0.5 or more data",
    )


# ---- database files --------------------------------------------------------------------------


def copied(path: Path) -> bytes:
    """The database at `path` as one whole file, whatever its write-ahead log still holds."""
    copy = path.with_name(f"{path.name}.copy")
    source, target = sqlite3.connect(path), sqlite3.connect(copy)
    source.backup(target)
    target.close()
    source.close()
    written = copy.read_bytes()
    copy.unlink()
    return written


def settings_of(config: StudyConfig) -> dict[str, Any]:
    """The fingerprint that a run of `config` stores."""
    digest = load_dataset(config.dataset, config.validation_split).digest
    return config.settings(f"{config.dataset.rsplit('/', 1)[-1]} ({digest[:12]})")


def close(study: optuna.Study) -> None:
    backend = study._storage._backend  # type: ignore[attr-defined]
    backend.remove_session()
    backend.engine.dispose()


@pytest.fixture(scope="session")
def study_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a real study.db whose study `tiny` has the settings of `command()`."""
    folder = tmp_path_factory.mktemp("study")
    np.savez(folder / "tiny.npz", **arrays())
    config = StudyConfig(
        study_name=NAME,
        dataset=f"{folder}/tiny.npz",
        storage=f"sqlite:///{folder}/study.db",
        hidden_units=SETTINGS["hidden_units"],
        dropout_rate=SETTINGS["dropout_rate"],
        learning_rate=SETTINGS["learning_rate"],
        epochs=int(SETTINGS["epochs"]),
        batch_size=int(SETTINGS["batch_size"]),
    )
    close(storage.open_study(config, settings_of(config)))
    return copied(folder / "study.db")


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a real mlflow.db."""
    from search.tracking.runs import Tracking

    folder = tmp_path_factory.mktemp("mlflow")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    Tracking(StudyConfig(tracking_uri=f"sqlite:///{folder}/mlflow.db")).open()
    return copied(folder / "mlflow.db")


@pytest.fixture(params=["study.db", "mlflow.db"])
def database(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def whole(database: str, study_database: bytes, mlflow_database: bytes) -> bytes:
    return study_database if database == "study.db" else mlflow_database


OPTION = {"study.db": "--storage", "mlflow.db": "--tracking-uri"}
OWNER = {"study.db": "Optuna", "mlflow.db": "MLflow"}
REMEDY = {"study.db": NEW, "mlflow.db": NEW_TRACKING}


def in_journal_mode(whole: bytes, mode: int) -> bytes:
    """`whole` marked as a database with a rollback journal (1) or a write-ahead log (2)."""
    return whole[:18] + bytes([mode, mode]) + whole[20:]


@pytest.mark.parametrize(
    "written",
    [
        pytest.param(b"hello\n", id="text"),
        pytest.param(b"x", id="one-byte"),
        pytest.param(bytes(8192), id="zeros"),
        pytest.param(random.Random(0).randbytes(8192), id="noise"),
        pytest.param(b"SQLite format 3\0", id="header-only"),
        pytest.param(b"SQLite format 3\0" + random.Random(1).randbytes(8176), id="noisy-sqlite"),
        pytest.param(b"PK\x03\x04" + bytes(5000), id="zip"),
    ],
)
def test_a_file_that_is_no_database_is_refused(
    folder: Path, refused: Refused, database: str, written: bytes
) -> None:
    (folder / database).write_bytes(written)
    refused(
        command(),
        f"error: {OPTION[database]} must be ",
        f"but '{folder / database}' is ",
        REMEDY[database],
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_what_is_no_database(
    folder: Path, refused: Refused, database: str, verb: str
) -> None:
    (folder / database).write_bytes(random.Random(2).randbytes(8192))
    places = (f"{option}=sqlite:///{folder}/{name}" for name, option in OPTION.items())
    refused([verb, *places], f"error: {OPTION[database]} must be ", REMEDY[database])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_a_study_that_is_not_there(
    folder: Path, refused: Refused, study_database: bytes, verb: str
) -> None:
    (folder / "study.db").write_bytes(study_database)
    places = (f"{option}=sqlite:///{folder}/{name}" for name, option in OPTION.items())
    refused([verb, *places, "--study-name", "other"], "error: --study-name must be a study of")


@pytest.mark.parametrize("place", ["no/such/folder.html", ".", "/dev/null"])
def test_a_report_that_cannot_be_written_is_refused(
    folder: Path, refused: Refused, place: str
) -> None:
    refused(command(report=place), "error: the report must be a file in a folder", "another file")


@pytest.mark.parametrize(
    "place", ["tiny.npz", "notes.txt", "empty.html", "report.html", "page.html"]
)
def test_a_report_overwrites_no_file_that_is_none(
    folder: Path, refused: Refused, place: str
) -> None:
    (folder / "notes.txt").write_text("<title>x: hyperparameter search</title>")
    (folder / "empty.html").touch()
    for name in ("report.html", "page.html"):
        (folder / name).write_text("<!doctype html><title>my page</title>")
    fragments = ("error: the report must be a new file or replace a report", "give another file")
    refused(command(report=place), *fragments)
    refused(["report", "--output", place], *fragments)


def test_a_report_whose_name_no_disk_takes_is_refused(refused: Refused) -> None:
    refused(command(report="é" * 130), "the report must be a file whose name has at most 255 bytes")


@pytest.mark.parametrize("place", ["study.db", "mlflow.db", "link.html", "study.db-wal"])
@pytest.mark.parametrize("there", [True, False])
def test_a_report_overwrites_no_database_be_it_there_or_not_yet(
    folder: Path, refused: Refused, study_database: bytes, place: str, there: bool
) -> None:
    (folder / "link.html").symlink_to("study.db")
    if there:
        (folder / "study.db").write_bytes(study_database)
    refused(
        command(report=place), "error: the report must be a file of its own", "give another file"
    )
    refused(["report", "--output", place], "error: the report must be a file of its own")


def test_a_zero_length_database_is_refused(folder: Path, refused: Refused, database: str) -> None:
    (folder / database).touch()
    refused(
        command(),
        f"error: {OPTION[database]} must be {OWNER[database]}'s database",
        f"but '{folder / database}' is empty",
        REMEDY[database],
    )


def test_a_folder_in_a_databases_place_is_refused(
    folder: Path, refused: Refused, database: str
) -> None:
    (folder / database).mkdir()
    refused(
        command(),
        f"error: {OPTION[database]} must be a file",
        f"but '{folder / database}' is a folder",
        "name a file",
    )


@pytest.mark.parametrize("mode", [1, 2], ids=["rollback", "wal"])
@pytest.mark.parametrize(
    "share", [17, 100, 512, 1024, 4095, 4096, 4097, 0.3, 0.5, 0.9, -4096, -1], ids=str
)
def test_a_truncated_database_is_refused(
    folder: Path, refused: Refused, database: str, whole: bytes, share: float, mode: int
) -> None:
    size = int(len(whole) * share) if isinstance(share, float) else share
    (folder / database).write_bytes(in_journal_mode(whole, mode)[:size])
    refused(
        command(),
        f"error: {OPTION[database]} must be a sound SQLite database",
        f"but '{folder / database}' is not",
        REMEDY[database],
    )


@pytest.mark.parametrize("fill", ["noise", "zeros"])
@pytest.mark.parametrize("page", OVERWRITTEN_PAGES)
def test_a_database_with_an_overwritten_page_is_refused(
    folder: Path, refused: Refused, database: str, whole: bytes, page: int, fill: str
) -> None:
    start = 4096 * page + (100 if page == 0 else 0)
    length = 4096 * (page + 1) - start
    new = random.Random(page).randbytes(length) if fill == "noise" else bytes(length)
    (folder / database).write_bytes(whole[:start] + new + whole[start + length :])
    refused(
        command(),
        f"error: {OPTION[database]} must be a sound SQLite database",
        f"but '{folder / database}' is not",
        REMEDY[database],
    )


def edited(folder: Path, whole: bytes, *statements: str) -> bytes:
    """`whole` after the SQL `statements`."""
    path = folder / "edited.db"
    path.write_bytes(in_journal_mode(whole, 1))
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    written = path.read_bytes()
    path.unlink()
    return in_journal_mode(written, whole[18])


@pytest.mark.parametrize("tables", [(), ("notes",), ("studies",), ("runs", "trials")])
def test_another_programs_database_is_refused(
    folder: Path, refused: Refused, database: str, tables: tuple[str, ...]
) -> None:
    connection = sqlite3.connect(folder / database)
    connection.execute("PRAGMA user_version = 7")
    for table in tables:
        connection.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY)")
    connection.commit()
    connection.close()
    refused(
        command(),
        f"error: {OPTION[database]} must be {OWNER[database]}'s database",
        f"but '{folder / database}' is another program's",
        REMEDY[database],
    )


def test_each_others_database_is_refused(
    folder: Path, refused: Refused, database: str, study_database: bytes, mlflow_database: bytes
) -> None:
    (folder / database).write_bytes(mlflow_database if database == "study.db" else study_database)
    refused(
        command(),
        f"error: {OPTION[database]} must be {OWNER[database]}'s database",
        f"but '{folder / database}' is another program's",
        REMEDY[database],
    )


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE alembic_version SET version_num = 'v0.9.0.a'",
        "UPDATE alembic_version SET version_num = 'v99.0.0.a'",
        "UPDATE alembic_version SET version_num = ''",
        "DELETE FROM alembic_version",
        "DROP TABLE alembic_version",
    ],
)
def test_another_versions_database_is_refused(
    folder: Path, refused: Refused, database: str, whole: bytes, change: str
) -> None:
    (folder / database).write_bytes(edited(folder, whole, change))
    found = change.split("'")[1] if "'v" in change else "has the schema "
    upgrade = "optuna storage upgrade" if database == "study.db" else "mlflow db upgrade"
    refused(
        command(),
        f"error: {OPTION[database]} must be a database of {OWNER[database]} ",
        f"'{folder / database}' has the schema",
        found,
        upgrade,
        "or give another file",
    )


# ---- existing studies ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [1, 2], ids=["rollback", "wal"])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_units": "4,8,16"}, "hidden_units: 4,8 -> 4,8,16"),
        ({"hidden_units": "8,4"}, "hidden_units: 4,8 -> 8,4"),
        ({"dropout_rate": "0.0:0.3"}, "dropout_rate: 0.1,0.3 -> 0:0.3"),
        ({"learning_rate": "0.02"}, "learning_rate: 0.01 -> 0.02"),
        ({"epochs": "2"}, "epochs: 1 -> 2"),
        ({"batch_size": "16"}, "batch_size: 8 -> 16"),
        ({"validation_split": "0.2"}, "validation_split: 0.1 -> 0.2"),
        ({"seed": "1"}, "seed: 0 -> 1"),
        ({"sampler": "grid"}, "grid: False -> True"),
        ({"dataset": "other.npz"}, "-> other.npz ("),
        ({"epochs": "2", "seed": "1"}, "epochs: 1 -> 2; seed: 0 -> 1"),
    ],
    ids=str,
)
def test_a_study_with_other_settings_is_refused(
    folder: Path,
    refused: Refused,
    study_database: bytes,
    changed: dict[str, str],
    said: str,
    mode: int,
) -> None:
    np.savez(folder / "other.npz", **arrays(x_train=X))
    (folder / "study.db").write_bytes(in_journal_mode(study_database, mode))
    refused(
        command(**changed),
        f"error: --study-name {NAME} exists with other settings (stored -> given): ",
        said,
        ANOTHER_NAME,
    )


def test_other_data_under_the_same_name_is_refused(
    folder: Path, refused: Refused, study_database: bytes
) -> None:
    (folder / "study.db").write_bytes(study_database)
    np.savez(folder / "tiny.npz", **arrays(x_train=X))
    refused(command(), "dataset: tiny.npz (", "-> tiny.npz (", ANOTHER_NAME)


def test_a_study_in_an_unfinished_write_ahead_log_is_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, study_database: bytes, capsys: Any
) -> None:
    source = tmp_path_factory.mktemp("killed") / "study.db"
    source.write_bytes(in_journal_mode(study_database, 2))
    writer = sqlite3.connect(source)
    writer.execute("UPDATE study_user_attributes SET value_json = replace(value_json, '8', '9')")
    writer.commit()
    for suffix in ("", "-wal"):
        (folder / f"study.db{suffix}").write_bytes(Path(f"{source}{suffix}").read_bytes())
    writer.close()
    before = contents(folder)
    assert len(before["study.db-wal"] or b"") > 0
    assert cli.main(command()) == 2
    check_refusal(*capsys.readouterr(), ("hidden_units: 4,9 -> 4,8", ANOTHER_NAME))
    after = contents(folder)
    assert {name: after[name] for name in before} == before


def made_by_optuna(folder: Path, **given: Any) -> optuna.Study:
    return optuna.create_study(study_name=NAME, storage=f"sqlite:///{folder / 'study.db'}", **given)


def test_a_study_that_minimizes_is_refused(folder: Path, refused: Refused) -> None:
    close(made_by_optuna(folder, direction="minimize"))
    refused(
        command(),
        f"error: --study-name {NAME} must be a study that maximizes",
        "direction: minimize -> maximize",
        ANOTHER_NAME,
    )


def test_a_study_of_two_objectives_is_refused(folder: Path, refused: Refused) -> None:
    close(made_by_optuna(folder, directions=["maximize", "minimize"]))
    refused(
        command(),
        f"error: --study-name {NAME} must be a study that maximizes",
        "minimize",
        ANOTHER_NAME,
    )


@pytest.mark.parametrize("attribute", [None, "note"])
def test_a_study_of_plain_optuna_with_a_trial_is_refused(
    folder: Path, refused: Refused, attribute: str | None
) -> None:
    study = made_by_optuna(folder, direction="maximize")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    if attribute is not None:
        study.set_user_attr(attribute, "mine")
    close(study)
    refused(
        command(),
        f"error: --study-name {NAME} must be a study of this tool",
        "was created by another program",
        ANOTHER_NAME,
    )


@pytest.mark.parametrize("settings", ["mine", 7, [1, 2], {"epochs": "many"}], ids=str)
def test_a_study_with_strange_settings_is_refused(
    folder: Path, refused: Refused, settings: Any
) -> None:
    study = made_by_optuna(folder, direction="maximize")
    study.set_user_attr("settings", settings)
    close(study)
    refused(command(), f"error: --study-name {NAME} ", ANOTHER_NAME)


# ---- the real command ------------------------------------------------------------------------


def run_script(folder: Path, *arguments: str | bytes) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OPTUNA_STORAGE", "MLFLOW_TRACKING_URI")
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_command_refuses_a_bad_option(folder: Path) -> None:
    before = contents(folder)
    result = run_script(folder, str(ROOT / "study.py"), "--n-trials", "0")
    assert result.returncode == 2
    check_refusal(result.stdout, result.stderr, (TRIALS[0], "but got 0", TRIALS[1]))
    assert contents(folder) == before


REFUSING = """
import sys
from search import cli

arguments = sys.argv[1:]
while arguments:
    length = int(arguments[0])
    code = cli.main(arguments[1 : length + 1])
    if code != 2 or {"tensorflow", "keras"} & set(sys.modules):
        sys.exit(f"{code}, with {set(sys.modules)}")
    arguments = arguments[length + 1 :]
"""


@pytest.mark.slow
def test_refusals_in_a_new_process_never_load_tensorflow(
    folder: Path, study_database: bytes
) -> None:
    (folder / "damaged.db").write_bytes(study_database[: len(study_database) // 2])
    (folder / "study.db").write_bytes(study_database)
    before = contents(folder)
    refused: list[tuple[list[Any], tuple[str, ...]]] = [
        (["--dataset", b"\xff\xfe.npz"], ("--dataset", PATH)),  # a file's name that is no text
        (command(storage="sqlite:///damaged.db"), ("must be a sound SQLite database", NEW)),
        (command(epochs="2"), ("epochs: 1 -> 2", ANOTHER_NAME)),
    ]
    words = [word for arguments, _ in refused for word in (str(len(arguments)), *arguments)]
    result = run_script(folder, "-c", REFUSING, *words)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines(keepends=True)
    for line, (_, fragments) in zip(lines, refused, strict=True):
        check_refusal(result.stdout, line, fragments)
    assert contents(folder) == before
