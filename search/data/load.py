"""Load the data of a study: which source, split and preparation its settings ask for."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.config.data_settings import is_table, names_in
from search.config.hyperparameters import HYPERPARAMETERS
from search.config.options import flag
from search.config.settings import StudyConfig
from search.data import function, images, sources
from search.data.dataset import OWN_SPLIT, Dataset, count_repeated, is_image
from search.data.preparation import Normalization, fit, held_out, kept, scaled
from search.data.sources import Arrays, Source, is_own
from search.errors import InputError, one_line
from search.memory import chunks, moved, partition
from search.task import KINDS, Task, describe


def load_for_study(config: StudyConfig, stored: Mapping[str, Any] | None) -> Dataset:
    """The dataset, prepared as in the existing study unless the settings say otherwise.

    stored: the settings of that study, which may be older than these options; None for a new study.
    """
    own = is_own(config.dataset)
    split, normalize, task = ("stratified" if own else "last"), own, config.task
    if stored is not None:
        split, normalize = stored.get("split", "last"), "normalize" in stored
        task = stored.get("task", "classification") if task == "auto" else task
    split = config.split or split
    if is_table(config.dataset):
        dataset = _load_table(config, split, task)
        _check_task(config, dataset)
        return dataset
    _refuse_table_settings(config, split)
    dataset = load_dataset(
        config.dataset,
        config.validation_split,
        split=split,
        seed=config.seed,
        normalize=normalize and config.normalize == "auto",
        image_size=config.image_size or (stored or {}).get("image_size"),
        test_split=config.test_split,
        task=task,
    )
    _check_task(config, dataset)
    if config.split is not None and dataset.split == OWN_SPLIT:
        raise InputError(
            f"--split {config.split} needs data without a validation part",
            f"{config.dataset} has one",
            "leave it out",
        )
    size = str(config.space.parameters["batch_size"])
    if "batch_size" in dataset.source and size != HYPERPARAMETERS["batch_size"].space:
        rule = f"--batch-size {size} needs data without batches of their own"
        found = f"train of {config.dataset} has batches of {dataset.source['batch_size']:,}"
        raise InputError(rule, found, "leave it out, or return train without .batch()")
    return dataset


def _check_task(config: StudyConfig, dataset: Dataset) -> None:
    """Raise InputError for options that make no sense in the task of `dataset`."""
    smooths = str(config.space.parameters["label_smoothing"]) != "0"
    for option, used, remedy in (
        ("--split stratified", config.split == "stratified", "give --split random or last"),
        ("--label-smoothing", smooths, "leave it out"),
        ("--class-weight balanced", config.class_weight == "balanced", "leave it out"),
    ):
        if used and not dataset.task.classes:
            found = f"the task of {dataset.name} is {dataset.task.kind}"
            raise InputError(f"{option} needs classes", found, remedy)


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


def _load_table(config: StudyConfig, split: str, task: str) -> Dataset:
    """The dataset of a table, its columns adapted to the training part alone."""
    from search.data import columns, table  # import pandas

    by = split.partition(":")[2]
    given = table.read_table(config, by)
    kind = columns.kind_of(given.target, task)
    split = split if KINDS[kind].has_classes or split != "stratified" else "random"
    part = table.divide(config, given, split, kind)
    frame = given.frame.drop(columns=by) if split.startswith("group:") else given.frame
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
    order = np.concatenate([part.train, part.validation])
    x_all, x_test = moved(adapted.encode(rows[order])), moved(adapted.encode(test))
    described, y_all = describe(kind, part.y[order], len(part.train), part.names)
    return Dataset(
        name=config.dataset,
        digest=given.digest,
        x_all=x_all,
        y_all=y_all,
        x_test=x_test,
        y_test=part.y_test,
        train_size=len(part.train),
        sample_shape=(adapted.features,),
        split=split,
        repeated=count_repeated(x_test, x_all),
        source=config.table,
        task=described,
        columns=adapted,
        test_rows=test,
        example=frame[adapted.sources].iloc[part.train[:2]],
    )


# ---- arrays -----------------------------------------------------------------------------------


def load_dataset(
    name: str,
    validation_split: float,
    *,
    split: str = "last",
    seed: int = 0,
    normalize: bool = False,
    image_size: int | None = None,
    test_split: float = 0.2,
    task: str = "auto",
) -> Dataset:
    """The dataset `name`: mnist, one of Keras', the path of an .npz file or a folder of images.

    validation_split: fraction of the training data used for validation: with `split` "last" its
    end, as in Keras; with "random" a random sample, by `seed`; with "stratified" one with the same
    class proportions, or without classes any.
    normalize: scale every feature, unless examples are images, to mean 0 and variance 1 in the
    training part. image_size, test_split: of a folder, see `images.read`. task: its kind, or auto.
    Raises InputError, in one line, if it cannot be used.
    """
    source, pipeline = _read(name, image_size, test_split, seed, task)
    arrays = source.arrays
    kind = sources.kind_of(arrays["y_train"], task)
    decided = KINDS[kind]
    sources.check(name, arrays, kind)
    digest = _digest(arrays, pipeline)
    shape = arrays["x_train"].shape[1:]
    x_all, x_test = (sources.examples(name, arrays, part) for part in ("train", "test"))
    y_all, y_test = (sources.targets(arrays, part, decided) for part in ("train", "test"))
    repeated = count_repeated(x_test, x_all)
    train_size = len(arrays["x_train"])
    if "x_validation" in arrays:
        split = OWN_SPLIT
    else:
        train_size = kept("--validation-split", validation_split, train_size, "validate")
        if split == "stratified" and not decided.has_classes:
            split = "random"
        if split != "last":
            validates = held_out(split, y_all, len(x_all) - train_size, seed)
            train_size = _to_the_end(validates, x_all, y_all)
    normalization = None
    if normalize and x_all.dtype != np.uint8 and not is_image(shape):
        normalization = _normalize(name, x_all, train_size)
    described, y_all = describe(kind, y_all, train_size, source.class_names)
    _check_class_names(name, source.class_names, described)
    if pipeline is not None:
        pipeline = replace(pipeline, task=described, normalization=normalization)
    return Dataset(
        name=name,
        digest=digest,
        x_all=x_all,
        y_all=y_all,
        x_test=x_test,
        y_test=y_test,
        train_size=train_size,
        sample_shape=shape,
        split=split,
        normalization=normalization,
        repeated=repeated,
        pixels=source.pixels,
        source=source.settings,
        note=source.note,
        task=described,
        pipeline=pipeline,
    )


def _to_the_end(validates: NDArray[np.bool_], *arrays: NDArray[Any]) -> int:
    """Move the examples that validate to the end of the arrays; returns how many train."""
    for array in arrays:
        partition(array, validates)
    return int((~validates).sum())


def _normalize(name: str, x: NDArray[Any], train_size: int) -> Normalization:
    """Normalize `x` in place, by what its first `train_size` examples have."""
    normalization = fit(name, scaled(x[:train_size]))
    for rows in chunks(x):
        x[rows] = normalization.apply(scaled(x[rows]))
    return normalization


def _check_class_names(name: str, names: Sequence[str], task: Task) -> None:
    if names and (task.is_number or len(names) != task.outputs):
        raise InputError(
            f"--dataset {name}: class_names must have a name for each of {task}",
            f"has {len(names)}",
            "give each class a name, in the order of the labels",
        )


def _digest(arrays: Arrays, pipeline: function.Pipeline | None) -> str:
    """SHA-256 of the arrays; of a pipeline what it holds is left out, since it may be random."""
    digest = hashlib.sha256(b"" if pipeline is None else f"train {pipeline.spec} ".encode())
    for key in arrays:
        if pipeline is None or not key.endswith("_train"):
            digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape} ".encode())
            digest.update(np.ascontiguousarray(arrays[key]).data)
    return digest.hexdigest()


def _read(
    name: str, image_size: int | None, test_split: float, seed: int, task: str
) -> tuple[Source, function.Pipeline | None]:
    """The arrays of the dataset `name`, from wherever they come, and its pipeline if it has one."""
    if images.is_folder(name):
        if task == "multilabel":
            raise InputError(
                "--task multilabel needs several labels for an example, in a table or in arrays",
                f"{name} is a folder of images, each in the folder of its class",
                "leave it out",
            )
        return images.read(name, image_size, test_split, seed), None
    if image_size is not None:
        raise InputError(
            "--image-size needs a folder of images", f"--dataset is {name}", "leave it out"
        )
    if function.is_function(name):
        return function.read(name, seed)
    return sources.read(name), None


# ---- weights -----------------------------------------------------------------------------------


def class_weights(config: StudyConfig, dataset: Dataset) -> NDArray[np.float32] | None:
    """The weight of a training example of each class, as --class-weight says; None for no weights.

    balanced: n / (classes * examples of the class), of the n examples of the training part, as
    scikit-learn's `compute_class_weight("balanced")` (King and Zeng 2001).
    """
    if config.class_weight == "none":
        return None
    counts: NDArray[Any] = np.bincount(dataset.train[1].astype(int), minlength=dataset.classes)
    if (whole := dataset.pipeline) is not None:
        counts = np.array([whole.counts[label] for label in range(dataset.classes)])
    weights = counts.sum() / (dataset.classes * np.maximum(counts, 1))
    return np.asarray(weights, np.float32)
