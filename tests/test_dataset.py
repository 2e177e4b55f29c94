"""Tokens on disk and the batches cut from them: nothing lost, nothing seen twice, the same data after a resume."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from expertmesh.system.tokenizer import Tokenizer
from expertmesh.system.train import dataset as dataset_module
from expertmesh.system.train.dataset import TokenDataset, prepare_tokens, unigram_loss

VOCAB = 300


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """40 documents of 4 to 43 lines, split with a share of 0.2."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = ["\n".join(f"naïve line {i * j} of text {i}" for j in range(4 + i)) for i in range(40)]
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_tokens(str(source), None, VOCAB, None, 0.2, folder / "data")
    return texts, str(source), folder / "data"


def write_tokens(folder: Path, train, validation=(1, 2)):
    """A prepared folder of chosen tokens."""
    folder.mkdir(exist_ok=True)
    for name, tokens in [("train.bin", train), ("validation.bin", validation)]:
        np.asarray(tokens, dtype="<u4").tofile(folder / name)
    meta = dict.fromkeys(dataset_module.TokenMeta.__dataclass_fields__, 0)
    meta |= {"dtype": "uint32", "train_tokens": len(train), "validation_tokens": len(validation), "vocab_size": 1000}
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenDataset(folder)


def stored(folder: Path, name: str) -> list[int]:
    return np.fromfile(folder / name, dtype=TokenDataset(folder).meta.dtype).tolist()


def split_documents(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    texts, start = [], 0
    for place, token in enumerate(ids):
        if token == tokenizer.eos_id:
            texts.append(tokenizer.decode(ids[start:place]))
            start = place + 1
    assert start == len(ids), "the file must end in the end-of-text token"
    return texts


def test_files_hold_every_document_once_and_meta_counts_them(prepared):
    texts, _, folder = prepared
    tokenizer = Tokenizer.load(folder / "tokenizer")
    train, held_out = (split_documents(stored(folder, f"{part}.bin"), tokenizer) for part in ("train", "validation"))
    assert sorted(train + held_out) == sorted(texts)
    assert 1 <= len(held_out) < len(train)
    opened = TokenDataset(folder)
    meta = opened.meta
    assert (meta.train_documents, meta.validation_documents, meta.split) == (len(train), len(held_out), "documents")
    assert meta.train_bytes == sum(len(text.encode()) for text in train)
    assert meta.validation_bytes == sum(len(text.encode()) for text in held_out)
    assert opened.vocab_size == tokenizer.vocab_size <= VOCAB
    assert meta.dtype == "uint16"
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "tokenizer", "train.bin", "validation.bin"]


def test_tokenizer_learns_from_the_training_part_only(prepared, monkeypatch, tmp_path):
    _, source, folder = prepared
    seen = []
    train = Tokenizer.train

    def spy(texts, vocab_size):
        seen.extend(texts)
        return train(iter(seen), vocab_size)

    monkeypatch.setattr(dataset_module.Tokenizer, "train", spy)
    prepare_tokens(source, None, VOCAB, None, 0.2, tmp_path / "data")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    assert sorted(seen) == sorted(split_documents(stored(folder, "train.bin"), tokenizer))


def test_equal_documents_stay_on_one_side_and_new_ones_move_none(tmp_path):
    def sides(texts):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare_tokens(str(tmp_path / "a.jsonl"), None, VOCAB, None, 0.3, tmp_path / "data")
        tokenizer = Tokenizer.load(tmp_path / "data" / "tokenizer")
        return [set(split_documents(stored(tmp_path / "data", f"{p}.bin"), tokenizer)) for p in ("train", "validation")]

    texts = [f"document {i}" for i in range(60)]
    train, held_out = sides(texts * 2)
    assert not train & held_out
    more_train, more_held_out = sides([f"new {i}" for i in range(60)] + texts)
    assert train < more_train and held_out < more_held_out


def test_one_book_is_held_out_by_its_tail(tmp_path):
    book = "".join(f"line {i} of the book\n" for i in range(400))
    (tmp_path / "book.txt").write_text(book)
    prepare_tokens(str(tmp_path / "book.txt"), None, VOCAB, None, 0.1, tmp_path / "data")
    tokenizer = Tokenizer.load(tmp_path / "data" / "tokenizer")
    train, held_out = (
        split_documents(stored(tmp_path / "data", f"{p}.bin"), tokenizer) for p in ("train", "validation")
    )
    assert TokenDataset(tmp_path / "data").meta.split == "tails"
    assert len(train) == len(held_out) == 1
    assert train[0] + held_out[0] == book
    assert 0.1 <= len(held_out[0]) / len(book) < 0.11 and held_out[0].startswith("line ")


def test_long_documents_are_encoded_in_pieces_that_lose_nothing(tmp_path, monkeypatch, prepared):
    monkeypatch.setattr(dataset_module, "PIECE_CHARACTERS", 50)
    texts = ["short lines\n" * 30 + "é" * 130 + "\nend", "x" * 50, "y" * 51, "\n" * 49 + "word\n" + "z" * 200]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_tokens(str(tmp_path / "a.jsonl"), str(prepared[2] / "tokenizer"), VOCAB, None, 0.5, tmp_path / "data")
    tokenizer = Tokenizer.load(prepared[2] / "tokenizer")
    both = [split_documents(stored(tmp_path / "data", f"{p}.bin"), tokenizer) for p in ("train", "validation")]
    assert sorted(both[0] + both[1]) == sorted(texts)


def test_same_settings_reuse_the_folder_and_others_rebuild_it(tmp_path):
    source = tmp_path / "corpus"
    source.mkdir()
    for i in range(20):
        (source / f"{i:02}.txt").write_text(f"text number {i}\n" * (i + 1))

    def prepare(**changed):
        settings = dict(vocab_size=VOCAB, max_bytes=None, validation_share=0.3) | changed
        prepare_tokens(str(source), None, folder=tmp_path / "data", **settings)
        return (tmp_path / "data" / "meta.json").stat().st_mtime_ns, stored(tmp_path / "data", "train.bin")

    first = prepare()
    assert prepare() == first
    assert prepare(max_bytes=1000) != first
    again = prepare()
    assert again[0] != first[0] and again[1] == first[1], "the same settings must give the same tokens"
    (source / "99.txt").write_text("a new file")
    assert prepare() != again


def test_a_cut_off_build_leaves_no_folder_that_looks_whole(tmp_path, prepared, monkeypatch):
    _, source, folder = prepared
    copy = tmp_path / "data"
    shutil.copytree(folder, copy)
    replace, done = dataset_module.os.replace, []

    def dies_after_two(a, b):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(replace(a, b))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(dataset_module.os, "replace", dies_after_two)
        prepare_tokens(source, None, VOCAB, None, 0.4, copy)
    with pytest.raises(ValueError, match="holds no prepared tokens"):
        TokenDataset(copy)
    prepare_tokens(source, None, VOCAB, None, 0.2, copy)
    assert stored(copy, "train.bin") == stored(folder, "train.bin")
    assert not (copy / "building").exists()


def test_a_torn_token_file_is_noticed(tmp_path, prepared):
    copy = tmp_path / "data"
    shutil.copytree(prepared[2], copy)
    content = (copy / "train.bin").read_bytes()
    (copy / "train.bin").write_bytes(content[:-2])
    with pytest.raises(ValueError, match="train.bin has .* bytes, meta.json says"):
        TokenDataset(copy)


@pytest.mark.parametrize("share", [0, 1, -0.1, 5])
def test_shares_outside_zero_and_one_are_refused(tmp_path, share):
    with pytest.raises(ValueError, match="validation_share is"):
        prepare_tokens("stdlib", None, VOCAB, 1000, share, tmp_path)


def test_a_given_tokenizer_is_used_as_it_is(tmp_path, prepared):
    _, source, folder = prepared
    prepare_tokens(source, str(folder / "tokenizer"), 5, None, 0.2, tmp_path / "data")
    assert stored(tmp_path / "data", "train.bin") == stored(folder, "train.bin")
    with pytest.raises(ValueError, match="nowhere"):
        prepare_tokens(source, str(tmp_path / "nowhere"), VOCAB, None, 0.2, tmp_path / "data")


def test_one_character_is_too_little_to_split(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="too little text"):
        prepare_tokens(str(tmp_path / "a.txt"), None, VOCAB, None, 0.1, tmp_path / "data")


@pytest.mark.parametrize(
    "tokens, sequence_length, batch_size",
    [
        (101, 10, 3),  # the tokens are a whole number of windows
        (107, 10, 4),  # some are left over
        (1000, 7, 5),  # an epoch ends inside a batch
        (11, 10, 2),  # one window: every sample is an epoch of its own
        (50, 1, 9),  # pairs
    ],
)
def test_an_epoch_predicts_each_token_once(tmp_path, tokens, sequence_length, batch_size):
    data = write_tokens(tmp_path, range(tokens))  # a token's value is its place
    windows = max(1, (tokens - 1) // sequence_length - 1)
    steps = -(-3 * windows // batch_size)
    rows = torch.cat([data.batch(step, batch_size, sequence_length, seed=5) for step in range(steps)])
    assert rows.dtype == torch.int64 and rows.shape[1] == sequence_length + 1
    assert (rows.diff(dim=1) == 1).all(), "each row must be a run of neighbouring tokens"
    for epoch in range(3):
        starts = rows[epoch * windows : (epoch + 1) * windows, 0].sort().values
        assert (starts.diff() == sequence_length).all(), "windows must tile the text, each once"
        assert starts[0] < sequence_length


def test_epochs_differ_in_order_and_offset_and_seeds_differ(tmp_path):
    data = write_tokens(tmp_path, range(2000))
    windows = (2000 - 1) // 20 - 1
    first, second, third = (data.batch(epoch, windows, 20, seed=1)[:, 0] for epoch in range(3))
    assert len({int(epoch.min()) for epoch in (first, second, third)}) > 1, "the offset must move"
    assert first.argsort().tolist() != second.argsort().tolist(), "the order must change"
    assert first.tolist() != sorted(first.tolist())
    assert not torch.equal(first, data.batch(0, windows, 20, seed=2)[:, 0])


def test_batches_are_a_function_of_their_arguments_alone(tmp_path):
    tokens = np.random.default_rng(3).integers(0, 1000, 5000)
    data = write_tokens(tmp_path, tokens)
    straight = [data.batch(step, 4, 33, seed=7) for step in range(60)]
    dataset_module._epoch.cache_clear()
    resumed = TokenDataset(tmp_path)
    for step in reversed(range(60)):
        assert torch.equal(resumed.batch(step, 4, 33, seed=7), straight[step])


def test_ranks_together_see_what_one_rank_sees(tmp_path):
    data = write_tokens(tmp_path, np.random.default_rng(4).integers(0, 1000, 3000))
    for step in range(9):
        whole = data.batch(step, 8, 16, seed=0)
        # Micro-batches of a larger count of steps see the same rows too: sample i is sample i, however it is cut.
        assert torch.equal(whole, torch.cat([data.batch(2 * step + half, 4, 16, seed=0) for half in range(2)]))
        for ranks in (2, 4):
            parts = [TokenDataset(tmp_path).batch(step, 8, 16, seed=0)[rank::ranks] for rank in range(ranks)]
            assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole)


def test_batch_values_are_known():
    """Pins the stream: a change here would give resumed runs other data."""
    offset, order = dataset_module._epoch(6, 9, seed=3, epoch=2)
    assert (offset, order.tolist()) == (2, [1, 3, 0, 2, 5, 4])


@pytest.mark.parametrize("tokens, expected_sizes", [(81, [3, 3, 2]), (89, [3, 3, 2]), (91, [3, 3, 3]), (11, [1])])
def test_validation_windows_are_whole_and_fixed(tmp_path, tokens, expected_sizes):
    data = write_tokens(tmp_path, range(5), range(tokens))
    batches = list(data.validation_batches(3, 10, max_batches=3))
    assert [len(batch) for batch in batches] == expected_sizes
    rows = torch.cat(batches)
    assert torch.equal(rows, torch.arange(len(rows))[:, None] * 10 + torch.arange(11))
    assert [len(batch) for batch in data.validation_batches(3, 10, max_batches=1)] == expected_sizes[:1]


def test_one_token_short_of_a_window_says_both_numbers(tmp_path):
    data = write_tokens(tmp_path, range(10), range(10))
    assert data.batch(0, 1, 9, seed=0).tolist() == [list(range(10))]
    with pytest.raises(ValueError, match="training text has 10 tokens and one sequence needs 11"):
        data.batch(0, 1, 10, seed=0)
    with pytest.raises(ValueError, match="held-out text has 10 tokens and one sequence needs 11"):
        next(data.validation_batches(1, 10, 1))


def test_unigram_loss_by_hand_and_from_the_files(prepared):
    # Probabilities (3 + 1) / 8, (1 + 1) / 8 and, never seen, (0 + 1) / 8 twice.
    loss = unigram_loss(np.array([3, 1, 0, 0]), np.array([2, 1, 1, 0]))
    assert math.isclose(loss, (2 * math.log(2) + math.log(4) + math.log(8)) / 4)
    folder = prepared[2]
    meta = TokenDataset(folder).meta
    counts = [np.bincount(stored(folder, f"{part}.bin"), minlength=meta.vocab_size) for part in ("train", "validation")]
    assert math.isclose(meta.unigram_loss, unigram_loss(*counts))
    assert 0 < meta.unigram_loss < math.log(meta.vocab_size)


def test_wide_vocabularies_are_stored_in_four_bytes():
    assert dataset_module._dtype(1 << 16) == np.dtype("<u2")
    assert dataset_module._dtype((1 << 16) + 1) == np.dtype("<u4")
