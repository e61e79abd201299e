"""A study of a folder of images: as of its arrays, with class names, and served."""

import contextlib
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
from conftest import ROOT, mlflow_at
from in_process import command
from PIL import Image
from servers import ask_model_server, model_server

from search import StudyConfig
from search.data.dataset import Dataset
from search.data.load import load_dataset, load_for_study
from search.report import publish
from search.workers.reproduce import train_again

PAGE = (ROOT / "docs" / "your-data.md").read_text().split("## A folder of images")[1]
COMMAND = shlex.split(re.findall(r"^    python study.py (.*)$", PAGE, re.MULTILINE)[0])
EXAMPLE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
SERVE, ASK = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)[:2]
NAMES = "cat", "dog & fox"
SMALL = (
    *("--n-trials", "2", "--epochs", "2", "--hidden-units", "8", "--workers", "1"),
    *("--learning-rate", "0.01"),
)
pytestmark = pytest.mark.slow


def write(root: Path, x: Any, y: Any, names: Any) -> None:
    for number, (pixels, label) in enumerate(zip(x, y, strict=True)):
        path = root / str(names[label]) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def history(dataset: Dataset) -> list[dict[str, float]]:
    """The epochs of one and the same trial, but for their times."""
    config = StudyConfig(epochs=2, batch_size=32)
    params = {"hidden_units": 8, "dropout_rate": 0.2, "learning_rate": 0.01}
    epochs: list[dict[str, float]] = []
    trial = SimpleNamespace(params=params)
    train_again(config, dataset, trial, {"params": {"batch_size": 32}}, 1, epochs)
    return [{name: epoch[name] for name in epoch if name != "time_ms"} for epoch in epochs]


def test_digits_as_a_folder_train_to_the_same_digits_as_their_arrays(
    tmp_path: Path, digits: Path
) -> None:
    with np.load(digits) as archive:
        found = dict(archive)
    ordered = {}
    for part in ("train", "test"):
        x, y = found[f"x_{part}"][:200], found[f"y_{part}"][:200]
        write(tmp_path / "digits" / part, x, y, range(10))
        order = np.argsort(y, kind="stable")
        ordered |= {f"x_{part}": x[order], f"y_{part}": y[order].astype(np.int64)}
    np.savez(tmp_path / "digits.npz", **ordered)
    folders, arrays = (
        load_for_study(StudyConfig(dataset=str(tmp_path / name)), None)
        for name in ("digits", "digits.npz")
    )
    assert (folders.digest, folders.split) == (arrays.digest, arrays.split)
    for one, other in zip(folders.training, arrays.training, strict=True):
        np.testing.assert_array_equal(one, other)
    results = history(folders)
    assert results == history(arrays)
    assert len(results) == 2


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's command ran on images of two colours."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = random.integers(0, 100, (60, 6, 6, 3)).astype(np.uint8)
    x[y == 1, :, :, 0] += 150
    write(folder / "photos", x, y, NAMES)
    code, out, err = command(folder, *COMMAND, *SMALL)
    assert (code, err) == (0, "")
    assert "photos/: 43 / 5 / 12 examples to train, validate, test (stratified split)" in out
    return folder


def test_the_report_and_the_model_have_the_names_of_the_classes(photos: Path) -> None:
    page = (photos / "report.html").read_text()
    assert re.search(r'"cat","dog (&|\\\\u0026) fox"', page)
    with mlflow_at(photos) as client:
        version = client.get_model_version_by_alias("Photos", "production")
        info = mlflow.models.get_model_info("models:/Photos@production")
        assert info.metadata["class_names"] == list(NAMES)
        shape = info.signature.inputs.to_dict()[0]["tensor-spec"]
        assert shape == {"dtype": "float32", "shape": (-1, 6, 6, 3)}
        params = client.get_run(version.run_id).data.params
        assert (params["image_size"], params["test_split"]) == ("6", "0.2")
        path = client.download_artifacts(version.run_id, "evaluation.json")
    found = publish.load_evaluation(Path(path).read_text())
    assert found.class_names == NAMES


def test_the_study_is_resumed_and_reproduced(photos: Path) -> None:
    code, out, err = command(photos, *COMMAND, *SMALL)
    assert (code, err) == (0, "")
    assert "2 finished trials" in out
    code, out, err = command(photos, "reproduce", "--study-name", "photos")
    assert (code, err) == (0, ""), out
    code, out, err = command(photos, *COMMAND, "--image-size", "5", *SMALL)
    assert code == 2
    assert "image_size: 6 -> 5" in err


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_served_model_takes_pixels_and_answers_as_it_was_tested(photos: Path) -> None:
    dataset = load_dataset(str(photos / "photos"), 0.1, split="stratified")
    with mlflow_at(photos) as client:
        version = client.get_model_version_by_alias("Photos", "production")
        tested = client.get_run(version.run_id).data.metrics["test_accuracy"]
        model = mlflow.keras.load_model("models:/Photos@production")
    probabilities = model.predict(dataset.test_inputs(), verbose=0)  # uint8, as read
    assert (probabilities.argmax(axis=1) == dataset.y_test).mean() == pytest.approx(tested)
    (photos / "photos/cat/0001.png").symlink_to("0000.png")  # an example's name on the page
    example = EXAMPLE.replace("(64, 64)", "(6, 6)")
    with contextlib.chdir(photos):
        exec(example, {})
    with model_server(photos, SERVE) as port:
        answered = ask_model_server(photos, ASK, port)
    (answer,) = json.loads(answered)["predictions"]
    expected = model.predict(np.array(Image.open(photos / "photos/cat/0000.png"))[None], verbose=0)
    assert answer.pop("prediction") == NAMES[expected[0].argmax()]
    assert list(answer) == [f"probability_{name}" for name in NAMES]
    np.testing.assert_allclose(list(answer.values()), expected[0], rtol=1e-5, atol=1e-6)
    (photos / "photos/cat/0001.png").unlink()
