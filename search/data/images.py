"""Folders of images: FOLDER/CLASS/*.png, or FOLDER/train/CLASS and FOLDER/test/CLASS."""

import math
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.config.data_settings import KERAS_DATASETS
from search.data.preparation import stratified
from search.data.sources import Arrays, Source
from search.errors import InputError, one_line, printable
from search.imports import prepare_tensorflow, silent_stderr
from search.memory import check_fits, empty

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png")  # what Keras reads
DEFAULT_SIZE = 64  # where the images are of several sizes
_BATCH = 64  # images that Keras decodes at once
_NO_DATA = {"thumbs.db", "desktop.ini"}  # that systems write into folders of images
_GREY, _COLOUR = {"1", "L", "LA"}, {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class _Part:
    """The images of a folder of classes, sorted by class and file name; labels: int64."""

    folder: Path
    names: tuple[str, ...]
    files: list[Path]
    labels: NDArray[np.int64]


def is_folder(name: str) -> bool:
    """Whether the dataset `name` is a folder, or a link that leads to none."""
    if name == "mnist" or name in KERAS_DATASETS or name.endswith(".npz") or "\0" in name:
        return False
    return name.endswith("/") or os.path.isdir(name) or os.path.islink(name)


def read(name: str, size: int | None, test_split: float, seed: int) -> Source:
    """The images of the folder `name`, as uint8 of shape (n, height, width[, 3]).

    They are sorted by class and file name, and grey if all files are. size: height and width that
    they are resized to; None: theirs if they are of one size, else `DEFAULT_SIZE`. test_split:
    without a folder `test`, the fraction of each class that is drawn, by `seed`, for the test set.
    Raises InputError, in one line, if it can't be used.
    """
    root = Path(name)
    parts = _parts(name, root)
    files = [file for part in parts for file in part.files]
    shape = _shape(name, files, size)
    check_fits(name, len(files) * math.prod(shape), "give a smaller --image-size, or fewer images")
    settings: dict[str, Any] = {"image_size": shape[0]} if shape[0] == shape[1] else {}
    if len(parts) == 2:
        tests = np.r_[np.zeros(len(parts[0].files), bool), np.ones(len(parts[1].files), bool)]
    else:
        count = max(1, round(len(parts[0].files) * test_split))
        tests = stratified(parts[0].labels.astype(np.int32), count, seed)
        settings["test_split"] = test_split
    labels = np.concatenate([part.labels for part in parts])
    arrays = {
        "x_train": empty((int((~tests).sum()), *shape), np.uint8),
        "y_train": labels[~tests],
        "x_test": empty((int(tests.sum()), *shape), np.uint8),
        "y_test": labels[tests],
    }
    _fill(arrays, tests, (images for part in parts for images in _decoded(name, part, shape)))
    return Source(arrays, parts[0].names, pixels=True, settings=settings)


def _fill(arrays: Arrays, tests: NDArray[np.bool_], batches: Iterator[NDArray[np.uint8]]) -> None:
    """Write the images into x_test where `tests` says so, else into x_train, one after another."""
    done = {"x_train": 0, "x_test": 0}
    with silent_stderr():
        for images in batches:
            chosen = tests[sum(done.values()) :][: len(images)]
            for key, those in (("x_train", images[~chosen]), ("x_test", images[chosen])):
                arrays[key][done[key] : done[key] + len(those)] = those
                done[key] += len(those)


# ---- which files there are ---------------------------------------------------------------------


def _parts(name: str, root: Path) -> list[_Part]:
    """The training images and those of the test, or all images in one part."""
    folders = _entries(name, root)
    if {path.name for path in folders} != {"train", "test"}:
        return [_part(name, root, folders)]
    parts = [_part(name, root / part, _entries(name, root / part)) for part in ("train", "test")]
    known, tested = (set(part.names) for part in parts)
    if known != tested:
        extra = sorted(known ^ tested)[0]
        where = "train" if extra in known else "test"
        raise _refusal(
            name, "train and test must have the same classes", f"{extra} only in {where}", "add it"
        )
    return parts


def _entries(name: str, folder: Path) -> list[Path]:
    """The folders in `folder`, sorted. Raises InputError if images stand beside them."""
    found = sorted(_listed(name, folder), key=lambda path: path.name)
    folders = [path for path in found if path.is_dir()]
    loose = [path for path in found if path.suffix.lower() in ENDINGS and not path.is_dir()]
    if loose or not folders:
        raise _refusal(
            name,
            "must hold one folder of images for each class",
            f"the image {_shown(loose[0])} beside them" if loose else f"no folder in {folder}",
            "put each image into the folder of its class",
        )
    return folders


def _part(name: str, root: Path, folders: list[Path]) -> _Part:
    files, labels = [], []
    if len(folders) < 2:
        raise _refusal(
            name, "must have two classes or more", f"only {_shown(folders[0])}", "add a folder"
        )
    for label, folder in enumerate(folders):
        images = list(_images(name, folder))
        least = 1 if root.name == "test" else 2  # one to train, one to validate or test
        if len(images) < least:
            raise _refusal(
                name,
                f"every class must have {least} images or more",
                f"{len(images)} in {_shown(folder)}",
                "add some, or remove the folder",
            )
        files += images
        labels += [label] * len(images)
    names = tuple(folder.name for folder in folders)
    return _Part(root, names, files, np.array(labels, np.int64))


def _images(name: str, folder: Path) -> Iterator[Path]:
    """The images in the folder of a class, sorted by name."""
    for path in sorted(_listed(name, folder), key=lambda path: path.name):
        if path.suffix.lower() in ENDINGS and path.is_file():
            yield path
            continue
        kind = "a folder" if path.is_dir() else "a file of another kind"
        if path.is_symlink() and not path.exists():
            kind = "a link that leads nowhere"
        raise _refusal(
            name,
            f"a class must hold images ({', '.join(ENDINGS)}) alone",
            f"{kind}, {_shown(path)}",
            "move it away",
        )


def _listed(name: str, folder: Path) -> Iterator[Path]:
    """What is in `folder`, but for hidden files and those that systems write there."""
    try:
        found = list(folder.iterdir())
    except OSError as error:
        why = (error.strerror or one_line(error)).lower()
        raise _refusal(
            name, "must be a readable folder", f"{why}: {_shown(folder)}", "check the path"
        ) from None
    for path in found:
        hidden = path.name.startswith(".") and path.suffix.lower() not in ENDINGS
        if hidden or path.name.lower() in _NO_DATA:
            continue
        if path.name != printable(path.name):
            raise _refusal(
                name, "file names must be printable UTF-8", _shown(path), "give it another name"
            )
        yield path


def _shown(path: Path) -> str:
    return printable(str(path))


def _refusal(name: str, rule: str, found: str, remedy: str) -> InputError:
    return InputError(f"--dataset {printable(name)}: {rule}", f"found {found}", remedy)


# ---- what is in them ---------------------------------------------------------------------------


def _shape(name: str, files: list[Path], size: int | None) -> tuple[int, ...]:
    """The shape of an example: (height, width) if all files are grey, else (height, width, 3)."""
    sizes, grey = set(), True
    for file in files:
        width, height, is_grey = _header(name, file)
        if min(width, height) < 2:
            raise _refusal(
                name,
                "an image must have 2 x 2 pixels or more",
                f"{height} x {width} in {_shown(file)}",
                "remove it",
            )
        sizes.add((height, width))
        grey &= is_grey
    if size is not None:
        sizes = {(size, size)}
    height, width = sizes.pop() if len(sizes) == 1 else (DEFAULT_SIZE, DEFAULT_SIZE)
    return (height, width) if grey else (height, width, 3)


def _header(name: str, file: Path) -> tuple[int, int, bool]:
    """Width, height, and whether the image is grey, without decoding it."""
    from PIL import Image  # slow, and only for folders

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            kind, mode, (width, height) = str(image.format), image.mode, image.size
            palette = image.getpalette("RGB") if mode == "P" else None  # decodes the image
    except Exception as error:  # anything that a damaged file makes a decoder raise
        raise _damaged(name, file, one_line(error).replace(f"'{file}'", "it")) from None
    deep = mode not in _GREY | _COLOUR or (kind == "PNG" and _depth(file) > 8)
    if deep or (kind == "BMP" and mode in ("1", "P")):  # which TensorFlow rounds or misreads
        raise _refusal(
            name,
            "an image must have 8 bits per pixel and channel",
            f"another format ({kind}, mode {mode}) in {_shown(file)}",
            "save it as a PNG file of 8 bits",
        )
    if palette:
        colours = np.reshape(palette, (-1, 3))
        return width, height, bool((colours == colours[:, :1]).all())
    return width, height, mode in _GREY


def _depth(file: Path) -> int:
    """Bits per channel of a PNG file, byte 24 (https://www.w3.org/TR/png/#11IHDR)."""
    with file.open("rb") as opened:
        return opened.read(25)[24]


def _damaged(name: str, file: Path, why: str) -> InputError:
    return _refusal(
        name,
        "every image must be readable",
        f"a damaged one, {_shown(file)} ({why})",
        "remove it, or save it again",
    )


# ---- decoding ----------------------------------------------------------------------------------


def _decoded(name: str, part: _Part, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
    """The images of `part` in batches, uint8 of shape (n, *shape), decoded by Keras.

    Those of the right size keep their pixels; the others are resized bilinearly.
    """
    prepare_tensorflow()
    import keras
    import tensorflow as tf

    batches = keras.utils.image_dataset_from_directory(
        part.folder,
        color_mode="rgb",  # also of grey files: TensorFlow reads a BMP or GIF in no other mode
        batch_size=_BATCH,
        image_size=shape[:2],
        shuffle=False,
        verbose=False,
    )
    assert [Path(path) for path in batches.file_paths] == part.files
    try:
        for batch, _ in batches.as_numpy_iterator():
            pixels = np.rint(batch).astype(np.uint8)
            yield pixels if len(shape) == 3 else pixels[..., 0]
    except tf.errors.OpError:
        for file in part.files:
            try:
                tf.io.decode_image(tf.io.read_file(str(file)), channels=3, expand_animations=False)
            except tf.errors.OpError as error:
                raise _damaged(name, file, _first_sentence(error)) from None
        raise


def _first_sentence(error: Any) -> str:
    """TensorFlow's message without the names of its operations."""
    text = re.sub(r"\{\{.*?\}\}\s*|\s*\[Op:.*?\].*", "", " ".join(str(error.message).split()))
    return text[:100]
