"""The registry's side of the winner: register it, and let it into production if it is better.

The gate compares challenger and champion on the same test images. Every step leaves a mark that the
next start finds, so a run killed between any two of them is continued there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from search.config.settings import StudyConfig
from search.promotion.comparison import SIGNIFICANT, SMALLEST_P, Comparison
from search.study.lock import promotion_lock
from search.study.storage import RUN_ID, VERSION
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


def _other_data(tracking: Tracking, run: Run, champion: ModelVersion) -> str | None:
    """Why the champion can't be compared with the model of `run`, if other data is the reason.

    None where nothing tells on which data it was trained, as of a version registered by hand.
    """
    origin = tracking.find(champion.run_id) if champion.run_id else None
    digest = champion.tags.get(DATASET) or (origin and origin.data.tags.get(DATASET))
    if not digest or digest == run.data.tags.get(DATASET, digest):
        return None
    path = origin.data.params.get("dataset", "") if origin else ""
    name = path.rsplit("/", 1)[-1]
    return f"it was trained on other data ({name}{name and ', '}{digest[:12]})"


# ---- the verdict ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """Whether a version went to production, and why.

    policy: the `--promote` that decided. champion: the version that was in production before, None
    where nothing was. accuracy, champion_accuracy: on the test examples. p_value: of the exact
    McNemar test. problem: why the champion could not be compared.
    """

    promoted: bool
    policy: str
    accuracy: float
    champion: int | None = None
    champion_accuracy: float | None = None
    p_value: float | None = None
    problem: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether the next start leaves it as it is: a problem may be gone by then."""
        return self.promoted or self.problem is None

    def as_tags(self, version: int) -> dict[str, str]:
        """What `version` keeps of it; `read` reads it."""
        loser = None
        if self.champion_accuracy is not None:
            loser = self.champion if self.accuracy > self.champion_accuracy else version
        kept = {
            "policy": self.policy,
            "test_accuracy": self.accuracy,
            "champion_version": self.champion,
            "champion_test_accuracy": self.champion_accuracy,
            "mcnemar_p_value": self.p_value,
            "losing_version": loser,
            "problem": self.problem,
            "decision": str(self),
        }
        return {f"{_GATE}{key}": str(value) for key, value in kept.items() if value is not None}

    @staticmethod
    def read(tags: Mapping[str, str], accuracy: float) -> "Decision":
        """The verdict in a version's tags; `accuracy` where they hold none."""

        def number(name: str) -> float | None:
            text = tags.get(_GATE + name)
            return None if text is None else float(text)

        champion, measured = number("champion_version"), number("test_accuracy")
        return Decision(
            promoted=tags.get(_PROMOTED) == "true",
            policy=tags.get(f"{_GATE}policy", ""),
            accuracy=accuracy if measured is None else measured,
            champion=None if champion is None else int(champion),
            champion_accuracy=number("champion_test_accuracy"),
            p_value=number("mcnemar_p_value"),
            problem=tags.get(f"{_GATE}problem"),
        )

    def __str__(self) -> str:
        decision = "promoted" if self.promoted else "not promoted"
        if self.champion is None:
            return f"{decision}: nothing was in production" + (
                "" if self.promoted else f", --promote {self.policy}"
            )
        if self.problem is not None:
            remedy = "" if self.promoted else "; to replace it run again with --promote always"
            return (
                f"{decision}: version {self.champion}, in production, could not be compared: "
                f"{self.problem}{remedy}"
            )
        assert self.champion_accuracy is not None
        assert self.p_value is not None
        chance = "more than chance" if self.p_value < SIGNIFICANT else "may be chance"
        p_value = f"= {self.p_value:.2g}" if self.p_value > SMALLEST_P else f"< {SMALLEST_P}"
        policy = "" if self.policy == "if-better" else f", --promote {self.policy}"
        return (
            f"{decision}: test accuracy {self.accuracy:.4f} against {self.champion_accuracy:.4f} "
            f"of version {self.champion}, exact McNemar p {p_value} ({chance}){policy}"
        )


Compare = Callable[[int, int], Comparison | str]


def decide(policy: str, accuracy: float, found: Comparison | str | None, champion: int) -> Decision:
    """The verdict over a challenger with this test accuracy, against version `champion`.

    By `if-better` the champion stays unless the challenger's accuracy is higher.
    """
    if isinstance(found, Comparison):
        better = found.challenger > found.champion
        return Decision(
            promoted=policy == "always" or (policy == "if-better" and better),
            policy=policy,
            accuracy=found.challenger,
            champion=champion,
            champion_accuracy=found.champion,
            p_value=found.p_value,
        )
    return Decision(policy == "always", policy, accuracy, champion, problem=found)


# ---- the registry --------------------------------------------------------------------------------


def promote(stores: "Stores", run: Run, compare: Compare) -> tuple[int, Decision]:
    """Register the model of the retraining `run`, and let it into production if the gate says so.

    Returns its version and the verdict. What was promoted once is not promoted again; another
    verdict stands while the version that it names, or none, is in production.
    """
    tracking, config = stores.tracking, stores.config
    client, name = tracking.client, config.model_name
    accuracy = run.data.metrics["test_accuracy"]
    version = find_version(tracking, config, run.info.run_id)
    if version is None or not _is_decided(version, config, aliased_version(client, name)):
        with promotion_lock(config):
            if version is None:
                version = register(tracking, config, run)
            number = int(version.version)
            _link(stores, int(run.data.tags[NUMBER]), f"{name}/{number}")
            champion = aliased_version(client, name)
            if champion is not None and int(champion.version) == number:  # killed after the alias
                verdict = Decision.read({**version.tags, _PROMOTED: "true"}, accuracy)
            elif champion is None:
                verdict = Decision(config.promote != "never", config.promote, accuracy)
            else:
                against = int(champion.version)
                found = _other_data(tracking, run, champion) or compare(number, against)
                verdict = decide(config.promote, accuracy, found, against)
            tags = verdict.as_tags(number)
            if _PROMOTED in version.tags:  # of an earlier verdict: from here on it is open again
                client.delete_model_version_tag(name, version.version, _PROMOTED)
            for gone in [key for key in version.tags if key.startswith(_GATE) and key not in tags]:
                client.delete_model_version_tag(name, version.version, gone)
            for key, value in tags.items():
                if version.tags.get(key) != value:
                    client.set_model_version_tag(name, version.version, key, value)
            if verdict.promoted:
                client.set_registered_model_alias(name, ALIAS, version.version)
                follow_alias(tracking, config)
            if verdict.is_final:  # last: it says that the rest is done
                mark = str(verdict.promoted).lower()
                client.set_model_version_tag(name, version.version, _PROMOTED, mark)
        return number, verdict
    return int(version.version), Decision.read(version.tags, accuracy)


def _is_decided(version: ModelVersion, config: StudyConfig, champion: ModelVersion | None) -> bool:
    """Whether the gate's verdict was carried out, by this policy and against this champion."""
    verdict = Decision.read(version.tags, accuracy=0.0)
    if verdict.promoted or _PROMOTED not in version.tags:
        return verdict.promoted
    # Where the alias was moved to the version itself by hand, the gate has nothing to add.
    against = None if champion is None else int(champion.version)
    return verdict.policy == config.promote and against in (verdict.champion, int(version.version))


def _link(stores: "Stores", number: int, version: str) -> None:
    """Let the trial, and its run, name the version that was made of it."""
    trial = stores.study.get_trials(deepcopy=False)[number]
    if trial.user_attrs.get(VERSION) != version:
        stores.amend(trial, VERSION, version)
        stores.tracking.client.set_tag(trial.user_attrs[RUN_ID], MODEL, version)


@dataclass(frozen=True)
class Winner:
    """The trial that won, trained anew, and its version of the registered model.

    val_accuracy: of the trial. verdict: whether it went to production. in_production: the version
    that is there now, which may be a later study's. new: whether it was trained anew in this run.
    """

    trial: int
    run_id: str
    version: int
    val_accuracy: float
    test_loss: float
    test_accuracy: float
    verdict: Decision
    in_production: int | None
    new: bool
