"""The winner on the test examples, in the report: its charts and its mistakes."""

import base64
from dataclasses import dataclass
from functools import cached_property

import plotly.graph_objects as go
import plotly.io

from search.promotion.evaluation import MANY, Evaluation, Found, Labels, Residuals, most_frequent


@dataclass(frozen=True)
class Chart:
    """A Plotly figure; `caption` describes what it shows, also for screen readers.

    wide: it needs more than a phone's width, so it scrolls there.
    """

    title: str
    caption: str
    figure: go.Figure
    wide: bool = False

    @cached_property
    def json(self) -> str:
        """The figure as the page's script reads it."""
        bare = self.figure.to_dict()
        bare["layout"].pop("template", None)  # the page sets one, light or dark
        bare["layout"].pop("title", None)
        return str(plotly.io.to_json(go.Figure(bare, skip_invalid=True), validate=False))


@dataclass(frozen=True)
class Tested:
    """The retrained winner on the test set; mistakes: a picture (PNG), if examples are images."""

    run_id: str
    trial: int
    metrics: dict[str, float]
    evaluation: Found | None
    mistakes: bytes | None


def charts_of(tested: Tested) -> list[Chart]:
    """The confusion matrix or what stands in its place; none where there is nothing to show."""
    evaluation = tested.evaluation
    if isinstance(evaluation, Residuals):
        return [_residuals(tested.trial, evaluation)]
    if isinstance(evaluation, Labels):
        return [_labels(tested.trial, evaluation)]
    if evaluation is not None and (evaluation.confusion or evaluation.confusions):
        return [_confusion(tested.trial, evaluation)]
    return []


def _confusion(trial: int, evaluation: Evaluation) -> Chart:
    counts = evaluation.confusion
    caption = (
        f"Trial {trial}, retrained, classifies {evaluation.right:,} of {evaluation.total:,} test "
        "examples correctly. "
    )
    if counts is None:
        return Chart(
            "Most frequent confusions of the winner",
            caption + "Each bar: true class, predicted class and number of examples.",
            _confusions(evaluation),
        )
    names = [evaluation.name(label) for label in range(len(counts))]
    figure = go.Figure(
        go.Heatmap(
            z=[[count / max(sum(row), 1) for count in row] for row in counts],
            customdata=counts,
            text=counts if len(counts) < MANY else None,
            texttemplate="%{text}" if len(counts) < MANY else None,
            x=names,
            y=names,
            colorscale="Blues",
            zmin=0,
            zmax=1,
            hovertemplate="%{y} called %{x}: %{customdata}<extra></extra>",
            showscale=False,
        )
    )
    figure.update_xaxes(title="predicted class", type="category")
    figure.update_yaxes(title="true class", type="category", autorange="reversed")
    return Chart(
        "Confusion matrix of the winner",
        caption + "Row: true class; column: predicted class.",
        figure,
    )


def _labels(trial: int, evaluation: Labels) -> Chart:
    """Bars of precision and recall, of the most frequent labels where there are many."""
    scores = most_frequent(evaluation)
    names = [evaluation.name(score.label) for score in scores]
    figure = go.Figure(
        [
            go.Bar(
                orientation="h",
                name=title,
                x=[getattr(score, title) or 0 for score in scores],
                y=names,
                hovertemplate=f"%{{y}}: {title} %{{x:.4f}}<extra></extra>",
            )
            for title in ("precision", "recall")
        ]
    )
    figure.update_xaxes(range=[0, 1])
    figure.update_yaxes(type="category", autorange="reversed", dtick=1, automargin=True)
    return Chart(
        "Labels of the winner",
        f"Trial {trial}, retrained, predicts all labels of {evaluation.right:,} of "
        f"{evaluation.total:,} test examples correctly. Precision and recall of each label"
        + (f", the {MANY} most frequent." if len(scores) < len(evaluation.classes) else "."),
        figure,
    )


def _residuals(trial: int, residuals: Residuals) -> Chart:
    """Predicted over true numbers, and the diagonal where both are equal."""
    ends = [f(residuals.true + residuals.predicted) for f in (min, max)]
    figure = go.Figure(
        [
            go.Scatter(x=ends, y=ends, mode="lines", line={"color": "grey"}, hoverinfo="skip"),
            go.Scatter(
                x=residuals.true,
                y=residuals.predicted,
                mode="markers",
                marker={"size": 5, "opacity": 0.5},
                hovertemplate="true %{x:.5g}, predicted %{y:.5g}<extra></extra>",
            ),
        ]
    )
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title="true")
    figure.update_yaxes(title="predicted")
    return Chart(
        "Predictions of the winner",
        f"Trial {trial}, retrained: predicted over true number of {len(residuals.true):,} of "
        f"{residuals.total:,} test examples; on the line both are equal.",
        figure,
    )


def _confusions(evaluation: Evaluation) -> go.Figure:
    """In place of a matrix, for too many classes."""
    confusions = evaluation.confusions
    figure = go.Figure(
        go.Bar(
            orientation="h",
            x=[confusion.count for confusion in confusions],
            y=[evaluation.called(confusion) for confusion in confusions],
            hovertemplate="%{y}: %{x}<extra></extra>",
        )
    )
    figure.update_xaxes(title="test examples")
    figure.update_yaxes(type="category", autorange="reversed", dtick=1, automargin=True)
    return figure


def mistakes_of(tested: Tested | None) -> dict[str, str] | None:
    """The picture of the worst mistakes as base64, and what it shows; None if there is none."""
    if tested is None or tested.mistakes is None or not isinstance(tested.evaluation, Evaluation):
        return None
    evaluation = tested.evaluation
    listed = "; ".join(
        f"test image {m.index} of class {evaluation.called(m)} ({m.probability:.0%})"
        for m in evaluation.mistakes
    )
    return {"png": base64.b64encode(tested.mistakes).decode(), "alt": listed}
