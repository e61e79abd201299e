"""What is read: the bundled digits, and the arrays of .npz files as they are."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import arrays, load

from search.data.load import load_dataset
from search.data.sources import ARRAYS, MNIST
from search.errors import InputError

SHA256 = {
    "x_train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "y_train": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "x_test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "y_test": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}


@pytest.mark.parametrize("key", ARRAYS)
def test_the_bundled_digits_are_the_standard_ones(key: str) -> None:
    with np.load(MNIST, allow_pickle=False) as archive:
        array = archive[key]
    assert array.dtype == np.uint8
    assert hashlib.sha256(array.tobytes()).hexdigest() == SHA256[key]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numbers_with_a_fraction_stay_as_they_are(tmp_path: Path, kind: type) -> None:
    x = np.linspace(-300, 300, 160).reshape(40, 4).astype(kind)
    dataset = load(tmp_path, x_train=x)
    assert dataset.x_all.dtype == np.float32
    np.testing.assert_array_equal(dataset.x_all, x.astype(np.float32))


def test_whole_numbers_other_than_bytes_stay_as_they_are(tmp_path: Path) -> None:
    x = np.arange(160).reshape(40, 4)
    np.testing.assert_array_equal(load(tmp_path, x_train=x).x_all, x)


def test_images_of_any_shape_become_flat(tmp_path: Path) -> None:
    x = np.zeros((40, 2, 3, 4), dtype=np.float32)
    dataset = load(tmp_path, x_train=x, x_test=x[:10])
    assert dataset.features == 24
    assert dataset.x_all.flags.c_contiguous


def test_labels_in_a_column_are_accepted(tmp_path: Path) -> None:
    column = load(tmp_path, y_train=np.arange(40)[:, None] % 2, y_test=np.arange(10)[:, None] % 2)
    row = load(tmp_path)
    assert column.y_all.shape == (40,)
    np.testing.assert_array_equal(column.y_all, row.y_all)
    np.testing.assert_array_equal(column.y_test, row.y_test)


def test_a_test_set_may_lack_a_class(tmp_path: Path) -> None:
    assert load(tmp_path, y_test=np.zeros(10, dtype=np.uint8)).classes == 2


def test_arrays_in_fortran_order_are_read_like_others(tmp_path: Path) -> None:
    usual = load(tmp_path)
    fortran = load(tmp_path, x_train=np.asfortranarray(arrays()["x_train"]))
    np.testing.assert_array_equal(fortran.x_all, usual.x_all)
    assert fortran.digest == usual.digest


def test_compressed_files_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "small.npz", **arrays())
    assert load_dataset(str(tmp_path / "small.npz"), 0.1).digest == load(tmp_path).digest


class Trap:
    """Unpickling it creates the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("key", ARRAYS)
def test_objects_are_never_unpickled(tmp_path: Path, key: str) -> None:
    marker = tmp_path / "marker"
    trap = np.array([Trap(marker)], dtype=object)
    with pytest.raises(InputError, match="must hold arrays of numbers, but has an array of obj"):
        load(tmp_path, **{key: trap})
    assert not marker.exists()
    with np.load(tmp_path / "data.npz", allow_pickle=True) as archive:
        archive[key][0].close()
    assert marker.exists(), "the trap does not work, so the test above shows nothing"


def test_a_name_that_is_neither_a_dataset_nor_a_file_is_refused() -> None:
    with pytest.raises(InputError, match=r"--dataset must be mnist, .*but got 'emnist'"):
        load_dataset("emnist", 0.1)
