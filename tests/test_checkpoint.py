"""A checkpoint's weights: written by any layout, read by any other; each way to be damaged is told in one line."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from expertmesh.parallel.groups import Groups
from expertmesh.parallel.shard import Shard
from expertmesh.system.model import checkpoint as checkpoint_module
from expertmesh.system.model.checkpoint import (
    INDEX,
    CheckpointError,
    load_weights,
    open_checkpoint,
    read_config,
    read_index,
    read_tensors,
    shard_name,
    write_config,
    write_index,
    write_tensors,
)
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.tensor_parallel import parallel_transformer
from expertmesh.system.model.transformer import ExpertPool, Transformer, shards
from expertmesh.system.model.weights import initialise, weights

CONFIG = tiny_model()
FIRST, SECOND = shard_name("model", 0, 2), shard_name("model", 1, 2)


def by_name(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: view.detach() for w in weights(module) for name, view in w.split(w.parameter).items()}


def write_checkpoint(folder: Path, size: int, config: ModelConfig = CONFIG) -> Path:
    """As `size` expert-parallel ranks write it: rank 0 the dense weights, each its own experts."""
    folder.mkdir()
    write_config(folder, config)
    files = []
    for rank in range(size):
        model = Transformer(config, shards(config, rank, size))
        initialise(model, 3, 0.2)
        mine = [w for w in weights(model) if w.is_expert or rank == 0]
        tensors = {name: view for w in mine for name, view in w.split(w.parameter).items()}
        files.append(folder / shard_name("model", rank, size))
        write_tensors(tensors, files[-1])
    write_index(folder / INDEX, files)
    return folder


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "written", 2)


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    model = Transformer(CONFIG)
    initialise(model, 3, 0.2)
    return by_name(model)


READERS: list[tuple[Callable[[], torch.nn.Module], str]] = [
    (lambda: Transformer(CONFIG), "one rank with everything"),
    (lambda: Transformer(CONFIG, shards(CONFIG, 1, 2)), "a rank of the layout that wrote it"),
    (lambda: Transformer(CONFIG, shards(CONFIG, 2, 3)), "an uneven shard that crosses the files"),
    (lambda: Transformer(CONFIG, shards(CONFIG, 0, 6)), "a rank without experts"),
    (lambda: Transformer(CONFIG, shards(CONFIG, 0, 0)), "an attention worker"),
    (lambda: ExpertPool(CONFIG, 0, 1), "an FFN worker with all experts"),
    (lambda: ExpertPool(CONFIG, 1, 3), "an FFN worker with some"),
]


@pytest.mark.parametrize("make, reason", READERS, ids=[reason for _, reason in READERS])
def test_written_by_two_read_by_any(two_shards, whole, make, reason):
    module = make()
    for parameter in module.parameters():
        parameter.data.fill_(torch.nan)
    load_weights(module, two_shards)
    for name, tensor in by_name(module).items():
        assert torch.equal(tensor, whole[name]), name


def test_of_a_split_weight_only_the_part_is_read(two_shards, whole):
    """A model that is split reads its parts, whoever wrote the files."""
    index = two_shards / INDEX
    weight_map = read_index(index)
    for name, shard in (("lm_head.weight", Shard(0, 1, 2)), ("layers.1.self_attn.o_proj.weight", Shard(1, 3, 4))):
        ((_, part),) = read_tensors(index, weight_map, [name], shard)
        assert part.numel() * shard.of == whole[name].numel()
        assert torch.equal(part, whole[name][shard.place(tuple(part.shape))])

    for rank in range(2):
        group: Any = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 2)
        model = parallel_transformer(CONFIG, Groups(tensor=group, expert_tensor=group))
        load_weights(model, two_shards)
        for weight in weights(model):
            for name, view in weight.split(weight.parameter.detach()).items():
                assert torch.equal(view, whole[name][weight.shard.place(tuple(view.shape))]), name


def test_a_file_that_does_not_fit_a_split_model_is_told_with_full_shapes(two_shards):
    group: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    wider = tiny_model(moe={"expert": {"hidden_size": 64}})
    with pytest.raises(
        CheckpointError, match=r"has shape \[16, 32\], config.json says \[64, 32\], of which 2 ranks hold"
    ):
        load_weights(parallel_transformer(wider, Groups(expert_tensor=group)), two_shards)


def test_the_number_of_shards_does_not_change_what_is_written(two_shards, whole, tmp_path):
    one, four = write_checkpoint(tmp_path / "one", 1), write_checkpoint(tmp_path / "four", 4)
    for folder, files in ((one, 1), (two_shards, 2), (four, 4)):
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        assert len(set(weight_map.values())) == files
        merged: dict[str, torch.Tensor] = {}
        for file_name in set(weight_map.values()):
            merged |= load_file(folder / file_name)
        assert merged.keys() == weight_map.keys() == whole.keys()
        assert all(torch.equal(merged[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("kind", ["ffn_experts", "constant_experts"])
def test_experts_that_a_model_has_none_of(tmp_path, kind):
    """Their parameters are there, and empty."""
    config = tiny_model(moe={kind: 0})
    folder = write_checkpoint(tmp_path / "checkpoint", 2, config)
    model, expected = Transformer(open_checkpoint(folder).config), Transformer(config)
    load_weights(model, folder)
    initialise(expected, 3, 0.2)
    for name, tensor in by_name(expected).items():
        assert torch.equal(by_name(model)[name], tensor), name


def test_config_reads_back(two_shards):
    assert open_checkpoint(two_shards).config == read_config(two_shards) == CONFIG
    described = json.loads((two_shards / "config.json").read_text())
    assert described["architectures"] == ["ExpertMeshForCausalLM"]


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    config = tiny_model(vocab_size=16, moe={"expert": {"hidden_size": 64}})  # an expert's matrices are the largest
    folder = write_checkpoint(tmp_path / "checkpoint", 2, config)
    live, peak, largest = 0, 0, 0
    open_file = checkpoint_module.safe_open

    class Counting:
        """safe_open, counting the bytes of tensors handed out and not yet let go."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.context = open_file(*args, **kwargs)

        def __enter__(self) -> Counting:
            self.file = self.context.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.context.__exit__(*error)

        def get_tensor(self, name: str) -> torch.Tensor:
            nonlocal live, peak, largest
            tensor = self.file.get_tensor(name)
            live += tensor.nbytes
            peak, largest = max(peak, live), max(largest, tensor.nbytes)
            weakref.finalize(tensor, let_go, tensor.nbytes)
            return tensor

    def let_go(size: int) -> None:
        nonlocal live
        live -= size

    monkeypatch.setattr(checkpoint_module, "safe_open", Counting)
    load_weights(Transformer(config), folder)
    assert largest == 64 * 32 * 4 and largest <= peak <= 2 * largest  # the one just read, and the one before it


# Each damage: what it does to a folder, the file that the message must name, words of the message, a reason.
Damage = tuple[Callable[[Path], None], str, str, str]


def cut(file_name: str, keep: Callable[[int, int], int]) -> Callable[[Path], None]:
    """Truncate to `keep(bytes of the header, bytes of the file)` bytes."""

    def damage(folder: Path) -> None:
        content = (folder / file_name).read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        (folder / file_name).write_bytes(content[: keep(header, len(content))])

    return damage


def rewrite(file_name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change the content of a JSON file."""

    def damage(folder: Path) -> None:
        path = folder / file_name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def put(file_name: str, content: bytes | None) -> Callable[[Path], None]:
    """Give a file other content; None deletes it."""

    def damage(folder: Path) -> None:
        (folder / file_name).unlink()
        if content is not None:
            (folder / file_name).write_bytes(content)

    return damage


def tensors(file_name: str, change: Callable[[dict], dict]) -> Callable[[Path], None]:
    """Write another set of tensors under the same name; the index stays as it is."""

    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / file_name)), folder / file_name)

    return damage


def without(name: str) -> Callable[[dict], dict]:
    return lambda content: {key: value for key, value in content.items() if key != name}


EXPERT = "layers.1.mlp.experts.3.down_proj.weight"
SEEN_AT_ONCE: list[Damage] = [
    (cut(FIRST, lambda header, size: 0), FIRST, "truncated or damaged", "an empty file"),
    (cut(FIRST, lambda header, size: 5), FIRST, "truncated or damaged", "cut in the length of the header"),
    (cut(FIRST, lambda header, size: 8), FIRST, "truncated or damaged", "cut after the length of the header"),
    (cut(FIRST, lambda header, size: header // 2), FIRST, "truncated or damaged", "cut in the header"),
    (cut(SECOND, lambda header, size: header), SECOND, "truncated or damaged", "header only"),
    (cut(SECOND, lambda header, size: (header + size) // 2), SECOND, "truncated or damaged", "half of the data"),
    (cut(SECOND, lambda header, size: size - 1), SECOND, "truncated or damaged", "the last byte of the data"),
    (put(SECOND, b"<html>not here</html>" * 20), SECOND, "truncated or damaged", "another kind of file"),
    (put(SECOND, None), SECOND, "the file is missing", "a missing shard"),
    (put(INDEX, None), INDEX, f"no {INDEX}", "no index"),
    (put(INDEX, b'{"weight_map": '), INDEX, "not valid JSON", "half an index"),
    (put(INDEX, b"\xff\xfe\x00"), INDEX, "not valid JSON", "an index that is not text"),
    (put(INDEX, b"[]"), INDEX, "not a JSON object", "an index that is a list"),
    (put(INDEX, b"{}"), INDEX, "no weight_map", "an index without its map"),
    (put(INDEX, b'{"weight_map": {"a": 1}}'), INDEX, "no weight_map", "an index that maps to numbers"),
    (put(INDEX, b'{"weight_map": {"a": ""}}'), "", "truncated or damaged", "an index that maps to a folder"),
    (put("config.json", None), "config.json", "no config.json", "no config"),
    (put("config.json", b"{,}"), "config.json", "not valid JSON", "a config that is not JSON"),
    (put("config.json", b"null"), "config.json", "not a JSON object", "an empty config"),
    (
        rewrite("config.json", lambda c: c | {"model_type": "llama"}),
        "config.json",
        "model_type is 'llama', expected 'expertmesh'",
        "somebody else's model",
    ),
    (rewrite("config.json", without("model_type")), "config.json", "model_type is None", "no model type"),
    (rewrite("config.json", lambda c: c | {"heads": 4}), "config.json", "heads: Extra inputs", "an unknown key"),
    (
        rewrite("config.json", lambda c: c | {"moe": c["moe"] | {"top_k": "two"}}),
        "config.json",
        "moe.top_k: Input should be a valid integer",
        "a bad value; the place is given",
    ),
    (
        rewrite("config.json", lambda c: c | {"attention": c["attention"] | {"kv_heads": 3}}),
        "config.json",
        "kv_heads=3 does not divide heads=4",
        "values that do not fit together",
    ),
    (rewrite("config.json", without("vocab_size")), "config.json", "vocab_size: missing", "no vocabulary"),
]

SEEN_ON_LOADING: list[Damage] = [
    (
        rewrite(INDEX, lambda c: {"weight_map": without(EXPERT)(c["weight_map"])}),
        INDEX,
        f"no tensor {EXPERT}",
        "a tensor the index does not know",
    ),
    (tensors(SECOND, without(EXPERT)), SECOND, EXPERT, "a tensor the index knows and the file does not have"),
    (
        tensors(SECOND, lambda found: found | {EXPERT: found[EXPERT][:-1].clone()}),
        SECOND,
        f"{EXPERT} has shape [31, 32], config.json says [32, 32]",
        "a tensor that is too small",
    ),
    (
        tensors(SECOND, lambda found: found | {EXPERT: found[EXPERT][:1].clone()}),
        SECOND,
        f"{EXPERT} has shape [1, 32], config.json says [32, 32]",
        "a tensor that would stretch to fit",
    ),
    (
        rewrite("config.json", lambda c: c | {"layers": 4}),
        INDEX,
        "no tensor layers.3.",
        "a config of another model: more layers",
    ),
    (
        rewrite("config.json", lambda c: c | {"vocab_size": 600}),
        FIRST,
        "embed_tokens.weight has shape [512, 32], config.json says [600, 32]",
        "a config of another model: more tokens",
    ),
]


def complaint(folder: Path, look: Callable[[Path], Any]) -> str:
    with pytest.raises(CheckpointError) as error:
        look(folder)
    assert error.value.__cause__ is None  # what a user sees is the line, not where it was found
    return str(error.value)


def load_everything(folder: Path) -> None:
    load_weights(Transformer(read_config(folder)), folder)


@pytest.mark.parametrize(
    "damage, file_name, words, reason",
    SEEN_AT_ONCE + SEEN_ON_LOADING,
    ids=[r for *_, r in SEEN_AT_ONCE + SEEN_ON_LOADING],
)
def test_damage_is_told_in_one_line_that_names_the_file(two_shards, tmp_path, damage, file_name, words, reason):
    folder = tmp_path / "damaged"
    shutil.copytree(two_shards, folder)
    damage(folder)
    before_loading = (damage, file_name, words, reason) in SEEN_AT_ONCE
    for look in (open_checkpoint, load_everything) if before_loading else (load_everything,):
        message = complaint(folder, look)
        assert words in message and str(folder) in message and file_name in message and "\n" not in message


def test_a_folder_that_is_none(tmp_path):
    assert "so this is not a checkpoint folder" in complaint(tmp_path / "nowhere", open_checkpoint)
    (tmp_path / "file").write_text("")
    assert "so this is not a checkpoint folder" in complaint(tmp_path / "file", open_checkpoint)


def test_an_ffn_worker_needs_no_more_than_its_experts(two_shards, tmp_path):
    """Dense weights that are missing do not matter to who does not hold them."""
    folder = tmp_path / "experts only"
    shutil.copytree(two_shards, folder)
    tensors(FIRST, lambda found: {name: t for name, t in found.items() if ".experts." in name})(folder)
    write_index(folder / INDEX, [folder / FIRST, folder / SECOND])
    load_weights(ExpertPool(CONFIG, 0, 1), folder)
    assert "no tensor embed_tokens.weight" in complaint(folder, load_everything)
