"""Writes that are either whole or absent."""

import os
import stat

import pytest

from packshot.core.storage import replacing_file, replacing_folder


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
