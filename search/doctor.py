"""Say whether both ledgers agree, and make them, without running anything."""

from search import runner, storage, tracking
from search.config import StudyConfig
from search.imports import undisturbed
from search.reconcile import Ledgers, existing
from search.tracking import Tracking


@undisturbed()
def examine(config: StudyConfig, *, fix: bool) -> tuple[list[str], list[str]]:
    """What disagreed and was mended, and what disagrees still; without `fix` nothing is changed.

    Every trial, run, curve and stage is compared, which takes some milliseconds a trial. Raises
    InputError where there is no study, RunError where it is being run or a database fails.
    """
    try:
        study, config = existing(config)
        with runner.sole_runner(config):
            mirror = Tracking(config)
            if not fix and not (mirror.exists() and mirror.open().has_parent(study)):
                return [], ["the study has no parent run in MLflow"]
            ledgers = Ledgers(study, config)
            mended = ledgers.reconcile(at_rest=True) if fix else []
            return mended, [left.what for left in ledgers.disagreements(at_rest=True)]
    except (*storage.ERRORS, *tracking.ERRORS) as error:
        raise storage.failure(error) from error
