"""Checkpoints of Hugging Face in and out: config, every tensor under its other name, tokenizer files.

Nothing is left out in silence. Which tensors a model must have follows from its config: one that is missing, unknown
or of another shape is an error, and the few kinds that carry nothing are counted.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expertmesh.system.convert.families import choose_family, family_of
from expertmesh.system.convert.family import Family
from expertmesh.system.convert.stream import (
    FP8_BLOCK,
    SHARD_BYTES,
    Copy,
    Stored,
    read_headers,
    same_bytes,
    write_shards,
    written_aside,
)
from expertmesh.system.model.checkpoint import CheckpointError, read_config, read_json, write_config, write_json
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import weights
from expertmesh.system.tokenizer import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
GENERATION = "generation_config.json"
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SCALE_SUFFIX = "_scale_inv"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    checkpoint: Path
    model_type: str  # of Hugging Face's side
    parameters: int
    active_parameters: int  # those that a token meets
    tensors: int
    peak_bytes: int  # most bytes of tensors in memory at once
    skipped: dict[str, int]  # tensors that were not taken over: why -> how many


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Every tensor of a checkpoint of `config`, by our names."""
    with torch.device("meta"):
        model = Transformer(config)
    views = (weight.split(weight.parameter) for weight in weights(model))
    return {name: tuple(view.shape) for split in views for name, view in split.items()}


def from_hf(path: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """Write the Hugging Face checkpoint in `path` as ours to `out`. Raises ValueError with one line if it cannot."""
    content = _read_hf_config(path)
    try:
        family = family_of(content)
        config = family.to_model_config(content)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    stored = read_headers(path)
    skipped = _take_out_ignored(stored, family, content, config, path)
    shapes = tensor_shapes(config)
    theirs = {name: family.hf_name(name) for name in shapes}
    copies = _match(theirs, shapes, stored, path)
    with written_aside(out) as folder:
        peak_bytes = write_shards(copies, folder, shard_bytes)
        write_config(folder, config, _common_dtype(copies))
        _copy_tokenizer(path, folder)
        token_ids = {key: content[key] for key in TOKEN_IDS if content.get(key) is not None}
        if token_ids and not (folder / GENERATION).exists():  # our config has no place for them
            write_json(token_ids, folder / GENERATION)
    return _conversion(out, family, config, shapes, peak_bytes, skipped)


def to_hf(path: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """Write our checkpoint in `path` for the Hugging Face class that can hold it. Raises ValueError if none can."""
    config = read_config(path)
    try:
        family = choose_family(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shapes = tensor_shapes(config)
    copies = [
        copy._replace(name=family.hf_name(copy.name))
        for copy in _match({name: name for name in shapes}, shapes, read_headers(path), path)
    ]
    with written_aside(out) as folder:
        peak_bytes = write_shards(copies, folder, shard_bytes)
        dtype = {"torch_dtype": _common_dtype(copies)}
        write_json(family.to_hf_config(config) | dtype | _token_ids(path), folder / "config.json")
        _copy_tokenizer(path, folder)
    return _conversion(out, family, config, shapes, peak_bytes, {})


def _read_hf_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ValueError(f"no folder {path}; give one that holds a Hugging Face checkpoint")
    content = read_json(path / "config.json")
    if content.get("model_type") == "expertmesh":
        raise ValueError(f"{path} is a checkpoint of expertmesh already")
    return content


def _take_out_ignored(
    stored: dict[str, Stored], family: Family, content: dict[str, Any], config: ModelConfig, path: Path
) -> dict[str, int]:
    """Remove from `stored` what carries nothing for this model; return why, and how many."""
    ignored: dict[str, str] = {}
    further = content.get("num_nextn_predict_layers", content.get("num_mtp_layers", 1)) or 0
    past = range(config.layers, config.layers + further) if family.prediction_layers else range(0)
    for name in stored:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if name.endswith(".rotary_emb.inv_freq"):
            ignored[name] = "tables of rotary frequencies"
        elif layer and int(layer[1]) in past:
            ignored[name] = "layers that predict further tokens"
    if config.tie_embeddings and "lm_head.weight" in stored:
        embedding = stored.get(family.hf_name("embed_tokens.weight"))
        if embedding is None or not same_bytes(stored["lm_head.weight"], embedding):
            raise ValueError(f"{path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding")
        ignored["lm_head.weight"] = "copies of tied embeddings"
    for name in ignored:
        del stored[name]
    return dict(Counter(ignored.values()))


def _match(sources: dict[str, str], shapes: Shapes, stored: dict[str, Stored], path: Path) -> list[Copy]:
    """A copy for each name of `sources`, from the stored tensor it gives; all stored tensors are used up."""
    missing = [source for source in sources.values() if source not in stored]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {len(sources)} tensors are missing, such as {missing[0]}")
    scales = {source + SCALE_SUFFIX for source in sources.values() if stored[source].dtype == "F8_E4M3"}
    unknown = sorted(stored.keys() - set(sources.values()) - scales)
    if unknown:
        raise CheckpointError(
            f"{stored[unknown[0]].path}: {len(unknown)} tensors that the architecture in config.json has not, "
            f"such as {unknown[0]}"
        )
    copies = []
    for name, source in sources.items():
        tensor, scale = stored[source], stored.get(source + SCALE_SUFFIX)
        if tensor.shape != shapes[name]:
            told = f"{list(tensor.shape)}, config.json says {list(shapes[name])}"
            raise CheckpointError(f"{tensor.path}: {source} has shape {told}")
        copy = Copy(name, tensor, scale)
        if copy.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{tensor.path}: {source} is {tensor.dtype} without factors in {source}{SCALE_SUFFIX}"
            )
        if scale is not None and (scale.dtype, scale.shape) != ("F32", _blocks(tensor.shape)):
            raise CheckpointError(f"{scale.path}: {source}{SCALE_SUFFIX} is not F32 {list(_blocks(tensor.shape))}")
        copies.append(copy)
    return copies


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.ceil(size / FP8_BLOCK) for size in shape)


def _common_dtype(copies: list[Copy]) -> str:
    """The one of most bytes; a router's bias may be float32 among bfloat16."""
    sizes: Counter[str] = Counter()
    for copy in copies:
        sizes[copy.dtype] += copy.nbytes
    return DTYPE_NAMES[sizes.most_common(1)[0][0]]


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _token_ids(path: Path) -> dict[str, Any]:
    """All three, so that no default of a family (Mixtral: 2 ends a text) takes the place of one that is not there."""
    found: dict[str, Any] = dict.fromkeys(TOKEN_IDS)
    if (path / GENERATION).is_file():
        generation = read_json(path / GENERATION)
        found |= {key: generation[key] for key in TOKEN_IDS if key in generation}
    if found["eos_token_id"] is None and (path / "tokenizer.json").is_file():
        found["eos_token_id"] = Tokenizer.load(path).eos_id
    return found


def _conversion(
    out: Path, family: Family, config: ModelConfig, shapes: Shapes, peak_bytes: int, skipped: dict[str, int]
) -> Conversion:
    parameters = sum(math.prod(shape) for shape in shapes.values())
    assert parameters == config.num_params(), "config and model disagree about the parameters"
    active = config.num_active_params()
    return Conversion(out.absolute(), family.model_type, parameters, active, len(shapes), peak_bytes, skipped)
