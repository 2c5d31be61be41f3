"""Files that are whole or absent."""

import os

import pytest

from treg.files import read_json, replacing, write_json


def test_a_file_lies_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Its content, then its name, then the folder that holds the name."""
    path, done = tmp_path / "a.json", []
    synchronise, rename = os.fsync, os.replace

    def fsync(handle):
        done.append(("synchronised", os.fstat(handle).st_ino))
        synchronise(handle)

    def replace(a, b):
        done.append(("renamed", os.stat(a).st_ino))
        rename(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_json(path, {"a": 1})
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert done == [("synchronised", file), ("renamed", file), ("synchronised", folder)]
    assert read_json(path) == {"a": 1}


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert read_json(path) == {"a": 1} and [x.name for x in tmp_path.iterdir()] == ["a.json"]
