"""Distorted images: how they move, by how much, and that the seed determines it."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray

from search.training import augmentation

KINDS = ("shift", "affine", "elastic")
SEED = (3, 4)
SIZE = 28


def test_the_smoothing_of_large_images_is_small() -> None:
    tracemalloc.start()
    kept = augmentation._smoothing(128, 96)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept.shape[1:] == (128 * 96,)
    assert peak < 100e6


def digits(count: int = 64, channels: int = 1) -> NDArray[np.float32]:
    """Smooth blobs, in the middle half of an image."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    random = np.random.default_rng(0)
    centres = random.uniform(10, 18, (count, 2, channels))
    squares = (rows[None, ..., None] - centres[:, None, None, 0]) ** 2
    squares = squares + (columns[None, ..., None] - centres[:, None, None, 1]) ** 2
    return np.asarray(np.exp(-squares / 18), np.float32)


def augment(
    kind: str, images: NDArray[Any], strength: float = 1.0, seed: tuple[int, int] = SEED
) -> NDArray[np.float32]:
    done = augmentation.augment(kind, tf.constant(images), strength, tf.constant(seed))
    return np.asarray(done)


def augment_many(kind: str, images: NDArray[Any]) -> NDArray[np.float32]:
    """In batches of 64, whose graph other tests use, each with a seed of its own."""
    batches = np.split(images, len(images) // 64)
    return np.concatenate([augment(kind, x, seed=(i, 4)) for i, x in enumerate(batches)])


def centres(images: NDArray[Any]) -> NDArray[Any]:
    """Row and column of every image's centre of mass."""
    mass = images[..., 0] / images[..., 0].sum(axis=(1, 2), keepdims=True)
    grid = np.mgrid[:SIZE, :SIZE]
    return np.stack([(mass * axis).sum(axis=(1, 2)) for axis in grid], axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_is_distorted_in_its_own_way_within_its_own_values(kind: str) -> None:
    images = np.repeat(digits(1), 64, axis=0)
    found = augment(kind, images)
    assert found.shape == images.shape
    assert found.dtype == np.float32
    assert len({image.tobytes() for image in found}) == 64
    assert found.min() >= 0
    assert found.max() <= images.max()
    assert np.abs(found - images).max(axis=(1, 2, 3)).min() > 0.005


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_everything(kind: str) -> None:
    first = augment(kind, digits())
    assert (augment(kind, digits()) == first).all()
    assert (augment(kind, digits(), seed=(3, 5)) != first).any()
    assert (augment(kind, digits(), seed=(4, 4)) != first).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_strength_scales_the_distortion_down_to_none(kind: str) -> None:
    images = digits()
    changes = [
        np.abs(augment(kind, images, strength) - images).mean() for strength in (1e-6, 0.3, 1.0)
    ]
    assert changes[0] < 1e-5
    assert changes[0] < changes[1] < changes[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_channels_of_an_image_move_together_and_it_need_not_be_square(kind: str) -> None:
    grey = np.random.default_rng(0).uniform(size=(5, 12, 20, 1)).astype(np.float32)
    colour = augment(kind, np.repeat(grey, 2, axis=-1))
    assert colour.shape == (5, 12, 20, 2)
    assert colour == pytest.approx(np.repeat(augment(kind, grey), 2, axis=-1), abs=1e-5)


def test_a_shift_moves_by_a_tenth_of_the_side_at_most_and_changes_nothing_else() -> None:
    images = digits(512)
    found = augment_many("shift", images)
    moved = centres(found) - centres(images)
    assert np.abs(moved).max() < 0.1 * SIZE + 0.05
    assert np.abs(moved).max() > 0.09 * SIZE
    assert np.abs(moved.mean(axis=0)).max() < 0.3
    assert found.sum(axis=(1, 2, 3)) == pytest.approx(images.sum(axis=(1, 2, 3)), rel=0.02)


def test_an_affine_turns_and_stretches_too() -> None:
    line = np.zeros((512, SIZE, SIZE, 1), np.float32)
    line[:, 6:22, 13:15] = 1
    found = augment_many("affine", line)[..., 0]
    rows, columns = np.mgrid[:SIZE, :SIZE]
    angles, lengths = [], []
    for image in found:
        mass = image / image.sum()
        y, x = (mass * rows).sum(), (mass * columns).sum()
        covariance = np.cov(np.stack([rows.ravel(), columns.ravel()]), aweights=mass.ravel())
        values, vectors = np.linalg.eigh(covariance)
        lengths.append(np.sqrt(12 * values[1]))
        angles.append(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])) % 180)
        assert 8 < y < 20
        assert 8 < x < 20
    turned = np.minimum(angles, 180 - np.array(angles))
    assert 12 < turned.max() < 19  # 15 degrees, and what unequal scales add
    assert 16 / 1.15 - 0.7 < min(lengths) < 14.7
    assert 17.3 < max(lengths) < 16 * 1.15 + 0.7


def test_what_comes_in_from_outside_is_the_nearest_edge() -> None:
    ramp = np.broadcast_to(np.arange(SIZE, dtype=np.float32)[:, None, None], (192, SIZE, SIZE, 1))
    found = augment_many("shift", ramp)
    assert found.min() == 0
    assert found.max() == pytest.approx(SIZE - 1)
    assert (np.diff(found, axis=1) >= 0).all()


def test_the_elastic_field_is_as_simard_et_al_drew_it() -> None:
    """Uniform noise in [-1, 1], convolved with a Gaussian of 4 pixels of 29, times 34."""
    side = 29
    found = np.asarray(augmentation.field(1000, side, side, tf.constant(SEED)))
    assert found.shape == (1000, 2, side, side)
    offsets = np.arange(-20, 21)
    gaussian = np.exp(-0.5 * (offsets / 4) ** 2)
    gaussian /= gaussian.sum()
    random = np.random.default_rng(0)
    fields = []
    for _ in range(300):
        noise = random.uniform(-1, 1, (side, side))
        for axis in (0, 1):
            noise = np.apply_along_axis(np.convolve, axis, noise, gaussian)
            noise = noise.take(range(20, 20 + side), axis)
        fields.append(34 * noise)
    theirs = np.array(fields)
    for where in ((14, 14), (2, 14), (2, 2)):
        ours = found[:, :, where[0], where[1]]
        assert ours.mean() == pytest.approx(0, abs=0.15)
        assert ours.std() == pytest.approx(theirs[:, where[0], where[1]].std(), rel=0.12)

    def smoothness(drawn: NDArray[Any], step: int) -> float:
        one, other = drawn[..., 14, 14 - step].ravel(), drawn[..., 14, 14].ravel()
        return float(np.corrcoef(one, other)[0, 1])

    for step in (1, 4, 8):
        assert smoothness(found, step) == pytest.approx(smoothness(theirs, step), abs=0.1)
