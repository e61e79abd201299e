"""What a thread of a process needs to run tasks, opened once."""

import threading

from search.config import custom_model
from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.promotion.comparison import compare_versions
from search.promotion.gate import Found
from search.promotion.retrain import retrain
from search.study import outline, sampling, storage, trials
from search.study.storage import METADATA, SETTINGS
from search.tracking.runs import Tracking
from search.training import environment


class Worker:
    """What a thread needs to run tasks: the study, the dataset and the tracking.

    rest_until: by the monotonic clock; until then MLflow, which has failed, is left alone.
    """

    def __init__(
        self, config: StudyConfig, parent_run: str, dataset: Dataset, threads: int = 1
    ) -> None:
        """threads: how many workers this process has, each a thread of its own."""
        from search.training.train import use_one_thread_each

        use_one_thread_each(threads)
        self.config = config
        self.dataset = dataset
        self.parent_run = parent_run
        self.study = trials.SlottedStudy(
            study_name=config.study_name,
            storage=outline.OutlineStorage(storage.open_storage(config.storage)),
            pruner=sampling.pruner(config),
        )
        self.metadata = self.study.user_attrs[METADATA]
        if config.model is not None:
            custom_model.check(config.model, self.study.user_attrs[SETTINGS]["model"])
        if dataset.pipeline is not None:
            dataset.pipeline.check()
        self.tracking = Tracking(config).open()
        self.owner = {**trials.owner_of_this_process(), "thread": threading.get_ident()}
        self.environment = environment.here()
        self.rest_until = 0.0
        self.closed = False

    def close(self) -> None:
        """Close the connections; no further trial is started."""
        self.closed = True
        storage.close_study(self.study)

    def retrain(self, number: int) -> str:
        """Retrain trial `number` on all training data, log the model and return its run."""
        return retrain(
            self.config, self.dataset, self.tracking, self.parent_run, self.study, number
        )

    def compare(self, challenger: int, champion: int) -> Found:
        """Compare two versions of the registered model on the test examples."""
        return compare_versions(self.config, self.dataset, self.tracking, challenger, champion)
