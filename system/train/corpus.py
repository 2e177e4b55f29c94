"""Text comes from wherever the user has it: this file turns a name or a path into a stream of documents.

"stdlib" is the real text that every Python carries, so that a first run needs no download: the language reference
(prose) and the standard library's sources (code). Anything else is a file, a folder or a glob:

    .txt .md .rst .py (.txt.gz)      one document a file
    .jsonl .json-lines (.jsonl.gz)   one document a line, its field "text" or "content"
    .parquet                         one document a row, its column "text" or "content"

One document is in memory at a time, and the order never depends on the file system.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

STDLIB = "stdlib"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".txt.gz")
LINE_SUFFIXES = (".jsonl", ".json-lines", ".jsonl.gz")
PARQUET_SUFFIX = ".parquet"
SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, PARQUET_SUFFIX)
TEXT_FIELDS = ("text", "content")

# Not prose and not code that a person would read: tests, bundled copies, tables; and pydoc_data, whose one file holds
# the language reference a second time and would put the same sentences on both sides of the held-out split.
SKIPPED_FOLDERS = frozenset(
    "test tests idlelib lib2to3 encodings ensurepip pydoc_data __pycache__ site-packages dist-packages".split()
)


def documents(source: str, max_bytes: int | None = None) -> Iterator[str]:
    """Yield the documents of `source`, none of them blank, in an order that is the same on every call.

    max_bytes: stop after this much UTF-8 text; the last document is cut to fit.
    Raises ValueError, in one line that says what is wrong, where, and what would be right, for a source that does not
    exist, is not readable text or holds none. A folder named "stdlib" is reached as "./stdlib".
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes is {max_bytes}; it must be at least 1, or left out for all of the text")
    remaining = max_bytes
    found = False
    for text in _stdlib_documents() if source == STDLIB else _path_documents(source):
        if not text.strip():
            continue
        # JSON can spell half of a surrogate pair, which no UTF-8 can hold: it becomes "?".
        data = text.encode("utf-8", "replace")
        if remaining is not None:
            data = data[:remaining]
            remaining -= len(data)
        found = True
        yield data.decode("utf-8", "ignore")  # "ignore" drops a character that the cut went through
        if remaining == 0:
            return
    if not found:
        raise ValueError(f"{source} holds no text: every document in it is blank")


def check_source(source: str) -> None:
    """Raise the ValueError that `documents` would raise for a source that does not exist or has no usable file.

    Looks at names only, so a launcher can call it before it starts anything.
    """
    source_files(source)


def fingerprint(files: list[Path]) -> str:
    """Return a short digest of names, sizes and times of change: equal ones mean that no file was written since."""
    stats = [(path.as_posix(), path.stat()) for path in files]
    described = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def source_files(source: str) -> list[Path]:
    """Return the files behind "stdlib", a file, a folder (searched in depth, hidden names left out) or a glob, sorted.

    Raises ValueError when there is none.
    """
    if source == STDLIB:
        return sorted(path for path in _walk(_library_root(), SKIPPED_FOLDERS) if _is_library_source(path))
    usable = " ".join(SUFFIXES)
    path = Path(source)
    if path.is_file():
        if not _readable(path):
            raise ValueError(f"{source} is not a file this reads; rename or convert it to one of {usable}")
        return [path]
    if path.is_dir():
        candidates = list(_walk(path, frozenset()))
    elif glob.has_magic(source):
        candidates = [Path(name) for name in glob.glob(source, recursive=True)]
        if not candidates:
            raise ValueError(f"no file matches {source}; give a file, a folder, a glob that matches, or {STDLIB!r}")
    else:
        raise ValueError(f"{source} does not exist; give a file, a folder, a glob, or {STDLIB!r}")
    files = sorted((p for p in candidates if _readable(p) and p.is_file()), key=lambda p: p.as_posix())
    if not files:
        raise ValueError(f"{source} holds no file this reads; it must hold at least one of {usable}")
    return files


def _readable(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _path_documents(source: str) -> Iterator[str]:
    for path in source_files(source):
        name = path.name.lower()
        if name.endswith(PARQUET_SUFFIX):
            yield from _parquet_documents(path)
        elif name.endswith(LINE_SUFFIXES):
            yield from _line_documents(path)
        else:
            yield _text_document(path)


def _open(path: Path) -> BinaryIO:
    # GzipFile reads bytes like any other binary file, it only isn't declared as one.
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _text_document(path: Path) -> str:
    try:
        with _open(path) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it, or leave it out") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); compress it again") from error
    return text.replace("\r\n", "\n")


def _line_documents(path: Path) -> Iterator[str]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _line_text(line, f"{path}, line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file after line {number} ({error}); compress it again") from error


def _line_text(line: bytes, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise ValueError(
            f'{place}: a JSON {type(record).__name__}; each line must be an object such as {{"text": "…"}}'
        )
    for field in TEXT_FIELDS:
        if isinstance(record.get(field), str):
            return record[field]
    held = ", ".join(map(repr, record)) or "none"
    raise ValueError(f'{place}: key "text" (or "content") with a string is missing; the keys there are: {held}')


def _parquet_documents(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = {column.name: column.type for column in file.schema_arrow}
            strings = (pyarrow.string(), pyarrow.large_string())
            field = next((field for field in TEXT_FIELDS if columns.get(field) in strings), None)
            if field is None:
                held = ", ".join(f"{name!r} ({kind})" for name, kind in columns.items()) or "none"
                raise ValueError(f'{path}: string column "text" (or "content") is missing; the columns are: {held}')
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    if value.is_valid:
                        yield value.as_py()
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a readable parquet file ({reason}); write it again") from error


def _stdlib_documents() -> Iterator[str]:
    """Mix prose and code by a hash of each name, so that any cut of the stream holds some of both."""
    from pydoc_data.topics import topics

    sources = {path.relative_to(_library_root()).as_posix(): path for path in source_files(STDLIB)}
    names = [("topic", name) for name, text in topics.items() if not _is_excerpt(text, topics)]
    names += [("source", name) for name in sources]
    for kind, name in sorted(names, key=lambda item: hashlib.blake2b("/".join(item).encode()).digest()):
        if kind == "topic":
            yield topics[name]
            continue
        try:
            yield sources[name].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few old modules declare another encoding


def _is_excerpt(text: str, topics: dict[str, str]) -> bool:
    # One topic in four ("if", "while") is a section of a longer one ("compound"): held-out text must not hold it too.
    middle = len(text) // 2
    return any(len(other) > len(text) and text[middle : middle + 80] in other for other in topics.values())


def _library_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _is_library_source(path: Path) -> bool:
    # _sysconfigdata… and config-3.x… describe one machine's build of Python.
    generated = path.name.startswith("_sysconfigdata") or path.parent.name.startswith("config-")
    return path.suffix == ".py" and not generated


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    """Yield the files below `root`; what is skipped or hidden is not entered (site-packages may be huge)."""
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in skipped and not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))
