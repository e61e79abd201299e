"""The metrics of the validation data, as Keras metrics that count in the graph, batch by batch."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from search.task import THRESHOLD, Task

_SPREAD = 4.0  # bins are narrowest for logits below 1 / 4
_RANGE = math.asinh(-90 * _SPREAD), math.asinh(17 * _SPREAD)  # where float32 tells them apart
_BINS, _MOST_CELLS = 4096, 2**22  # of a class; of all classes


def compiled_metric(task: Task) -> Any:
    """What an epoch is compiled with: the metric of both training and validation data."""
    if task.is_number:
        return AbsoluteError(task.deviation)
    return SubsetAccuracy() if task.labels else "accuracy"


def validation_metrics(task: Task) -> keras.metrics.Metric:
    """The other metrics of the task, in one."""
    if task.is_number:
        return OfNumbers(task.deviation)
    return OfLabels(task.outputs) if task.labels else OfClasses(task.outputs)


def measure(model: keras.Model, x: Any, y: Any, metrics: Sequence[keras.metrics.Metric]) -> Any:
    """What `model` gives for a batch; the mean loss and other `metrics` count it."""
    outputs = model(x, training=False)
    loss, *others = metrics
    loss.update_state(model.compute_loss(x, y, outputs, training=False), tf.shape(y)[0])
    for metric in others:
        metric.update_state(y, outputs)
    return outputs


def reset(metrics: Sequence[keras.metrics.Metric]) -> None:
    """Let all count from zero."""
    for metric in metrics:
        metric.reset_state()


def results(metrics: Sequence[keras.metrics.Metric]) -> dict[str, Any]:
    """All results by their names; a metric may have several."""
    found: dict[str, Any] = {}
    for metric in metrics:
        result = metric.result()
        found |= result if isinstance(result, dict) else {metric.name: result}
    return found


class OfClasses(keras.metrics.Metric):  # type: ignore[misc]
    """AUC, macro F1 and balanced accuracy of class probabilities, as scikit-learn defines them.

    auc: the area under the ROC curve of each class against all others, averaged over the classes
    that have both examples and others (macro, one-vs-rest; Hanley and McNeil 1982: the probability
    that an example of the class gets a higher probability for it than another example, ties
    counting half). Probabilities are counted in up to 4,096 bins by their logit, and those in one
    bin are ties, so it can differ from the exact area in the fourth decimal.
    f1: the mean F1 over the classes that occur as a label or are predicted.
    balanced_accuracy: the mean recall over the classes that occur as a label.
    """

    def __init__(self, classes: int, name: str = "of_classes") -> None:
        super().__init__(name=name)
        self._classes = classes
        self._bins = max(8, min(_BINS, _MOST_CELLS // classes))
        shapes = {
            "right": (classes,),
            "labelled": (classes,),
            "predicted": (classes,),
            "scores": (classes * self._bins,),
            "own_scores": (classes * self._bins,),
        }
        self._counts = {
            name: self.add_variable(shape, "zeros", name=name) for name, shape in shapes.items()
        }

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Count a batch: labels of shape (n,), probabilities of shape (n, classes)."""
        label, one = tf.cast(y_true, tf.int32), tf.ones(tf.shape(y_true)[0])
        predicted = tf.argmax(y_pred, axis=1, output_type=tf.int32)
        cell = self._cells(y_pred)
        own = tf.gather(cell, label, batch_dims=1)
        cells = self._classes * self._bins
        for name, values, index, size in (
            ("right", tf.cast(predicted == label, tf.float32), label, self._classes),
            ("labelled", one, label, self._classes),
            ("predicted", one, predicted, self._classes),
            ("scores", tf.ones(tf.size(cell)), tf.reshape(cell, [-1]), cells),
            ("own_scores", one, own, cells),
        ):
            self._counts[name].assign_add(tf.math.unsorted_segment_sum(values, index, size))

    def result(self) -> dict[str, Any]:
        """Each metric by its name; 0.5 and 0 where no class has what it takes."""
        counts = {name: tf.cast(kept.value, tf.float64) for name, kept in self._counts.items()}
        labelled, right = counts["labelled"], counts["right"]
        either = labelled + counts["predicted"]
        return {
            "auc": self._area(counts["scores"], counts["own_scores"]),
            "f1": _mean_where(either > 0, tf.math.divide_no_nan(2 * right, either)),
            "balanced_accuracy": _mean_where(labelled > 0, tf.math.divide_no_nan(right, labelled)),
        }

    def _cells(self, y_pred: Any) -> Any:
        """The bin of every probability, among those of all classes; of shape (n, classes)."""
        low, high = _RANGE
        logit = tf.math.log(y_pred) - tf.math.log1p(-y_pred)  # infinite at the ends
        share = (tf.clip_by_value(tf.asinh(_SPREAD * logit), low, high) - low) / (high - low)
        score = tf.cast(share * (self._bins - 1), tf.int32)
        return score + tf.range(self._classes) * self._bins

    def _area(self, scores: Any, own_scores: Any) -> Any:
        own = tf.reshape(own_scores, [self._classes, self._bins])
        other = tf.reshape(scores, [self._classes, self._bins]) - own
        below = tf.cumsum(other, axis=1, exclusive=True)
        pairs = tf.reduce_sum(own, axis=1) * tf.reduce_sum(other, axis=1)
        won = tf.reduce_sum(own * (below + other / 2), axis=1)
        area = _mean_where(pairs > 0, tf.math.divide_no_nan(won, pairs))
        return tf.where(tf.reduce_any(pairs > 0), area, 0.5)


def _mean_where(counted: Any, values: Any) -> Any:
    share = tf.cast(counted, values.dtype)
    return tf.cast(
        tf.math.divide_no_nan(tf.reduce_sum(values * share), tf.reduce_sum(share)), tf.float32
    )


class OfLabels(OfClasses):
    """AUC and macro F1 of the probabilities of labels, as scikit-learn defines them.

    auc: as of classes, over the labels that both occur and are missing. f1: the mean F1 of all
    labels, 0 for one that neither occurs nor is predicted.
    """

    def __init__(self, labels: int) -> None:
        super().__init__(labels, name="of_labels")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Count a batch: labels, 0 or 1, and probabilities, both of shape (n, labels)."""
        predicted = tf.cast(y_pred > THRESHOLD, tf.float32)
        flat, cells = tf.reshape(self._cells(y_pred), [-1]), self._classes * self._bins
        for name, counted in (
            ("right", tf.reduce_sum(predicted * y_true, axis=0)),
            ("labelled", tf.reduce_sum(y_true, axis=0)),
            ("predicted", tf.reduce_sum(predicted, axis=0)),
            ("scores", tf.math.unsorted_segment_sum(tf.ones(tf.size(flat)), flat, cells)),
            ("own_scores", tf.math.unsorted_segment_sum(tf.reshape(y_true, [-1]), flat, cells)),
        ):
            self._counts[name].assign_add(counted)

    def result(self) -> dict[str, Any]:
        """Each metric by its name; an AUC of 0.5 where no label has what it takes."""
        counts = {name: tf.cast(kept.value, tf.float64) for name, kept in self._counts.items()}
        either = counts["labelled"] + counts["predicted"]
        f1 = tf.reduce_mean(tf.math.divide_no_nan(2 * counts["right"], either))
        return {
            "auc": self._area(counts["scores"], counts["own_scores"]),
            "f1": tf.cast(f1, tf.float32),
        }


class SubsetAccuracy(keras.metrics.Mean):  # type: ignore[misc]
    """The share of the examples whose labels are all right, scikit-learn's accuracy of labels."""

    def __init__(self) -> None:
        super().__init__(name="accuracy")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Add a batch: labels, 0 or 1, and probabilities, both of shape (n, labels)."""
        right = tf.reduce_all((y_pred > THRESHOLD) == (y_true > THRESHOLD), axis=1)
        super().update_state(tf.cast(right, tf.float32), sample_weight=sample_weight)


class AbsoluteError(keras.metrics.Mean):  # type: ignore[misc]
    """The mean absolute error in the unit of the target, which has been divided by `deviation`."""

    def __init__(self, deviation: float) -> None:
        super().__init__(name="mae")
        self._deviation = deviation

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Add a batch: targets of shape (n,), predictions of shape (n, 1)."""
        error = tf.abs(tf.reshape(y_pred, [-1]) - y_true) * self._deviation
        super().update_state(error, sample_weight=sample_weight)


class OfNumbers(keras.metrics.Metric):  # type: ignore[misc]
    """The root mean squared error, in the unit of the target, and R2.

    r2: 1 - the squared error / the squared deviation of the targets from their mean; 0 where all
    targets are equal.
    """

    def __init__(self, deviation: float) -> None:
        super().__init__(name="of_numbers")
        self._deviation = deviation
        self._sums = self.add_variable((4,), "zeros", name="sums")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Add a batch: standardized targets of shape (n,), predictions of shape (n, 1)."""
        error = tf.reshape(y_pred, [-1]) - y_true
        terms = tf.stack([tf.ones_like(error), tf.square(error), y_true, tf.square(y_true)])
        self._sums.assign_add(tf.reduce_sum(terms, axis=1))

    def result(self) -> dict[str, Any]:
        """Each metric by its name."""
        count, squared, total, squares = tf.unstack(tf.cast(self._sums.value, tf.float64))
        spread = squares - tf.math.divide_no_nan(tf.square(total), count)
        mean = tf.math.divide_no_nan(squared, count)
        r2 = tf.where(spread > 0, 1 - tf.math.divide_no_nan(squared, spread), 0.0)
        return {
            "rmse": tf.cast(tf.sqrt(mean) * self._deviation, tf.float32),
            "r2": tf.cast(r2, tf.float32),
        }
