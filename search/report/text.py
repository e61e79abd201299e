"""The findings as text: the summary of a run, the overview of a study, Markdown."""

import shlex
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console

from search.config.hyperparameters import describe, short
from search.config.parameter import Value
from search.errors import redact
from search.task import DEFAULT_OBJECTIVE, METRICS, Metric, metric_among

if TYPE_CHECKING:  # only types: a run loads this before it prints its first line
    from search.promotion.baselines import Baseline
    from search.promotion.gate import Winner
    from search.report.overview import Overview
    from search.report.progress import Result
    from search.study.trials import TrialSummary

_BAR = 24  # characters
LOSS = METRICS["val_loss"]


def gain(best: "TrialSummary", reference: "TrialSummary", complete: int, objective: Metric) -> str:
    """What the search gained over the reference configuration, in one or two sentences."""
    if best.number == reference.number:
        return "The search found nothing better than the reference configuration."
    difference = (best.value or 0) - (reference.value or 0)
    sign = "+" if difference >= 0 else "-"
    changed = "gained" if objective.maximize else "changed"
    return (
        f"The search {changed} {sign}{objective.text(abs(difference))} {objective.name} over the "
        f"reference. It is the best of {complete} noisy results, so part of that is luck."
    )


def sentences(found: "Overview") -> list[str]:
    """What was searched, and what was found."""
    space = ", ".join(f"{name} {allowed}" for name, allowed in found.space.items())
    running = f" It is being run by {found.running}." if found.running else ""
    unfinished = f", {found.unfinished} not finished" if found.unfinished else ""
    fixed = f" All trials have {_listed(found.fixed)}." if found.fixed else ""
    lines = [
        f"Study {found.study} searched {space}: {found.complete} trials complete, {found.pruned} "
        f"pruned, {found.failed} failed{unfinished}.{running}{fixed}"
    ]
    if found.best is None:
        return [*lines, "No trial has completed yet."]
    lines.append(
        f"The best is trial {found.best.number} with {shown(found.metric, found.best.value)}: "
        f"{_listed(found.best.hyperparameters)}."
    )
    if found.reference is not None:
        if found.reference.number != found.best.number:
            lines[-1] += (
                f" The reference, trial {found.reference.number}, has "
                f"{found.metric.text(found.reference.value or 0)}."
            )
        lines[-1] += " " + gain(found.best, found.reference, found.complete, found.metric)
    if found.baselines:
        metric = metric_among(found.baselines[0].metrics, found.metric)
        lines.append(f"Baselines, by {metric.name}: {listed(found.baselines, found.metric)}.")
    if found.against_baseline is not None:
        lines[-1] += f" {against_baseline(found.against_baseline)}"
    if found.finalists:
        seeds = len(found.finalists[0].values)
        ranking = "; ".join(finalist.text(found.metric) for finalist in found.finalists)
        lines.append(f"Finalists, trained again on {seeds} fresh seeds, winner first: {ranking}.")
    return lines


def listed(baselines: "list[Baseline]", objective: Metric) -> str:
    """The name of each baseline and how good it is."""
    return ", ".join(baseline.text(objective) for baseline in baselines)


def _baselines(baselines: "list[Baseline]", objective: Metric) -> list[str]:
    """A line for each, as one for the reference."""
    if not baselines:
        return []
    metric = metric_among(baselines[0].metrics, objective)
    return [
        f"{baseline.name:22s} {shown(metric, baseline.metrics[metric.name])}"
        + ("" if baseline.converged else "  not converged")
        for baseline in baselines
    ]


def against_baseline(found: Mapping[str, Any]) -> str:
    """Whether the winner is better than the best baseline, in a sentence."""
    metric = METRICS[found["metric"].replace("test_", "val_", 1)]
    mine, theirs = found["value"], found["baseline_value"]
    worse = metric.sign * mine < metric.sign * theirs
    compared = "significantly worse" if worse else "significantly better"
    if not found["significant"]:
        compared = "not significantly better"
    return (
        f"The network is {compared} than {found['baseline']} on the test examples: {metric.label} "
        f"{metric.text(mine)} against {metric.text(theirs)}, {found['test']} "
        f"p = {found['p_value']:.2g}."
    )


def in_production(found: "Overview") -> str:
    """Which version is in production, and its origin."""
    now = found.production
    if now is None:
        return "Nothing is in production."
    tested = tested_by(now.metrics, found.metric) or tested_by(now.metrics, DEFAULT_OBJECTIVE)
    origin = "of unknown origin" if now.trial is None else f"trial {now.trial} of study {now.study}"
    return f"In production: {now.model} version {now.version}, {origin}{tested and ', '}{tested}."


def markdown(found: "Overview", more: list[str]) -> str:
    """The findings in Markdown, followed by the paragraphs in `more`.

    They depend on the study alone: the same study gives the same text.
    """
    parts = sentences(found)
    if found.top:
        names = list(found.space)
        rows = [
            [str(row.number), found.metric.text(row.value or 0)]
            + [short(row.hyperparameters.get(name)) for name in names]
            for row in found.top
        ]
        head = ["trial", found.objective, *names]
        table = [head, ["---:"] * len(head), *rows]
        parts.append("\n".join("| " + " | ".join(cells) + " |" for cells in table))
    if found.saved.epochs:
        parts.append(f"Pruning saved {found.saved.epochs} epochs.")
    return "\n\n".join([*parts, *more])


def shown(metric: Metric, value: float | None) -> str:
    """A metric with its value, as `val_accuracy 0.9812`."""
    return f"{metric.name} {'--' if value is None else metric.text(value)}"


def tested_by(metrics: Mapping[str, float], metric: Metric) -> str:
    """A metric of the test examples, as `test accuracy 0.9812`; empty if it is not known."""
    value = metrics.get(f"test_{metric.stem}")
    return "" if value is None else f"test {metric.label} {metric.text(value)}"


def tested(metrics: Mapping[str, float], objective: Metric) -> str:
    """All metrics of the test examples, the objective first and the loss last."""
    others = [metric for metric in METRICS.values() if metric not in (objective, LOSS)]
    lines = [tested_by(metrics, metric) for metric in (objective, *others, LOSS)]
    return ", ".join(dict.fromkeys(line for line in lines if line))


def _listed(values: Mapping[str, Value]) -> str:
    return ", ".join(f"{name} {short(value)}" for name, value in values.items())


def summary(result: "Result") -> str:
    """The end of a run in a dozen lines."""
    if result.winner is None:
        end = ["", "Run the same command again to go on."]
    else:
        end = [*_of_winner(result, result.winner), "See also:"]
        end += [f"  {place}" for place in _places(result)]
    return "\n".join(["", *_of_search(result), *end])


def _of_search(result: "Result") -> list[str]:
    """How many trials there were, and the best beside what it has to beat."""
    from search.study.trials import summarize

    took = timedelta(seconds=round(result.seconds))
    lines = [
        f"{result.complete + result.pruned + result.given_up} finished trials: "
        f"{result.complete} complete, {result.pruned} pruned"
        + (f", {result.given_up} given up (failed twice)" if result.given_up else "")
        + f"; {result.failed} failed. {result.ran} run now, in {took}."
    ]
    if result.stopped:
        lines.append(f"Stopped early: {result.stopped}.")
    objective = METRICS[result.config.objective]
    if result.best is not None:
        best = summarize(result.best)
        lines += ["", _row("best", best, objective)]
        reference = None if result.reference is None else summarize(result.reference)
        if reference is not None:
            lines.append(_row("reference", reference, objective))
        lines += _baselines(result.baselines, objective)
        if reference is not None:
            lines.append(gain(best, reference, result.complete, objective))
    if result.finalists:
        repeats = len(result.finalists[0].values)
        lines += ["", f"finalists, mean of {repeats} fresh seeds, winner first:"]
        lines += [f"  {finalist.text(objective)}" for finalist in result.finalists]
    return lines


def _of_winner(result: "Result", winner: "Winner") -> list[str]:
    """Which trial won, how good it is on the test examples, and where its model is."""
    objective, now = METRICS[result.config.objective], winner.in_production
    where = f"not in production, where version {now} is" if now else "not in production"
    if now == winner.version:
        where = "alias production, stage Production"
    verb = "Registered as" if winner.new else "Already registered as"
    return [
        "",
        _chosen(result, winner, objective),
        f"Retrained on training and validation data: {tested(winner.metrics, objective)} "
        "(the test examples are used only here and by the gate).",
        *([] if result.against_baseline is None else [against_baseline(result.against_baseline)]),
        f"{verb} {result.config.model_name} version {winner.version}: {where}.",
        f"Gate: {winner.verdict}.",
        "",
    ]


def _chosen(result: "Result", winner: "Winner", objective: Metric) -> str:
    """The winner and the value that it was selected by."""
    if result.finalists:
        return f"winner: {result.finalists[0].text(objective)}, used for the selection"
    return (
        f"winner: trial {winner.trial}, {shown(objective, winner.value)}, used for the "
        "selection, so optimistically biased"
    )


def _row(title: str, trial: "TrialSummary", objective: Metric) -> str:
    title = f"{title}: trial {trial.number}"
    return f"{title:22s} {shown(objective, trial.value)}  {describe(trial.hyperparameters)}"


def _places(result: "Result") -> Iterator[str]:
    """Where to look further: files, addresses, commands."""
    config, run, runs = result.config, result.parent_run_id, redact(result.config.tracking_uri)
    if result.report is not None:
        also = f"  (also an artifact of MLflow run {run})" if runs.startswith("http") else ""
        yield f"{result.report}{also}"
    if config.mlflow_page is not None:
        yield f"{config.mlflow_page.rstrip('/')}/#/runs/{run}"
    elif runs.startswith("http"):
        yield f"mlflow ui  (already served at {runs})"
    else:
        named = f" --backend-store-uri {shlex.quote(runs)}"
        yield "mlflow ui" + ("" if runs == "sqlite:///mlflow.db" else named)
    yield config.optuna_page or f"optuna-dashboard {shlex.quote(redact(config.storage))}"


def show(console: Console, found: "Overview") -> None:
    """Print a study at a glance."""

    def line(text: str = "", style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    for sentence in sentences(found):
        line(sentence)
    if found.top:
        line()
        for text in _top(found):
            line(text)
    bar = "█" if console.encoding.startswith("utf") else "#"
    if found.importances is not None:
        line(
            f"\nImportance for {found.objective} after epoch {found.importances.epoch}, "
            f"{found.importances.trials} trials:"
        )
        for name, share in found.importances.shares.items():
            line(f"  {name:15s} {share:4.0%} {bar * round(share * _BAR)}")
    if found.saved.epochs:
        line(
            f"\nPruning saved {found.saved.epochs} epochs, about "
            f"{timedelta(seconds=round(found.saved.seconds))} of one worker."
        )
    if found.failures:
        line("\nFailed:")
        for failed in found.failures:
            line(f"  trial {failed.number}: {failed.failure or 'unknown'}", "red")
    line()
    if found.registered is not None:
        line(f"Its winner is registered as {found.registered}.")
    line(in_production(found))
    if found.unfinished and found.running is None:
        line("Its run was interrupted; run the same command again to go on.")


def _top(found: "Overview") -> Iterator[str]:
    """A table as plain lines, never wrapped or cut, so that run ids can be copied."""
    names, objective = list(found.space), found.objective
    width = max(len(objective), 8)
    widths = [max(len(name), 8) for name in names]
    head = ["trial", objective.rjust(width), *map(str.rjust, names, widths)]
    yield "  ".join([*head, "epochs", "seconds", "run"])
    reference = found.reference
    more = [] if reference is None or reference in found.top else [reference]
    for row in [*found.top, *more]:
        values = (short(row.hyperparameters.get(name)) for name in names)
        value = found.metric.text(row.value or 0)
        cells = [f"{row.number:5d}", value.rjust(width), *map(str.rjust, values, widths)]
        note = " (reference)" if row == reference else ""
        yield "  ".join([*cells, f"{row.epochs:6d}", f"{row.seconds:7.1f}", f"{row.run_id}{note}"])
