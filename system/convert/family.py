"""What one `model_type` of Hugging Face is: the features it holds, its configuration and its tensor names both ways.

Reading a `config.json` gives a `ModelConfig`. A key whose value changes what the model computes, in a way that nothing
here computes, is refused with one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from expertmesh.system.convert.feature import Feature, features
from expertmesh.system.convert.layout import Piece, Shape, Shapes, Theirs
from expertmesh.system.model.config import ModelConfig

_ONLY = {"hidden_act": "silu"}
_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "head_dim": None,
    "attention_bias": False,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "use_sliding_window": False,
}


@dataclass(frozen=True)
class HFConfig:
    """A `config.json` of Hugging Face, with what its family takes for keys that were left out."""

    content: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        if key in self.content:
            return self.content[key]
        if key in self.defaults:
            return self.defaults[key]
        raise ValueError(f"no key {key!r}")

    def size(self, key: str, at_least: int = 1) -> int:
        value = self[key]
        if not isinstance(value, int) or value < at_least:
            raise ValueError(f"{key} is {value!r}; supported: a whole number from {at_least}")
        return value

    def first(self, *keys: str) -> Any:
        """The value of the first of these keys that is there."""
        return self[next((key for key in keys if key in self.content), keys[0])]


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face."""

    model_type: str
    architecture: str  # the class that AutoModelForCausalLM loads
    needs: frozenset[Feature]  # what each of its models has
    holds: frozenset[Feature]  # what its models may have besides
    read: Callable[[HFConfig], dict[str, Any]]  # the parts of ModelConfig that differ between families
    write: Callable[[ModelConfig], dict[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys that older files leave out
    only: Mapping[str, Any] = field(default_factory=dict)  # keys with the one value that is computed here
    renames: tuple[tuple[str, str], ...] = ()  # patterns in our names and what the family has for them
    stacked: str | None = None  # their tensors that hold one matrix of each expert, in a dimension of its own
    entries: Callable[[str, ModelConfig], list[str]] | None = None  # names for our tensor's entries; []: it is whole
    unused: Callable[[ModelConfig], Shapes] | None = None  # tensors that their code makes and never reads
    prediction_layers: bool = False  # may carry layers past the last, for predicting further tokens
    text_key: str | None = None  # where the config of the language model lies, if it is a part of a larger model
    other_parts: str | None = None  # the tensors of that larger model

    def text_config(self, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a `config.json` that is about the language model."""
        if self.text_key is None:
            return content
        text = content.get(self.text_key)
        if not isinstance(text, Mapping):
            raise ValueError(f"no section {self.text_key!r}")
        return {**content, **text}  # quantisation and token ids lie outside

    def to_model_config(self, content: Mapping[str, Any]) -> ModelConfig:
        """Raises ValueError with one line that names key, value and what is supported."""
        content = self.text_config(content)
        hf = HFConfig(content, _DEFAULTS | dict(self.only) | dict(self.defaults))
        for key, supported in (_ONLY | dict(self.only)).items():
            if hf[key] != supported:
                raise ValueError(f"{key} is {hf[key]!r}; supported for {self.model_type}: {supported!r}")
        _check_quantization(content)
        try:
            config = ModelConfig(
                vocab_size=hf["vocab_size"],
                layers=hf.size("num_hidden_layers"),
                hidden_size=hf.size("hidden_size"),
                context_length=hf.first("max_position_embeddings", "max_position_embedding"),
                norm_eps=hf["rms_norm_eps"],
                initializer_range=hf["initializer_range"],
                tie_embeddings=hf["tie_word_embeddings"],
                **self.read(hf),
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if obstacles := self.obstacles(config):
            raise ValueError(f"model_type is {self.model_type!r}, which {obstacles[0]}")
        return config

    def to_hf_config(self, config: ModelConfig) -> dict[str, Any]:
        """What AutoModelForCausalLM makes the same model of; `obstacles` must be empty."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "num_hidden_layers": config.layers,
            "hidden_size": config.hidden_size,
            "max_position_embeddings": config.context_length,
            "rms_norm_eps": config.norm_eps,
            "initializer_range": config.initializer_range,
            "tie_word_embeddings": config.tie_embeddings,
            "rope_theta": config.attention.rope_theta,  # at this place both old and new transformers read it
            "num_attention_heads": config.attention.heads,
            **_ONLY,
            **self.only,
            **self.write(config),
        }

    def obstacles(self, config: ModelConfig) -> list[str]:
        """Why this family cannot hold `config`, each as "cannot hold ..." or "always has ..."."""
        found = features(config)
        lacks = [f"cannot hold {feature}" for feature in found if feature not in self.holds | self.needs]
        return lacks + [f"always has {feature}" for feature in Feature if feature in self.needs.difference(found)]

    def hf_name(self, name: str) -> str:
        """The family's name for our tensor `name`."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name if name.startswith("lm_head.") else f"model.{name}"

    def layout(self, config: ModelConfig, shapes: Shapes) -> list[Theirs]:
        """The family's tensors for a model of `config`, whose own are `shapes`."""
        pieces: dict[str, list[Piece]] = {}
        for name, shape in shapes.items():
            entries = self.entries(name, config) if self.entries else []
            for entry, entry_name in enumerate(entries):
                pieces.setdefault(self.hf_name(entry_name), []).append(Piece(name, shape[1:], entry))
            if not entries:
                pieces.setdefault(self.hf_name(name), []).append(Piece(name, shape))
        made = [Theirs(name, self._together(name, parts), tuple(parts)) for name, parts in pieces.items()]
        unused = self.unused(config) if self.unused else {}
        return made + [Theirs(name, shape, ()) for name, shape in unused.items()]

    def _together(self, name: str, pieces: list[Piece]) -> Shape:
        shape = pieces[0].shape
        if self.stacked and re.search(self.stacked, name):
            return (len(pieces), *shape)
        return shape if len(pieces) == 1 else (sum(piece.shape[0] for piece in pieces), *shape[1:])


def _check_quantization(content: Mapping[str, Any]) -> None:
    quantization = content.get("quantization_config")
    if not quantization:
        return
    found = quantization.get("quant_method"), quantization.get("weight_block_size")
    if found != ("fp8", [128, 128]):
        raise ValueError(
            f"quantization_config has quant_method {found[0]!r} and weight_block_size {found[1]!r}; "
            "supported: 'fp8' in blocks of [128, 128], or no quantization"
        )
