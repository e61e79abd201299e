"""Optuna's storage on a database server: made once, seen from all hosts, patient with restarts."""

import time
import warnings
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from search.config import InputError, one_line
from search.database import (
    SERVER_TIMEOUT,
    connect_arguments,
    is_cut,
    patient,
    server_lock,
    wait_for_server,
)
from search.urls import redact

HEARTBEAT = 10  # seconds between two signs of life of a trial
GRACE = 60  # seconds without one after which it is lost; longer than a restart is waited for


def braces(url: str) -> str:
    """RDBStorage formats its URL; doubled braces survive that."""
    return url.replace("{", "{{").replace("}", "}}")


@patient
def open_storage(url: str) -> "ServerStorage":
    """The storage behind `url`; its tables are made first where there are none.

    Optuna's own first start does not survive another at the same time.
    """
    with server_lock(url, "Optuna's tables"):
        try:
            return ServerStorage(url)
        except RuntimeError as error:  # tables of another Optuna
            raise InputError(
                f"--storage must be a database of Optuna {optuna.__version__}, but "
                f"{redact(url)} is not: {one_line(error)}"
            ) from None


class ServerStorage(RDBStorage):
    """A storage whose running trials give signs of life, and whose server may be restarted."""

    def __init__(self, url: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(
                braces(url),
                engine_kwargs={"pool_pre_ping": True, "connect_args": connect_arguments(url)},
                heartbeat_interval=HEARTBEAT,
            )
        wait_for_server(self.engine)
        self.remove_session()
        self.engine.dispose()  # the connections so far are in the server's time zone, not in UTC

    @patient
    def silent(self, study_id: int) -> set[int]:
        """The ids of the running trials that have given no sign of life for `GRACE` seconds.

        The server's clock alone counts.
        """
        trial, sign = models.TrialModel, models.TrialHeartbeatModel
        query = (
            sqlalchemy.select(trial.trial_id, sign.heartbeat, sqlalchemy.func.now())
            .outerjoin(sign, sign.trial_id == trial.trial_id)
            .where(trial.study_id == study_id, trial.state.in_([TrialState.RUNNING]))
        )
        with self.engine.connect() as connection:
            return {
                trial_id
                for trial_id, last, now in connection.execute(query)
                if last is None or (now.replace(tzinfo=None) - last).total_seconds() > GRACE
            }

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """None: Optuna would fail them without a reason, and `silent` knows them."""
        return []

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Any
    ) -> Any:
        """A new trial, with its first sign of life in the same transaction."""
        trial = super()._get_prepared_new_trial(study_id, template_trial, session)
        if template_trial is None or not template_trial.state.is_finished():
            session.add(models.TrialHeartbeatModel(trial_id=trial.trial_id))
        return trial

    def record_heartbeat(self, trial_id: int) -> None:
        """Give a sign of life; where the server does not take it, the next one will do."""
        try:
            super().record_heartbeat(trial_id)
        except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError):
            return

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        """End a trial, once, also where a cut connection hides that it was done."""
        deadline = time.monotonic() + SERVER_TIMEOUT
        cut = False
        while True:
            try:
                return super().set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                if cut and self.get_trial(trial_id).state is state:
                    return True
                raise
            except StorageInternalError as error:
                if not is_cut(error) or time.monotonic() > deadline:
                    raise
                cut = True


for _name in (
    *("get_study_id_from_name", "get_study_name_from_id", "get_study_directions"),
    *("get_study_user_attrs", "get_study_system_attrs", "get_trial", "_get_trials"),
    *("set_study_user_attr", "set_study_system_attr", "set_trial_user_attr"),
    *("set_trial_system_attr", "_set_trial_param", "set_trial_intermediate_value"),
):
    setattr(ServerStorage, _name, patient(getattr(RDBStorage, _name)))


def of(study: optuna.Study) -> ServerStorage | None:
    """The server's storage of `study`; None where it lives in a file or in memory."""
    backend = getattr(study._storage, "_backend", study._storage)
    return backend if isinstance(backend, ServerStorage) else None
