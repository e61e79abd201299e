"""Folders of images: which files are read, in which order, with which pixels; what is refused."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import as_nobody, of_root
from numpy.typing import NDArray
from PIL import Image

from search.config.settings import StudyConfig
from search.data.dataset import Dataset
from search.data.images import is_folder, read
from search.data.load import load_dataset
from search.errors import InputError

Pixels = NDArray[np.uint8]


def picture(seed: int, shape: tuple[int, ...] = (4, 5)) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: Pixels, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)


def fill(
    root: Path, counts: dict[str, int], shape: tuple[int, ...] = (4, 5), end: str = "png"
) -> dict[str, list[Pixels]]:
    """A folder for each class, with so many images."""
    made: dict[str, list[Pixels]] = {}
    for number, (name, count) in enumerate(counts.items()):
        made[name] = [picture(1000 * number + i, shape) for i in range(count)]
        for i, pixels in enumerate(made[name]):
            save(root / name / f"{i:03d}.{end}", pixels)
    return made


def load(root: Path, **settings: Any) -> Dataset:
    return load_dataset(str(root), 0.25, split="stratified", **settings)


def test_the_images_of_train_and_test_are_read_by_class_and_name(tmp_path: Path) -> None:
    trains = fill(tmp_path / "train", {"dog": 6, "cat": 4})
    tests = fill(tmp_path / "test", {"cat": 1, "dog": 2})
    found = read(str(tmp_path), None, 0.2, 0)
    assert found.class_names == ("cat", "dog")
    assert found.pixels
    assert found.settings == {}
    for part, made in (("train", trains), ("test", tests)):
        x = found.arrays[f"x_{part}"]
        assert x.dtype == np.uint8
        np.testing.assert_array_equal(x, made["cat"] + made["dog"])
        labels = [0] * len(made["cat"]) + [1] * len(made["dog"])
        assert found.arrays[f"y_{part}"].tolist() == labels


def test_the_names_classes_and_pixels_reach_the_dataset(tmp_path: Path) -> None:
    made = fill(tmp_path / "train", {"cat": 8, "dog": 8})
    fill(tmp_path / "test", {"cat": 1, "dog": 1})
    dataset = load(tmp_path)
    assert dataset.task.class_names == ("cat", "dog")
    assert dataset.sample_shape == (4, 5)
    rows = sorted(row.tobytes() for row in dataset.x_all)
    assert rows == sorted(pixels.tobytes() for pixels in made["cat"] + made["dog"])
    assert dataset.test_inputs().shape == (2, 4, 5)
    assert load(tmp_path).digest == dataset.digest


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_without_a_test_folder_a_seeded_part_of_every_class_tests(
    tmp_path: Path, share: float
) -> None:
    fill(tmp_path, {"a": 40, "b": 20})
    first, again, other = (read(str(tmp_path), None, share, seed).arrays for seed in (0, 0, 1))
    assert np.bincount(first["y_test"]).tolist() == [40 * share, 20 * share]
    np.testing.assert_array_equal(first["x_test"], again["x_test"])
    assert not np.array_equal(first["x_test"], other["x_test"])
    every = [row.tobytes() for key in ("x_train", "x_test") for row in first[key]]
    assert len(set(every)) == 60


def test_what_the_arrays_depend_on_is_stored(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 4, "b": 4}, (6, 6))
    assert load(tmp_path).source == {"image_size": 6, "test_split": 0.2}
    settings = StudyConfig().settings("d", source=load(tmp_path).source)
    assert (settings["image_size"], settings["test_split"]) == (6, 0.2)


@pytest.mark.parametrize(
    ("end", "mode", "shape"),
    [
        *((end, "L", (4, 5)) for end in ("png", "bmp", "gif", "PNG")),
        ("png", "1", (4, 5)),
        ("png", "LA", (4, 5)),
        *((end, "RGB", (4, 5, 3)) for end in ("png", "bmp")),
        ("png", "P", (4, 5, 3)),
        ("gif", "P", (4, 5, 3)),
        ("png", "RGBA", (4, 5, 3)),
    ],
)
def test_pixels_are_those_of_the_files(
    tmp_path: Path, end: str, mode: str, shape: tuple[int, ...]
) -> None:
    for name in ("train/a", "train/b", "test/a", "test/b"):
        for i in range(2):
            save(tmp_path / name / f"{i}.{end}", picture(i, (4, 5, 3)), mode)
    with Image.open(tmp_path / f"train/a/1.{end}") as image:
        expected = np.asarray(image.convert("L" if len(shape) == 2 else "RGB"))
    x = read(str(tmp_path), None, 0.2, 0).arrays["x_train"]
    assert x.shape == (4, *shape)
    np.testing.assert_array_equal(x[1], expected)


def test_a_jpeg_is_read_as_nearly_as_its_decoders_agree(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 8
    for name in ("a", "b"):
        for i in range(3):
            save(tmp_path / name / f"{i}.jpg", smooth)
    x = read(str(tmp_path), None, 0.2, 0).arrays["x_train"]
    assert x.shape == (5, 16, 16)
    assert np.abs(x[0].astype(int) - smooth).max() < 8


def test_one_colour_image_makes_all_of_them_colour(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3})
    save(tmp_path / "b" / "999.png", picture(5, (4, 5, 3)))
    assert load(tmp_path).sample_shape == (4, 5, 3)


def test_images_of_several_sizes_are_resized(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3})
    save(tmp_path / "b" / "999.png", picture(5, (8, 8)))
    assert load(tmp_path).sample_shape == (64, 64)
    assert load(tmp_path, image_size=6).sample_shape == (6, 6)
    assert load(tmp_path, image_size=6).source["image_size"] == 6


def test_an_even_image_stays_even_where_it_is_resized(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(3):
            save(tmp_path / name / f"{i}.png", np.full((7, 5), 200, np.uint8))
    assert set(np.unique(load(tmp_path, image_size=4).x_all)) == {200}


def test_hidden_files_and_those_of_systems_are_passed_over(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 4, "b": 4})
    for name in (".DS_Store", "a/.DS_Store", "a/Thumbs.db", "README.txt", ".cache/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    assert load(tmp_path).classes == 2


# ---- what is refused ---------------------------------------------------------------------------


def empty(root: Path) -> None:
    pass


def one_class(root: Path) -> None:
    fill(root, {"cat": 5})


def one_image(root: Path) -> None:
    fill(root, {"cat": 5, "dog": 1})


def no_image(root: Path) -> None:
    fill(root, {"cat": 5})
    (root / "dog").mkdir()


def tiny(root: Path) -> None:
    fill(root, {"cat": 3, "dog": 3}, (1, 1))


def loose(root: Path) -> None:
    fill(root, {"cat": 3, "dog": 3})
    save(root / "x.png", picture(0))


def other_file(root: Path) -> None:
    fill(root, {"cat": 3, "dog": 3})
    (root / "dog" / "notes.txt").write_text("no image")


def nested(root: Path) -> None:
    fill(root, {"cat": 3, "dog": 3})
    (root / "dog" / "more").mkdir()


def no_image_in_it(root: Path) -> None:
    fill(root, {"cat": 3, "dog": 3})
    (root / "cat" / "001.png").write_text("no image")


def cut(end: str) -> Callable[[Path], None]:
    def cut_one(root: Path) -> None:
        fill(root, {"cat": 3, "dog": 3}, (40, 40), end)
        path = root / "dog" / f"001.{end}"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut_one


def deep(root: Path) -> None:
    fill(root, {"cat": 3, "dog": 3})
    Image.fromarray(picture(0).astype(np.uint16) * 256).save(root / "cat" / "001.png")


def deep_colour(root: Path) -> None:
    fill(root, {"cat": 3, "dog": 3}, (4, 5, 3))
    path = root / "cat" / "001.png"
    whole = path.read_bytes()
    header = whole[12:24] + b"\x10" + whole[25:29]
    path.write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])


def palette_bmp(root: Path) -> None:
    fill(root, {"cat": 3, "dog": 3})
    save(root / "cat" / "001.bmp", picture(0, (4, 5, 3)), "P")


def other_test_classes(root: Path) -> None:
    fill(root / "train", {"cat": 3, "dog": 3})
    fill(root / "test", {"cat": 3, "cow": 3})


def hidden_image(root: Path) -> None:
    fill(root, {"cat": 3, "dog": 3})
    (root / "dog" / "._001.png").write_bytes(b"\0\5\x16\7")  # as macOS writes beside 001.png


def looped(root: Path) -> None:
    fill(root, {"cat": 3, "dog": 3})
    (root / "dog" / "loop.png").symlink_to("loop.png")


def loop_of_folders(root: Path) -> None:
    fill(root, {"cat": 3, "dog": 3})
    (root / "dog" / "above").symlink_to(root)


def unprintable(root: Path) -> None:
    fill(root, {"cat": 3, "dog": 3})
    save(root / "dog" / "a\nb.png", picture(0))


@pytest.mark.parametrize(
    ("make", "rule", "found", "remedy"),
    [
        (empty, "must hold one folder of images for each class", "no folder in", "put each"),
        (one_class, "must have two classes or more", "only ", "add a folder"),
        (one_image, "every class must have 2 images or more", "1 in ", "remove the folder"),
        (no_image, "every class must have 2 images or more", "0 in ", "remove the folder"),
        (tiny, "an image must have 2 x 2 pixels or more", "1 x 1 in ", "remove it"),
        (loose, "must hold one folder of images for each class", "x.png beside", "put each"),
        (other_file, "a class must hold images (.bmp,", "of another kind, ", "move it away"),
        (nested, "a class must hold images (.bmp,", "a folder, ", "move it away"),
        (no_image_in_it, "every image must be readable", "001.png (", "remove it, or save"),
        (cut("png"), "every image must be readable", "dog/001.png (", "remove it, or save"),
        (cut("jpg"), "every image must be readable", "dog/001.jpg (", "remove it, or save"),
        (cut("bmp"), "every image must be readable", "dog/001.bmp (", "remove it, or save"),
        (cut("gif"), "every image must be readable", "dog/001.gif (", "remove it, or save"),
        (deep, "8 bits per pixel and channel", "cat/001.png", "save it as a PNG"),
        (deep_colour, "8 bits per pixel and channel", "cat/001.png", "save it as a PNG"),
        (palette_bmp, "8 bits per pixel and channel", "cat/001.bmp", "save it as a PNG"),
        (other_test_classes, "the same classes", "cow only in test", "add it"),
        (hidden_image, "every image must be readable", "dog/._001.png (", "remove it"),
        (looped, "a class must hold images", "a link that leads nowhere", "move it away"),
        (loop_of_folders, "a class must hold images", "a folder, ", "move it away"),
        (unprintable, "file names must be printable UTF-8", r"a\nb.png", "another name"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], None], rule: str, found: str, remedy: str
) -> None:
    make(tmp_path)
    with pytest.raises(InputError) as refusal:
        load(tmp_path)
    said = str(refusal.value)
    assert said.startswith(f"--dataset {tmp_path}: ")
    assert "\n" not in said
    assert all(part in said for part in (rule, found, remedy)), said


def test_a_link_that_leads_to_itself_is_refused(in_folder: Path) -> None:
    Path("loop").symlink_to("loop")
    assert is_folder("loop")
    with pytest.raises(InputError, match=r"--dataset loop: must be a readable folder, .*levels of"):
        load(Path("loop"))


@of_root
def test_a_folder_that_cannot_be_read_is_refused(temporary: Path) -> None:
    fill(temporary / "data", {"cat": 3, "dog": 3})
    os.chmod(temporary / "data" / "dog", 0)

    def act() -> None:
        with pytest.raises(InputError, match="must be a readable folder, but found permission den"):
            load(temporary / "data")

    as_nobody(act)


def test_images_have_no_several_labels(tmp_path: Path) -> None:
    fill(tmp_path, {"dog": 3, "cat": 3})
    with pytest.raises(InputError, match=r"--task multilabel needs several .* folder of images,"):
        load(tmp_path, task="multilabel")


def test_a_size_needs_a_folder(in_folder: Path) -> None:
    with pytest.raises(InputError, match=r"--image-size needs a folder of images, but --dataset"):
        load_dataset("mnist", 0.1, image_size=32)
