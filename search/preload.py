"""Imported once, by the process that workers are forked from: TensorFlow takes seconds."""

from search.imports import hidden
from search.tasks import load_trial

with hidden("sklearn"):  # a second, for Keras' wrappers of it
    load_trial()
