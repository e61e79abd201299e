"""Random distortions of the training images, new in every step, inside the graph of an epoch.

An image is sampled at a grid of points that is shifted, rotated and scaled (affine) or displaced by
a smooth random field (elastic), by Keras' `map_coordinates`. Keras' layers do one of these each:
three in a row take ten times as long as one sampling here and blur three times;
`RandomElasticTransform` (3.15) also takes ten times as long (`tests/benchmarks/augmentation.py`).
"""

import functools
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

SHIFT = 0.1  # of the side: 2.8 pixels for MNIST
ROTATION = 15.0  # degrees
SCALE = 0.15  # up or down
SIGMA, ALPHA = 4 / 29, 34.0  # Simard et al. 2003: 4 of the side's 29 pixels; 34 of such pixels
_NEGLIGIBLE = 2e-3  # of the smoothing's largest singular value


def augment(kind: str, images: Any, strength: Any, seed: Any) -> Any:
    """Distorted `images`, float32 of shape (n, height, width, channels) with n known.

    kind: shift, affine (shift, rotation, scale) or elastic (Simard et al. 2003). strength: a factor
    for the constants above. seed: two int32, which determine all random numbers.
    Points outside an image get the value of its nearest edge.
    """
    count, height, width, _ = images.shape
    if kind == "elastic":
        return _sampled(kind, images, field(count, height, width, seed) * strength)
    draws = tf.random.stateless_uniform([5, count, 1, 1], seed, -1.0, 1.0)
    return _sampled(kind, images, draws * strength)


@tf.function(jit_compile=True)  # type: ignore[untyped-decorator]  # fused: five times as fast
def _sampled(kind: str, images: Any, drawn: Any) -> Any:
    """The images, sampled where `drawn`, a field or affine parameters, moves the grid."""
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
    """The grid of every image after its own shift, rotation and scaling."""
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
    the noise is normal with the same variance, 1/3, so that it can be drawn along the singular
    vectors of the smoothing: only about 50 of 784 matter.
    """
    smoothing = _smoothing(height, width)
    noise = tf.random.stateless_normal([2 * count, len(smoothing)], seed)
    pixels = np.array([height, width], np.float32)[:, None, None] * (ALPHA / 29 / math.sqrt(3))
    return tf.reshape(tf.matmul(noise, smoothing), [count, 2, height, width]) * pixels


@functools.cache
def _smoothing(height: int, width: int) -> NDArray[np.float32]:
    """The left singular vectors, as rows, of a 2-D Gaussian filter, times its singular values.

    They are products of those of the 1-D filters.
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
