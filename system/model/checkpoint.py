"""A checkpoint's weights: a folder that a Hugging Face user recognises, written by many ranks, read by any layout.

    config.json                          the architecture
    model-00001-of-00002.safetensors     dense weights and the experts of the first expert-parallel rank
    model-00002-of-00002.safetensors     the experts of the second
    model.safetensors.index.json         which file holds which weight
    tokenizer.json, tokenizer_config.json

Reading takes from each file just the weights that the module has, so an FFN worker reads its experts and no more, and
of a weight that is split over ranks just the part that is held here.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from expertmesh.parallel.shard import WHOLE, Shard
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.weights import weights

INDEX = "model.safetensors.index.json"
_DESCRIPTION = {"architectures": ["ExpertMeshForCausalLM"], "model_type": "expertmesh", "torch_dtype": "float32"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line that names the file."""


def shard_name(stem: str, rank: int, size: int) -> str:
    return f"{stem}-{rank + 1:05d}-of-{size:05d}.safetensors"


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one safetensors file and wait until it is on the disk."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    flush(path)


def write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
    flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_index(index: Path, files: Iterable[Path]) -> None:
    """Write the index of the tensors in `files`, as their own headers list them. All lie in the index's folder."""
    weight_map: dict[str, str] = {}
    size = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            weight_map.update(dict.fromkeys(file.keys(), path.name))
        size += path.stat().st_size
    write_json({"metadata": {"total_size": size}, "weight_map": weight_map}, index)


def write_config(folder: Path, config: ModelConfig, dtype: str = "float32") -> None:
    write_json(_DESCRIPTION | {"torch_dtype": dtype} | config.model_dump(), folder / "config.json")


def read_json(path: Path) -> dict:
    """The content of a JSON file of a checkpoint."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path.parent}: no {path.name}, so this is not a checkpoint folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{path}: not valid JSON; the checkpoint is damaged") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; the checkpoint is damaged")
    return content


def read_config(folder: Path) -> ModelConfig:
    """The architecture of the checkpoint in `folder`."""
    path = folder / "config.json"
    content = read_json(path)
    kind = content.get("model_type")
    if kind != "expertmesh":
        raise CheckpointError(f"{path}: model_type is {kind!r}, expected 'expertmesh'")
    try:
        config = ModelConfig(**{key: value for key, value in content.items() if key not in _DESCRIPTION})
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if config.vocab_size is None:  # a recipe may leave it to the tokenizer, a trained model cannot
        raise CheckpointError(f"{path}: vocab_size: missing")
    return config


def read_tensors(
    index: Path, weight_map: dict[str, str], names: Iterable[str], shard: Shard = WHOLE
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the named tensors one by one from the files that `weight_map` gives for them, each file opened once.

    Of each only the part `shard`; a tensor that cannot be cut so is read whole, and has a shape that nobody expects.
    """
    by_file: dict[str, list[str]] = {}
    for name in names:
        if name not in weight_map:
            raise CheckpointError(f"{index}: no tensor {name}")
        by_file.setdefault(weight_map[name], []).append(name)
    for file_name, wanted in by_file.items():
        path = index.parent / file_name
        try:
            with safe_open(path, framework="pt") as file:
                for name in wanted:
                    yield name, file.get_tensor(name) if shard.of == 1 else _read_part(file, name, shard)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: the file is missing") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or damaged ({error})") from None


def _read_part(file: Any, name: str, shard: Shard) -> torch.Tensor:
    stored = file.get_slice(name)
    shape = list(stored.get_shape())
    if len(shape) <= shard.dim or shape[shard.dim] % shard.of:
        return file.get_tensor(name)
    shape[shard.dim] //= shard.of
    return stored[shard.place(tuple(shape))]


def read_index(index: Path) -> dict[str, str]:
    """Which file holds which tensor. Each file is opened, so that a truncated one is found before any work."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: no weight_map of tensors and their files; the checkpoint is damaged")
    one_of_each_file = {file_name: name for name, file_name in weight_map.items()}
    for _ in read_tensors(index, weight_map, one_of_each_file.values()):
        pass
    return weight_map


@torch.no_grad()
def fill(views: dict[str, torch.Tensor], index: Path, weight_map: dict[str, str], shard: Shard = WHOLE) -> None:
    """Copy into each of `views` the part `shard` of the tensor of its name."""
    for name, tensor in read_tensors(index, weight_map, views, shard):
        if tensor.shape != views[name].shape:
            part = f", of which {shard.of} ranks hold equal parts" if shard.of > 1 else ""
            raise CheckpointError(
                f"{index.parent / weight_map[name]}: {name} has shape {list(tensor.shape)}, "
                f"config.json says {list(shard.full_shape(views[name].shape))}{part}"
            )
        if views[name].dtype.itemsize == 1 and tensor.dtype != views[name].dtype:  # bytes of a format of their own
            raise CheckpointError(
                f"{index.parent / weight_map[name]}: {name} is {tensor.dtype}, config.json asks for {views[name].dtype}"
            )
        views[name].copy_(tensor)


@dataclass(frozen=True)
class Checkpoint(ABC):
    """A checkpoint that was looked at: what is needed to load it is there. It may be sent to other processes.

    Whose layout it has (ours here, Hugging Face's in system/convert/huggingface.py) its readers need not know.
    """

    folder: Path
    config: ModelConfig
    dtype: str  # as torch names it, of most of its bytes

    @abstractmethod
    def fill(self, views: dict[str, torch.Tensor], shard: Shard = WHOLE) -> None:
        """Copy into each of `views` the part `shard` of the tensor of its name. Raises CheckpointError."""

    def load(self, module: nn.Module, prefix: str = "", but: Collection[nn.Module] = ()) -> None:
        """Fill every parameter of `module`, a whole model or a part of one (see `weights`). Raises CheckpointError.

        Numbers take the dtype of the parameter that they go to.
        """
        for weight in weights(module, prefix, but):
            self.fill(weight.split(weight.parameter.detach()), weight.shard)


@dataclass(frozen=True)
class OwnCheckpoint(Checkpoint):
    """One that was written here."""

    weight_map: dict[str, str]  # which file holds which tensor

    def fill(self, views: dict[str, torch.Tensor], shard: Shard = WHOLE) -> None:
        fill(views, self.folder / INDEX, self.weight_map, shard)


def open_checkpoint(folder: Path) -> OwnCheckpoint:
    """Look at everything that is needed to load `folder`, without loading it. Raises CheckpointError with one line."""
    config = read_config(folder)
    dtype = read_json(folder / "config.json").get("torch_dtype", "float32")
    return OwnCheckpoint(folder, config, dtype, read_index(folder / INDEX))


def load_weights(module: nn.Module, folder: Path) -> None:
    """Fill every parameter of `module` (a whole model or a part of one) from the checkpoint in `folder`."""
    open_checkpoint(folder).load(module)
