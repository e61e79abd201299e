"""What all trials of a study have in common, as the study keeps it and every run shows it."""

from pathlib import Path

from search.config import StudyConfig
from search.contract import Facts
from search.data import Dataset
from search.recipe import LOSS, OUTPUT_ACTIVATION, shared


def facts_of(config: StudyConfig, dataset: Dataset) -> Facts:
    """What the runs of all trials of a study share, as the study keeps it."""
    from mlflow.data.numpy_dataset import from_numpy  # slow: pandas

    x, y = dataset.train
    described = from_numpy(
        features=x, targets=y, name=Path(dataset.name).name, digest=dataset.digest[:8]
    )
    return {
        "params": {
            "epochs": config.trial_epochs,
            **shared(config.space),
            "validation_split": config.validation_split,
            **({} if dataset.split == "last" else {"split": dataset.split}),
            **({} if dataset.normalization is None else {"normalize": "auto"}),
            **({} if config.model else {"output_activation": OUTPUT_ACTIVATION}),
            **({"model": config.model} if config.model else {}),
            "loss": LOSS,
            "dataset": config.dataset,
            "train_samples": dataset.train_size,
            "validation_samples": len(dataset.x_all) - dataset.train_size,
            "test_samples": len(dataset.x_test),
            "num_classes": dataset.classes,
        },
        "dataset": described._to_mlflow_entity().to_dictionary(),
        "space": {name: str(p) for name, p in config.space.searched().items()},
        "reference": config.space.reference() or {},
    }
