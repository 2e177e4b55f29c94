"""Training reads tokens, not text: encode a corpus once into flat files, then cut batches out of them by arithmetic.

    folder/tokenizer/       the tokenizer, trained on the training part or loaded
    folder/train.bin        token ids, little endian, uint16 or uint32; each document ends in the end-of-text token
    folder/validation.bin   the same for held-out documents
    folder/meta.json        TokenMeta; written last, so a folder that has it is whole

A batch is a pure function of (step, batch size, sequence length, seed): a resumed run sees the data it would have seen,
and rank r of R takes rows [r::R], so the data does not depend on the number of ranks.

Shape suffixes: B sequences in a batch, S1 tokens of a sequence and the one that follows it, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from expertmesh.system.tokenizer import Tokenizer
from expertmesh.system.train.corpus import documents, fingerprint, source_files

FORMAT = 2  # raise when the same settings would give other files
PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class TokenMeta:
    """What meta.json says of a prepared folder."""

    digest: str  # of the settings, the source's files and a given tokenizer: equal digests, equal tokens
    dtype: str  # numpy name of one token on disk
    vocab_size: int
    train_tokens: int
    validation_tokens: int
    train_bytes: int  # UTF-8 text, without the end-of-text tokens
    validation_bytes: int
    train_documents: int
    validation_documents: int
    split: str  # "documents": whole documents held out; "tails": the end of each document, where there are too few
    unigram_loss: float  # nats per held-out token; see `unigram_loss`


def prepare_tokens(
    source: str,
    tokenizer_source: str | None,
    vocab_size: int,
    max_bytes: int | None,
    validation_share: float,
    folder: Path,
) -> None:
    """Fill `folder` from the text of `source`, unless it already holds just that. One process at a time.

    tokenizer_source: a tokenizer to load, or None to train one on the training part.
    vocab_size: most ids of a trained tokenizer; a loaded one brings its own.
    validation_share: part of the documents to hold out, above 0 and below 1; a document's content decides its side, so
        equal documents stay together and new ones move no old one.
    Raises ValueError for a source, a tokenizer or a share that cannot be used.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share is {validation_share}; it must lie above 0 and below 1, such as 0.05")
    given = None if tokenizer_source is None else Tokenizer.load(tokenizer_source)
    inputs = [fingerprint(source_files(source)), given and given.fingerprint]
    settings = [FORMAT, source, None if given else vocab_size, max_bytes, validation_share, *inputs]
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()
    if _is_prepared(folder, digest):
        return
    corpus = _Corpus(source, max_bytes, validation_share)
    tokenizer = given or Tokenizer.train(corpus.texts(held_out=False), vocab_size)
    building = folder / "building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    tokenizer.save(building / "tokenizer")
    train = _encode(corpus.texts(held_out=False), tokenizer, building / "train.bin")
    validation = _encode(corpus.texts(held_out=True), tokenizer, building / "validation.bin")
    meta = TokenMeta(
        digest=digest,
        dtype=_dtype(tokenizer.vocab_size).name,
        vocab_size=tokenizer.vocab_size,
        train_tokens=int(train.counts_V.sum()),
        validation_tokens=int(validation.counts_V.sum()),
        train_bytes=train.bytes,
        validation_bytes=validation.bytes,
        train_documents=train.documents,
        validation_documents=validation.documents,
        split=corpus.split,
        unigram_loss=unigram_loss(train.counts_V, validation.counts_V),
    )
    (building / "meta.json").write_text(json.dumps(asdict(meta), indent=2) + "\n")
    # The old meta.json goes first and the new one comes last: cut off in between, the folder counts as unprepared.
    (folder / "meta.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    for name in ("tokenizer", "train.bin", "validation.bin", "meta.json"):
        os.replace(building / name, folder / name)
    building.rmdir()


def unigram_loss(train_counts_V: np.ndarray, validation_counts_V: np.ndarray) -> float:
    """Return the nats per held-out token of a model that knows only how often each token occurs in training.

    train_counts_V, validation_counts_V: [V] occurrences of each id. One is added to each training count, so that a
    token never seen in training costs much, not infinity. A trained model must do better than this.
    """
    smoothed_V = train_counts_V.astype(np.float64) + 1
    log_probability_V = np.log(smoothed_V) - np.log(smoothed_V.sum())
    return float(-(validation_counts_V * log_probability_V).sum() / validation_counts_V.sum())


class TokenDataset:
    """The tokens in a folder that `prepare_tokens` filled, mapped and not read.

    Raises ValueError for a folder that is not prepared, or whose files do not have the size that meta.json gives.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.meta = TokenMeta(**json.loads((folder / "meta.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{folder} holds no prepared tokens ({error}); prepare_tokens writes them") from error
        self._train = _map_tokens(folder / "train.bin", self.meta.dtype, self.meta.train_tokens)
        self._validation = _map_tokens(folder / "validation.bin", self.meta.dtype, self.meta.validation_tokens)

    @property
    def vocab_size(self) -> int:
        """How many ids the tokenizer has; every token is below this."""
        return self.meta.vocab_size

    @property
    def train_tokens(self) -> int:
        """Tokens in the training part."""
        return self.meta.train_tokens

    @property
    def validation_tokens(self) -> int:
        """Tokens in the held-out part."""
        return self.meta.validation_tokens

    def batch(self, step: int, batch_size: int, sequence_length: int, seed: int) -> torch.Tensor:
        """Return tokens_BS1 [batch_size, sequence_length + 1] int64 for `step`, which counts from 0.

        An epoch cuts the training tokens, from an offset of its own, into windows that predict each token once (the
        last token of one is the first of the next) and uses every window once, in an order of its own.
        Raises ValueError when the tokens do not fill one window.
        """
        windows = _window_count(self.train_tokens, sequence_length, "training")
        # One window is given up, where there are two, so that any offset below a whole window leaves the same number.
        windows = max(1, windows - 1)
        slack = min(sequence_length - 1, self.train_tokens - 1 - windows * sequence_length)
        starts = []
        for sample in range(step * batch_size, (step + 1) * batch_size):
            epoch, position = divmod(sample, windows)
            offset, order = _epoch(windows, slack, seed, epoch)
            starts.append(offset + int(order[position]) * sequence_length)
        return _cut(self._train, starts, sequence_length)

    def validation_batches(self, batch_size: int, sequence_length: int, max_batches: int) -> Iterator[torch.Tensor]:
        """Yield up to `max_batches` of tokens_BS1 [B, sequence_length + 1] int64, always the same ones, in text order.

        B is `batch_size`, but for a last batch of fewer windows; every window is whole.
        Raises ValueError when the tokens do not fill one window.
        """
        windows = _window_count(self.validation_tokens, sequence_length, "held-out")
        for first in range(0, min(windows, batch_size * max_batches), batch_size):
            last = min(first + batch_size, windows)
            starts = [window * sequence_length for window in range(first, last)]
            yield _cut(self._validation, starts, sequence_length)


class _Corpus:
    """A source and the rule that holds text out of it."""

    def __init__(self, source: str, max_bytes: int | None, validation_share: float) -> None:
        self._source, self._max_bytes, self._share = source, max_bytes, validation_share
        sides = set()
        for text in documents(source, max_bytes):
            sides.add(self._is_held_out(text))
            if len(sides) == 2:
                break
        # A single book has no second document to hold out.
        self.split = "documents" if len(sides) == 2 else "tails"
        for held_out in (False, True):
            if next(self.texts(held_out=held_out), None) is None:
                raise ValueError(f"{source} holds too little text to train on and to hold some out; give more text")

    def texts(self, *, held_out: bool) -> Iterator[str]:
        """Yield the texts of one side."""
        for text in documents(self._source, self._max_bytes):
            if self.split == "documents":
                if self._is_held_out(text) == held_out:
                    yield text
                continue
            middle = int(len(text) * (1 - self._share))
            middle = text.rfind("\n", 0, middle) + 1 or middle
            part = text[middle:] if held_out else text[:middle]
            if part.strip():
                yield part

    def _is_held_out(self, text: str) -> bool:
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        return number < self._share * 2**64


@dataclass(frozen=True)
class _Encoded:
    """What went into one token file; counts_V [V] int64 are the occurrences of each id."""

    counts_V: np.ndarray
    bytes: int
    documents: int


def _encode(texts: Iterator[str], tokenizer: Tokenizer, path: Path) -> _Encoded:
    dtype = _dtype(tokenizer.vocab_size)
    counts_V = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    end_of_text = tokenizer.eos_id
    read_bytes = read_documents = 0
    with path.open("wb") as file:
        for text in texts:
            for piece in _pieces(text):
                ids = np.asarray(tokenizer.encode(piece), dtype=np.int64)
                counts_V += np.bincount(ids, minlength=len(counts_V))
                file.write(ids.astype(dtype).tobytes())
            counts_V[end_of_text] += 1
            file.write(dtype.type(end_of_text).tobytes())
            read_bytes += len(text.encode())
            read_documents += 1
        file.flush()
        os.fsync(file.fileno())
    return _Encoded(counts_V, read_bytes, read_documents)


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text at line ends: a tokenizer needs a hundred times the memory of what it encodes in one call."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _is_prepared(folder: Path, digest: str) -> bool:
    try:
        return TokenDataset(folder).meta.digest == digest and (folder / "tokenizer").is_dir()
    except ValueError:
        return False


def _map_tokens(path: Path, dtype: str, tokens: int) -> np.ndarray:
    expected = tokens * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, meta.json says {expected}; delete the folder and prepare it again")
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")


def _window_count(tokens: int, sequence_length: int, part: str) -> int:
    windows = (tokens - 1) // sequence_length
    if windows < 1:
        raise ValueError(
            f"the {part} text has {tokens} tokens and one sequence needs {sequence_length + 1}; "
            "give more text or a shorter sequence length"
        )
    return windows


@lru_cache(maxsize=2)
def _epoch(windows: int, slack: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    """Return where an epoch's first window starts and the order of its windows.

    Sorting raw Philox words, not Generator.permutation, whose stream may change from one numpy to the next.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(windows + 1)
    return int(words[0] % (slack + 1)), np.argsort(words[1:], kind="stable")


def _cut(tokens: np.ndarray, starts: list[int], sequence_length: int) -> torch.Tensor:
    rows = [tokens[start : start + sequence_length + 1] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))
