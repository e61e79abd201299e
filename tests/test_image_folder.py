"""The real command on a folder of images: as on its arrays, with class names, and served."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import pytest
import requests
from conftest import command, mlflow_at
from PIL import Image
from servers import free_port, wait_for
from test_serve import SHELL

from search.data.load import load_dataset
from search.report import publish

SMALL = (
    *("--n-trials", "2", "--epochs", "2", "--hidden-units", "8,16", "--workers", "1"),
    *("--learning-rate", "0.01", "--study-name", "own", "--model-name", "Own"),
)
pytestmark = pytest.mark.slow


def write(root: Path, x: Any, y: Any, names: Any) -> None:
    for number, (pixels, label) in enumerate(zip(x, y, strict=True)):
        path = root / str(names[label]) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def histories(folder: Path) -> list[Any]:
    study = optuna.load_study(study_name="own", storage=f"sqlite:///{folder / 'study.db'}")
    kept = [dict(trial.user_attrs["history"][-1]) for trial in study.trials]
    return [
        (trial.params, {name: entry[name] for name in entry if name != "time_ms"})
        for trial, entry in zip(study.trials, kept, strict=True)
    ]


def test_digits_as_a_folder_train_to_the_same_digits_as_their_arrays(
    tmp_path: Path, digits: Path
) -> None:
    with np.load(digits) as archive:
        found = dict(archive)
    ordered = {}
    for part in ("train", "test"):
        x, y = found[f"x_{part}"][:400], found[f"y_{part}"][:400]
        write(tmp_path / "digits" / part, x, y, range(10))
        order = np.argsort(y, kind="stable")
        ordered |= {f"x_{part}": x[order], f"y_{part}": y[order].astype(np.int64)}
    np.savez(tmp_path / "digits.npz", **ordered)
    results = {}
    for name in ("digits", "digits.npz"):
        folder = tmp_path / f"of-{name}"
        folder.mkdir()
        code, out, err = command(folder, "--dataset", f"../{name}", *SMALL)
        assert (code, err) == (0, ""), out
        results[name] = histories(folder)
    assert results["digits"] == results["digits.npz"]
    assert len(results["digits"]) == 2
    folders, arrays = (load_dataset(str(tmp_path / name), 0.1) for name in results)
    assert folders.digest == arrays.digest


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the command ran on images of two colours."""
    folder = tmp_path_factory.mktemp("shapes")
    random = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = random.integers(0, 100, (60, 6, 6, 3)).astype(np.uint8)
    x[y == 1, :, :, 0] += 150
    write(folder / "pictures", x, y, ("blue & green", "red"))
    code, out, err = command(folder, "--dataset", "pictures/", *SMALL)
    assert (code, err) == (0, "")
    assert "pictures/: 43 / 5 / 12 examples to train, validate, test (stratified split)" in out
    return folder


def test_the_report_and_the_model_have_the_names_of_the_classes(shapes: Path) -> None:
    page = (shapes / "report.html").read_text()
    assert '"blue \\u0026 green","red"' in page or '"blue & green","red"' in page
    with mlflow_at(shapes) as client:
        version = client.get_model_version_by_alias("Own", "production")
        info = mlflow.models.get_model_info("models:/Own@production")
        assert info.metadata["class_names"] == ["blue & green", "red"]
        shape = info.signature.inputs.to_dict()[0]["tensor-spec"]
        assert shape == {"dtype": "float32", "shape": (-1, 6, 6, 3)}
        params = client.get_run(version.run_id).data.params
        assert (params["image_size"], params["test_split"]) == ("6", "0.2")
        path = client.download_artifacts(version.run_id, "evaluation.json")
    found = publish.load_evaluation(Path(path).read_text())
    assert found.class_names == ("blue & green", "red")


def test_the_study_is_resumed_and_reproduced(shapes: Path) -> None:
    code, out, err = command(shapes, "--dataset", "pictures/", *SMALL)
    assert (code, err) == (0, "")
    assert "2 finished trials" in out
    code, out, err = command(shapes, "reproduce", "--study-name", "own")
    assert (code, err) == (0, ""), out
    code, out, err = command(shapes, "--dataset", "pictures/", "--image-size", "5", *SMALL)
    assert code == 2
    assert "image_size: 6 -> 5" in err


def test_the_served_model_takes_pixels_and_answers_as_it_was_tested(shapes: Path) -> None:
    dataset = load_dataset(str(shapes / "pictures"), 0.1, split="stratified")
    with mlflow_at(shapes) as client:
        version = client.get_model_version_by_alias("Own", "production")
        tested = client.get_run(version.run_id).data.metrics["test_accuracy"]
        model = mlflow.keras.load_model("models:/Own@production")
    probabilities = model.predict(dataset.test_inputs(), verbose=0)  # uint8, as read
    assert (probabilities.argmax(axis=1) == dataset.y_test).mean() == pytest.approx(tested)
    port = free_port()
    with (shapes / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *("mlflow", "models", "serve", "-m", "models:/Own@production", "-p", str(port)),
                *("--env-manager", "local", "--workers", "1"),
            ],
            cwd=shapes,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**SHELL, "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"},
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/ping", process, shapes / "server.log")
        body = json.dumps({"inputs": dataset.test_inputs().tolist()})
        headers = {"Content-Type": "application/json"}
        answer = requests.post(f"{address}/invocations", body, headers=headers, timeout=60)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert answer.status_code == 200, answer.text
    np.testing.assert_allclose(answer.json()["predictions"], probabilities, rtol=1e-5, atol=1e-6)
