"""What a worker tells of a trial; light, so that the main process can read it without Keras."""

from dataclasses import dataclass

from search.space import Hyperparameters


@dataclass(frozen=True)
class Outcome:
    """How a trial ended, as the engine and the display need it.

    value: val_accuracy after the last epoch, of a COMPLETE trial.
    last: val_accuracy after the last epoch that was run, where there was one.
    """

    number: int
    place: int
    state: str
    value: float | None
    last: float | None
    hyperparameters: Hyperparameters | None
    epochs: int
    seconds: float
    failure: str | None
