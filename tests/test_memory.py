"""Arrays that processes share: one copy, the same numbers, and nothing left behind."""

import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import arrays

from search import memory
from search.data.dataset import Dataset
from search.data.load import load_dataset
from search.data.preparation import fit
from search.errors import InputError
from search.memory import empty, free, hand_over, moved, opened, partition, shared

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create is Linux'")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    np.savez(tmp_path / "data.npz", **arrays())
    return load_dataset(str(tmp_path / "data.npz"), 0.1, split="stratified", normalize=True)


def grid(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@LINUX
def test_another_process_maps_the_arrays_and_gets_no_copy(dataset: Dataset) -> None:
    handed = pickle.dumps(hand_over(dataset))
    assert len(handed) < 3_000
    code = (
        "import pickle, sys; from search.memory import opened; "
        "data = opened(pickle.load(sys.stdin.buffer)); data.x_all[0] = 7; "
        "sys.stdout.buffer.write(pickle.dumps((data.x_all[1:], data.y_all, data.x_test)))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=handed, capture_output=True)
    assert done.returncode == 0, done.stderr
    x, y, test = pickle.loads(done.stdout)
    np.testing.assert_array_equal(x, dataset.x_all[1:])
    np.testing.assert_array_equal(y, dataset.y_all)
    np.testing.assert_array_equal(test, dataset.x_test)
    assert not (dataset.x_all[0] == 7).all(), "what a process writes stays in it"


@LINUX
def test_a_change_is_seen_because_the_memory_is_the_same(dataset: Dataset) -> None:
    other = opened(hand_over(dataset))
    dataset.x_all[3, 2] = 41.5
    assert other.x_all[3, 2] == 41.5
    assert (other.name, other.train_size) == (dataset.name, dataset.train_size)


@LINUX
def test_the_memory_ends_with_the_last_array_that_needs_it() -> None:
    def files() -> int:
        links = Path("/proc/self/fd").iterdir()
        return sum("memfd:dataset" in str(link.readlink()) for link in links if link.is_symlink())

    before = files()
    array = empty((10, 10), np.float32)
    view = array[2:].reshape(-1)
    del array
    assert files() > before
    del view
    assert files() == before


def test_what_another_machine_gets_are_arrays(dataset: Dataset) -> None:
    sent = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(sent.x_all, dataset.x_all)


@dataclass
class Owner:
    own: Any
    name: str = "data"


def test_an_array_that_is_not_shared_is_handed_over_as_it_is() -> None:
    owner = Owner(grid(3, 2))
    assert opened(pickle.loads(pickle.dumps(hand_over(owner)))).own.tolist() == owner.own.tolist()


def test_without_memfd_every_process_gets_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(memory.os, "memfd_create", raising=False)
    owner = Owner(shared(grid(3, 2)))
    assert isinstance(hand_over(owner).own, np.ndarray)


@LINUX
def test_a_part_of_an_array_keeps_its_place() -> None:
    whole = shared(grid(100, 7))
    part = opened(hand_over(Owner(whole[40:60]))).own
    np.testing.assert_array_equal(part, grid(100, 7)[40:60])
    apart = whole[:, 1:3]  # rows that lie apart
    assert opened(hand_over(Owner(apart))).own is apart


@pytest.mark.parametrize("shape", [(1000,), (100, 10), (10, 5, 20), (0, 3), (1, 1)])
@pytest.mark.parametrize("chunk", [4, 64, 1000, 10**6])
def test_a_moved_array_has_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], chunk: int
) -> None:
    monkeypatch.setattr(memory, "CHUNK", chunk)
    for array in (grid(*shape).copy(), grid(*shape), grid(*shape).T):
        expected = array.copy()
        np.testing.assert_array_equal(moved(array), expected)


@pytest.mark.parametrize("chunk", [8, 100, 10**6])
def test_rows_move_to_the_end_in_their_order(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(memory, "CHUNK", chunk)
    rows, last = grid(50, 3), np.random.default_rng(0).random(50) < 0.3
    expected = np.concatenate([rows[~last], rows[last]])
    partition(rows, last)
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("shape", [(500, 7), (333, 1), (400, 130), (20, 2000)])
def test_statistics_of_some_features_at_a_time_are_those_of_all(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(memory, "CHUNK", 100)
    x = (np.random.default_rng(0).normal(size=shape) * 3 + 1).astype(np.float32)
    found = fit("x", x)
    np.testing.assert_array_equal(found.mean, x.mean(axis=0, dtype=float).astype(np.float32))
    variance = x.std(axis=0, dtype=float) ** 2
    np.testing.assert_array_equal(found.variance, variance.astype(np.float32))


# ---- does it fit? ------------------------------------------------------------------------------


def test_free_memory_is_that_of_the_machine_or_its_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_CGROUPS", ())
    there = free()
    assert 10**8 < there < 10**14
    for name, text in (
        ("memory.max", "300000000\n"),
        ("memory.current", "120000000\n"),
        ("memory.stat", "anon 1\ninactive_file 20000000\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUPS", ((str(tmp_path), "memory.max", "memory.current"),))
    assert free() == 200_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free() > there / 2


def test_data_that_do_not_fit_are_refused_before_they_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays())
    monkeypatch.setattr(memory, "free", lambda: 1_000)
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: pytest.fail("read"))
    with pytest.raises(InputError) as refusal:
        load_dataset(str(path), 0.1)
    assert str(refusal.value) == (
        f"--dataset {path} must fit into memory, but it needs 0.0 GB and 0.0 GB are free; take "
        "fewer or smaller examples, a machine with more memory, or a function that returns a "
        "tf.data.Dataset, which is trained batch by batch"
    )
