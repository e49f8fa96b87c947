"""Output files appear whole or not at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from sav_jax import UserError
from sav_jax._files import check_output_file, check_output_folder, to_stdout, write_file, write_folder


def fail(*_: object) -> NoReturn:
    raise OSError(28, "No space left on device")


def test_write_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new/folder/file.txt"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"file.txt: cannot be written: No space left on device"):
        write_file(path, b"three")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file.txt"]


def test_write_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new/folder"
    write_folder(path, {"a": b"1", "b": b"2"})
    (path / "other").write_text("stays")
    write_folder(path, {"a": b"3"})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {"a": b"3", "b": b"2", "other": b"stays"}
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(UserError, match="cannot be written"):
        write_folder(tmp_path / "new/second", {"a": b"1"})
    assert os.listdir(tmp_path / "new") == ["folder"]


def test_checks_come_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert check_output_file(tmp_path / "new/file") == tmp_path / "new/file"
    assert check_output_file(tmp_path / "file") == tmp_path / "file"
    assert check_output_folder(tmp_path / "new/folder") == tmp_path / "new/folder"
    assert check_output_folder(tmp_path) == tmp_path
    assert os.listdir(tmp_path) == ["file"], "nothing is made"
    with pytest.raises(UserError, match="is a folder; the output is a file"):
        check_output_file(tmp_path)
    with pytest.raises(UserError, match="is a file; the output is a folder"):
        check_output_folder(tmp_path / "file")
    for check in (check_output_file, check_output_folder):
        with pytest.raises(UserError, match=r"cannot be written: .*file is a file"):
            check(tmp_path / "file/below")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_stdout_on_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(UserError, match="standard output: No space left on device"):
            to_stdout("some words\n")
        to_stdout("")  # what could not be written is not tried again
