"""Compare two versions of the registered model on the same test examples, in a worker."""

import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray
from requests import RequestException

from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.errors import RunError, one_line
from search.promotion.evaluation import predict
from search.tracking.address import global_uri
from search.tracking.runs import Tracking

SIGNIFICANT = 0.05
SMALLEST_P = 1e-300  # stored and shown instead of smaller ones, which floats round to 0


@dataclass(frozen=True)
class Comparison:
    """Two models on the same test examples.

    challenger, champion: their accuracies. only_challenger, only_champion: how many examples only
    that model classifies correctly.
    """

    challenger: float
    champion: float
    only_challenger: int
    only_champion: int

    @property
    def p_value(self) -> float:
        """Of the two-sided exact McNemar test (McNemar 1947), at least 1e-300.

        Null hypothesis: an example that only one model classifies correctly is equally likely to be
        the challenger's or the champion's.
        """
        from scipy.stats import binomtest

        discordant = self.only_challenger + self.only_champion
        p_value = binomtest(self.only_challenger, discordant).pvalue if discordant else 1.0
        return max(float(p_value), SMALLEST_P)


def compare_versions(
    config: StudyConfig, dataset: Dataset, tracking: Tracking, challenger: int, champion: int
) -> Comparison | str:
    """Compare two versions on the test examples; or return why the champion can't be compared."""
    mine, theirs = (
        _correct(f"models:/{config.model_name}/{version}", dataset, tracking)
        for version in (challenger, champion)
    )
    if isinstance(mine, str):
        raise RunError(
            f"version {challenger} of {config.model_name} was just registered, but {mine}; check "
            "its artifacts, and run the same command again"
        )
    if isinstance(theirs, str):
        return theirs
    return Comparison(
        challenger=float(mine.mean()),
        champion=float(theirs.mean()),
        only_challenger=int((mine & ~theirs).sum()),
        only_champion=int((theirs & ~mine).sum()),
    )


def _correct(uri: str, dataset: Dataset, tracking: Tracking) -> NDArray[np.bool_] | str:
    """Which test examples a model classifies correctly, or why it can't be evaluated."""
    with tempfile.TemporaryDirectory() as folder:  # else MLflow writes into the model's folder
        try:
            with global_uri(tracking.uri):
                import mlflow.keras

                model: Any = mlflow.keras.load_model(uri, dst_path=folder)
            shapes = model.input_shape, model.output_shape
            takes = dataset.raw_test.shape[1:]
            if shapes != ((None, *takes), (None, dataset.classes)):
                data = f"images of {takes}" if dataset.pixels else f"{dataset.features} features"
                return (
                    f"it takes {shapes[0]} and returns {shapes[1]}, but this study's data have "
                    f"{data} and {dataset.classes} classes"
                )
            predicted, _ = predict(model, dataset.raw_test)
        except MemoryError:
            raise
        except Exception as error:  # with a damaged file, Keras, zipfile and json raise anything
            if _is_server_error(error, tracking):
                raise
            if isinstance(error, KeyError) and error.args == ("keras",):
                return "it is not a Keras model"
            why = one_line(error).replace(f"{folder}/", "")
            return f"it can't be loaded ({type(error).__name__}: {why})"
    correct: NDArray[np.bool_] = predicted == dataset.y_test
    return correct


def _is_server_error(error: Exception, tracking: Tracking) -> bool:
    """Whether the tracking server failed, which may recover, rather than the model."""
    if not tracking.uri.startswith("http"):
        return False
    if isinstance(error, MlflowException):
        return error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
    return isinstance(error, RequestException)
