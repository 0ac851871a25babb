"""Images for the studies: scikit-learn's digits, or a folder of IDX files.

Both sources give the same `Dataset`: three disjoint parts, pixels standardized with the mean and
deviation of the training part, labels as int32. All randomness comes from the seed.
"""

import dataclasses
import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

IMAGES_MAGIC = 0x0803  # unsigned bytes, three axes: count, rows, columns
LABELS_MAGIC = 0x0801  # unsigned bytes, one axis: count
SMALLEST_SIDE = 4  # the convolutional network halves its map twice
FEWEST_TRAINING_IMAGES = 100
FEWEST_TEST_IMAGES = 10
CHUNK = 1 << 22  # bytes per read

IDX_NAMES = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}


class DataError(ValueError):
    """Data that cannot be used; the message says which data, why, and what to do."""


class LabeledImages(NamedTuple):
    """Images together with their labels: one part of a data set."""

    images: np.ndarray  # float32 (count, rows, columns, 1)
    labels: np.ndarray  # int32 (count,)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three disjoint parts of one data set, standardized by its training part."""

    name: str
    classes: int
    train: LabeledImages
    validation: LabeledImages  # for curves, learning rates and stability
    test: LabeledImages  # for the accuracy that is reported; it is used once

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of one image."""
        rows, columns, channels = self.train.images.shape[1:]
        return rows, columns, channels


def load_digits(seed: int = 0) -> Dataset:
    """Load scikit-learn's 1797 handwritten digits of 8x8 pixels, split 2/3, 1/6, 1/6 by class.

    Args:
        seed: draws the split; the same seed gives the same split.

    Returns:
        A `Dataset` of ten classes.

    Example:
        >>> digits = load_digits(seed=0)
        >>> digits.train.images.shape, digits.validation.labels.shape, digits.test.labels.shape
        ((1197, 8, 8, 1), (300,), (300,))

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    from sklearn import datasets, model_selection

    bunch: Any = datasets.load_digits()
    images, labels = np.asarray(bunch.images), np.asarray(bunch.target)
    held_out = 2 * (len(images) // 6 + 1)
    train, rest = model_selection.train_test_split(
        np.arange(len(images)), test_size=held_out, random_state=seed, stratify=labels
    )
    validation, test = model_selection.train_test_split(
        rest, test_size=0.5, random_state=seed, stratify=labels[rest]
    )
    parts = [(images[rows], labels[rows]) for rows in (train, validation, test)]
    return _dataset("scikit-learn digits", parts)


def load_idx(folder: str | os.PathLike[str], seed: int = 0) -> Dataset:
    """Load MNIST, Fashion-MNIST or other data from their four IDX files, gzipped or not.

    One sixth of the training images, but at most 2000, become the validation part. `seed` draws
    them.

    Args:
        folder: a folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
            `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`, each plain or with `.gz`. If both
            exist, the plain file is read.
        seed: draws the validation part.

    Returns:
        A `Dataset`. The largest training label gives the number of classes.

    Raises:
        DataError: a file is missing, is not what its name says, or is shorter or longer than its
            header says; or images and labels do not fit each other.

    Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", file format.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        problem = "a file" if os.path.exists(folder) else "a path that does not exist"
        raise DataError(
            f"load_idx: the data must be a folder with the four IDX files; got {problem}, "
            f"'{folder}'. Give the folder that holds {IDX_NAMES['train', 'images']}[.gz]."
        )
    train_images, train_labels = _read_pair(folder, "train", FEWEST_TRAINING_IMAGES)
    test_images, test_labels = _read_pair(folder, "test", FEWEST_TEST_IMAGES)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            "load_idx: training and test images must have one size; got "
            f"{_size(train_images)} in '{IDX_NAMES['train', 'images']}' and "
            f"{_size(test_images)} in '{IDX_NAMES['test', 'images']}' of '{folder}'. "
            "Use four files of one data set."
        )
    if test_labels.max() > train_labels.max():
        raise DataError(
            "load_idx: every test label must occur in training; got labels up to "
            f"{train_labels.max()} in training and up to {test_labels.max()} in test, in "
            f"'{folder}'. Use four files of one data set."
        )
    order = np.random.default_rng(seed).permutation(len(train_images))
    held_out = min(len(order) // 6, 2000)
    validation, train = order[:held_out], order[held_out:]
    parts = [
        (train_images[train], train_labels[train]),
        (train_images[validation], train_labels[validation]),
        (test_images, test_labels),
    ]
    return _dataset(folder.resolve().name, parts)


def read_idx(path: str | os.PathLike[str], magic: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes and check it against its header.

    Args:
        path: the file. A gzipped file is recognized by its first two bytes, whatever its name.
        magic: the number in the first four bytes, `IMAGES_MAGIC` or `LABELS_MAGIC`.

    Returns:
        uint8, in the shape that the header gives.

    Raises:
        DataError: the file cannot be read, has another magic number, or is shorter or longer than
            its header says.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "labels"
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
        ...     read_idx(path, LABELS_MAGIC)
        array([7, 2, 1], dtype=uint8)
    """
    path = Path(path)
    again = "Fetch the file again."
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw
            return _parse(stream, path, magic)
    except FileNotFoundError:
        raise DataError(f"read_idx: the file must exist; got '{path}'. {again}") from None
    except EOFError:
        raise DataError(
            f"read_idx: a gzipped file must be complete; got '{path}', which ends early. {again}"
        ) from None
    except (OSError, zlib.error) as error:
        raise DataError(
            f"read_idx: the file must be readable; got '{path}': {error}. {again}"
        ) from None


def batch_rows(count: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Draw the rows of the images for each training step, from shuffled epochs.

    Args:
        count: the number of images to draw from.
        batch_size: images per step, at most `count`.
        steps: the number of training steps.
        seed: draws the order.

    Returns:
        int32 (steps, batch_size), rows of the training part. No image comes twice in an epoch. The
        images that do not fill a batch at its end are left out.

    Raises:
        DataError: a batch is larger than the training part.

    Example:
        >>> batch_rows(5, 2, 3, seed=0).shape
        (3, 2)
    """
    if not 1 <= batch_size <= count:
        raise DataError(
            f"batch_rows: a batch must fit the training part; got batch_size={batch_size} and "
            f"{count} training images. Use a smaller batch or more data."
        )
    draw = np.random.default_rng(seed)
    per_epoch = count // batch_size
    epochs = [
        draw.permutation(count)[: per_epoch * batch_size].reshape(per_epoch, batch_size)
        for _ in range(math.ceil(steps / per_epoch))
    ]
    return np.concatenate(epochs)[:steps].astype(np.int32)


def _dataset(name: str, parts: list[tuple[np.ndarray, np.ndarray]]) -> Dataset:
    pixels = parts[0][0].astype(np.float32)
    mean, deviation = pixels.mean(dtype=np.float64), pixels.std(dtype=np.float64)
    if deviation == 0:
        raise DataError(
            f"load_idx: training images must differ; got {len(pixels)} images with every pixel "
            f"equal to {mean:g}. Use another data set."
        )
    shift, factor = np.float32(mean), np.float32(1 / deviation)
    train, validation, test = (
        LabeledImages(
            (images[..., None].astype(np.float32) - shift) * factor, labels.astype(np.int32)
        )
        for images, labels in parts
    )
    classes = 1 + max(int(labels.max()) for _, labels in parts)
    return Dataset(name, classes, train, validation, test)


def _read_pair(folder: Path, part: str, fewest: int) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(_find(folder, IDX_NAMES[part, "images"]), IMAGES_MAGIC)
    labels = read_idx(_find(folder, IDX_NAMES[part, "labels"]), LABELS_MAGIC)
    names = f"'{IDX_NAMES[part, 'images']}' and '{IDX_NAMES[part, 'labels']}' of '{folder}'"
    if len(images) != len(labels):
        raise DataError(
            f"load_idx: there must be one label per image; got {len(images)} images and "
            f"{len(labels)} labels in {names}. Use two files of one data set."
        )
    if len(images) < fewest:
        raise DataError(
            f"load_idx: the {part} part needs at least {fewest} images; got {len(images)} in "
            f"{names}. Use a larger data set."
        )
    if min(images.shape[1:]) < SMALLEST_SIDE:
        raise DataError(
            f"load_idx: images must be at least {SMALLEST_SIDE}x{SMALLEST_SIDE}; got "
            f"{_size(images)} in {names}. Use larger images."
        )
    return images, labels


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if os.path.isfile(path):  # False, and no exception, in a folder that may not be read
            return path
    raise DataError(
        f"load_idx: the folder must hold the four IDX files; got '{folder}' without '{name}' or "
        f"'{name}.gz'. Put it there, under this name, or give another folder."
    )


def _size(images: np.ndarray) -> str:
    return "x".join(map(str, images.shape[1:]))


def _parse(stream: BinaryIO, path: Path, magic: int) -> np.ndarray:
    axes = magic & 0xFF
    header = stream.read(4 + 4 * axes)
    if len(header) < 4 + 4 * axes:
        raise DataError(
            f"read_idx: the header takes {4 + 4 * axes} bytes; got {len(header)} bytes in "
            f"'{path}'. Fetch the file again."
        )
    found, *shape = struct.unpack(f">I{axes}I", header)
    if found != magic:
        raise DataError(
            f"read_idx: the magic number must be {magic:#010x} (unsigned bytes, {axes} axes); got "
            f"{found:#010x} in '{path}'. Check that the images and the labels are not swapped."
        )
    expected = math.prod(shape)
    body = bytearray()  # read in chunks: a broken header may announce more than fits in memory
    while len(body) <= expected and (chunk := stream.read(CHUNK)):
        body += chunk
    if len(body) != expected:
        got = f"only {len(body)}" if len(body) < expected else "more"
        raise DataError(
            f"read_idx: the header announces {'x'.join(map(str, shape))} = {expected} bytes; got "
            f"{got} in '{path}'. Fetch the file again."
        )
    return np.frombuffer(body, np.uint8).reshape(shape)
