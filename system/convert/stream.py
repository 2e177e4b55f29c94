"""Copies tensors, or runs of them, from one safetensors checkpoint into another, a piece at a time.

A model that is converted rarely fits in memory, and its weights need not: the layout of a file follows from its shapes,
so the header is written first and the bytes after it, as they are read.

    8 bytes   length of the header, little-endian
    header    JSON: {"norm.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}, ...}
    data      the bytes of the tensors, at those offsets

Files are read and not mapped, so that the memory of the process shows what is held.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch

from expertmesh.system.model.checkpoint import INDEX, CheckpointError, flush, read_json, shard_name, write_json

SHARD_BYTES = 2 * 10**9
CHUNK_BYTES = 8 * 2**20
FP8_BLOCK = 128  # rows and columns of a weight that share one factor
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of weights
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1}


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    start: int  # of its bytes in the file
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    pitch: int | None = None  # bytes from one row to the next in the file, where `columns` left out the rest of a row

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def columns(self, count: int) -> Stored:
        """The first `count` numbers of each row."""
        *rows, width = self.shape
        assert self.pitch is None and 0 < count <= width
        return self._replace(shape=(*rows, count), pitch=width * DTYPE_BYTES[self.dtype])

    def cut(self, first: int, shape: tuple[int, ...]) -> Stored:
        """The elements from number `first` on, as a tensor of `shape`."""
        assert self.pitch is None, "rows are cut before columns"
        cut = self._replace(start=self.start + first * DTYPE_BYTES[self.dtype], shape=shape)
        assert cut.start + cut.nbytes <= self.start + self.nbytes, "beyond the end"
        return cut


class Part(NamedTuple):
    """Stored numbers that become a tensor, or a run of one."""

    stored: Stored
    scale: Stored | None = None  # the factors of an FP8 matrix's blocks; it is read as bfloat16

    @property
    def dtype(self) -> str:
        return self.stored.dtype if self.scale is None else "BF16"

    def cut(self, first: int, shape: tuple[int, ...]) -> Part:
        """As `Stored.cut`. What is cut out of FP8 is whole rows of one matrix, from the first row of a block on."""
        stored = self.stored.cut(first, shape)
        if self.scale is None:
            return Part(stored)
        *_, rows, columns = self.stored.shape
        matrix, row = divmod(first // columns, rows)
        assert first % columns == 0 and shape[1:] == (columns,) and row + shape[0] <= rows, "no rows of one matrix"
        if row % FP8_BLOCK:
            raise CheckpointError(f"{stored.path}: blocks of {FP8_BLOCK} rows would be cut apart at row {row}")
        *_, block_rows, block_columns = self.scale.shape
        scale_first = (matrix * block_rows + row // FP8_BLOCK) * block_columns
        return Part(stored, self.scale.cut(scale_first, block_grid(shape)))


class Made(NamedTuple):
    """A whole tensor that is computed when its turn to be written comes."""

    make: Callable[[], torch.Tensor]
    held: int  # bytes of tensors in memory meanwhile


class Copy(NamedTuple):
    """A tensor to be written: its parts one after the other, or zeros where there are none."""

    name: str
    dtype: str  # of all its parts
    shape: tuple[int, ...]
    parts: tuple[Part, ...] | tuple[Made]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def copy_of(name: str, stored: Stored, scale: Stored | None = None) -> Copy:
    """A copy of one whole tensor."""
    part = Part(stored, scale)
    return Copy(name, part.dtype, stored.shape, (part,))


def block_grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the factors of FP8 matrices of `shape`: one for each block of rows and columns."""
    return (*shape[:-2], *(math.ceil(size / FP8_BLOCK) for size in shape[-2:]))


class Piece(NamedTuple):
    """Some bytes of a tensor, in order."""

    content: memoryview
    held: int  # bytes of tensors in memory while it was made


def read_headers(folder: Path) -> dict[str, Stored]:
    """Where each tensor of a checkpoint lies. Index, headers and lengths of the files must agree: CheckpointError."""
    index = folder / INDEX
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.gguf") for path in folder.glob(pattern))
            found = f"; {others[0]} is of another format" if others else ""
            raise CheckpointError(f"{folder}: neither {INDEX} nor model.safetensors{found}")
        return _read_header(single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
        raise CheckpointError(f"{index}: no weight_map of tensors and their files; the checkpoint is damaged")
    stored: dict[str, Stored] = {}
    for file_name in sorted(set(weight_map.values())):
        for name, tensor in _read_header(folder / file_name).items():
            if weight_map.get(name) != file_name:
                raise CheckpointError(f"{folder / file_name}: holds {name}, which {INDEX} does not say")
            stored[name] = tensor
    absent = [name for name in weight_map if name not in stored]
    if absent:
        raise CheckpointError(f"{folder / weight_map[absent[0]]}: no tensor {absent[0]}, which {INDEX} puts there")
    return stored


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name


def _read_header(path: Path) -> dict[str, Stored]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 + header_bytes:
                raise CheckpointError(f"{path}: truncated or damaged (no whole header)")
            header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            stored, ends = {}, [0]
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                stored[name] = Stored(path, 8 + header_bytes + start, entry["dtype"], tuple(entry["shape"]))
                if entry["dtype"] not in DTYPE_BYTES:
                    raise CheckpointError(f"{path}: {name} is {entry['dtype']}; supported: {', '.join(DTYPE_BYTES)}")
                if start < 0 or end - start != stored[name].nbytes:
                    raise CheckpointError(f"{path}: truncated or damaged ({name} has not the bytes of its shape)")
                ends.append(end)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: truncated or damaged (the header is not one of safetensors)") from None
    if max(ends) != size - 8 - header_bytes:
        raise CheckpointError(f"{path}: truncated or damaged ({size} bytes, {8 + header_bytes + max(ends)} expected)")
    return stored


def write_shards(copies: Iterable[Copy], folder: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write files of at most `shard_bytes`, unless one tensor is larger, and their index.

    Returns the most bytes of tensors that were in memory at once.
    """
    shards: list[list[Copy]] = [[]]
    size = 0
    for copy in copies:
        if shards[-1] and size + copy.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(copy)
        size += copy.nbytes
    weight_map, peak = {}, 0
    for number, shard in enumerate(shards):
        path = folder / shard_name("model", number, len(shards))
        peak = max(peak, _write_shard(shard, path))
        weight_map.update({copy.name: path.name for copy in shard})
    total = sum(copy.nbytes for shard in shards for copy in shard)
    write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX)
    return peak


def _write_shard(copies: list[Copy], path: Path) -> int:
    # Wide dtypes first, as the safetensors library does: so each tensor starts at a multiple of its element.
    copies = sorted(copies, key=lambda copy: -DTYPE_BYTES[copy.dtype])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = peak = 0
    for copy in copies:
        place = [start, start + copy.nbytes]
        header[copy.name] = {"dtype": copy.dtype, "shape": list(copy.shape), "data_offsets": place}
        start += copy.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for copy in copies:
            for piece in _pieces(copy):
                written = 0
                while written < len(piece.content):  # a raw write may take a part only
                    written += target.write(piece.content[written:]) or 0
                peak = max(peak, piece.held)
    flush(path)
    return peak


def read_tensor(copy: Copy) -> torch.Tensor:
    """The tensor that `write_shards` would write."""
    content = torch.empty(copy.nbytes, dtype=torch.uint8)
    target, done = memoryview(content.numpy()), 0
    for piece in _pieces(copy):
        target[done : done + len(piece.content)] = piece.content
        done += len(piece.content)
    return content.view(TORCH_DTYPES[copy.dtype]).view(copy.shape)


def _pieces(copy: Copy) -> Iterator[Piece]:
    if not copy.parts:
        for done in range(0, copy.nbytes, CHUNK_BYTES):
            zeros = bytes(min(CHUNK_BYTES, copy.nbytes - done))
            yield Piece(memoryview(zeros), len(zeros))
    for part in copy.parts:
        if isinstance(part, Made):
            content = part.make().contiguous().view(-1).view(torch.uint8)
            yield Piece(memoryview(content.numpy()), part.held)
            continue
        stored, scale = part
        yield from _raw_pieces(stored, CHUNK_BYTES) if scale is None else _dequantised_pieces(stored, scale)


def _raw_pieces(stored: Stored, piece_bytes: int) -> Iterator[Piece]:
    if stored.pitch is not None:
        yield from _short_row_pieces(stored, stored.pitch, piece_bytes)
        return
    buffer = bytearray(min(piece_bytes, stored.nbytes))
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        for done in range(0, stored.nbytes, piece_bytes):
            part = memoryview(buffer)[: min(piece_bytes, stored.nbytes - done)]
            _fill(part, file, stored)
            yield Piece(part, len(buffer))


def _short_row_pieces(stored: Stored, pitch: int, piece_bytes: int) -> Iterator[Piece]:
    """Whole rows are read, some at a time, and their first numbers are handed on."""
    rows, row_bytes = math.prod(stored.shape[:-1]), stored.shape[-1] * DTYPE_BYTES[stored.dtype]
    at_once = max(1, piece_bytes // pitch)
    buffer = bytearray(min(at_once, rows) * pitch)
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        for row in range(0, rows, at_once):
            part = memoryview(buffer)[: min(at_once, rows - row) * pitch]
            _fill(part, file, stored)
            kept = torch.frombuffer(part, dtype=torch.uint8).view(-1, pitch)[:, :row_bytes].contiguous()
            yield Piece(memoryview(kept.numpy()).cast("B"), len(buffer) + kept.nbytes)


def _dequantised_pieces(stored: Stored, scale: Stored) -> Iterator[Piece]:
    """A row of blocks at a time: each weight times its block's factor (DeepSeek-V3, arXiv 2412.19437, section 3.3)."""
    rows, columns = stored.shape
    factors_BC = torch.frombuffer(_read(scale), dtype=torch.float32).view(scale.shape)
    buffer = bytearray(FP8_BLOCK * columns)
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        for block, row in enumerate(range(0, rows, FP8_BLOCK)):
            part = memoryview(buffer)[: min(FP8_BLOCK, rows - row) * columns]
            _fill(part, file, stored)
            weight_RC = torch.frombuffer(part, dtype=torch.float8_e4m3fn).view(-1, columns).float()
            factors_C = factors_BC[block].repeat_interleave(FP8_BLOCK)[:columns]
            result_RC = weight_RC.mul_(factors_C).bfloat16()
            held = len(buffer) + sum(t.nbytes for t in (weight_RC, factors_C, factors_BC, result_RC))
            yield Piece(memoryview(result_RC.view(torch.uint8).numpy()).cast("B"), held)


def _read(stored: Stored) -> bytearray:
    content = bytearray(stored.nbytes)
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        _fill(memoryview(content), file, stored)
    return content


def _fill(part: memoryview, file: FileIO, stored: Stored) -> None:
    done = 0
    while done < len(part):
        got = file.readinto(part[done:])
        if not got:
            raise CheckpointError(f"{stored.path}: truncated while it was read")
        done += got


def same_bytes(one: Stored, other: Stored) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    half = max(1, min(CHUNK_BYTES, one.nbytes) // 2)  # so that two hold no more than copying one does
    pairs = zip(_raw_pieces(one, half), _raw_pieces(other, half), strict=True)
    return all(first.content == second.content for first, second in pairs)


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A folder to fill. It takes the name `out` if all goes well, and is deleted if not; ValueError if `out` is taken.

    What a killed process left under the other name is deleted by the next that writes `out`.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; name another one, or delete it")
    writing = out.with_name(out.name + ".writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        yield writing
        for path in (*writing.iterdir(), writing):
            flush(path)
        os.replace(writing, out)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    flush(out.parent)
