"""Checkpoints of Hugging Face used where they lie, brought in, and sent out: config, every tensor, tokenizer files.

Nothing is left out in silence. Which tensors a model must have follows from its config: one that is missing, unknown
or of another shape is an error, and the few kinds that carry nothing are counted.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expertmesh.parallel.shard import WHOLE, Shard
from expertmesh.system.convert.families import choose_family, family_of
from expertmesh.system.convert.family import Family
from expertmesh.system.convert.layout import Shapes, Theirs, ours_from_theirs, theirs_from_ours
from expertmesh.system.convert.stream import (
    SHARD_BYTES,
    Copy,
    Part,
    Stored,
    block_grid,
    read_headers,
    read_tensor,
    same_bytes,
    write_shards,
    written_aside,
)
from expertmesh.system.model.checkpoint import (
    Checkpoint,
    CheckpointError,
    read_config,
    read_json,
    write_config,
    write_json,
)
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


@dataclass(frozen=True)
class HuggingFaceCheckpoint(Checkpoint):
    """A checkpoint of Hugging Face that is used where it lies: nothing is copied on the disk."""

    family: Family
    copies: dict[str, Copy]  # how each of our tensors is read
    skipped: dict[str, int]  # tensors that are not: why -> how many

    @torch.no_grad()
    def fill(self, views: dict[str, torch.Tensor], shard: Shard = WHOLE) -> None:
        for name, view in views.items():
            view.copy_(read_tensor(self.copies[name])[shard.place(view.shape)])


def open_hf(path: Path) -> HuggingFaceCheckpoint:
    """Look at the Hugging Face checkpoint in `path`: every tensor is found or refused, none is read.

    Raises ValueError with one line.
    """
    content = _read_hf_config(path)
    try:
        family = family_of(content)
        config = family.to_model_config(content)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    stored = read_headers(path)
    shapes = tensor_shapes(config)
    layout = family.layout(config, shapes)
    skipped = _take_out_ignored(stored, family, layout, content, config, path)
    used = {theirs.name: theirs.shape for theirs in layout if theirs.pieces}
    copies = ours_from_theirs(layout, match_tensors(used, stored, path), shapes)
    by_name = {copy.name: copy for copy in copies}
    return HuggingFaceCheckpoint(path, config, _common_dtype(copies), family, by_name, skipped)


def from_hf(path: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """Write the Hugging Face checkpoint in `path` as ours to `out`. Raises ValueError with one line if it cannot."""
    found = open_hf(path)
    copies = list(found.copies.values())
    with written_aside(out) as folder:
        peak_bytes = write_shards(copies, folder, shard_bytes)
        write_config(folder, found.config, found.dtype)
        copy_texts(found, folder)
    return _conversion(out, found.family, found.config, peak_bytes, copies, found.skipped)


def to_hf(path: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """Write our checkpoint in `path` for the Hugging Face class that can hold it. Raises ValueError if none can."""
    config = read_config(path)
    try:
        family = choose_family(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shapes = tensor_shapes(config)
    parts = match_tensors(shapes, read_headers(path), path)
    copies = theirs_from_ours(family.layout(config, shapes), parts, parts["embed_tokens.weight"].dtype)
    with written_aside(out) as folder:
        peak_bytes = write_shards(copies, folder, shard_bytes)
        dtype = {"torch_dtype": _common_dtype(copies)}
        write_json(family.to_hf_config(config) | dtype | _token_ids(path), folder / "config.json")
        copy_tokenizer(path, folder)
    return _conversion(out, family, config, peak_bytes, copies, {})


def _read_hf_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ValueError(f"no folder {path}; give one that holds a Hugging Face checkpoint")
    content = read_json(path / "config.json")
    if content.get("model_type") == "expertmesh":
        raise ValueError(f"{path} is a checkpoint of expertmesh already")
    return content


def _take_out_ignored(
    stored: dict[str, Stored],
    family: Family,
    layout: list[Theirs],
    content: dict[str, Any],
    config: ModelConfig,
    path: Path,
) -> dict[str, int]:
    """Remove from `stored` what carries nothing for this model; return why, and how many."""
    ignored: dict[str, str] = {}
    further = content.get("num_nextn_predict_layers", content.get("num_mtp_layers", 1)) or 0
    past = range(config.layers, config.layers + further) if family.prediction_layers else range(0)
    unused = {theirs.name for theirs in layout if not theirs.pieces}
    for name in stored:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if name.endswith(".rotary_emb.inv_freq"):
            ignored[name] = "tables of rotary frequencies"
        elif layer and int(layer[1]) in past:
            ignored[name] = "layers that predict further tokens"
        elif name in unused:
            ignored[name] = "weights that nothing reads"
        elif family.other_parts and re.match(family.other_parts, name):
            ignored[name] = "parts that are no language model"
    if config.tie_embeddings and "lm_head.weight" in stored:
        embedding = stored.get(family.hf_name("embed_tokens.weight"))
        if embedding is None or not same_bytes(stored["lm_head.weight"], embedding):
            raise ValueError(f"{path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding")
        ignored["lm_head.weight"] = "copies of tied embeddings"
    for name in ignored:
        del stored[name]
    return dict(Counter(ignored.values()))


def match_tensors(shapes: Shapes, stored: dict[str, Stored], path: Path) -> dict[str, Part]:
    """The tensors of `shapes`, with the factors of those in FP8; all stored tensors are used up."""
    missing = [name for name in shapes if name not in stored]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {len(shapes)} tensors are missing, such as {missing[0]}")
    scales = {name + SCALE_SUFFIX for name in shapes if stored[name].dtype == "F8_E4M3"}
    unknown = sorted(stored.keys() - shapes.keys() - scales)
    if unknown:
        raise CheckpointError(
            f"{stored[unknown[0]].path}: {len(unknown)} tensors that the architecture in config.json has not, "
            f"such as {unknown[0]}"
        )
    parts = {}
    for name, shape in shapes.items():
        tensor, scale = stored[name], stored.get(name + SCALE_SUFFIX)
        if tensor.shape != shape:
            told = f"{list(tensor.shape)}, config.json says {list(shape)}"
            raise CheckpointError(f"{tensor.path}: {name} has shape {told}")
        part = Part(tensor, scale)
        if part.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{tensor.path}: {name} is {tensor.dtype} without factors in {name}{SCALE_SUFFIX}")
        if scale is not None and (scale.dtype, scale.shape) != ("F32", block_grid(shape)):
            raise CheckpointError(f"{scale.path}: {name}{SCALE_SUFFIX} is not F32 {list(block_grid(shape))}")
        parts[name] = part
    return parts


def _common_dtype(copies: Iterable[Copy]) -> str:
    """The one of most bytes; a router's bias may be float32 among bfloat16."""
    sizes: Counter[str] = Counter()
    for copy in copies:
        sizes[copy.dtype] += copy.nbytes
    return DTYPE_NAMES[sizes.most_common(1)[0][0]]


def copy_tokenizer(source: Path, target: Path) -> None:
    """All of its files that are there, chat template and end-of-text tokens among them."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def copy_texts(found: Checkpoint, folder: Path) -> None:
    """What belongs to a checkpoint beside config and weights: its tokenizer, and the ids that end a text."""
    copy_tokenizer(found.folder, folder)
    if isinstance(found, HuggingFaceCheckpoint) and not (folder / GENERATION).exists():
        content = found.family.text_config(read_json(found.folder / "config.json"))
        token_ids = {key: content[key] for key in TOKEN_IDS if content.get(key) is not None}
        if token_ids:  # our config has no place for them
            write_json(token_ids, folder / GENERATION)


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
    out: Path, family: Family, config: ModelConfig, peak_bytes: int, copies: Sequence[Copy], skipped: dict[str, int]
) -> Conversion:
    parameters = sum(math.prod(copy.shape) for copy in copies if copy.parts)
    assert parameters == config.num_params(), "config and model disagree about the parameters"
    active = config.num_active_params()
    return Conversion(out.absolute(), family.model_type, parameters, active, len(copies), peak_bytes, skipped)
