"""The winner of a regression on the test examples: its predictions over the true numbers."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESIDUALS = "residuals.png"
_POINTS = 2_000  # kept and drawn


@dataclass(frozen=True)
class Residuals:
    """True and predicted numbers, in the target's unit, of at most 2,000 of `total` test examples.

    Those kept are spread evenly over all, in their order.
    """

    total: int
    true: list[float]
    predicted: list[float]

    def as_json(self) -> str:
        """What `Residuals.read` reads."""
        return json.dumps({"residuals": asdict(self)})

    @staticmethod
    def read(kept: dict[str, Any]) -> "Residuals":
        """From the value of `residuals` in the JSON."""
        return Residuals(**kept)


def residuals_of(y: NDArray[Any], outputs: NDArray[Any]) -> Residuals:
    """y of shape (n,), outputs of shape (n, 1), both in the target's unit."""
    kept = np.unique(np.linspace(0, len(y) - 1, min(len(y), _POINTS)).astype(int))
    true, predicted = (values[kept].astype(float).tolist() for values in (y, outputs[:, 0]))
    return Residuals(len(y), true, predicted)


def draw_residuals(residuals: Residuals, figure: Any) -> None:
    """Draw the predictions over the true numbers, and the diagonal where both are equal."""
    axes = figure.add_subplot()
    axes.scatter(residuals.true, residuals.predicted, s=8, alpha=0.5)
    both = residuals.true + residuals.predicted
    axes.axline((min(both), min(both)), slope=1, color="grey", linewidth=1)
    axes.set(
        xlabel="true", ylabel="predicted", title="Predictions of the test examples over the truth"
    )
