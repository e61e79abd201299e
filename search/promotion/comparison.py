"""Compare two versions of the registered model on the same test examples."""

import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray
from requests import RequestException

from search.config.settings import StudyConfig
from search.data.dataset import Dataset, scaled
from search.errors import RunError, one_line
from search.promotion.evaluation import predict
from search.tracking.address import global_uri
from search.tracking.runs import Tracking

SIGNIFICANT = 0.05
SMALLEST_P = 1e-300  # stored and shown in place of smaller ones, which floats round to 0


# ---- the comparison, in a worker -----------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two models on the same test examples.

    challenger, champion: their accuracies. only_challenger, only_champion: how many examples one
    of them alone gets right.
    """

    challenger: float
    champion: float
    only_challenger: int
    only_champion: int

    @property
    def p_value(self) -> float:
        """Two-sided exact McNemar test (McNemar 1947): whether the difference may be chance.

        Under chance each of the examples that one of them alone gets right is a fair coin's throw.
        1e-300 stands for all that is smaller.
        """
        from scipy.stats import binomtest

        throws = self.only_challenger + self.only_champion
        p_value = float(binomtest(self.only_challenger, throws).pvalue) if throws else 1.0
        return max(p_value, SMALLEST_P)


def compare_versions(
    config: StudyConfig, dataset: Dataset, tracking: Tracking, challenger: int, champion: int
) -> Comparison | str:
    """Compare two versions on the test examples; or say why the champion can't be compared."""
    right = []
    for version in (challenger, champion):
        found = _right(f"models:/{config.model_name}/{version}", dataset, tracking)
        if isinstance(found, str) and version == champion:
            return found
        if isinstance(found, str):
            raise RunError(
                f"version {version} of {config.model_name} was just registered, but {found}; look "
                "at its artifacts, and run the same command again"
            )
        right.append(found)
    mine, theirs = right
    return Comparison(
        challenger=float(mine.mean()),
        champion=float(theirs.mean()),
        only_challenger=int((mine & ~theirs).sum()),
        only_champion=int((theirs & ~mine).sum()),
    )


def _right(uri: str, dataset: Dataset, tracking: Tracking) -> NDArray[np.bool_] | str:
    """Which test examples a model gets right, or why it can't be asked."""
    with tempfile.TemporaryDirectory() as folder:  # else MLflow writes where the model is
        try:
            with global_uri(tracking.uri):
                import mlflow.keras

                model: Any = mlflow.keras.load_model(uri, dst_path=folder)
            shapes = model.input_shape, model.output_shape
            if shapes != ((None, dataset.features), (None, dataset.classes)):
                return (
                    f"it takes {shapes[0]} and gives {shapes[1]}, where this study's data have "
                    f"{dataset.features} features and {dataset.classes} classes"
                )
            predicted, _ = predict(model, scaled(dataset.x_test))
        except MemoryError:
            raise
        except Exception as error:  # a damaged file makes Keras, zipfile and json raise anything
            if _is_of_server(error, tracking):
                raise
            if isinstance(error, KeyError) and error.args == ("keras",):
                return "it is not a Keras model"
            why = one_line(error).replace(f"{folder}/", "")
            return f"it can't be loaded ({type(error).__name__}: {why})"
    right: NDArray[np.bool_] = predicted == dataset.y_test
    return right


def _is_of_server(error: Exception, tracking: Tracking) -> bool:
    """Whether a server failed, which may answer later, and not the model."""
    if not tracking.uri.startswith("http"):
        return False
    if isinstance(error, MlflowException):
        return error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
    return isinstance(error, RequestException)
