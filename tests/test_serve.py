"""The commands of docs/results.md serve the model in production, and answer what it predicts."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import requests
from conftest import ROOT
from servers import ask_model_server, model_server

PAGE = (ROOT / "docs" / "results.md").read_text()
SERVE, ASK = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def served(finished: dict[str, Any], tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The first block of the page, on a copy of the finished study and a free port."""
    folder = tmp_path / "study"
    shutil.copytree(finished["folder"], folder)
    with model_server(folder, SERVE) as port:
        yield folder, port


def ask(port: str, inputs: Any) -> tuple[int, Any]:
    body = json.dumps({"inputs": inputs})
    headers = {"Content-Type": "application/json"}
    answer = requests.post(
        f"http://127.0.0.1:{port}/invocations", body, headers=headers, timeout=60
    )
    return answer.status_code, answer.json()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_pages_commands_get_what_the_model_predicts(
    served: tuple[Path, str], finished: dict[str, Any]
) -> None:
    folder, port = served
    answered = np.array(json.loads(ask_model_server(folder, ASK, port))["predictions"], np.float32)
    (file,) = finished["folder"].rglob("model.keras")
    model = keras.saving.load_model(file)
    digits = np.array(json.loads((folder / "digits.json").read_text())["inputs"], np.float32)
    assert digits.shape == (2, 784)
    np.testing.assert_allclose(answered, model.predict(digits, verbose=0), rtol=1e-5, atol=1e-7)
    assert answered.argmax(axis=1).tolist() == [7, 2]

    for inputs, message in (
        ([[0.5, 0.5]], "does not match expected shape (-1, 784)"),
        ([["seven"] * 784], "could not convert string to float"),
    ):
        code, answer = ask(port, inputs)
        assert (code, message in answer["message"], message in PAGE) == (400, True, True)
    for value in (math.nan, None):
        code, answer = ask(port, [[value] + [0.5] * 783, [0.5] * 784])
        assert code == 200
        assert all(math.isnan(probability) for probability in answer["predictions"][0])
        assert sum(answer["predictions"][1]) == pytest.approx(1, abs=1e-3)
