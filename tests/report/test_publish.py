"""Where a report is written, and what both user interfaces say of a study."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import command

from search import pipeline
from search.config.settings import StudyConfig
from search.report import publish
from search.report.text import summary
from search.study import storage


def of_study(path: Path) -> str:
    """The study that a report names."""
    found = re.search('<meta name="search-study" content="([^"]*)"', path.read_text())
    assert found is not None
    return found[1]


@pytest.mark.slow
def test_each_of_two_studies_in_a_folder_has_its_report_where_its_last_line_says(
    in_folder: Path, clouds: Path
) -> None:
    small = {"n_trials": 1, "epochs": 1, "workers": 1, "hidden_units": "4"}

    def told(name: str) -> str:
        result = pipeline.run(StudyConfig(dataset=str(clouds), study_name=name, **small))
        lines = summary(result).splitlines()
        return lines[lines.index("See also:") + 1].strip()

    expected = {"first": "report.html", "second": "report-second.html"}
    for name in ("first", "second", "first", "second"):  # from the third on there is nothing to do
        assert told(name) == expected[name]
        for study in {"first", name}:
            assert of_study(in_folder / expected[study]) == study
    written = (in_folder / "report.html").stat().st_mtime_ns
    assert told("first") == "report.html"
    assert (in_folder / "report.html").stat().st_mtime_ns == written
    (in_folder / "report-second.html").unlink()
    assert told("second") == "report-second.html"
    assert of_study(in_folder / "report-second.html") == "second"
    config = StudyConfig(study_name="second")
    assert publish.write_report(config, "report.html") == Path("report-second.html")
    assert publish.write_report(config, "all.html") == Path("all.html")
    assert of_study(in_folder / "report.html") == "first"


@pytest.mark.slow
def test_a_rerun_replaces_the_report_of_a_namesake_in_another_database(
    in_folder: Path, clouds: Path
) -> None:
    small = {"n_trials": 1, "epochs": 1, "workers": 1, "hidden_units": "4"}
    for storage_url in ("sqlite:///study.db", "sqlite:///other.db"):
        pipeline.run(StudyConfig(dataset=str(clouds), storage=storage_url, **small))
    assert "mnist-dnn in sqlite:///other.db" in (in_folder / "report.html").read_text()
    pipeline.run(StudyConfig(dataset=str(clouds), **small))
    assert "mnist-dnn in sqlite:///study.db" in (in_folder / "report.html").read_text()


def test_a_report_of_before_reports_named_their_study_is_known_by_its_title(
    in_folder: Path,
) -> None:
    old = '<!doctype html>\n<html lang="en">\n<title>{}: hyperparameter search</title>'
    (in_folder / "report.html").write_text(old.format("mnist-dnn"))
    publish.check_report(StudyConfig(), "report.html")
    assert publish.report_path("report.html", "mnist-dnn") == Path("report.html")
    assert publish.report_path("report.html", "other") == Path("report-other.html")
    publish.check_report(StudyConfig(study_name="other"), str(in_folder / "report.html"))


@pytest.mark.slow
def test_it_is_an_artifact_of_the_parent_run_and_can_be_written_again(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    client, parent = finished["client"], finished["parent"].info.run_id
    logged = Path(client.download_artifacts(parent, "report.html", str(tmp_path)))
    written = (finished["folder"] / "report.html").read_text()
    assert logged.read_text() == written
    code, out, err = command(finished["folder"], "report", "--output", str(tmp_path / "again.html"))
    assert (code, out, err) == (0, f"wrote {tmp_path / 'again.html'}\n", "")
    again = (tmp_path / "again.html").read_text()
    assert len(again) == len(written)


@pytest.mark.slow
def test_the_descriptions_name_each_other_and_the_users_own_words_stay(
    in_folder: Path, clouds: Path
) -> None:
    from optuna_dashboard import get_note, save_note

    config = StudyConfig(
        dataset=str(clouds),
        epochs=2,
        n_trials=3,
        hidden_units="8",
        workers=1,
        report="none",
        baselines="none",
    )
    result = pipeline.run(config)
    study = storage.load_study(config)
    from search.tracking.runs import Tracking

    client = Tracking(config).open().client

    def description() -> str:
        return client.get_run(result.parent_run_id).data.tags["mlflow.note.content"]

    assert result.parent_run_id in get_note(study)
    assert "study mnist-dnn in sqlite:///study.db" in description()
    assert "is version 1 of MNIST_DNN_Model" in description()
    assert "is version 1 of MNIST_DNN_Model" in get_note(study)

    save_note(study, "my own words")
    pipeline.run(replace(config, n_trials=5))
    assert get_note(storage.load_study(config)) == "my own words"
    assert "5 trials complete" in description()
    client.set_tag(result.parent_run_id, "mlflow.note.content", "mine, too")
    pipeline.run(replace(config, n_trials=6))
    assert description() == "mine, too"
