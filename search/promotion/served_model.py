"""A model that is served with the names of its classes or columns, as MLflow stores it."""

import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import mlflow

from search.data.dataset import Dataset

if TYPE_CHECKING:
    import keras
    from mlflow.types import Schema


def log_served_model(
    model: "keras.Model", dataset: Dataset, origin: dict[str, str], requirements: list[str]
) -> str:
    """Log `model` to the active run, to be served by the module `serving`; returns its URI."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    names = dataset.task.class_names
    prediction = ColSpec("string" if names else "double", "prediction")
    probabilities = [ColSpec("float", f"probability_{name}") for name in names]
    schema: dict[str, Any] = {"classes": list(names) or None}
    example = dataset.example
    if dataset.columns is not None:
        schema |= {"numbers": dataset.columns.numbers, "words": dataset.columns.words}
    else:
        example = dataset.test_inputs(slice(2))
    info = Model.log(
        artifact_path=None,
        name="model",
        flavor=_ServedFlavor,
        metadata={**origin, **({"class_names": list(names)} if names else {})},
        model=model,
        signature=ModelSignature(_inputs(dataset), Schema([prediction, *probabilities])),
        input_example=example,
        schema=schema,
        pip_requirements=requirements,
    )
    return str(info.model_uri)


def _inputs(dataset: Dataset) -> "Schema":
    """What the served model takes: columns of a table by name, or a tensor.

    A column may be missing, or hold integers where there were decimals, so the types of columns are
    left open: MLflow would refuse both.
    """
    import numpy as np
    from mlflow.types.schema import AnyType, ColSpec, Schema, TensorSpec

    if dataset.columns is None:
        shape = dataset.sample_shape if dataset.pixels else (dataset.features,)
        return Schema([TensorSpec(np.dtype(np.float32), (-1, *shape))])
    anything = AnyType()  # type: ignore[no-untyped-call]
    return Schema([ColSpec(anything, name, required=False) for name in dataset.columns.sources])


class _ServedFlavor:
    """`mlflow.keras`, served by the module `serving`, a copy of which is saved with the model.

    `mlflow.keras.load_model` loads the Keras model alone.
    """

    __name__ = "mlflow.keras"

    @staticmethod
    def save_model(
        path: str, mlflow_model: Any, signature: Any, schema: dict[str, Any], **arguments: Any
    ) -> None:
        from search.data import serving

        os.makedirs(path)
        arguments.pop("validate_serving_input", None)
        mlflow.keras.save_model(path=path, mlflow_model=mlflow_model, **arguments)
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
