"""Distort training images anew in every step, inside the graph of an epoch.

An image is sampled where a grid of points lies: shifted, turned and stretched (affine), or pulled
about by a smooth random field (elastic). Keras' own layers do one of these each: three of them in
a row take three times as long as one sampling here and blur three times, and its
`RandomElasticTransform` (3.15) takes fifty times as long.
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
    count, height, width, channels = images.shape
    rows, columns = _grid(height, width)
    if kind == "elastic":
        move = field(count, height, width, seed) * strength
        rows, columns = rows + move[:, 0], columns + move[:, 1]
    else:
        rows, columns = _affine(kind, rows, columns, count, strength, seed)
    which = tf.broadcast_to(tf.range(count, dtype=tf.float32)[:, None, None], rows.shape)
    points = tf.stack([which, rows, columns])
    return tf.stack([_sample(images[..., i], points) for i in range(channels)], axis=-1)


def _grid(height: int, width: int) -> tuple[Any, Any]:
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return rows[None].astype(np.float32), columns[None].astype(np.float32)


def _affine(
    kind: str, rows: Any, columns: Any, count: int, strength: Any, seed: Any
) -> tuple[Any, Any]:
    """Where the points of every image lie after its own shift, rotation and scale."""
    height, width = rows.shape[1:]
    draws = tf.random.stateless_uniform([5, count, 1, 1], seed, -1.0, 1.0) * strength
    down, right = draws[0] * SHIFT * height, draws[1] * SHIFT * width
    if kind == "shift":
        return tf.broadcast_to(rows + down, [count, height, width]), columns + right + 0 * rows
    angle = draws[2] * math.radians(ROTATION)
    tall, wide = (tf.exp(draw * math.log(1 + SCALE)) for draw in (draws[3], draws[4]))
    middle = (height - 1) / 2, (width - 1) / 2
    y, x = rows - middle[0], columns - middle[1]
    return (
        (y * tf.cos(angle) + x * tf.sin(angle)) * tall + middle[0] + down,
        (x * tf.cos(angle) - y * tf.sin(angle)) * wide + middle[1] + right,
    )


def field(count: int, height: int, width: int, seed: Any) -> Any:
    """Elastic displacements in pixels, of shape (count, 2, height, width).

    Simard et al. 2003: uniform noise in [-1, 1], smoothed by a Gaussian of SIGMA, times ALPHA. Here
    the noise is normal with the variance of theirs, 1/3, so that the smoothing, a product with a
    matrix from either side, can be drawn through its singular vectors: of 28 only nine matter.
    """
    down, across = _smoothing(height), _smoothing(width)
    ranks = down.shape[1], across.shape[1]
    noise = tf.random.stateless_normal([2 * count * ranks[0], ranks[1]], seed)
    half = tf.reshape(tf.matmul(noise, across, transpose_b=True), [2 * count, ranks[0], width])
    smooth = tf.matmul(down, half)
    pixels = np.array([height, width], np.float32)[:, None, None] * (ALPHA / 29 / math.sqrt(3))
    return tf.reshape(smooth, [count, 2, height, width]) * pixels


@functools.cache
def _smoothing(size: int) -> NDArray[np.float32]:
    """A Gaussian filter over `size` points, its singular vectors times its singular values."""
    sigma = SIGMA * size
    distance = np.subtract.outer(np.arange(size), np.arange(size))
    gaussian = np.exp(-0.5 * (distance / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    vectors, values, _ = np.linalg.svd(gaussian)
    kept = values > _NEGLIGIBLE * values[0]
    return np.asarray(vectors[:, kept] * values[kept], np.float32)


@tf.function(jit_compile=True)  # type: ignore[untyped-decorator]  # fused, five times as fast
def _sample(images: Any, points: Any) -> Any:
    return keras.ops.image.map_coordinates(images, points, order=1, fill_mode="nearest")
