"""Search the hyperparameters of a Keras network and leave the best model in production.

    from search import StudyConfig, run

    result = run(StudyConfig(n_trials=50))
    print(result.best.value, result.winner.test_accuracy, result.winner.version)

Importing this package loads nothing heavy: `run` is looked up when it is first used.
"""

from typing import TYPE_CHECKING, Any

from search.config.settings import StudyConfig
from search.errors import InputError, Interrupted, RunError

if TYPE_CHECKING:
    from search.pipeline import run

__all__ = ["InputError", "Interrupted", "RunError", "StudyConfig", "run"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "run":
        from search.pipeline import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
