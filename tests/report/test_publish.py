"""Where a report is written, and what both user interfaces say of a study."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import copy_databases
from in_process import command

from search import pipeline
from search.config.settings import StudyConfig
from search.report import publish
from search.report.progress import Result
from search.report.text import summary
from search.study import storage

pytestmark = pytest.mark.usefixtures("no_pictures")


def of_study(path: Path) -> str:
    """The study that a report names."""
    found = re.search('<meta name="search-study" content="([^"]*)"', path.read_text())
    assert found is not None
    return found[1]


def small(clouds: Path, **changed: Any) -> StudyConfig:
    settings = {"n_trials": 1, "epochs": 1, "workers": 1, "hidden_units": "8", "baselines": "none"}
    return StudyConfig(dataset=str(clouds), study_name="first", **{**settings, **changed})


def told(result: Result) -> str:
    """Where the last lines of a run say that the report is."""
    lines = summary(result).splitlines()
    return lines[lines.index("See also:") + 1].strip()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, clouds: Path) -> tuple[Path, Result]:
    """A folder in which a study has ended, with its report."""
    folder = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, pipeline.run(small(clouds))


@pytest.fixture
def first(ended: tuple[Path, Result], in_folder: Path) -> Result:
    """The same, in this test's own folder; the artifacts stay where they are."""
    folder, result = ended
    copy_databases(folder, in_folder)
    shutil.copy2(folder / "report.html", in_folder)
    return result


@pytest.mark.slow
def test_each_of_two_studies_in_a_folder_has_its_report_where_its_last_line_says(
    first: Result, in_folder: Path, clouds: Path
) -> None:
    def of_run(name: str) -> str:
        return told(pipeline.run(replace(small(clouds), study_name=name)))

    expected = {"first": "report.html", "second": "report-second.html"}
    assert told(first) == expected["first"]
    assert of_study(in_folder / "report.html") == "first"
    written = (in_folder / "report.html").stat().st_mtime_ns
    for name in ("second", "first", "second"):  # from the second on there is nothing to do
        assert of_run(name) == expected[name]
        for study in expected:
            assert of_study(in_folder / expected[study]) == study
        assert (in_folder / "report.html").stat().st_mtime_ns == written
    (in_folder / "report-second.html").unlink()
    assert of_run("second") == "report-second.html"
    assert of_study(in_folder / "report-second.html") == "second"
    config = StudyConfig(study_name="second")
    assert publish.write_report(config, "report.html") == Path("report-second.html")
    assert publish.write_report(config, "all.html") == Path("all.html")
    assert of_study(in_folder / "report.html") == "first"


@pytest.mark.slow
def test_a_rerun_replaces_the_report_of_a_namesake_in_another_database(
    first: Result, in_folder: Path, clouds: Path
) -> None:
    pipeline.run(small(clouds, storage="sqlite:///other.db"))
    assert "first in sqlite:///other.db" in (in_folder / "report.html").read_text()
    pipeline.run(small(clouds))
    assert "first in sqlite:///study.db" in (in_folder / "report.html").read_text()


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
    finished: dict[str, Any],
    tmp_path: Path,
) -> None:
    client, parent = finished["client"], finished["parent"].info.run_id
    logged = Path(client.download_artifacts(parent, "report.html", str(tmp_path)))
    written = (finished["folder"] / "report.html").read_text()
    assert logged.read_text() == written
    again = tmp_path / "again.html"
    told = command(finished["folder"], "report", "--output", str(again))
    assert told == (0, f"wrote {again}\n", "")
    assert len(again.read_text()) == len(written)


@pytest.mark.slow
def test_the_descriptions_name_each_other_and_the_users_own_words_stay(
    first: Result, clouds: Path
) -> None:
    from optuna_dashboard import get_note, save_note

    from search.tracking.runs import Tracking

    config = small(clouds, report="none")
    study = storage.load_study(config)
    client = Tracking(config).open().client

    def description() -> str:
        return client.get_run(first.parent_run_id).data.tags["mlflow.note.content"]

    assert first.parent_run_id in get_note(study)
    assert "study first in sqlite:///study.db" in description()
    assert "is version 1 of MNIST_DNN_Model" in description()
    assert "is version 1 of MNIST_DNN_Model" in get_note(study)

    save_note(study, "my own words")
    pipeline.run(replace(config, n_trials=2))
    assert get_note(storage.load_study(config)) == "my own words"
    assert "2 trials complete" in description()
    client.set_tag(first.parent_run_id, "mlflow.note.content", "mine, too")
    pipeline.run(replace(config, n_trials=3))
    assert description() == "mine, too"
