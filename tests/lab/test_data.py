"""IDX files written byte by byte, and the errors for broken ones."""

import gzip
import struct

import numpy as np
import pytest

from jaxnorm.lab import data

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(array, magic=None):
    header = struct.pack(">HBB", 0, 8, array.ndim) if magic is None else struct.pack(">I", magic)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def arrays(count, seed, side=6):
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (count, side, side), dtype=np.uint8)
    return images, (np.arange(count) % 4).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    (images, labels), (test_images, test_labels) = arrays(120, 0), arrays(12, 1)
    contents = {IMAGES: images, LABELS: labels, TEST_IMAGES: test_images, TEST_LABELS: test_labels}
    for name, array in contents.items():
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path


def test_idx_gives_the_bytes_that_were_written(folder):
    images, labels = arrays(120, 0)
    np.testing.assert_array_equal(data.read_idx(folder / IMAGES, data.IMAGES_MAGIC), images)
    np.testing.assert_array_equal(data.read_idx(folder / LABELS, data.LABELS_MAGIC), labels)


def test_gzipped_files_give_the_same_data_set(folder):
    plain = data.load_idx(folder)
    for path in list(folder.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    zipped = data.load_idx(folder)
    np.testing.assert_array_equal(zipped.train.images, plain.train.images)
    np.testing.assert_array_equal(zipped.test.labels, plain.test.labels)


def test_parts_are_disjoint_complete_and_standardized(folder):
    loaded = data.load_idx(folder, seed=3)
    images, _ = arrays(120, 0)
    assert (loaded.classes, loaded.image_shape) == (4, (6, 6, 1))
    assert [len(part.labels) for part in (loaded.train, loaded.validation, loaded.test)] == [
        100,
        20,
        12,
    ]
    together = np.concatenate([loaded.train.images, loaded.validation.images])
    rank = np.sort(together.sum((1, 2, 3)))
    expected = images.astype(np.float64).sum((1, 2))
    kept = loaded.train.images.astype(np.float64)
    assert abs(kept.mean()) < 1e-5 and abs(kept.std() - 1) < 1e-5
    # An affine map of all pixels keeps the order of the images' sums.
    factor, shift = np.polyfit(np.sort(expected), rank, 1)
    np.testing.assert_allclose(rank, factor * np.sort(expected) + shift, atol=1e-2)


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


BROKEN = {
    "truncated": (IMAGES, lambda raw: raw[:-7], "announces 120x6x6 = 4320 bytes; got only 4313"),
    "too long": (LABELS, lambda raw: raw + b"\0", "announces 120 = 120 bytes; got more"),
    "no header": (IMAGES, lambda raw: raw[:9], "header takes 16 bytes; got 9"),
    "empty": (LABELS, lambda raw: b"", "header takes 8 bytes; got 0"),
    "wrong magic": (LABELS, lambda raw: b"\0\0\x08\x03" + raw[4:], "magic number must be 0x0801"),
    "truncated gzip": (IMAGES, lambda raw: gzip.compress(raw)[:-20], "ends early"),
    "damaged gzip": (
        IMAGES,
        lambda raw: gzip.compress(raw)[:40] + b"\xff" * 20 + gzip.compress(raw)[60:],
        "must be",
    ),
    "announces more than any memory": (
        IMAGES,
        lambda raw: raw[:4] + b"\xff" * 12 + raw[16:],
        "got only 4320",
    ),
    "counts differ": (LABELS, lambda raw: idx(arrays(119, 0)[1]), "120 images and 119 labels"),
    "too few": (TEST_LABELS, lambda raw: idx(arrays(3, 0)[1]), "12 images and 3 labels"),
    "sizes differ": (TEST_IMAGES, lambda raw: idx(arrays(12, 1, 7)[0]), "6x6 in"),
    "unknown class": (TEST_LABELS, lambda raw: raw[:-1] + b"\x09", "up to 9 in test"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_what_is_wrong(folder, case):
    name, change, message = BROKEN[case]
    damage(folder, name, change)
    with pytest.raises(data.DataError, match=r"load_idx|read_idx") as caught:
        data.load_idx(folder)
    assert message in str(caught.value).replace("0x00000801", "0x0801")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", [IMAGES, LABELS, TEST_IMAGES, TEST_LABELS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(data.DataError, match=name):
        data.load_idx(folder)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(data.DataError, match="does not exist"):
        data.load_idx(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DataError, match="got a file"):
        data.load_idx(tmp_path / "file")


def test_blank_images_are_refused(folder):
    (folder / IMAGES).write_bytes(idx(np.zeros((120, 6, 6), np.uint8)))
    with pytest.raises(data.DataError, match="must differ"):
        data.load_idx(folder)


@pytest.mark.sample
@pytest.mark.seconds(90, "the first import of scikit-learn")
def test_digits_are_split_by_seed_without_overlap():
    first, again, other = data.load_digits(0), data.load_digits(0), data.load_digits(1)
    np.testing.assert_array_equal(first.train.images, again.train.images)
    assert not np.array_equal(first.test.labels, other.test.labels)
    parts = [first.train, first.validation, first.test]
    assert sum(len(part.labels) for part in parts) == 1797
    for part in parts:  # every digit is a tenth of every part
        np.testing.assert_allclose(np.bincount(part.labels) / len(part.labels), 0.1, atol=0.01)


def test_batches_are_whole_epochs_in_an_order_of_the_seed():
    rows = data.batch_rows(10, 3, 7, seed=5)
    for epoch in (rows[:3], rows[3:6]):
        assert len(np.unique(epoch)) == 9
    np.testing.assert_array_equal(rows, data.batch_rows(10, 3, 7, seed=5))
    assert not np.array_equal(rows, data.batch_rows(10, 3, 7, seed=6))
    with pytest.raises(data.DataError, match="batch_size=11"):
        data.batch_rows(10, 11, 1, seed=0)
