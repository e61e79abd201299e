"""The model of a table as MLflow stores it: it takes rows and answers classes or numbers."""

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


def log_table_model(
    model: "keras.Model", dataset: Dataset, origin: dict[str, str], requirements: list[str]
) -> str:
    """Log the Keras model of raw rows, `model`, to the active run; returns its URI.

    Any column may be missing or hold integers where there were decimals, so the signature names the
    columns but leaves their types open: MLflow would refuse both.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, Schema

    assert dataset.columns is not None
    names = dataset.task.class_names
    prediction = ColSpec("string" if names else "double", "prediction")
    probabilities = [ColSpec("float", f"probability_{name}") for name in names]
    anything = AnyType()  # type: ignore[no-untyped-call]
    columns = [ColSpec(anything, name, required=False) for name in dataset.columns.sources]
    info = Model.log(
        artifact_path=None,
        name="model",
        flavor=_TableFlavor,
        metadata=origin,
        model=model,
        signature=ModelSignature(Schema([*columns]), Schema([prediction, *probabilities])),
        input_example=dataset.example,
        schema={
            "numbers": dataset.columns.numbers,
            "words": dataset.columns.words,
            "classes": list(names) or None,
        },
        pip_requirements=requirements,
    )
    return str(info.model_uri)


class _TableFlavor:
    """`mlflow.keras`, served by the module `table_rows`, a copy of which is saved with the model.

    `mlflow.keras.load_model` loads the Keras model alone.
    """

    __name__ = "mlflow.keras"

    @staticmethod
    def save_model(
        path: str, mlflow_model: Any, signature: Any, schema: dict[str, Any], **arguments: Any
    ) -> None:
        from search.data import table_rows

        os.makedirs(path)
        arguments.pop("validate_serving_input", None)
        mlflow.keras.save_model(path=path, mlflow_model=mlflow_model, **arguments)
        text = json.dumps(schema, ensure_ascii=False)
        (Path(path) / "data" / table_rows.SCHEMA).write_text(text, encoding="utf-8")
        mlflow_model.signature = signature
        _serve_by(table_rows, Path(path), mlflow_model)


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
