"""Register the winner, and promote it to production if it is better than the model there.

Both are compared on the same test examples. Every step leaves a trace that the next run finds, so
a run killed between any two of them is continued there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from search.promotion.bootstrap import PairedBootstrap
from search.promotion.comparison import SIGNIFICANT, SMALLEST_P, Comparison
from search.study.lock import promotion_lock
from search.study.storage import RUN_ID, VERSION
from search.study.storage import objective as objective_of
from search.task import DEFAULT_OBJECTIVE, METRICS, Metric
from search.tracking.registered_model import (
    ALIAS,
    aliased_version,
    find_version,
    follow_alias,
    register,
)
from search.tracking.runs import Tracking
from search.tracking.schema import DATASET, MODEL, NUMBER

if TYPE_CHECKING:
    from search.tracking.sync import Stores

_PROMOTED, _GATE = "promoted", "gate."
_TESTS = ("mcnemar", "bootstrap")  # exact, resampled
Found = Comparison | PairedBootstrap | str
Compare = Callable[[int, int], Found]  # challenger and champion, by version


@dataclass(frozen=True)
class Decision:
    """Whether a version went to production, and why.

    policy: the value of `--promote`. champion: the version in production before, None if there was
    none. value, champion_value: the objective on the test examples. p_value: of the exact McNemar
    test if that is the accuracy, else of a paired bootstrap, which also gives the 95 % confidence
    interval of value - champion_value. problem: why the champion could not be compared.
    """

    promoted: bool
    policy: str
    value: float
    champion: int | None = None
    champion_value: float | None = None
    p_value: float | None = None
    problem: str | None = None
    objective: Metric = DEFAULT_OBJECTIVE
    interval: tuple[float, float] | None = None

    @property
    def is_final(self) -> bool:
        """Whether the next run keeps it; a problem may be solved by then."""
        return self.promoted or self.problem is None

    def as_tags(self, version: int) -> dict[str, str]:
        """The tags of `version` that record it; `read` reads them."""
        loser, stem = None, self.objective.stem
        if self.champion_value is not None:
            better = self.objective.sign * (self.value - self.champion_value) > 0
            loser = self.champion if better else version
        low, high = self.interval or (None, None)
        kept = {
            "policy": self.policy,
            "objective": None if self.objective == DEFAULT_OBJECTIVE else self.objective.name,
            f"test_{stem}": self.value,
            "champion_version": self.champion,
            f"champion_test_{stem}": self.champion_value,
            f"{_TESTS[self.interval is not None]}_p_value": self.p_value,
            "difference_low": low,
            "difference_high": high,
            "losing_version": loser,
            "problem": self.problem,
            "decision": str(self),
        }
        return {f"{_GATE}{key}": str(value) for key, value in kept.items() if value is not None}

    @staticmethod
    def read(
        tags: Mapping[str, str], value: float, objective: Metric = DEFAULT_OBJECTIVE
    ) -> "Decision":
        """The decision in a version's tags; `value` and `objective` where they hold none."""
        objective = METRICS.get(tags.get(f"{_GATE}objective", ""), objective)

        def number(name: str) -> float | None:
            text = tags.get(_GATE + name)
            return None if text is None else float(text)

        champion, measured = number("champion_version"), number(f"test_{objective.stem}")
        low, high = number("difference_low"), number("difference_high")
        exact, resampled = (number(f"{test}_p_value") for test in _TESTS)
        return Decision(
            promoted=tags.get(_PROMOTED) == "true",
            policy=tags.get(f"{_GATE}policy", ""),
            value=value if measured is None else measured,
            champion=None if champion is None else int(champion),
            champion_value=number(f"champion_test_{objective.stem}"),
            p_value=resampled if exact is None else exact,
            problem=tags.get(f"{_GATE}problem"),
            objective=objective,
            interval=None if low is None or high is None else (low, high),
        )

    def __str__(self) -> str:
        decision = "promoted" if self.promoted else "not promoted"
        if self.champion is None:
            policy = "" if self.promoted else f", --promote {self.policy}"
            return f"{decision}: nothing was in production{policy}"
        if self.problem is not None:
            remedy = "" if self.promoted else "; to replace it run again with --promote always"
            return (
                f"{decision}: version {self.champion}, in production, could not be compared: "
                f"{self.problem}{remedy}"
            )
        assert self.champion_value is not None
        assert self.p_value is not None
        text, label = self.objective.text, self.objective.label
        significant = "significant" if self.p_value < SIGNIFICANT else "not significant"
        p_value = f"= {self.p_value:.2g}" if self.p_value > SMALLEST_P else f"< {SMALLEST_P}"
        policy = "" if self.policy == "if-better" else f", --promote {self.policy}"
        return (
            f"{decision}: test {label} {text(self.value)} against {text(self.champion_value)} "
            f"of version {self.champion}, {self._test} p {p_value} ({significant} at 5 %)"
            f"{policy}"
        )

    @property
    def _test(self) -> str:
        """Which test was made, in words."""
        if self.interval is None:
            return "exact McNemar"
        low, high = map(self.objective.text, self.interval)
        return f"paired bootstrap, 95 % interval of the difference {low} to {high},"


def decide(
    policy: str, value: float, found: Found, champion: int, objective: Metric = DEFAULT_OBJECTIVE
) -> Decision:
    """The decision on a challenger with this test value, compared with version `champion`.

    found: the comparison, or why there is none. With `if-better`, the challenger is promoted only
    if its value is better.
    """
    if isinstance(found, str):
        promoted = policy == "always"
        return Decision(promoted, policy, value, champion, problem=found, objective=objective)
    better = objective.sign * (found.challenger - found.champion) > 0
    return Decision(
        promoted=policy == "always" or (policy == "if-better" and better),
        policy=policy,
        value=found.challenger,
        champion=champion,
        champion_value=found.champion,
        p_value=found.p_value,
        objective=objective,
        interval=(found.low, found.high) if isinstance(found, PairedBootstrap) else None,
    )


def promote(stores: "Stores", run: Run, compare: Compare) -> tuple[int, Decision]:
    """Register the model of the retraining `run`, and promote it to production if it is better.

    Returns its version and the decision. A version that was promoted once is not promoted again;
    any other decision stands as long as the champion that it names, or none, is in production.
    """
    config, client = stores.config, stores.tracking.client
    version = find_version(stores.tracking, config, run.info.run_id)
    if version is not None:
        champion = aliased_version(client, config.model_name)
        decision = Decision.read(version.tags, *_measured(stores, run))
        if _is_decided(version, decision, config.promote, champion):
            return int(version.version), decision
    with promotion_lock(config):
        version = version or register(stores.tracking, config, run)
        link_trial(stores, run, version)
        decision = _decide(stores, run, version, compare)
        _write_tags(stores.tracking, version, decision)
        if decision.promoted:
            _point_production_at(stores, version)
        if decision.is_final:
            _mark_decided(stores.tracking, version, decision)  # last: the rest is done
    return int(version.version), decision


def _is_decided(
    version: ModelVersion, decision: Decision, policy: str, champion: ModelVersion | None
) -> bool:
    """Whether `decision` was carried out, and was made by this policy against this champion."""
    if decision.promoted or _PROMOTED not in version.tags:
        return decision.promoted
    # Where the alias was moved to the version itself by hand, there is nothing left to decide.
    against = None if champion is None else int(champion.version)
    return decision.policy == policy and against in (decision.champion, int(version.version))


def link_trial(stores: "Stores", run: Run, version: ModelVersion) -> None:
    """Record in the retrained trial, and in its run, which version it became."""
    trial = stores.study.get_trials(deepcopy=False)[int(run.data.tags[NUMBER])]
    name = f"{version.name}/{version.version}"
    if trial.user_attrs.get(VERSION) != name:
        stores.amend(trial, VERSION, name)
        stores.tracking.client.set_tag(trial.user_attrs[RUN_ID], MODEL, name)


def _decide(stores: "Stores", run: Run, version: ModelVersion, compare: Compare) -> Decision:
    policy = stores.config.promote
    value, objective = _measured(stores, run)
    champion = aliased_version(stores.tracking.client, version.name)
    if champion is None:
        return Decision(policy != "never", policy, value, objective=objective)
    number, against = int(version.version), int(champion.version)
    if number == against:  # an earlier run was killed after it had set the alias
        return Decision.read({**version.tags, _PROMOTED: "true"}, value, objective)
    found = _other_data(stores.tracking, run, champion) or compare(number, against)
    return decide(policy, value, found, against, objective)


def _measured(stores: "Stores", run: Run) -> tuple[float, Metric]:
    """The objective of the study, and its value on the test examples in the retraining `run`."""
    objective = objective_of(stores.study)
    return run.data.metrics[f"test_{objective.stem}"], objective


def _other_data(tracking: Tracking, run: Run, champion: ModelVersion) -> str | None:
    """Why the champion can't be compared with the model of `run`, if their data differ.

    None where the champion's data are unknown, as those of a version registered by hand.
    """
    origin = tracking.find(champion.run_id) if champion.run_id else None
    digest = champion.tags.get(DATASET) or (origin and origin.data.tags.get(DATASET))
    if not digest or digest == run.data.tags.get(DATASET, digest):
        return None
    path = origin.data.params.get("dataset", "") if origin else ""
    name = path.rstrip("/").rsplit("/", 1)[-1]
    return f"it was trained on other data ({name}{name and ', '}{digest[:12]})"


def _write_tags(tracking: Tracking, version: ModelVersion, decision: Decision) -> None:
    """Replace the tags of an earlier decision; until `_mark_decided`, the version is undecided."""
    tags = decision.as_tags(int(version.version))
    outdated = [key for key in version.tags if key.startswith(_GATE) and key not in tags]
    for key in ([_PROMOTED] if _PROMOTED in version.tags else []) + outdated:
        tracking.client.delete_model_version_tag(version.name, version.version, key)
    for key, value in tags.items():
        if version.tags.get(key) != value:
            tracking.client.set_model_version_tag(version.name, version.version, key, value)


def _point_production_at(stores: "Stores", version: ModelVersion) -> None:
    stores.tracking.client.set_registered_model_alias(version.name, ALIAS, version.version)
    follow_alias(stores.tracking, stores.config)


def _mark_decided(tracking: Tracking, version: ModelVersion, decision: Decision) -> None:
    mark = str(decision.promoted).lower()
    tracking.client.set_model_version_tag(version.name, version.version, _PROMOTED, mark)


@dataclass(frozen=True)
class Winner:
    """The winning trial, retrained, and its version of the registered model.

    value: the objective of the trial. metrics: of the test examples, by name, as `test_loss`.
    verdict: whether the version was promoted. in_production: the version that is there now, perhaps
    a later study's. new: whether this run retrained it.
    """

    trial: int
    run_id: str
    version: int
    value: float
    metrics: Mapping[str, float]
    verdict: Decision
    in_production: int | None
    new: bool

    @property
    def test_loss(self) -> float:
        """The loss on the test examples."""
        return self.metrics["test_loss"]

    @property
    def test_accuracy(self) -> float:
        """The accuracy on the test examples. Raises KeyError in a regression."""
        return self.metrics["test_accuracy"]
