"""An experiment that can't take runs is refused before anything changes."""

from pathlib import Path

import pytest
from conftest import as_nobody, of_root

from search import InputError, StudyConfig, run
from search.tracking.address import check_experiment
from search.tracking.runs import Tracking


def files(folder: Path) -> dict[str, bytes]:
    """Every file's content, but of those in which SQLite's readers write."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in found if not path.name.endswith("-shm")}


def test_an_experiment_in_the_trash_is_refused_before_anything_is_created_or_changed(
    in_folder: Path, clouds: Path
) -> None:
    tracking = Tracking(StudyConfig()).open()
    tracking.client.delete_experiment(tracking.experiment_id)
    before = files(in_folder)
    with pytest.raises(InputError, match="must not be deleted, but it is in the trash of sqlite"):
        run(StudyConfig(dataset=str(clouds)))
    assert files(in_folder) == before


@of_root
def test_an_experiment_whose_folder_is_another_users_is_refused(temporary: Path) -> None:
    tracking = Tracking(StudyConfig()).open()
    tracking.disconnect()
    (temporary / "mlflow.db").chmod(0o666)
    temporary.chmod(0o777)
    folder = temporary / "mlruns" / "MNIST_Classification"
    folder.mkdir(parents=True)
    check_experiment(StudyConfig())

    def be_refused() -> None:
        with pytest.raises(InputError, match="must have a folder that can be written to"):
            check_experiment(StudyConfig())

    as_nobody(be_refused)
    folder.chmod(0o777)
    as_nobody(lambda: check_experiment(StudyConfig()))
