"""A custom model, as in docs/your-model.md."""

import hashlib
import importlib
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import forks
import invariants
import mlflow
import numpy as np
import pytest
from conftest import ROOT, mlflow_at
from in_process import command

from search import StudyConfig, run
from search.config import custom_model
from search.data.load import load_dataset, load_for_study
from search.errors import InputError, RunError
from search.tracking.schema import study_metadata
from search.workers.reproduce import train_again

PAGE = (ROOT / "docs" / "your-model.md").read_text()
SOURCE = re.search(r"```python\n(import keras\n\nSPACE = .*?)```", PAGE, re.DOTALL)
COMMAND = re.search(r"    python study.py (--model mine:build .*)", PAGE)
DENSE = """
import keras

SPACE = {"units": "4,8"}


def build(hyperparameters, shape, classes):
    hidden = keras.layers.Dense(hyperparameters["units"], activation="relu")
    return keras.Sequential([keras.Input(shape), hidden, keras.layers.Dense(classes, "softmax")])
"""
OF_A_TRIAL = {"seed", "trainable_parameters"}  # what each trial's run says of itself
SMALL = (
    *("--dataset", "digits.npz", "--n-trials", "3", "--epochs", "2"),
    *("--report", "none", "--baselines", "none"),
)


@pytest.fixture
def folder(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's mine.py beside some digits, where modules are found, as in a new process."""
    assert SOURCE is not None
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE[1])
    with np.load(digits) as data:
        few = {name: array[: 400 if "train" in name else 100] for name, array in data.items()}
    np.savez(tmp_path / "digits.npz", **few)
    return tmp_path


def test_the_pages_example_has_twenty_lines_or_so() -> None:
    assert SOURCE is not None
    assert len(SOURCE[1].strip().splitlines()) <= 21


FUNCTION = """
import numpy as np

print("read", file=open("calls.txt", "a"))


def load():
    return {**np.load("digits.npz"), "class_names": [f"digit {number}" for number in range(10)]}
"""


@pytest.mark.slow
def test_the_pages_custom_model_is_searched_by_two_workers_registered_and_reproduced(
    folder: Path,
) -> None:
    """On the data of a function, which is called once."""
    assert COMMAND is not None
    (folder / "read.py").write_text(FUNCTION)
    options = (*COMMAND[1].split(), *SMALL, "--n-trials", "2", "--dataset", "read:load")
    name = options[options.index("--study-name") + 1]
    code, out, err = conftest.command(folder, *options, "--workers", "2")
    assert (code, err) == (0, "")
    assert "read:load: 360 / 40 / 100 examples to train, validate, test (stratified split)" in out
    assert (folder / "calls.txt").read_text() == "read\n"
    assert "pooling " in out
    found = invariants.check(folder, 2, study_name=name)
    searched = {"filters", "kernel", "dropout", "pooling", "learning_rate", "optimizer"}
    for trial in found["trials"]:
        assert set(trial.params) == searched
        params = found["runs"][trial.number].data.params
        assert params["model"] == "mine:build"
        assert params["schedule"] == "one_cycle"
        assert not {"hidden_units", "dropout_rate", "activation", "output_activation"} & set(params)

    code, out, err = command(folder, "reproduce", "--study-name", name, "--trial", "1")
    assert (code, err) == (0, "")
    assert "the same to the last digit" in out
    for verb in (("show",), ("report",), ("doctor",)):
        code, out, err = command(folder, *verb, "--study-name", name)
        assert (code, err) == (0, ""), verb

    with mlflow_at(folder):
        model = mlflow.keras.load_model("models:/MNIST_DNN_Model@production")
    with np.load(folder / "digits.npz") as data:
        x = data["x_test"].reshape(-1, 784).astype("float32") / 255
        accuracy = np.mean(model.predict(x, verbose=0).argmax(axis=1) == data["y_test"])
    assert accuracy == pytest.approx(found["winner"].data.metrics["test_accuracy"], abs=1e-6)
    check_another_source(folder, name, options)


def check_another_source(folder: Path, name: str, options: tuple[str, ...]) -> None:
    """Assert that another source is another model."""
    before = invariants.dump(folder)
    with (folder / "mine.py").open("a") as file:
        file.write("# changed\n")
    code, out, err = command(folder, *options)
    assert (code, out) == (2, "")
    assert "exists with other settings (stored -> given): model: mine:build (" in err
    code, out, err = command(folder, "reproduce", "--study-name", name)
    assert (code, err.count("\n")) == (2, 1)
    assert "mine:build must be the model of the study" in err
    assert "restore its source" in err
    assert invariants.dump(folder) == before


def test_no_name_with_another_meaning_in_a_store_is_free(
    in_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    config = StudyConfig(dataset=str(folder / "digits.npz"), model="mine:build")
    dataset = load_dataset(config.dataset, config.validation_split)
    written = {
        *config.settings(dataset.digest),
        *study_metadata(config, dataset)["params"],
        *OF_A_TRIAL,
    }
    for name in written - set(custom_model.load("mine:build").space):
        (folder / f"takes_{name}.py").write_text(
            f"def build(hyperparameters, shape, classes): ...\nSPACE = {{{name!r}: '1,2'}}\n"
        )
        with pytest.raises(InputError, match=f"names that are free, but '{name}' is not"):
            custom_model.load(f"takes_{name}:build")


EDITED = DENSE.replace("4,8", "5,9")  # of the same size


def loaded_units(config: StudyConfig) -> object:
    """The network that the model of `config` builds for the first of its units."""
    found = config.custom_model
    assert found is not None
    units = next(iter(found.space["units"].values))  # type: ignore[union-attr]
    return found.build({"units": units}, (3,), 2).layers[0].units


def test_an_edited_module_is_imported_again_even_where_its_bytecode_looks_current(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(in_folder)
    source = in_folder / "edited_soon.py"
    digests = []
    for units, text in ((4, DENSE), (5, EDITED), (4, DENSE)):
        source.write_text(text)
        os.utime(source, (1_700_000_000, 1_700_000_000))
        config = StudyConfig(model="edited_soon:build")
        assert loaded_units(config) == units
        assert config.custom_model is not None
        digests.append(config.custom_model.digest)
        assert digests[-1] == hashlib.sha256(text.encode()).hexdigest()
        importlib.import_module("edited_soon")  # as the user does, which leaves bytecode


def test_what_was_imported_before_an_edit_is_imported_again(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(in_folder)
    (in_folder / "imported_before.py").write_text(DENSE)
    importlib.import_module("imported_before")
    (in_folder / "imported_before.py").write_text(EDITED)
    assert loaded_units(StudyConfig(model="imported_before:build")) == 5


def test_settings_keep_the_model_that_they_were_created_with_and_refuse_to_run_another(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(in_folder)
    (in_folder / "edited_later.py").write_text(DENSE)
    config = StudyConfig(
        dataset=str(clouds), model="edited_later:build", report="none", baselines="none"
    )
    (in_folder / "edited_later.py").write_text(EDITED)
    assert loaded_units(config) == 4
    before = sorted(in_folder.iterdir())
    with pytest.raises(InputError, match="must be as it was when these settings were created"):
        run(config)
    assert sorted(in_folder.iterdir()) == before


@pytest.mark.slow
def test_an_edited_layer_trains_as_it_is_now(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(in_folder)
    losses = []
    trial = SimpleNamespace(params={"units": 4, "learning_rate": 0.001})
    for factor in ("1.0", "0.0", "1.0"):
        (in_folder / "with_layer.py").write_text(LAYERED.replace("FACTOR", factor))
        config = StudyConfig(dataset=str(clouds), model="with_layer:build", epochs=1)
        dataset = load_for_study(config, None)
        epochs: list[dict[str, float]] = []
        train_again(config, dataset, trial, {"params": {}}, 1, epochs)
        losses.append(epochs[0]["val_loss"])
    assert losses[0] == losses[2]
    assert losses[1] == pytest.approx(math.log(3))  # it sees zeros: every class is as likely


LAYERED = """
import keras

SPACE = {"units": "4"}


@keras.saving.register_keras_serializable()
class Times(keras.layers.Layer):
    def call(self, x):
        return x * FACTOR


def build(hyperparameters, shape, classes):
    last = keras.layers.Dense(classes, "softmax", use_bias=False)
    return keras.Sequential([keras.Input(shape), Times(), last])
"""
CONVOLUTION = """
import keras

SPACE = {"filters": "16"}


def build(hyperparameters, shape, classes):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Reshape((*shape, 1)),
            layers.Conv2D(hyperparameters["filters"], 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(classes, activation="softmax"),
        ]
    )
"""
TRAIN = """
import sys
from search import StudyConfig
from search.data.load import load_dataset
from search.training.train import use_one_thread_each
from search.workers.reproduce import train_again
from types import SimpleNamespace

config = StudyConfig(dataset="digits.npz", model=sys.argv[1], epochs=3)  # imports the module
use_one_thread_each(1)
history = []
params = {"filters": 16, "learning_rate": 0.01}  # so large a rate shows the last digits
dataset = load_dataset("digits.npz", config.validation_split)
train_again(config, dataset, SimpleNamespace(params=params), {"params": {}}, 1, history)
print([epoch["train_loss"] for epoch in history])
"""


@pytest.mark.slow
def test_a_module_that_starts_tensorflow_does_not_change_the_digits(folder: Path) -> None:
    (folder / "late.py").write_text(CONVOLUTION)
    (folder / "early.py").write_text(CONVOLUTION + "\n\nkeras.random.uniform((2, 2))\n")
    losses = [
        forks.Python(["-c", TRAIN, f"{module}:build"], cwd=folder).communicate(timeout=100)[0]
        for module in ("late", "early")
    ]
    assert losses[0] == losses[1] != ""


@pytest.mark.parametrize(
    ("declared", "values"),
    [
        ([1.0, 2.0], (1.0, 2.0)),
        (2.0, (2.0,)),
        ([1, 2.5], (1.0, 2.5)),
        ([1, 2], (1, 2)),
        ([10**13, 10**13 + 1], (10**13, 10**13 + 1)),
        (f"{10**13},{10**13 + 1}", (10**13, 10**13 + 1)),
        ([True, False], (True, False)),
        (["8", 16], (8, 16)),
    ],
)
def test_numbers_in_a_space_stay_what_they_are(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, declared: object, values: tuple[object, ...]
) -> None:
    monkeypatch.syspath_prepend(in_folder)
    (in_folder / "numbers_only.py").write_text(f"SPACE = {{'n': {declared!r}}}\nbuild = print\n")
    found = StudyConfig(model="numbers_only:build").space.parameters["n"].values  # type: ignore[union-attr]
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.slow
def test_a_network_of_logits_fails_its_trials_with_the_remedy(
    in_folder: Path, clouds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(in_folder)
    (in_folder / "of_logits.py").write_text(DENSE.replace(', "softmax"', ""))
    small = {
        "n_trials": 1,
        "epochs": 1,
        "workers": 1,
        "report": "none",
        "baselines": "none",
        "max_failures": 1,
    }
    with pytest.raises(RunError, match=r'end it with a softmax.*Dense\(3, activation="softmax"\)'):
        run(StudyConfig(dataset=str(clouds), model="of_logits:build", **small))


def test_a_network_that_does_not_fit_fails_its_trials_with_the_reason(folder: Path) -> None:
    source = (folder / "mine.py").read_text().replace("Dense(classes", "Dense(classes + 1")
    (folder / "mine.py").write_text(source)
    options = ("--model", "mine:build", *SMALL, "--workers", "1", "--max-failures", "2")
    code, _, err = command(folder, *options)
    assert code == 1
    assert "2 configurations in a row failed" in err
    assert "mine:build must return a model that gives a probability for each of 10 classes" in err
    found = invariants.check(folder, 1, registered=False)
    assert len(found["trials"]) == 3  # the first configuration was run twice
