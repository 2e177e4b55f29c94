"""A checkpoint's weights: a folder that a Hugging Face user recognises, written by many ranks, read by any layout.

    config.json                          the architecture
    model-00001-of-00002.safetensors     dense weights and the experts of the first expert-parallel rank
    model-00002-of-00002.safetensors     the experts of the second
    model.safetensors.index.json         which file holds which weight
    tokenizer.json, tokenizer_config.json

Reading takes from each file just the weights that the module has, so an FFN worker reads its experts and no more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

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


def write_config(folder: Path, config: ModelConfig) -> None:
    write_json(_DESCRIPTION | config.model_dump(), folder / "config.json")


def read_json(path: Path) -> dict:
    """The content of a JSON file of a checkpoint."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}, so this is not a checkpoint folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{path}: not valid JSON; the checkpoint is damaged") from None


def read_config(folder: Path) -> ModelConfig:
    """The architecture of the checkpoint in `folder`."""
    content = read_json(folder / "config.json")
    kind = content.get("model_type")
    if kind != "expertmesh":
        raise CheckpointError(f"{folder / 'config.json'}: model_type is {kind!r}, expected 'expertmesh'")
    try:
        return ModelConfig(**{key: value for key, value in content.items() if key not in _DESCRIPTION})
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{folder / 'config.json'}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None


def read_tensors(folder: Path, weight_map: dict[str, str], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Read the named tensors from the files that `weight_map` gives for them, each file opened once."""
    by_file: dict[str, list[str]] = {}
    for name in names:
        if name not in weight_map:
            raise CheckpointError(f"{folder}: no tensor {name}")
        by_file.setdefault(weight_map[name], []).append(name)
    tensors = {}
    for file_name, wanted in by_file.items():
        try:
            with safe_open(folder / file_name, framework="pt") as file:
                for name in wanted:
                    tensors[name] = file.get_tensor(name)
        except FileNotFoundError:
            raise CheckpointError(f"{folder / file_name}: the file is missing") from None
        except SafetensorError as error:
            raise CheckpointError(f"{folder / file_name}: truncated or damaged ({error})") from None
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """Which file holds which tensor. Each file is opened, so that a truncated one is found before any work."""
    weight_map: dict[str, str] = read_json(index).get("weight_map", {})
    one_of_each_file = {file_name: name for name, file_name in weight_map.items()}
    read_tensors(index.parent, weight_map, one_of_each_file.values())
    return weight_map


def check_checkpoint(folder: Path) -> ModelConfig:
    """Look at everything that is needed to load `folder`, without loading it; return its architecture."""
    config = read_config(folder)
    read_index(folder / INDEX)
    return config


@torch.no_grad()
def load_weights(module: nn.Module, folder: Path) -> None:
    """Fill every parameter of `module` (a whole model or a part of one) from the checkpoint in `folder`."""
    weight_map = read_index(folder / INDEX)
    for weight in weights(module):
        views = weight.split(weight.parameter)
        for name, tensor in read_tensors(folder, weight_map, views).items():
            if tensor.shape != views[name].shape:
                raise CheckpointError(
                    f"{folder}: {name} has shape {list(tensor.shape)}, config.json says {list(views[name].shape)}"
                )
            views[name].copy_(tensor)
