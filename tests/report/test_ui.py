"""Both user interfaces, in a real browser, on a real study."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from conftest import EPOCHS, TRIALS, start
from in_process import command

from search.task import KINDS


@pytest.fixture(scope="module")
def served(finished: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`study.py ui` and its two addresses; ends it by Ctrl-C."""
    process = start(finished["folder"], "ui")
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[2] == "Ctrl-C ends both.\n"
        dashboard = re.fullmatch(r"optuna-dashboard +(http://127\.0\.0\.1:\d+/\S+)\n", lines[0])
        mlflow = re.fullmatch(r"mlflow ui +(http://127\.0\.0\.1:\d+/\S+)\n", lines[1])
        assert dashboard is not None, lines
        assert mlflow is not None, lines
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        yield {"dashboard": dashboard[1], "mlflow": mlflow[1]}
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    assert not psutil.wait_procs(family, timeout=10)[1]
    for address in (dashboard[1], mlflow[1]):
        with pytest.raises(requests.ConnectionError):
            requests.get(address, timeout=5)


@pytest.fixture(scope="module")
def page(browser: Any) -> Iterator[Any]:
    """One for all: another address on a page of MLflow's does not load its megabytes again."""
    page = browser.new_page(viewport={"width": 1600, "height": 1400}, reduced_motion="reduce")
    yield page
    page.close()


@pytest.mark.slow
def test_mlflow_shows_the_parent_with_its_nested_trials(
    served: dict[str, Any], finished: dict[str, Any], page: Any
) -> None:
    page.goto(served["mlflow"])
    parent = page.get_by_role("link", name="mnist-dnn", exact=True)
    parent.wait_for()
    assert page.get_by_role("link", name="trial-0000").count() == 0
    page.get_by_role("gridcell").filter(has=parent).get_by_role("button").first.click()
    for number in range(TRIALS):
        page.get_by_role("link", name=f"trial-{number:04d}", exact=True).first.wait_for()


@pytest.mark.slow
def test_mlflow_shows_the_curves_of_a_trial(
    served: dict[str, Any], finished: dict[str, Any], page: Any
) -> None:
    run = finished["runs"][0].info
    page.goto(f"{served['mlflow'].removesuffix('/runs')}/runs/{run.run_id}/model-metrics")
    names = "train_loss", "train_accuracy", *KINDS["classification"].metrics
    for name in names:
        page.get_by_text(name, exact=True).first.wait_for()
    page.wait_for_function(
        "([length, plots]) => [...document.querySelectorAll('.js-plotly-plot')].filter("
        "plot => plot.data[0]?.y?.length === length).length === plots",
        arg=[EPOCHS, len(names)],
    )


@pytest.mark.slow
def test_mlflow_shows_the_summary_and_the_winners_pictures(
    served: dict[str, Any], finished: dict[str, Any], page: Any
) -> None:
    runs = served["mlflow"]
    page.goto(f"{runs}/{finished['parent'].info.run_id}")
    page.get_by_text("Study mnist-dnn searched").first.wait_for()
    page.goto(f"{runs}/{finished['winner'].info.run_id}/artifacts")
    for name in ("confusion_matrix.png", "mistakes.png"):
        page.get_by_text(name, exact=True).first.click()
        page.locator("img[src^='blob:'], img[src*='get-artifact']").first.wait_for()


@pytest.mark.slow
def test_optuna_dashboard_shows_the_study_its_trials_and_their_curves(
    served: dict[str, Any], finished: dict[str, Any], page: Any
) -> None:
    page.goto(served["dashboard"])
    page.wait_for_function(
        "lengths => JSON.stringify(document.querySelector('#graph-intermediate-values')?.data"
        "?.map(line => line.x.length).sort()) === JSON.stringify(lengths)",
        arg=sorted(len(trial.intermediate_values) for trial in finished["trials"]),
    )
    page.locator("a[href$='/trials']").first.click()
    page.get_by_text(f"{TRIALS} Trials").wait_for()
    for number in range(TRIALS):
        page.get_by_text(f"Trial {number}", exact=True).first.wait_for()
    page.locator("a[href$='/note']").first.click()
    page.get_by_text(finished["parent"].info.run_id).first.wait_for()


def test_a_database_without_the_studys_runs_is_refused(finished: dict[str, Any]) -> None:
    code, out, err = command(finished["folder"], "ui", "--tracking-uri", "sqlite:///other.db")
    assert (code, out) == (2, "")
    assert "sqlite:///other.db has no experiment MNIST_Classification" in err
    assert not (finished["folder"] / "other.db").exists()


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    code, out, err = command(tmp_path, "ui")
    assert (code, out) == (2, "")
    assert err.startswith("error: --study-name must be a study of this tool")
