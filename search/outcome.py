"""What a worker tells of a trial; light, so that the main process can read it without Keras."""

from collections.abc import Mapping
from dataclasses import dataclass

from search.parameter import Value


@dataclass(frozen=True)
class Outcome:
    """How a trial ended, as the engine and the display need it.

    value: val_accuracy of the weights that a COMPLETE trial ended with.
    last: val_accuracy after the last epoch that was run, where there was one.
    given_up: it failed by itself, as a trial of its slot had before, so the slot is finished.
    """

    number: int
    place: int
    state: str
    value: float | None
    last: float | None
    hyperparameters: Mapping[str, Value] | None
    epochs: int
    seconds: float
    failure: str | None
    given_up: bool = False
