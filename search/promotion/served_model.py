"""The model as MLflow stores and serves it."""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np

from search.data.dataset import Dataset
from search.task import Task

if TYPE_CHECKING:
    import keras
    from mlflow.types import Schema


def log_model(
    model: "keras.Model", dataset: Dataset, origin: dict[str, str], requirements: list[str]
) -> tuple[str, str]:
    """Log `model` to the active run; returns its URI and its id.

    A model of a table or of named classes or labels is served by the module `serving`, any other by
    MLflow.
    """
    from mlflow.models import Model, ModelSignature, infer_signature

    names, example = dataset.task.class_names, dataset.example
    if dataset.columns is None:
        example = dataset.test_inputs(slice(2))
    if dataset.columns is not None or names:
        kind: dict[str, Any] = {
            "flavor": _ServedFlavor,
            "schema": _schema(dataset),
            "signature": ModelSignature(_inputs(dataset), _answers(dataset.task)),
        }
        requirements = [*requirements, f"pandas=={version('pandas')}"]  # `serving` imports it
    else:
        signature = infer_signature(example, np.asarray(model(example)))
        kind = {"flavor": _KerasFlavor, "signature": signature}
    info = Model.log(
        artifact_path=None,
        name="model",
        metadata={**origin, **({"class_names": list(names)} if names else {})},
        validate_serving_input=False,  # by loading the model once more, which takes a second
        model=model,
        input_example=example,
        pip_requirements=requirements,
        **kind,
    )
    return str(info.model_uri), str(info.model_id)


def _schema(dataset: Dataset) -> dict[str, Any]:
    """What the module `serving` needs to know of the model."""
    schema: dict[str, Any] = {"classes": list(dataset.task.class_names) or None}
    if dataset.task.labels:
        schema["multilabel"] = True
    if dataset.columns is not None:
        schema |= {"numbers": dataset.columns.numbers, "words": dataset.columns.words}
    return schema


def _answers(task: Task) -> "Schema":
    """What the served model answers: a class or labels and the probability of each, or a number."""
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    kind: Any = DataType.double if task.is_number else DataType.string
    prediction = ColSpec(Array(kind) if task.labels else kind, "prediction")
    probabilities = (ColSpec("float", f"probability_{name}") for name in task.class_names)
    return Schema([prediction, *probabilities])


def _inputs(dataset: Dataset) -> "Schema":
    """What the served model takes: columns of a table by name, or a tensor.

    A column may be missing, or hold integers where there were decimals, so the types of columns are
    left open: MLflow would refuse both.
    """
    from mlflow.types.schema import AnyType, ColSpec, Schema, TensorSpec

    if dataset.columns is None:
        shape = dataset.sample_shape if dataset.pixels else (dataset.features,)
        return Schema([TensorSpec(np.dtype(np.float32), (-1, *shape))])
    anything = AnyType()  # type: ignore[no-untyped-call]
    return Schema([ColSpec(anything, name, required=False) for name in dataset.columns.sources])


class _KerasFlavor:
    """`mlflow.keras`, whose save_model (3.17) needs the folder to exist for an input example."""

    __name__ = "mlflow.keras"

    @staticmethod
    def save_model(path: str, **arguments: Any) -> None:
        os.makedirs(path)
        del arguments["validate_serving_input"]  # meant for `log`, which passes on all it gets
        mlflow.keras.save_model(path=path, **arguments)


class _ServedFlavor:
    """The same, served by the module `serving`, a copy of which is saved with the model.

    `mlflow.keras.load_model` loads the Keras model alone.
    """

    __name__ = "mlflow.keras"

    @staticmethod
    def save_model(
        path: str, mlflow_model: Any, signature: Any, schema: dict[str, Any], **arguments: Any
    ) -> None:
        from search.data import serving

        _KerasFlavor.save_model(path, mlflow_model=mlflow_model, **arguments)
        text = json.dumps(schema, ensure_ascii=False)
        (Path(path) / "data" / serving.SCHEMA).write_text(text, encoding="utf-8")
        mlflow_model.signature = signature
        _serve_by(serving, Path(path), mlflow_model)


def _serve_by(module: ModuleType, path: Path, mlflow_model: Any) -> None:
    """Let `module` load the saved model for MLflow, from a copy of its source."""
    name = module.__name__.rpartition(".")[2]
    (path / "code").mkdir()
    shutil.copy(str(module.__file__), path / "code" / f"{name}.py")
    environment = mlflow_model.flavors["python_function"]["env"]
    mlflow.pyfunc.add_to_model(
        mlflow_model,
        loader_module=name,
        data="data",
        code="code",
        conda_env=environment["conda"],
        python_env=environment["virtualenv"],
    )
    mlflow_model.save(str(path / "MLmodel"))
