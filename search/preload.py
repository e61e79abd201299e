"""Imported once, by the process that workers are forked from: TensorFlow takes seconds."""

from search.engine import load_trial
from search.imports import hidden

with hidden("sklearn"):  # a second, for Keras' wrappers of it
    load_trial()
