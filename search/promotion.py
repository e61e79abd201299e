"""The registry's side of the winner: register it, and let it into production if it is better.

The gate compares challenger and champion on the same test images. Every step leaves a mark that the
next start finds, so a run killed between any two of them is continued there.
"""

import contextlib
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray
from requests import RequestException

from search import evaluation
from search.config import RunError, StudyConfig, one_line
from search.contract import DATASET, LINEAGE, MODEL, MODEL_URI, NUMBER
from search.data import Dataset, scaled
from search.database import server_lock
from search.lock import Timeout, file_lock, host_wide
from search.production import ALIAS, aliased
from search.tracking import Tracking
from search.urls import sqlite_path

if TYPE_CHECKING:
    from search.reconcile import Ledgers

STAGE = "Production"
_PROMOTED, _GATE = "promoted", "gate."
_SIGNIFICANT = 0.05
_held: set[tuple[int, str]] = set()  # threads of this process and the locks that they have
_SMALLEST_P = 1e-300  # stored and shown in place of smaller ones, which floats round to 0


# ---- the comparison, in a worker -----------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two models on the same test examples.

    challenger, champion: their accuracies. only_challenger, only_champion: how many examples one
    of them alone gets right.
    """

    challenger: float
    champion: float
    only_challenger: int
    only_champion: int

    @property
    def p_value(self) -> float:
        """Two-sided exact McNemar test (McNemar 1947): whether the difference may be chance.

        Under chance each of the examples that one of them alone gets right is a fair coin's throw.
        1e-300 stands for all that is smaller.
        """
        from scipy.stats import binomtest

        throws = self.only_challenger + self.only_champion
        p_value = float(binomtest(self.only_challenger, throws).pvalue) if throws else 1.0
        return max(p_value, _SMALLEST_P)


def compare(
    config: StudyConfig, dataset: Dataset, tracking: Tracking, challenger: int, champion: int
) -> Comparison | str:
    """Compare two versions on the test examples; or say why the champion can't be compared."""
    right = []
    for version in (challenger, champion):
        found = _right(f"models:/{config.model_name}/{version}", dataset, tracking)
        if isinstance(found, str) and version == champion:
            return found
        if isinstance(found, str):
            raise RunError(
                f"version {version} of {config.model_name} was just registered, but {found}; look "
                "at its artifacts, and run the same command again"
            )
        right.append(found)
    mine, theirs = right
    return Comparison(
        challenger=float(mine.mean()),
        champion=float(theirs.mean()),
        only_challenger=int((mine & ~theirs).sum()),
        only_champion=int((theirs & ~mine).sum()),
    )


def _right(uri: str, dataset: Dataset, tracking: Tracking) -> NDArray[np.bool_] | str:
    """Which test examples a model gets right, or why it can't be asked."""
    with tempfile.TemporaryDirectory() as folder:  # else MLflow writes where the model is
        try:
            with tracking.addressed():
                import mlflow.keras

                model: Any = mlflow.keras.load_model(uri, dst_path=folder)
            shapes = model.input_shape, model.output_shape
            if shapes != ((None, dataset.features), (None, dataset.classes)):
                return (
                    f"it takes {shapes[0]} and gives {shapes[1]}, where this study's data have "
                    f"{dataset.features} features and {dataset.classes} classes"
                )
            predicted, _ = evaluation.predict(model, scaled(dataset.x_test))
        except MemoryError:
            raise
        except Exception as error:  # a damaged file makes Keras, zipfile and json raise anything
            if _is_of_server(error, tracking):
                raise
            if isinstance(error, KeyError) and error.args == ("keras",):
                return "it is not a Keras model"
            why = one_line(error).replace(f"{folder}/", "")
            return f"it can't be loaded ({type(error).__name__}: {why})"
    right: NDArray[np.bool_] = predicted == dataset.y_test
    return right


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


def _is_of_server(error: Exception, tracking: Tracking) -> bool:
    """Whether a server failed, which may answer later, and not the model."""
    if not tracking.uri.startswith("http"):
        return False
    if isinstance(error, MlflowException):
        return error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
    return isinstance(error, RequestException)


# ---- the verdict ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
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
    def read(tags: Mapping[str, str], accuracy: float) -> "Verdict":
        """The verdict in a version's tags; `accuracy` where they hold none."""

        def number(name: str) -> float | None:
            text = tags.get(_GATE + name)
            return None if text is None else float(text)

        champion, measured = number("champion_version"), number("test_accuracy")
        return Verdict(
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
        chance = "more than chance" if self.p_value < _SIGNIFICANT else "may be chance"
        p_value = f"= {self.p_value:.2g}" if self.p_value > _SMALLEST_P else f"< {_SMALLEST_P}"
        policy = "" if self.policy == "if-better" else f", --promote {self.policy}"
        return (
            f"{decision}: test accuracy {self.accuracy:.4f} against {self.champion_accuracy:.4f} "
            f"of version {self.champion}, exact McNemar p {p_value} ({chance}){policy}"
        )


Compare = Callable[[int, int], Comparison | str]


def judge(policy: str, accuracy: float, found: Comparison | str | None, champion: int) -> Verdict:
    """The verdict over a challenger with this test accuracy, against version `champion`.

    By `if-better` the champion stays unless the challenger's accuracy is higher.
    """
    if isinstance(found, Comparison):
        better = found.challenger > found.champion
        return Verdict(
            promoted=policy == "always" or (policy == "if-better" and better),
            policy=policy,
            accuracy=found.challenger,
            champion=champion,
            champion_accuracy=found.champion,
            p_value=found.p_value,
        )
    return Verdict(policy == "always", policy, accuracy, champion, problem=found)


# ---- the registry --------------------------------------------------------------------------------


def promote(ledgers: "Ledgers", run: Run, compare: Compare) -> tuple[int, Verdict]:
    """Register the model of the retraining `run`, and let it into production if the gate says so.

    Returns its version and the verdict. What was promoted once is not promoted again; another
    verdict stands while the version that it names, or none, is in production.
    """
    tracking, config = ledgers.tracking, ledgers.config
    client, name = tracking.client, config.model_name
    accuracy = run.data.metrics["test_accuracy"]
    version = find_version(tracking, config, run.info.run_id)
    if version is None or not _is_decided(version, config, aliased(client, name)):
        with _promoting(config):
            if version is None:
                version = _register(tracking, config, run)
            number = int(version.version)
            _link(ledgers, int(run.data.tags[NUMBER]), f"{name}/{number}")
            champion = aliased(client, name)
            if champion is not None and int(champion.version) == number:  # killed after the alias
                verdict = Verdict.read({**version.tags, _PROMOTED: "true"}, accuracy)
            elif champion is None:
                verdict = Verdict(config.promote != "never", config.promote, accuracy)
            else:
                against = int(champion.version)
                found = _other_data(tracking, run, champion) or compare(number, against)
                verdict = judge(config.promote, accuracy, found, against)
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
                _follow_alias(tracking, name)
            if verdict.is_final:  # last: it says that the rest is done
                mark = str(verdict.promoted).lower()
                client.set_model_version_tag(name, version.version, _PROMOTED, mark)
        return number, verdict
    return int(version.version), Verdict.read(version.tags, accuracy)


def find_version(tracking: Tracking, config: StudyConfig, run_id: str) -> ModelVersion | None:
    """The model version that was registered from `run_id`."""
    found = tracking.client.search_model_versions(f"run_id = '{run_id}'")
    versions = [version for version in found if version.name == config.model_name]
    return versions[0] if versions else None


def _is_decided(version: ModelVersion, config: StudyConfig, champion: ModelVersion | None) -> bool:
    """Whether the gate's verdict was carried out, by this policy and against this champion."""
    verdict = Verdict.read(version.tags, accuracy=0.0)
    if verdict.promoted or _PROMOTED not in version.tags:
        return verdict.promoted
    # Where the alias was moved to the version itself by hand, the gate has nothing to add.
    against = None if champion is None else int(champion.version)
    return verdict.policy == config.promote and against in (verdict.champion, int(version.version))


def _register(tracking: Tracking, config: StudyConfig, run: Run) -> ModelVersion:
    client = tracking.client
    with contextlib.suppress(MlflowException):  # it exists
        client.create_registered_model(config.model_name)
    model_id = run.data.tags[MODEL_URI].removeprefix("models:/")
    return client.create_model_version(
        config.model_name,
        source=client.get_logged_model(model_id).artifact_location,
        run_id=run.info.run_id,
        model_id=model_id,
        tags={key: value for key, value in run.data.tags.items() if key in LINEAGE},
    )


def _link(ledgers: "Ledgers", number: int, version: str) -> None:
    """Let the trial, and its run, name the version that was made of it."""
    trial = ledgers.study.get_trials(deepcopy=False)[number]
    if trial.user_attrs.get("model_version") != version:
        ledgers.amend(trial, "model_version", version)
        ledgers.tracking.client.set_tag(trial.user_attrs["mlflow_run_id"], MODEL, version)


def wrong_stages(tracking: Tracking, name: str) -> list[tuple[ModelVersion, str]]:
    """The versions whose stage does not follow the alias, each with the stage it should have.

    The alias is one row, so one version by construction. Stages are one column a version, and two
    processes that promote at once leave two.
    """
    production = aliased(tracking.client, name)
    if production is None:
        return []  # nothing to follow
    versions = tracking.client.search_model_versions(f"name = '{name}'")
    wanted = [(v, STAGE if v.version == production.version else "Archived") for v in versions]
    wrong = [
        (version, stage)
        for version, stage in wanted
        if version.current_stage != stage and STAGE in (stage, version.current_stage)
    ]
    return sorted(wrong, key=lambda pair: pair[1] != STAGE)


def follow_alias(tracking: Tracking, config: StudyConfig) -> None:
    """Give the stage Production to the version with the alias, and to no other."""
    with _promoting(config):
        _follow_alias(tracking, config.model_name)


def _follow_alias(tracking: Tracking, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # stages are deprecated, and asked for
        for version, stage in wrong_stages(tracking, name):
            tracking.client.transition_model_version_stage(name, version.version, stage)


def check_lock(config: StudyConfig) -> None:
    """Raise InputError where this user can't take the lock that `promote` needs."""
    with contextlib.suppress(Timeout), _lock_here(config, timeout=0):  # held: so it can be taken
        pass


def _lock_here(config: StudyConfig, *, timeout: float = 600) -> AbstractContextManager[Path]:
    path = sqlite_path(config.tracking_uri)
    beside = host_wide(f"registry {config.tracking_uri}") if path is None else path.resolve()
    return file_lock(beside, config.model_name, timeout=timeout, reentrant=True)


@contextlib.contextmanager
def _promoting(config: StudyConfig) -> Iterator[None]:
    """One process at a time compares and promotes: of this host, and of the study's server.

    Reentrant: where a worker dies during the comparison, the stages are repaired, too.
    """
    name = f"model {config.model_name} of {config.tracking_uri}"
    mine = threading.get_ident(), name
    if mine in _held:
        yield
        return
    with _lock_here(config), server_lock(config.storage, name):
        _held.add(mine)
        try:
            yield
        finally:
            _held.remove(mine)
