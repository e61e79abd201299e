"""The report, in a real browser."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import TRIALS
from optuna.trial import TrialState, create_trial
from rich.console import Console

from search.config.settings import StudyConfig
from search.data.load import load_dataset
from search.report import overview
from search.report.html import draw_charts, write_html
from search.report.text import markdown, show
from search.study import sampling, storage
from search.tracking.schema import study_metadata

TITLES = [
    "History of the search",
    "Learning curves",
    "Which hyperparameters matter",
    "Each hyperparameter alone",
    "All hyperparameters together",
    "Timeline",
    "Confusion matrix of the winner",
    "Each class on the test examples",
    "The winner's worst mistakes",
    "All trials",
]


def opened(browser: Any, path: Path, **options: Any) -> Any:
    """The page, drawn to its end; fails on an error in it or a request to anywhere."""
    page = browser.new_page(**options)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: wrong.append(asked.url) if asked.url != path.as_uri() else 0)
    page.goto(path.as_uri())
    page.wait_for_function(
        "[...document.querySelectorAll('.chart')].every(chart => chart.querySelector('.main-svg'))"
    )
    assert not [line for line in wrong if not line.startswith("data:")]
    return page


def write(path: Path, study: optuna.Study, config: StudyConfig) -> None:
    """The report of `study`, without a winner."""
    found = overview.of(study, config)
    write_html(path, study, found, draw_charts(study, found), None)


@pytest.mark.slow
def test_every_chart_is_drawn_without_an_error_and_without_a_network(
    finished: dict[str, Any], browser: Any
) -> None:
    page = opened(browser, finished["folder"] / "report.html")
    assert page.locator("h2").all_inner_texts() == TITLES
    for chart in page.locator(".chart").all():
        box = chart.locator(".main-svg").first.bounding_box()
        assert box["width"] > 300
        assert box["height"] > 300
    curves = page.evaluate(
        "document.querySelectorAll('.chart')[1].data.map(t => [t.name, t.opacity, t.y.length])"
    )
    pruned = [t.number for t in finished["trials"] if t.state is TrialState.PRUNED]
    assert len(curves) == TRIALS
    assert {name for name, opacity, _ in curves if opacity < 1} == {
        f"trial {number}, pruned" for number in pruned
    }
    page.close()


@pytest.mark.slow
def test_it_reads_well_on_a_phone_in_the_dark_and_with_a_screen_reader(
    finished: dict[str, Any], browser: Any
) -> None:
    path = finished["folder"] / "report.html"
    page = opened(
        browser, path, viewport={"width": 360, "height": 740}, color_scheme="dark", is_mobile=True
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 24)"
    assert page.evaluate("document.querySelector('.chart')._fullLayout.paper_bgcolor") == "#111418"
    page.emulate_media(color_scheme="light")
    page.wait_for_function(
        "document.querySelector('.chart')._fullLayout.paper_bgcolor === '#ffffff'"
    )
    for chart in page.locator(".chart").all():
        assert chart.get_attribute("role") == "img"
        described = chart.get_attribute("aria-labelledby").split()
        assert all(page.locator(f"#{part}").inner_text() for part in described)
    assert "called" in page.locator("img").get_attribute("alt")
    page.close()


@pytest.mark.slow
def test_the_table_holds_every_trial_and_sorts(finished: dict[str, Any], browser: Any) -> None:
    page = opened(browser, finished["folder"] / "report.html")

    def column(index: int) -> list[str]:
        return page.locator(
            f"[aria-labelledby=trials] tbody td:nth-child({index})"
        ).all_inner_texts()

    assert column(1) == [str(number) for number in range(TRIALS)]
    assert set(column(9)) >= {run.info.run_id for run in finished["runs"].values()} - {""}
    accuracy = page.get_by_role("button", name="val_accuracy")
    accuracy.click()
    assert column(3) == sorted(column(3))
    accuracy.click()
    assert column(3) == sorted(column(3), reverse=True)
    assert page.locator("th[aria-sort=descending]").inner_text() == "val_accuracy"
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("finished_trials", [0, 1, 2])
def test_a_study_that_has_hardly_begun_has_a_report(
    in_folder: Path, browser: Any, finished_trials: int
) -> None:
    config = StudyConfig()
    study = storage.open_study(config, config.settings("mnist (0123456789ab)"))
    params = {"hidden_units": 512, "dropout_rate": 0.2, "learning_rate": 0.001}
    study.add_trial(
        create_trial(state=TrialState.FAIL, user_attrs={"failure": "<script>alert(1)</script>"})
    )
    for value in (0.5, 0.75)[:finished_trials]:
        study.add_trial(
            create_trial(
                params=params,
                distributions=dict(sampling.distributions(config.space)),
                value=value,
                intermediate_values={0: value},
                user_attrs={"history": [{"epoch": 0, "val_accuracy": value}]},
            )
        )
    path = in_folder / "report.html"
    write(path, study, config)
    page = opened(browser, path)
    assert page.locator("tbody tr").count() == finished_trials + 1
    assert page.get_by_text("<script>alert(1)</script>").count() == 1
    page.close()


def of_many_kinds(seeds: Iterable[int]) -> tuple[optuna.Study, StudyConfig]:
    """A study in the working directory whose trials tried different things."""
    config = StudyConfig(
        architecture="dense,cnn",
        filters="8,16",
        activation="relu,gelu",
        batch_normalization="false,true",
        augmentation="none,shift",
        augmentation_strength="0.5:1.5",
    )
    study = storage.open_study(config, config.settings("mnist (0123456789ab)"))
    dataset = load_dataset("mnist", 0.1)
    study.set_user_attr("facts", study_metadata(config, dataset))
    distributions = sampling.distributions(config.space)
    for number, seed in enumerate(seeds):
        proposal = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed)).ask()
        config.space.suggest(proposal)
        study.add_trial(
            create_trial(
                params=proposal.params,
                distributions={name: distributions[name] for name in proposal.params},
                value=0.5 + number / 100,
                intermediate_values={0: 0.5 + number / 100},
                user_attrs={"history": [{"epoch": 0, "val_accuracy": 0.5 + number / 100}]},
            )
        )
    return study, config


@pytest.mark.slow
def test_hyperparameters_that_no_trial_had_are_in_no_chart(in_folder: Path, browser: Any) -> None:
    study, config = of_many_kinds([5])
    assert not {"filters", "augmentation_strength"} & set(study.trials[0].params)
    write(in_folder / "report.html", study, config)
    page = opened(browser, in_folder / "report.html")
    assert "Each hyperparameter alone" in page.locator("h2").all_inner_texts()
    page.close()


@pytest.mark.slow
def test_a_study_whose_trials_tried_different_things_is_reported_and_shown(
    in_folder: Path, browser: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    study, config = of_many_kinds(range(12))
    found = overview.of(study, config)
    assert found.importances is not None
    of_some = {"filters", "conv_blocks", "augmentation_strength"}
    searched = set(sampling.distributions(config.space))
    assert set(found.importances.shares) == searched - of_some
    path = in_folder / "report.html"
    write(path, study, config)
    page = opened(browser, path)
    titles = page.locator("h2").all_inner_texts()
    assert {"Which hyperparameters matter", "All hyperparameters together"} <= set(titles)
    table = page.locator("table").inner_text()
    assert "filters" in table
    assert "gelu" in table
    page.close()
    show(Console(), found)
    shown = capsys.readouterr().out
    assert "architecture dense,cnn" in shown
    assert "gelu" in shown
    assert "| gelu |" in markdown(found, [])
