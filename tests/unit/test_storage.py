"""Writes that are either whole or absent."""

import os
import stat

import pytest

from packshot.runs.files import replacing_file, replacing_folder


@pytest.mark.parametrize("replacing", [replacing_file, replacing_folder])
def test_the_new_name_is_on_disk_before_anything_old_may_go(replacing, tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            synced.append((tmp_path / "new").exists())

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(tmp_path / "new") as temporary:
        (temporary if temporary.suffix and not temporary.is_dir() else temporary / "file").write_text("content")
    assert synced == [True]


def test_machines_that_share_a_folder_write_beside_each_other(tmp_path, monkeypatch):
    """Two processes of one number, of two machines."""
    monkeypatch.setattr("platform.node", lambda: "one")
    with replacing_file(tmp_path / "a") as first:
        first.write_text("1")
        monkeypatch.setattr("platform.node", lambda: "two")
        with replacing_file(tmp_path / "a") as second:
            second.write_text("2")
        assert first.read_text() == "1"
    assert (tmp_path / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
