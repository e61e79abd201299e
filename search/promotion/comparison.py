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
from search.promotion import bootstrap
from search.promotion.baselines import BestBaseline
from search.promotion.bootstrap import PairedBootstrap
from search.promotion.evaluation import outputs_of, right_of
from search.task import DEFAULT_OBJECTIVE, METRICS
from search.tracking.address import global_uri
from search.tracking.runs import Tracking

SIGNIFICANT = 0.05
SMALLEST_P = 1e-300  # stored and shown instead of smaller ones, which floats round to 0


@dataclass(frozen=True)
class Comparison:
    """Two models on the same test examples.

    challenger, champion: their accuracies. only_challenger, only_champion: how many examples only
    that model predicts right.
    """

    challenger: float
    champion: float
    only_challenger: int
    only_champion: int

    @property
    def p_value(self) -> float:
        """Of the two-sided exact McNemar test (McNemar 1947), at least 1e-300.

        Null hypothesis: an example that only one model predicts right is equally likely to be the
        challenger's or the champion's.
        """
        from scipy.stats import binomtest

        discordant = self.only_challenger + self.only_champion
        p_value = binomtest(self.only_challenger, discordant).pvalue if discordant else 1.0
        return max(float(p_value), SMALLEST_P)


def compare_versions(
    config: StudyConfig, dataset: Dataset, tracking: Tracking, challenger: int, champion: int
) -> Comparison | PairedBootstrap | str:
    """Compare two versions on the test examples; or return why the champion can't be compared.

    By the exact McNemar test where the objective is the accuracy, else by a paired bootstrap of the
    objective, seeded by the study's seed.
    """
    objective = dataset.task.objective(config.objective)
    by_accuracy = objective == DEFAULT_OBJECTIVE
    mine, theirs = (
        _answers(f"models:/{config.model_name}/{version}", dataset, tracking, by_accuracy)
        for version in (challenger, champion)
    )
    if isinstance(mine, str):
        raise RunError(
            f"version {challenger} of {config.model_name} was just registered, but {mine}; check "
            "its artifacts, and run the same command again"
        )
    if isinstance(theirs, str):
        return theirs
    if not by_accuracy:
        y = dataset.y_test
        return bootstrap.compare(dataset.task, objective, y, mine, theirs, config.seed)
    return _compare(mine, theirs)


def compare_with_baseline(
    model: Any, dataset: Dataset, outputs: NDArray[Any] | None, baseline: BestBaseline, seed: int
) -> dict[str, Any]:
    """Compare a Keras model with a baseline on the test examples, as two versions are compared.

    outputs: those of the model, if they fit into memory. seed: of the bootstrap. Returns what a
    study stores of it: the baseline's name, the metric and both values, the test, its p-value and
    whether it is significant; of McNemar's test, also how many examples only one of them predicts
    right.
    """
    examples, metric = len(dataset.y_test), METRICS[baseline.metric]
    found: Comparison | PairedBootstrap
    counts = {}
    if metric == DEFAULT_OBJECTIVE:
        found = _compare(right_of(model, dataset, outputs), baseline.correct(examples))
        counts = {"only_winner": found.only_challenger, "only_baseline": found.only_champion}
    else:
        assert outputs is not None  # there are few if those of the baseline were kept
        theirs = baseline.outputs(examples)
        found = bootstrap.compare(dataset.task, metric, dataset.y_test, outputs, theirs, seed)
    return {
        "baseline": baseline.name,
        "metric": f"test_{metric.stem}",
        "value": found.challenger,
        "baseline_value": found.champion,
        "test": "paired bootstrap" if isinstance(found, PairedBootstrap) else "exact McNemar",
        "p_value": found.p_value,
        "significant": found.p_value < SIGNIFICANT,
        **counts,
    }


def _compare(mine: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> Comparison:
    """The comparison of a challenger and a champion, by which examples they predict right."""
    return Comparison(
        challenger=float(mine.mean()),
        champion=float(theirs.mean()),
        only_challenger=int((mine & ~theirs).sum()),
        only_champion=int((theirs & ~mine).sum()),
    )


def _answers(
    uri: str, dataset: Dataset, tracking: Tracking, by_accuracy: bool
) -> NDArray[Any] | str:
    """Which test examples a model predicts right, or why it can't be evaluated.

    by_accuracy: if false, its outputs for them instead.
    """
    with tempfile.TemporaryDirectory() as folder:  # else MLflow writes into the model's folder
        try:
            with global_uri(tracking.uri):
                import mlflow.keras

                model: Any = mlflow.keras.load_model(uri, dst_path=folder)
            takes = [tuple(taken.shape) for taken in model.inputs]
            if (takes, model.output_shape) != (dataset.input_shapes, (None, dataset.task.outputs)):
                shown = ", ".join(map(str, takes))
                return (
                    f"it takes {shown} and returns {model.output_shape}, but this study's data "
                    f"have {_described(dataset)}"
                )
            if by_accuracy:
                return right_of(model, dataset)
            outputs = outputs_of(model, dataset)
            return "its outputs do not fit into memory" if outputs is None else outputs
        except MemoryError:
            raise
        except Exception as error:  # with a damaged file, Keras, zipfile and json raise anything
            if _is_server_error(error, tracking):
                raise
            if isinstance(error, KeyError) and error.args == ("keras",):
                return "it is not a Keras model"
            why = one_line(error).replace(f"{folder}/", "")
            return f"it can't be loaded ({type(error).__name__}: {why})"


def _is_server_error(error: Exception, tracking: Tracking) -> bool:
    """Whether the tracking server failed, which may recover, rather than the model."""
    if not tracking.uri.startswith("http"):
        return False
    if isinstance(error, MlflowException):
        return error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
    return isinstance(error, RequestException)


def _described(dataset: Dataset) -> str:
    """What a model of `dataset` takes and gives, in words."""
    examples = f"{dataset.features} features"
    if dataset.pixels:
        examples = f"images of {dataset.sample_shape}"
    return f"{examples} and {'one number to predict' if dataset.task.is_number else dataset.task}"
