"""Distort training images anew in every step, inside the graph of an epoch.

An image is sampled where a grid of points lies: shifted, turned and stretched (affine), or pulled
about by a smooth random field (elastic). The sampling is Keras'. Its layers do one of these each: a
row of three takes ten times as long as one sampling here and blurs three times, and its
`RandomElasticTransform` (3.15) takes ten times as long, too (`tests/benchmarks/augmentation.py`).
"""

import functools
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

SHIFT = 0.1  # of the side: 2.8 pixels of a digit
ROTATION = 15.0  # degrees
SCALE = 0.15  # either way
SIGMA, ALPHA = 4 / 29, 34.0  # Simard et al. 2003: of the side, their digits having 29; pixels of 29
_NEGLIGIBLE = 2e-3  # of the smoothing's largest singular value


def augment(kind: str, images: Any, strength: Any, seed: Any) -> Any:
    """Distorted `images`, float32 of shape (n, height, width, channels) with n known.

    kind: shift, affine (shift, rotation, scale) or elastic (Simard et al. 2003). strength: scales
    the constants above, which it takes at 1. seed: two int32, which decide everything.
    Points outside an image get the value at its nearest edge.
    """
    count, height, width, _ = images.shape
    if kind == "elastic":
        return _sampled(kind, images, field(count, height, width, seed) * strength)
    draws = tf.random.stateless_uniform([5, count, 1, 1], seed, -1.0, 1.0)
    return _sampled(kind, images, draws * strength)


@tf.function(jit_compile=True)  # type: ignore[untyped-decorator]  # fused: five times as fast
def _sampled(kind: str, images: Any, drawn: Any) -> Any:
    """The images at the points where `drawn`, a field or an affine's numbers, moves the grid."""
    count, height, width, channels = images.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32)[:, None]
    if kind == "elastic":
        rows, columns = rows + drawn[:, 0], columns + drawn[:, 1]
    else:
        rows, columns = _affine(kind, rows, columns, drawn)
    which = tf.range(count, dtype=tf.float32)[:, None, None]
    points = tf.stack([tf.broadcast_to(p, [count, height, width]) for p in (which, rows, columns)])
    return tf.stack(
        [
            keras.ops.image.map_coordinates(images[..., i], points, order=1, fill_mode="nearest")
            for i in range(channels)
        ],
        axis=-1,
    )


def _affine(kind: str, rows: Any, columns: Any, drawn: Any) -> tuple[Any, Any]:
    """Where the points of every image lie after its own shift, rotation and scale."""
    height, width = rows.shape[1:]
    down, right = drawn[0] * SHIFT * height, drawn[1] * SHIFT * width
    if kind == "shift":
        return rows + down, columns + right
    angle = drawn[2] * math.radians(ROTATION)
    tall, wide = (tf.exp(drawn[i] * math.log(1 + SCALE)) for i in (3, 4))
    middle = (height - 1) / 2, (width - 1) / 2
    y, x = rows - middle[0], columns - middle[1]
    return (
        (y * tf.cos(angle) + x * tf.sin(angle)) * tall + middle[0] + down,
        (x * tf.cos(angle) - y * tf.sin(angle)) * wide + middle[1] + right,
    )


def field(count: int, height: int, width: int, seed: Any) -> Any:
    """Elastic displacements in pixels, of shape (count, 2, height, width).

    Simard et al. 2003: uniform noise in [-1, 1], smoothed by a Gaussian of SIGMA, times ALPHA. Here
    the noise is normal with the variance of theirs, 1/3, so that it can be drawn along the
    smoothing's singular vectors: of 784 only some 50 matter.
    """
    smoothing = _smoothing(height, width)
    noise = tf.random.stateless_normal([2 * count, len(smoothing)], seed)
    pixels = np.array([height, width], np.float32)[:, None, None] * (ALPHA / 29 / math.sqrt(3))
    return tf.reshape(tf.matmul(noise, smoothing), [count, 2, height, width]) * pixels


@functools.cache
def _smoothing(height: int, width: int) -> NDArray[np.float32]:
    """A Gaussian filter's left singular vectors, as rows, times its singular values.

    In two dimensions they are products of those in one.
    """
    (down, tall), (across, wide) = _singular(height), _singular(width)
    values = np.outer(tall, wide)
    i, j = np.nonzero(values > _NEGLIGIBLE * values.max())
    vectors = np.einsum("hk,wk->khw", down[:, i], across[:, j]).reshape(len(i), height * width)
    return np.asarray(vectors * values[i, j, None], np.float32)


def _singular(size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The singular vectors, as columns, and values of a Gaussian filter over `size` points."""
    sigma = SIGMA * size
    distance = np.subtract.outer(np.arange(size), np.arange(size))
    gaussian = np.exp(-0.5 * (distance / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    vectors, values, _ = np.linalg.svd(gaussian)
    return vectors, values
