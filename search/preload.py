"""Imported once, by the process that workers are forked from: TensorFlow takes seconds."""

from search.engine import load_trial

load_trial()
