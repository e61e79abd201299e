"""Load the data of a study: which source, split and preparation its settings ask for."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from search.config.data_settings import is_table, names_in
from search.config.options import flag
from search.config.settings import StudyConfig
from search.data.dataset import Dataset, count_repeated, load_dataset
from search.data.sources import is_own
from search.data.task import Metric, Task, objective_of
from search.errors import InputError, one_line

_STEPS, _MOST = 100, 20  # optimizer steps that a trial needs; the most epochs for that


def load_for_study(config: StudyConfig, stored: Mapping[str, Any] | None) -> Dataset:
    """The dataset, prepared as in the existing study unless the settings say otherwise.

    stored: the settings of that study, which may be older than these options; None for a new study.
    """
    own = is_own(config.dataset)
    split, normalize = ("stratified" if own else "last"), own
    if stored is not None:
        split, normalize = stored.get("split", "last"), "normalize" in stored
    split = config.split or split
    if is_table(config.dataset):
        return _load_table(config, split)
    _refuse_table_settings(config, split)
    return load_dataset(
        config.dataset,
        config.validation_split,
        split=split,
        seed=config.seed,
        normalize=normalize and config.normalize == "auto",
    )


def _refuse_table_settings(config: StudyConfig, split: str) -> None:
    """Raise InputError for a setting that only a table has."""
    names = ("target", "ignore", "numeric", "categorical", "test")
    given = [flag(name) for name in names if getattr(config, name) is not None]
    if given or ":" in split:
        raise InputError(
            f"{given[0] if given else f'--split {split}'} needs a table, a .csv or .parquet file",
            f"--dataset is {config.dataset}",
            "leave it out",
        )


def _load_table(config: StudyConfig, split: str) -> Dataset:
    """The dataset of a table, its columns adapted to the training part alone."""
    from search.data import columns, table  # import pandas

    kind, _, by = split.partition(":")
    given = table.read_table(config, by)
    part = table.divide(config, given, kind)
    frame = given.frame.drop(columns=by) if kind == "group" else given.frame
    try:
        numeric, categorical = names_in(config.numeric), names_in(config.categorical)
        adapted = columns.adapt(frame.iloc[part.train], numeric, categorical)
        rows = adapted.rows(frame)
        test = rows[part.test] if given.test is None else adapted.rows(given.test)
    except ValueError as error:
        raise InputError(f"--dataset {config.dataset}: {one_line(error)}") from None
    if not adapted.features:
        raise InputError(
            f"--dataset {config.dataset}: a table must have a column to learn from",
            f"all are left out: {adapted.reasons}",
            "name some in --numeric or --categorical",
        )
    x_all = adapted.encode(rows[np.concatenate([part.train, part.validation])])
    x_test = adapted.encode(test)
    return Dataset(
        name=config.dataset,
        digest=given.digest,
        x_all=x_all,
        y_all=np.concatenate([part.y[part.train], part.y[part.validation]]),
        x_test=x_test,
        y_test=part.y_test,
        train_size=len(part.train),
        classes=len(part.names),
        sample_shape=(adapted.features,),
        split=split,
        repeated=count_repeated(x_test, x_all),
        task=Task("classification", len(part.names), part.names),
        columns=adapted,
        test_rows=test,
        example=frame[adapted.sources].iloc[part.train[:2]],
    )


def choose_epochs(config: StudyConfig, dataset: Dataset, stored: Mapping[str, Any] | None) -> int:
    """The epochs of a trial: as in the settings, or else as in the existing study.

    With a thousand examples, 5 epochs are 40 steps, too few to tell trials apart. On scikit-learn's
    digits, 10 epochs gain 0.009 test accuracy (mean of four splits of 50 trials).
    """
    known = (stored or {}).get("epochs")
    if config.epochs is None and isinstance(known, int):
        return known
    if config.epochs is not None or not is_own(config.dataset):
        return config.trial_epochs
    steps = math.ceil(dataset.train_size / 128)
    return min(_MOST, max(config.trial_epochs, math.ceil(_STEPS / steps)))


def choose_objective(
    config: StudyConfig, dataset: Dataset, stored: Mapping[str, Any] | None
) -> Metric:
    """The objective: as in the settings, or else as in the existing study, or the task's default.

    Raises InputError if it is not a metric of the task.
    """
    known = None if stored is None else objective_of(stored).name
    return dataset.task.objective(
        known or "auto" if config.objective == "auto" else config.objective
    )
