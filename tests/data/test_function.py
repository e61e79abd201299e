"""A dataset from the user's own function: what it may return, and what is refused in one line.

That a function of arrays is called once, whatever the workers, is in config/test_custom_model.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import command, mlflow_at
from in_process import command as command_here

from search import batches
from search.config.custom_model import ModelError
from search.config.settings import StudyConfig
from search.data import function
from search.data.dataset import Dataset
from search.data.function import Pipeline
from search.data.load import class_weights, load_dataset, load_for_study
from search.errors import InputError
from search.training.train import batches_of

ARRAYS = """
import numpy as np

x = np.arange(160, dtype="float32").reshape(40, 4)
y = np.arange(40) % 2
arrays = {"x_train": x[:30], "y_train": y[:30], "x_test": x[30:], "y_test": y[30:]}
"""
PIPELINES = (
    ARRAYS
    + """
import tensorflow as tf


def pipeline(first, last):
    return tf.data.Dataset.from_tensor_slices((x[first:last], y[first:last]))
"""
)


@pytest.fixture(autouse=True)
def _own_path(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own: no module of an earlier test's folder is found."""
    monkeypatch.syspath_prepend(in_folder)


def load(returned: str, source: str = ARRAYS, **settings: Any) -> Dataset:
    """The dataset of a function that returns this."""
    Path("mine.py").write_text(f"{source}\n\ndef load():\n    {returned}\n")
    return load_dataset("mine:load", 0.2, **{"split": "stratified", **settings})


def test_arrays_are_those_of_a_file_with_them(in_folder: Path) -> None:
    found = load("return arrays")
    space: dict[str, Any] = {}
    exec(ARRAYS, space)
    np.savez("mine.npz", **space["arrays"])
    of_file = load_dataset("mine.npz", 0.2, split="stratified")
    assert found.digest == of_file.digest
    np.testing.assert_array_equal(found.x_all, of_file.x_all)
    assert (found.split, found.task.class_names) == ("stratified", ())


def test_the_source_is_read_again(in_folder: Path) -> None:
    assert (
        load("return arrays").digest
        != load("return {**arrays, 'x_test': x[:3] + 1, 'y_test': y[:3]}").digest
    )


def test_a_validation_part_is_the_split(in_folder: Path) -> None:
    own = "return {**arrays, 'x_validation': x[5:9], 'y_validation': y[5:9], 'class_names': 'ab'}"
    own = own.replace("'ab'", "['no', 'yes']")
    found = load(own)
    assert (found.split, found.train_size, found.task.class_names) == ("own", 30, ("no", "yes"))
    np.testing.assert_array_equal(found.validation[0], found.x_all[5:9])
    assert "30 / 4 / 10 examples to train, validate, test (own split)" in str(found)
    assert found.digest != load("return arrays").digest
    with pytest.raises(InputError, match="--split last needs data without a validation part"):
        load(own)
        load_for_study(StudyConfig(dataset="mine:load", split="last"), None)
    again = load_for_study(StudyConfig(dataset="mine:load"), {"split": "own"})
    assert again.split == "own"


PARTS = "{'train': pipeline(0, 30), 'validation': pipeline(3, 8), 'test': pipeline(30, 40)}"


def piped(train: str, **settings: Any) -> Dataset:
    """The dataset of a function whose training part is this pipeline."""
    return load(f"return {{**{PARTS}, 'train': {train}}}", PIPELINES, **settings)


def pipeline_of(dataset: Dataset) -> Pipeline:
    assert dataset.pipeline is not None
    return dataset.pipeline


@pytest.mark.parametrize("batch", ["", ".batch(7)", ".batch(8).prefetch(2)", ".shuffle(9, seed=1)"])
def test_validation_and_test_are_read_into_arrays_in_their_order(
    in_folder: Path, batch: str
) -> None:
    test = f"'test': pipeline(30, 40){batch}"
    found = load(f"return {PARTS[:-1]}, {test}}}", source=PIPELINES)
    rows = found.x_test[:, 0]
    assert sorted(rows) == [120.0 + 4 * i for i in range(10)]
    assert (list(rows) == sorted(rows)) == ("shuffle" not in batch)
    np.testing.assert_array_equal(found.y_test, (rows / 4) % 2)


def test_a_pipeline_is_prepared_as_its_arrays_are(in_folder: Path) -> None:
    more = "'x_validation': x[3:8], 'y_validation': y[3:8]"
    arrays = load(f"return {{**arrays, {more}}}", normalize=True)
    found = load(f"return {PARTS}", source=PIPELINES, normalize=True)
    assert (found.split, found.train_examples, found.note) == (
        "own",
        30,
        "tf.data, trained batch by batch with Keras' fit",
    )
    assert str(found).replace(found.note, arrays.note) == str(arrays)
    np.testing.assert_array_equal(found.x_all, arrays.x_all)
    pipeline = pipeline_of(found)
    assert (pipeline.task, pipeline.counts, pipeline.batch_size) == (
        arrays.task,
        {0: 15, 1: 15},
        None,
    )
    assert pipeline.steps(8) == (4, 0)
    sent = found.for_workers()
    assert (len(sent.x_all), sent.train_examples) == (5, 30)
    np.testing.assert_array_equal(sent.validation[0], arrays.validation[0])
    np.testing.assert_array_equal(
        class_weights(StudyConfig(class_weight="balanced"), sent), [1.0, 1.0]
    )


def test_batches_are_the_pipelines_own_and_settings_of_the_study(in_folder: Path) -> None:
    found = piped("pipeline(0, 30).batch(8)")
    assert found.note.endswith("fit, in its own batches of 8")
    assert found.source == {"batch_size": 8}
    pipeline = pipeline_of(found)
    assert (pipeline.size(128), pipeline.steps(128)) == (8, (4, 0))
    with pytest.raises(InputError, match="--batch-size 4 needs data without batches"):
        load_for_study(StudyConfig(dataset="mine:load", batch_size="4"), None)


def test_the_digest_is_not_that_of_what_a_random_pipeline_holds(in_folder: Path) -> None:
    noise = "pipeline(0, 30).map(lambda x, y: (x + {} * tf.random.uniform([4]), y))"
    one, other = (piped(noise.format(i)) for i in (1, 2))
    assert not np.array_equal(one.x_all, other.x_all)
    assert one.digest == other.digest
    assert one.digest != load(f"return {PARTS[:-1]}, 'test': pipeline(9, 19)}}", PIPELINES).digest
    assert one.digest != piped("pipeline(0, 20)").digest


SPLIT = """whole = pipeline(0, 40){}
    parts = {{"train": whole.skip(20), "validation": whole.take(10)}}
    return {{**parts, "test": whole.take(20).skip(10)}}"""


def test_a_split_must_be_the_same_in_every_call(in_folder: Path) -> None:
    shuffled = ".shuffle(40, {}reshuffle_each_iteration={})"
    found = load(SPLIT.format(shuffled.format("seed=2, ", False)), PIPELINES)
    again = [x[0] for x, _ in pipeline_of(found).call().as_numpy_iterator()]
    np.testing.assert_array_equal(again, found.x_all[:20, 0])
    assert not set(again) & set(found.validation[0][:, 0])
    for seed, reshuffle in (("", False), ("seed=2, ", True)):
        with pytest.raises(InputError, match="validation must be the same in every call and epoch"):
            load(SPLIT.format(shuffled.format(seed, reshuffle)), PIPELINES)


def test_numpy_draws_by_the_seed_and_tensorflow_differently_in_every_epoch(in_folder: Path) -> None:
    noise = "pipeline(0, 30).map(lambda x, y: (x + tf.random.uniform([4]), y))"
    import tensorflow as tf

    tf.random.set_seed(3)  # as Keras' set_random_seed, with which each epoch would be the same
    found = pipeline_of(piped(noise)).call()
    one, other = (list(found.as_numpy_iterator()) for _ in range(2))
    assert not np.array_equal(one[0][0], other[0][0])
    drawn = "pipeline(0, 30).map(lambda x, y: (x + np.random.uniform(size=4), y))"
    found = piped(drawn, seed=3)
    for seed, same in ((3, True), (4, False)):
        again = list(replace(pipeline_of(found), seed=seed).call().as_numpy_iterator())
        assert np.array_equal([x for x, _ in again], found.train[0]) == same


def test_a_function_that_has_changed_since_the_run_began_is_refused(in_folder: Path) -> None:
    pipeline = pipeline_of(piped("pipeline(0, 30)"))
    pipeline.check()  # the same source, already loaded
    with pytest.raises(ModelError, match=r"--dataset must be as it was when the run began, mine"):
        replace(pipeline, digest="0" * 64).check()
    with pytest.raises(ModelError, match="No module named 'gone'"):
        replace(pipeline, name="gone:load").check()


def test_a_pipeline_larger_than_the_memory_is_trained_by_a_sample(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = 4 * 4 + 8
    monkeypatch.setattr(function, "free", lambda: 2 * (5 + 10 + 12) * row)  # validation and test
    found = load(f"return {PARTS}", PIPELINES)
    assert (len(found.train[1]), found.train_examples, len(found.validation[1])) == (12, 30, 5)
    assert str(found).endswith("in the sample of 12: 0; " + found.note)
    assert found.note.endswith("; scale and baselines by a sample of 12")
    assert load(f"return {PARTS}", PIPELINES).train[0].tolist() == found.train[0].tolist()
    rows = {row.tobytes() for row in load("return arrays").x_all}
    assert {row.tobytes() for row in found.train[0]} <= rows


LABELS = PIPELINES + "\n\ny = np.stack([np.arange(40) % 2, np.arange(40) % 3 > 0], axis=1)\n"


@pytest.mark.parametrize("batch", ["", ".batch(4)"])
def test_a_pipeline_of_labels_is_read_in_batches_or_not(in_folder: Path, batch: str) -> None:
    parts = {"train": "0, 30", "validation": "30, 35", "test": "35, 40"}
    listed = ", ".join(f"'{part}': pipeline({rows}){batch}" for part, rows in parts.items())
    found = load(f"return {{{listed}, 'class_names': ['odd', 'no multiple of 3']}}", LABELS)
    assert (found.task.kind, found.task.class_names[0]) == ("multilabel", "odd")
    assert (found.x_all.shape, found.y_all.shape) == ((35, 4), (35, 2))
    np.testing.assert_array_equal(found.y_test[:, 0], found.x_test[:, 0] / 4 % 2)
    read = list(batches_of(pipeline_of(found), 4, 0, 4).as_numpy_iterator())
    assert {(x.shape, y.shape, y.dtype.name) for x, y in read[:-1]} == {((4, 4), (4, 2), "float32")}
    np.testing.assert_array_equal(np.concatenate([y for _, y in read]), found.y_all[:30])


def test_a_name_for_each_label_is_needed(in_folder: Path) -> None:
    returned = "return {**arrays, 'y_train': y[:30], 'y_test': y[30:], 'class_names': ['odd']}"
    refused_as(returned, LABELS, "a name for each of 2 labels", "has 1", "give each")


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "rule", "found", "remedy"),
    [
        (
            "raise OSError('no\\nnet')",
            "must return its data",
            "it raised OSError: no net",
            "fix it",
        ),
        ("raise SystemExit(3)", "must return its data", "it raised SystemExit: 3", "fix it"),
        ("return None", "must return a dict", "a value of type NoneType", "return a dict of"),
        ("return x", "must return a dict", "a value of type ndarray", "return a dict of"),
        ("return {}", "must return x_train, y_train", "has no x_train", "return a dict of"),
        ("return {**arrays, 'x_val': x}", "must return x_train", "has 'x_val', too", "return a"),
        ("return {**arrays, 'x_validation': x}", "must return both", "one of them", "add it"),
        ("return {**arrays, 'class_names': 'ab'}", "a name for each of 2 classes", "has 1", "give"),
        ("return {**arrays, 'class_names': [1, 2]}", "list of texts", "got [1, 2]", "give each"),
        ("return {**arrays, 'class_names': ['a', 'a']}", "that differ", "['a', 'a']", "give each"),
        ("return {**arrays, 'x_test': [[1], [2, 3]]}", "must return arrays", "ValueError", "check"),
        ("return {**arrays, 'x_test': None}", "x_test must hold numbers", "object()", "convert"),
        ("return {**arrays, 'y_train': x[:30, 0]}", "whole numbers", "float32(30,)", "convert"),
        ("return {**arrays, 'x_test': x[30:, :2]}", "of one shape", "float32(2,)", "check how"),
    ],
)
def test_what_a_function_returns_is_checked(
    in_folder: Path, returned: str, rule: str, found: str, remedy: str
) -> None:
    refused_as(returned, ARRAYS, rule, found, remedy)


@pytest.mark.parametrize(
    ("returned", "rule", "found", "remedy"),
    [
        (f"return {{**{PARTS}, 'test': x}}", "test must be a tf.data.Dataset", "ndarray", "return"),
        ("return {'train': pipeline(0, 9)}", "must return train, val", "has no val", "return a"),
        (
            "return {'train': pipeline(0, 9), 'test': pipeline(0, 9)}",
            "must return validation beside train and test, since a tf.data.Dataset is not split",
            "has none",
            "return it, too, for example by .take() and .skip() before anything is shuffled",
        ),
        (
            f"return {{**{PARTS}, 'train': pipeline(0, 9).repeat()}}",
            "train must have an end",
            "it is infinite",
            "leave out .repeat()",
        ),
        (
            f"return {{**{PARTS}, 'train': pipeline(0, 9).repeat().filter(lambda x, y: True)}}",
            "train must have an end",
            "more than 1,000 examples and no end yet",
            "leave out .repeat()",
        ),
        (
            f"return {{**{PARTS}, 'train': pipeline(0, 9).batch(4).map(lambda x, y: (x, y[:2]))}}",
            "train must have a label for each example of a batch",
            "has 2 for 4",
            "check",
        ),
        (
            f"return {{**{PARTS}, 'train': pipeline(0, 9).map(lambda x, y: (x, y * 2))}}",
            "y_train must hold labels 0 to C-1",
            "has labels 0, 2",
            "number the classes",
        ),
        (
            f"return {{**{PARTS}, 'test': pipeline(0, 9).map(lambda x, y: x)}}",
            "test must be a tf.data.Dataset of (examples, labels)",
            "its elements are others",
            "map each",
        ),
        (f"return {{**{PARTS}, 'test': pipeline(9, 9)}}", "must have examples", "empty", "check"),
        (
            f"return {{**{PARTS}, 'test': pipeline(0, 9).map(lambda x, y: "
            "(tf.debugging.check_numerics(x / 0, 'zero'), y))}",
            "test must be a dataset that can be read",
            "it raised InvalidArgumentError: ",
            "fix it",
        ),
        (
            f"return {{**{PARTS}, 'test': pipeline(0, 9).map(lambda x, y: "
            "(tf.zeros([10**7, 10**6]), y))}",
            "test must fit into half of the free memory, ",
            "it needs 360000.0 GB",
            "take fewer or smaller examples",
        ),
    ],
    ids=lambda text: text[:20],
)
def test_pipelines_are_checked(
    in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    returned: str,
    rule: str,
    found: str,
    remedy: str,
) -> None:
    monkeypatch.setattr(batches, "MOST_EXAMPLES", 1000)
    refused_as(returned, PIPELINES, rule, found, remedy)


def refused_as(returned: str, source: str, rule: str, found: str, remedy: str) -> None:
    with pytest.raises(InputError) as refusal:
        load(returned, source)
    said = str(refusal.value)
    assert said.startswith("--dataset mine:load: ")
    assert "\n" not in said
    assert all(part in said for part in (rule, found, remedy)), said


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("nowhere:load", "ModuleNotFoundError: No module named 'nowhere'"),
        ("broken:load", "SyntaxError"),
        ("mine:other", "mine has no function other"),
    ],
)
def test_a_function_that_is_not_there_is_refused(in_folder: Path, name: str, found: str) -> None:
    Path("broken.py").write_text("def load(:")
    Path("mine.py").write_text("load = None")
    with pytest.raises(InputError, match=r"--dataset must name a ") as refusal:
        load_dataset(name, 0.1)
    assert found in str(refusal.value)


AUGMENTED = """
import numpy as np
import tensorflow as tf

y = np.arange(80) % 2
x = (np.random.default_rng(0).normal(size=(80, 4)) + 2 * y[:, None]).astype("float32")


def load():
    whole = tf.data.Dataset.from_tensor_slices((x, y))
    noise = tf.random.Generator.from_seed(1)
    train = whole.take(50).shuffle(50, seed=1)
    train = train.map(lambda x, y: (x + noise.normal([4]), y)).batch(8)
    return {"train": train, "validation": whole.skip(50).take(15), "test": whole.skip(65)}
"""


@pytest.mark.slow
def test_a_pipeline_is_searched_resumed_and_reproduced(in_folder: Path) -> None:
    Path("mine.py").write_text(AUGMENTED)
    options = (
        *(
            "--dataset",
            "mine:load",
            "--epochs",
            "2",
            "--hidden-units",
            "4",
            "--study-name",
            "own",
        ),
        *("--model-name", "Own", "--report", "none"),
    )
    code, out, err = command(in_folder, *options, "--n-trials", "2", "--workers", "2")
    assert (code, err) == (0, ""), out
    assert "50 / 15 / 15 examples to train, validate, test (own split); 4 features" in out
    assert "; tf.data, trained batch by batch with Keras' fit, in its own batches of 8\n" in out
    assert re.search(r"^baselines: majority class 0.5333, logistic regression ", out, re.MULTILINE)
    assert command_here(in_folder, "doctor", "--study-name", "own")[0] == 0
    code, out, err = command_here(in_folder, "reproduce", "--study-name", "own")
    assert (code, err) == (0, ""), out
    assert "the same to the last digit" in out
    Path("mine.py").write_text(AUGMENTED.replace("noise.normal([4])", "0.1 * noise.normal([4])"))
    code, out, err = command_here(in_folder, *options, "--n-trials", "3", "--workers", "1")
    assert (code, err) == (0, ""), out
    assert "own: 1 more trials of 2 epochs to run" in out
    with mlflow_at(in_folder) as client:
        version = client.get_model_version_by_alias("Own", "production")
        params = client.get_run(version.run_id).data.params
    assert [params[name] for name in ("batch_size", "train_samples", "split")] == ["8", "50", "own"]
    Path("mine.py").write_text(AUGMENTED.replace("batch(8)", "batch(5)"))
    code, _, err = command_here(in_folder, *options, "--n-trials", "4")
    assert code == 2
    assert "dataset: mine:load (" in err
    assert "; batch_size: 8 -> 5" in err
