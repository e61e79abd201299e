"""Imported once, by the process that workers are forked from: TensorFlow takes seconds."""

from search.imports import hidden, quickly
from search.tasks import load_trial

with quickly(), hidden("sklearn", "matplotlib"):  # a second, for parts of Keras not used
    load_trial()
    # What MLflow imports and SQLAlchemy prepares when the first of its databases is opened.
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    from sqlalchemy.orm import configure_mappers

    configure_mappers()
