"""Output files are written whole or not at all."""

import os

import pytest

from jaxnorm.report import output


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "a").write_text("old")
    output.write_files(tmp_path, {"a": "new", "b": "±"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "notes.txt": "mine",
        "a": "new",
        "b": "±",
    }


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(output.OutputError, match="No space left"):
        output.write_files(tmp_path, {"a": "new"})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_check_makes_nothing(tmp_path):
    output.check_folder(tmp_path / "x" / "y")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(output.OutputError, match="is not one"):
            output.check_folder(path)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(output.OutputError, match="must be a file"):
        output.check_folder(tmp_path, ("report.html",))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(output.OutputError, match="is not one"):
        output.check_folder(tmp_path / "dangling")


@pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="no /proc to stand for a read-only folder")
def test_a_folder_that_cannot_be_written():
    with pytest.raises(output.OutputError, match="must be writable; got '/proc/new'"):
        output.check_folder("/proc/new")
