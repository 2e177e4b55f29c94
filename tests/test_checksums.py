"""A checkpoint that is not what was written is found out, whichever of its files it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertmesh.system.model.checkpoint import CheckpointError
from expertmesh.system.train import checksums
from expertmesh.system.train.checksums import checksum, verify, write_checksums


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "training").mkdir()
    files = [tmp_path / "a.bin", tmp_path / "training" / "b.bin", tmp_path / "empty"]
    for number, path in enumerate(files):
        path.write_bytes(bytes(range(256)) * number)
    write_checksums(tmp_path, files[:1], "checksums-00001-of-00002.json")
    write_checksums(tmp_path, files[1:])
    return tmp_path


@pytest.mark.parametrize("block", [1, 4, 9, 1 << 22])
def test_a_known_sum_however_it_is_read(tmp_path, monkeypatch, block):
    monkeypatch.setattr(checksums, "_BLOCK", block)
    path = tmp_path / "check"
    path.write_bytes(b"123456789")
    assert checksum(path) == [9, 0xCBF43926], "the check value of CRC-32"


def test_as_written(folder):
    verify(folder)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = [
    ("training/b.bin", flip, "its checksum differs", "a bit"),
    ("training/b.bin", lambda path: path.write_bytes(path.read_bytes()[:-1]), "its checksum differs", "a lost tail"),
    ("a.bin", lambda path: path.write_bytes(b"0"), "its checksum differs", "a file that was empty"),
    ("empty", Path.unlink, "No such file", "a file is gone"),
    ("training/checksums.json", lambda path: path.write_text("{"), "not valid JSON", "the sums themselves"),
]


@pytest.mark.parametrize("name, damage, told, reason", DAMAGE, ids=[row[-1] for row in DAMAGE])
def test_damage(folder, name, damage, told, reason):
    damage(folder / name)
    with pytest.raises(CheckpointError, match=told) as raised:
        verify(folder)
    assert str(folder / name) in str(raised.value)


def test_one_without_sums_is_taken_as_it_is(tmp_path):
    verify(tmp_path)
