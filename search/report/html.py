"""The report: one self-contained HTML file, which opens without a network."""

import json
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import jinja2
import optuna
import plotly.graph_objects as go
import plotly.io
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState
from plotly.offline import get_plotlyjs

from search.config.hyperparameters import short
from search.promotion.evaluation import Labels, Residuals
from search.report import overview
from search.report.overview import Overview
from search.report.text import in_production, listed, sentences
from search.report.text import tested as tested_text
from search.report.winner import Chart, Tested, charts_of, mistakes_of
from search.study.storage import UID
from search.study.trials import FINISHED, summarize

_COLOURS = {"COMPLETE": "#2a9d8f", "PRUNED": "#e9a23b", "FAIL": "#d1495b", "RUNNING": "#6c8ebf"}


def write_html(
    path: Path, study: optuna.Study, found: Overview, charts: list[Chart], tested: Tested | None
) -> None:
    """Write the report of `study` into `path`, whole or not at all."""
    html = build_html(study, found, charts, tested)
    path = path.resolve()  # a symbolic link is kept
    unfinished = path.with_name(f".report.{os.getpid()}")  # valid however long the report's name
    try:
        unfinished.write_text(html, encoding="utf-8", errors="backslashreplace")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def draw_charts(study: optuna.Study, found: Overview) -> list[Chart]:
    """The charts of the search, which take the time; `build_html` adds that of the winner."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's functions warn of trials that they leave out
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        charts = list(_charts(study, found))
    for chart in charts:
        chart.json  # noqa: B018 - it is cached
    return charts


def build_html(
    study: optuna.Study, found: Overview, charts: list[Chart], tested: Tested | None
) -> str:
    """The report as HTML, with the `charts` of `draw_charts`."""
    evaluation = None if tested is None else tested.evaluation
    if tested is not None:
        charts = [*charts, *charts_of(tested)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    return environment.get_template("report.html.j2").render(
        found=found,
        uid=study.user_attrs.get(UID, ""),
        sentences=sentences(found),
        production=in_production(found),
        charts=charts,
        saved=timedelta(seconds=round(found.saved.seconds)),
        tested=tested,
        tested_text="" if tested is None else tested_text(tested.metrics, found.metric),
        mistakes=mistakes_of(tested),
        scored=None if isinstance(evaluation, Residuals) else evaluation,
        scores_of="label" if isinstance(evaluation, Labels) else "class",
        names=list(found.space),
        short=short,
        trials=[summarize(trial) for trial in study.get_trials(deepcopy=False)],
        templates=json.dumps(
            {
                scheme: plotly.io.templates[f"plotly_{name}"].to_plotly_json()
                for scheme, name in (("light", "white"), ("dark", "dark"))
            }
        ),
        plotly=get_plotlyjs(),
    )


def _charts(study: optuna.Study, found: Overview) -> Iterator[Chart]:
    if found.best is not None:
        more = f" Baselines: {listed(found.baselines, found.metric)}." if found.baselines else ""
        yield Chart(
            "History of the search",
            f"{found.objective} of the {found.complete} complete trials in order, and the best so "
            f"far, at the end {found.metric.text(found.best.value or 0)}.{more}",
            _history(study, found),
        )
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    if finished:
        yield Chart(
            "Learning curves",
            f"{found.objective} after every epoch of {len(finished)} trials; the {found.pruned} "
            "pruned ones are faint.",
            _curves(study, found),
        )
        yield from _comparisons(study, found)
    trials = study.get_trials(deepcopy=False)
    if trials:
        yield _timeline(trials)


def _history(study: optuna.Study, found: Overview) -> go.Figure:
    """Optuna's history, with a line at the best baseline."""
    figure = visualization.plot_optimization_history(study, target_name=found.objective)
    shown = [b for b in found.baselines if found.objective in b.metrics]
    if shown:
        best = max(shown, key=lambda b: found.metric.sign * b.metrics[found.objective])
        x, y = [0, len(study.trials) - 1], [best.metrics[found.objective]] * 2
        figure.add_scatter(x=x, y=y, mode="lines", line_dash="dot", name=best.name)
    return figure


def _comparisons(study: optuna.Study, found: Overview) -> Iterator[Chart]:
    epoch, copy = overview.comparable(study)
    varied, common = ([n for n in found.space if n in names] for names in overview.varied(copy))
    if not varied:
        return
    every = (
        f"{found.objective} after epoch {epoch}, which all {len(copy.trials)} finished trials have"
    )
    if found.importances is not None:
        name, share = next(iter(found.importances.shares.items()))
        yield Chart(
            "Which hyperparameters matter",
            f"Importance for {every}; the most important is {name} ({share:.0%}).",
            visualization.plot_param_importances(copy, params=common),
        )
    yield Chart(
        "Each hyperparameter alone",
        f"One point per trial: {every}.",
        visualization.plot_slice(copy, params=varied, target_name=found.objective),
        wide=True,
    )
    if common:
        yield Chart(
            "All hyperparameters together",
            f"One line per trial, from its {', '.join(common)} to {every}.",
            visualization.plot_parallel_coordinate(
                copy, params=common, target_name=found.objective
            ),
            wide=True,
        )


def _curves(study: optuna.Study, found: Overview) -> go.Figure:
    figure = visualization.plot_intermediate_values(study)
    states = {trial.number: trial.state for trial in study.get_trials(deepcopy=False)}
    for trace in figure.data:
        number = int(trace.name.removeprefix("Trial"))
        best = found.best is not None and number == found.best.number
        pruned = states[number] is TrialState.PRUNED
        trace.update(
            x=[step + 1 for step in trace.x],
            opacity=0.3 if pruned else 1,
            line={"width": 4 if best else 1.5},
            marker={"size": 5},
            name=f"trial {number}{', the best' if best else ', pruned' if pruned else ''}",
        )
    figure.update_layout(showlegend=False, hovermode="closest")
    figure.update_xaxes(title="epoch", dtick=1)
    figure.update_yaxes(title=found.objective)
    return figure


def _timeline(trials: list[FrozenTrial]) -> Chart:
    """When each process ran which trial; Optuna's own timeline has a row per trial instead."""
    workers: dict[Any, str] = {}
    bars: dict[str, list[tuple[str, str, float, int]]] = {state: [] for state in _COLOURS}
    for trial in trials:
        if trial.datetime_start is not None:
            owner = trial.user_attrs.get("owner", {})
            process = owner.get("host"), owner.get("pid"), owner.get("started")
            worker = workers.setdefault(process, f"worker {len(workers) + 1}")
            seconds = trial.duration.total_seconds() if trial.duration else 0
            start = trial.datetime_start.isoformat()
            bars[trial.state.name].append((worker, start, seconds * 1000, trial.number))
    figure = go.Figure()
    for state, rows in bars.items():
        if rows:
            figure.add_bar(
                orientation="h",
                name=state,
                y=[row[0] for row in rows],
                base=[row[1] for row in rows],
                x=[row[2] for row in rows],
                text=[f"trial {row[3]}" for row in rows],
                hovertemplate="%{text}: %{base} to %{x}<extra>%{y}</extra>",
                textposition="none",
                marker={
                    "color": _COLOURS[state],
                    "line": {"width": 1, "color": "rgba(255,255,255,0.6)"},
                },
            )
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(type="date", title="time")
    figure.update_yaxes(autorange="reversed")
    started = sum(map(len, bars.values()))
    counted = f"{len(workers)} process{'es' * (len(workers) != 1)}"
    return Chart("Timeline", f"When each of {started} trials ran, by {counted}.", figure)
