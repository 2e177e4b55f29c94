"""Whether a checkpoint is still what was written: a disk that lies gives other weights, and training goes on with them.

    training/checksums-00001-of-00002.json    {"model-00001-of-00002.safetensors": [bytes, crc32], ...} of one writer
    training/checksums.json                   of the small files

CRC-32 finds what fails by itself, such as flipped bits and lost tails; it is no protection against an attacker.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

from expertmesh.system.model.checkpoint import CheckpointError, read_json, write_json

_BLOCK = 1 << 22


def checksum(path: Path) -> list[int]:
    """Length in bytes and CRC-32 of a file."""
    length = value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            length, value = length + len(block), zlib.crc32(block, value)
    return [length, value]


def write_checksums(folder: Path, files: Iterable[Path], name: str = "checksums.json") -> None:
    """Write those of `files`, which lie in the checkpoint `folder` or its folders."""
    sums = {str(path.relative_to(folder)): checksum(path) for path in files}
    write_json(sums, folder / "training" / name)


def verify(folder: Path) -> None:
    """Raise CheckpointError, naming the file, when one is not what was written.

    A checkpoint without checksums (of an earlier version) is taken as it is.
    """
    for sums in sorted((folder / "training").glob("checksums*.json")):
        for name, expected in read_json(sums).items():
            path = folder / name
            try:
                found = checksum(path)
            except OSError as error:
                raise CheckpointError(f"{path}: {error.strerror}; the checkpoint is damaged") from None
            if found != expected:
                raise CheckpointError(f"{path}: not what was written (its checksum differs); the checkpoint is damaged")
