"""Tensors copied between safetensors files: byte for byte, a piece at a time; damage is found before any is read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import environment
from safetensors.torch import load_file, save_file

from expertmesh.system.convert import stream
from expertmesh.system.convert.stream import copy_of, read_headers, read_tensor, same_bytes, write_shards, written_aside
from expertmesh.system.model.checkpoint import INDEX, CheckpointError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_two_shards(folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    first = {
        "half": torch.randn(3, 7).bfloat16(),  # an odd number of bytes would shift what comes after it
        "byte": torch.arange(5, dtype=torch.uint8),
        "one": torch.tensor(3.5),
    }
    second = {"whole": torch.randn(33, 9), "none": torch.empty(0, 4), "long": torch.arange(6)}
    save_file(first, folder / FIRST)
    save_file(second, folder / SECOND, metadata={"format": "pt"})
    weight_map = dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return first | second


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """With the safetensors library; what the index says must be so."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    merged = {}
    for file_name in sorted(set(weight_map.values())):
        content = load_file(folder / file_name)
        assert all(weight_map[name] == file_name for name in content)
        merged |= content
    assert merged.keys() == weight_map.keys()
    return merged


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    write_two_shards(folder)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "written"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("chunk_bytes", [1, 13, 2**20], ids=["a byte", "odd", "larger than any tensor"])
@pytest.mark.parametrize("shard_bytes", [1, 1200, 10**9], ids=["a file each", "a few files", "one file"])
def test_bytes_stay_under_other_names(source, out, monkeypatch, chunk_bytes, shard_bytes):
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
    expected = {f"new.{name}": tensor for name, tensor in read_all(source).items()}
    stored = read_headers(source)
    assert {f"new.{name}": tensor.shape for name, tensor in stored.items()} == {k: v.shape for k, v in expected.items()}
    peak = write_shards([copy_of(f"new.{name}", tensor) for name, tensor in stored.items()], out, shard_bytes)
    written = read_all(out)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name
    assert peak == min(chunk_bytes, max(tensor.nbytes for tensor in expected.values()))
    files = {path: load_file(path) for path in out.glob("*.safetensors")}
    for content in files.values():
        assert len(content) == 1 or sum(tensor.nbytes for tensor in content.values()) <= shard_bytes
    assert len(files) == {1: 6, 1200: 2, 10**9: 1}[shard_bytes]


def test_every_tensor_starts_at_a_multiple_of_its_element(source, out):
    """Readers that map the file need it."""
    write_shards([copy_of(name, tensor) for name, tensor in read_headers(source).items()], out)
    for name, tensor in read_headers(out).items():
        assert tensor.start % stream.DTYPE_BYTES[tensor.dtype] == 0, name


def test_one_file_without_an_index(source):
    (source / INDEX).unlink()
    (source / FIRST).rename(source / "model.safetensors")
    assert read_headers(source).keys() == {"half", "byte", "one"}


SIZES = [(1, 1, "one value"), (128, 128, "one block"), (130, 300, "blocks cut at both ends"), (257, 128, "a last row")]


@pytest.mark.parametrize("rows, columns", [s[:2] for s in SIZES], ids=[s[2] for s in SIZES])
def test_fp8_blocks_are_multiplied_by_their_factors(tmp_path, out, rows, columns):
    torch.manual_seed(1)
    weight = (torch.randn(rows, columns) * 100).to(torch.float8_e4m3fn)
    factors = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.01
    save_file({"weight": weight, "weight_scale_inv": factors}, tmp_path / "model.safetensors")
    stored = read_headers(tmp_path)
    peak = write_shards([copy_of("weight", stored["weight"], stored["weight_scale_inv"])], out)
    expected = torch.empty(rows, columns, dtype=torch.bfloat16)
    for row in range(rows):
        for block in range(factors.shape[1]):
            part = slice(128 * block, 128 * block + 128)
            expected[row, part] = (weight[row, part].float() * factors[row // 128, block]).bfloat16()
    written = read_all(out)
    assert written.keys() == {"weight"} and written["weight"].dtype == torch.bfloat16
    assert torch.equal(written["weight"], expected)
    assert peak <= 128 * columns * (1 + 4 + 2) + 4 * columns + factors.nbytes  # a row of blocks in three dtypes


def test_same_bytes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 64)
    whole = torch.randn(5, 5)
    other = whole.clone()
    other[4, 4] += 1
    tensors = {"a": whole, "b": whole.clone(), "c": other, "d": whole.clone().reshape(25)}
    tensors["e"] = whole.clone().view(torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_headers(tmp_path)
    assert [name for name in stored if same_bytes(stored["a"], stored[name])] == ["a", "b"]


def cut(file_name: str, keep: Callable[[int, int], int]) -> Callable[[Path], None]:
    """Truncate to `keep(bytes of the header, bytes of the file)` bytes."""

    def damage(folder: Path) -> None:
        content = (folder / file_name).read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        (folder / file_name).write_bytes(content[: keep(header, len(content))])

    return damage


def header(file_name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Write another header before the same data."""

    def damage(folder: Path) -> None:
        content = (folder / file_name).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        text = json.dumps(change(json.loads(content[8:end]))).encode()
        (folder / file_name).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return damage


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        (folder / INDEX).write_text(json.dumps({"weight_map": change(weight_map)}))

    return damage


def replaced(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


DAMAGED: list[tuple[str, Callable[[Path], None], str]] = [
    ("an empty file", cut(FIRST, lambda header, size: 0), f"{FIRST}: truncated or damaged"),
    ("cut in the length of the header", cut(FIRST, lambda header, size: 5), f"{FIRST}: truncated or damaged"),
    ("cut in the header", cut(FIRST, lambda header, size: header // 2), f"{FIRST}: truncated or damaged"),
    ("header only", cut(SECOND, lambda header, size: header), f"{SECOND}: truncated or damaged"),
    ("the last byte", cut(SECOND, lambda header, size: size - 1), f"{SECOND}: truncated or damaged"),
    ("a missing file", lambda folder: (folder / SECOND).unlink(), f"{SECOND}: the file is missing"),
    ("a header that is a list", header(SECOND, lambda h: [1]), f"{SECOND}: truncated or damaged"),
    (
        "a shape that does not fit",
        header(SECOND, lambda h: h | {"whole": h["whole"] | {"shape": [33, 8]}}),
        f"{SECOND}: truncated or damaged (whole has not the bytes of its shape)",
    ),
    (
        "a dtype that nobody knows",
        header(SECOND, lambda h: h | {"whole": h["whole"] | {"dtype": "F4"}}),
        f"{SECOND}: whole is F4; supported: F64,",
    ),
    (
        "a tensor that the index has not",
        index(lambda m: {name: file for name, file in m.items() if name != "half"}),
        f"{FIRST}: holds half, which {INDEX} does not say",
    ),
    ("a tensor that the index puts elsewhere", index(lambda m: m | {"half": SECOND}), f"{FIRST}: holds half"),
    ("a tensor that is nowhere", index(lambda m: m | {"other": SECOND}), f"{SECOND}: no tensor other"),
    ("an index that leads elsewhere", index(lambda m: m | {"half": "../model.safetensors"}), "no weight_map"),
    ("an index without its map", index(lambda m: None), f"{INDEX}: no weight_map"),
    ("weights in pickles", replaced, "nor model.safetensors; pytorch_model.bin is of another format"),
]


@pytest.mark.parametrize("damage, told", [case[1:] for case in DAMAGED], ids=[case[0] for case in DAMAGED])
def test_damage_is_told_in_one_line(source, damage, told):
    damage(source)
    with pytest.raises(CheckpointError) as refused:
        read_headers(source)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_cut_short_while_it_is_read(source, out):
    stored = read_headers(source)
    cut(SECOND, lambda header, size: size - 1)(source)
    with pytest.raises(CheckpointError, match="truncated while it was read"):
        write_shards([copy_of(name, tensor) for name, tensor in stored.items()], out)


@pytest.mark.parametrize("chunk", [stream.CHUNK_BYTES, 100, 8], ids=["all rows", "some rows", "less than a row"])
def test_columns_of_some_rows(source, out, monkeypatch, chunk):
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk)
    stored = read_headers(source)["whole"]
    cuts = {"first": stored.columns(4), "later": stored.cut(9 * 5, (20, 9)).columns(1), "all": stored.columns(9)}
    write_shards([copy_of(name, part) for name, part in cuts.items()], out)
    whole, found = load_file(source / SECOND)["whole"], read_all(out)
    assert torch.equal(found["first"], whole[:, :4])
    assert torch.equal(found["later"], whole[5:25, :1])
    assert torch.equal(found["all"], whole)
    for name, part in cuts.items():
        assert torch.equal(read_tensor(copy_of(name, part)), found[name])


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), written_aside(out) as folder:
        (folder / "a").write_text("x")
        raise RuntimeError
    assert list(out.parent.iterdir()) == []
    out.mkdir()  # an empty folder may be named
    with written_aside(out) as folder:
        (folder / "a").write_text("x")
        assert list(out.iterdir()) == []
    assert [path.name for path in out.parent.iterdir()] == ["out"] and (out / "a").read_text() == "x"
    with pytest.raises(ValueError, match="is not an empty folder"), written_aside(out):
        pytest.fail("taken, and opened")
    with pytest.raises(ValueError, match="is not an empty folder"), written_aside(out / "a"):
        pytest.fail("a file, and opened")
    assert (out / "a").read_text() == "x"


KILLED = """
import os, signal, sys
from pathlib import Path
from expertmesh.system.convert.stream import copy_of, read_headers, write_shards, written_aside
source, out, kill = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
signal.signal(signal.SIGTERM, signal.default_int_handler)
with written_aside(out) as folder:
    write_shards([copy_of(name, tensor) for name, tensor in read_headers(source).items()], folder, 200)
    if kill:
        os.kill(os.getpid(), kill)
"""


@pytest.mark.parametrize("kill, left", [(signal.SIGTERM, []), (signal.SIGKILL, ["out.writing"])], ids=["term", "kill"])
def test_killed_midway(source, tmp_path, kill, left):
    place = tmp_path / "place"
    for number, expected in ((kill, left), (0, ["out"])):  # the next one clears away what was left
        command = [sys.executable, "-c", KILLED, str(source), str(place / "out"), str(int(number))]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert (done.returncode == 0) is (number == 0), done.stderr
        assert sorted(os.listdir(place)) == expected
    assert read_all(place / "out").keys() == read_headers(source).keys()
