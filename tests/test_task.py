import pytest

from search.config.data_settings import OBJECTIVES
from search.errors import InputError
from search.task import KINDS, METRICS, Metric, Task


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_of_a_task_are_known_and_its_objective_is_one_of_them(kind: str) -> None:
    decided = KINDS[kind]
    assert decided.metrics[0] == "val_loss" and set(decided.metrics) <= set(METRICS)
    assert decided.objective in decided.metrics
    assert Task(kind).objective("auto").name == decided.objective


def test_an_objective_that_is_not_of_the_task_is_refused() -> None:
    with pytest.raises(InputError, match=r"for regression val_loss, .* got 'val_accuracy'"):
        Task("regression").objective("val_accuracy")
    assert Task("classification", 3).objective("val_auc") is METRICS["val_auc"]


def test_direction() -> None:
    up, down = METRICS["val_r2"], METRICS["val_rmse"]
    assert (up.direction, down.direction) == ("maximize", "minimize")
    assert (up.best([1, 2]), down.best([1, 2])) == (2, 1)
    assert up.sign * 2 > up.sign * 1 and down.sign * 1 > down.sign * 2


def test_text_shows_unbounded_metrics_in_their_own_size() -> None:
    assert METRICS["val_auc"].text(0.98765) == "0.9877"
    assert METRICS["val_mae"].text(45678.9) == "45679"
    assert Metric("val_x", "x").stem == "x"


def test_class_names() -> None:
    assert Task("classification", 2, ("no", "yes")).name(1) == "yes"
    assert Task("classification", 2).name(1) == "1"
    assert Task("regression").classes == 0 and Task("classification", 2).classes == 2


def test_each_kind_has_one_sort_of_target() -> None:
    tasks = [Task(kind, 3) for kind in KINDS]
    assert [(t.classes, t.labels, t.is_number, t.target_shape) for t in tasks] == [
        (3, 0, False, ()),
        (0, 3, False, (3,)),
        (0, 0, True, ()),
    ]
    assert [str(task) for task in tasks[:2]] == ["3 classes", "3 labels"]


def test_every_metric_is_a_choice_of_the_option() -> None:
    assert set(OBJECTIVES) == set(METRICS)
