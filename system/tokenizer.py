"""Text to token ids and back, in the files the rest of the world already uses.

A tokenizer is a folder:

    tokenizer.json          vocabulary, merges, special tokens (the `tokenizers` library reads and writes it)
    tokenizer_config.json   eos_token, bos_token, chat_template
    chat_template.jinja     the chat template in newer checkpoints; goes before the one in tokenizer_config.json
    generation_config.json  eos_token_id: further tokens that end a text, such as the end of a chat turn; or config.json

so a checkpoint made here opens in transformers with the same ids, and one made there opens here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]

# The assistant's turn closes with the end-of-text token: the one token every engine already stops at.
CHAT_TEMPLATE = """\
{% for message in messages %}
<|{{ message.role }}|>
{{ message.content }}{{ eos_token if message.role == 'assistant' else '<|end|>' }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""


class Tokenizer:
    """A vocabulary with its end-of-text tokens and its chat template.

    eos_id: the token that separates documents. eos_ids: every token at which generation stops, eos_id among them.
    vocab_size: one more than the largest id, added tokens included.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_token: str,
        *,
        stop_ids: Iterable[int] = (),
        bos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Wrap `backend`. `stop_ids` also end a text. ValueError if `eos_token` is not in the vocabulary."""
        eos_id = backend.token_to_id(eos_token)
        if eos_id is None:
            raise ValueError(f"the end-of-text token {eos_token!r} is not in the vocabulary")
        # A tokenizer.json may carry the cut and the padding of somebody's training run.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._added = frozenset(backend.get_added_tokens_decoder())  # written as they are
        self._of_bytes = backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()
        self.eos_id = eos_id
        self.eos_ids = frozenset({eos_id, *stop_ids})
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self._chat_template = chat_template
        names = {"eos_token": eos_token, "bos_token": bos_token}
        self._special_names = {key: name for key, name in names.items() if name is not None}

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> Tokenizer:
        """Learn a byte-level BPE: any text comes back as it went in, and the same texts give the same tokenizer.

        The vocabulary is smaller than `vocab_size` if the texts run out of pairs to merge. ValueError if `vocab_size`
        leaves no room for the 256 bytes and the special tokens.
        """
        fewest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < fewest:
            raise ValueError(f"vocab_size {vocab_size} is too small: the bytes and special tokens alone take {fewest}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, END_OF_TEXT, chat_template=CHAT_TEMPLATE)

    @classmethod
    def load(cls, folder_or_file: str | Path) -> Tokenizer:
        """Read a folder with a tokenizer.json, or that file itself; the other files are looked for beside it.

        The end-of-text token is eos_token of tokenizer_config.json, or else the first eos_token_id of
        generation_config.json or, where that has none, config.json; the others of that list end a text too.
        ValueError names what is missing or unreadable, and where.
        """
        path = Path(folder_or_file)
        file = path / "tokenizer.json" if path.is_dir() else path
        folder = file.parent
        if not file.is_file():
            raise ValueError(f"no tokenizer: {file} does not exist")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file} is not a tokenizer: {error}") from None
        config = _read_json(folder / "tokenizer_config.json")
        stop_ids = _eos_token_ids(folder / "generation_config.json") or _eos_token_ids(folder / "config.json")
        eos_token = _token_name(config.get("eos_token"))
        if eos_token is None:
            eos_token = backend.id_to_token(stop_ids[0]) if stop_ids else None
        if eos_token is None:
            raise ValueError(
                f"no end-of-text token in {folder}: neither eos_token in tokenizer_config.json "
                "nor a known eos_token_id in generation_config.json or config.json"
            )
        template_file = folder / "chat_template.jinja"
        template = template_file.read_text("utf-8") if template_file.is_file() else config.get("chat_template")
        if isinstance(template, list):  # several templates under names, of which "default" is the plain one
            template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
        bos_token = _token_name(config.get("bos_token"))
        try:
            return cls(backend, eos_token, stop_ids=stop_ids, bos_token=bos_token, chat_template=template)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Write what `load` and transformers.AutoTokenizer read. Files of the same names are replaced."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= self._special_names
        if self._chat_template is not None:
            config["chat_template"] = self._chat_template
        _write_json(folder / "tokenizer_config.json", config)
        if len(self.eos_ids) > 1:
            stop_ids = [self.eos_id, *sorted(self.eos_ids - {self.eos_id})]
            _write_json(folder / "generation_config.json", {"eos_token_id": stop_ids})

    @property
    def fingerprint(self) -> str:
        """A short digest of all that `save` writes: equal ones mean the same tokenizer, wherever it lies."""
        content = [self._backend.to_str(), sorted(self.eos_ids), self._special_names, self._chat_template]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Give the token ids of `text`, nothing put before or after it.

        As in Hugging Face, a special token spelled out in the text ("<|endoftext|>") becomes that one token: chat
        templates rely on it. So text that must not hold special tokens has to be cleaned of them before.
        """
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int]) -> str:
        """Give the text of `token_ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(token_ids, skip_special_tokens=True)

    def to_json(self) -> str:
        """What tokenizer.json holds."""
        return self._backend.to_str()

    def spell(self, token_id: int) -> str:
        """How one token is written, special or not; bytes that are no whole character become U+FFFD."""
        return self._backend.decode([token_id], skip_special_tokens=False)

    def bytes_of(self, token_id: int) -> bytes:
        """What one token adds to a text's bytes, also where they are no whole character."""
        token = self._backend.id_to_token(token_id) or ""
        if token_id in self._added:
            return token.encode()
        if self._of_bytes and all(character in BYTE_OF for character in token):
            return bytes(BYTE_OF[character] for character in token)
        if len(token) == 6 and token.startswith("<0x"):  # SentencePiece's name of a byte
            return bytes.fromhex(token[3:5])
        return self.spell(token_id).encode()

    def stream(self) -> TextStream:
        """Start decoding one text token by token."""
        return TextStream(self)

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """Write `messages` (each with role and content) as the prompt for the assistant's next turn.

        ValueError if there is no chat template, or if the template refuses these messages.
        """
        if self._chat_template is None:
            raise ValueError("this tokenizer has no chat template: send a plain prompt to /v1/completions instead")
        try:
            template = _compile(self._chat_template)
            return template.render(messages=messages, add_generation_prompt=True, **self._special_names)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template cannot write these messages: {error}") from None


def _characters_of_bytes() -> dict[str, int]:
    """How byte-level BPE writes bytes (GPT-2): printable ones as they are, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _characters_of_bytes()


class TextStream:
    """The text of one growing list of tokens, handed out as soon as its characters are whole.

    All pieces put together are Tokenizer.decode of all the tokens. (One exception: in a vocabulary with byte fallback,
    as Mixtral's, a byte that is no UTF-8 also spoils the good bytes before it, which may be handed out by then. There
    tokenizers' own DecodeStream raises; this one goes on, with U+FFFD for the bad bytes.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The tokens of the last piece, then those held back. The last piece stays because decoders look back: the
        # first word of a text loses its leading space, a later one keeps it.
        self._ids: list[int] = []
        self._given = 0

    def push(self, token_id: int) -> str:
        """Add a token; return the characters that are whole now, often none."""
        self._ids.append(token_id)
        piece = self._held_back()
        if not piece or piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return piece

    def finish(self) -> str:
        """Return what was held back: U+FFFD for a character that was never completed."""
        piece = self._held_back()
        self._given = len(self._ids)
        return piece

    def _held_back(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._given])
        return self._tokenizer.decode(self._ids)[len(before) :]


@lru_cache(maxsize=8)
def _compile(chat_template: str) -> jinja2.Template:
    """Compile under the names and settings that Hugging Face's templates are written for."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(chat_template)


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a file that is not there counts as empty."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _eos_token_ids(path: Path) -> list[int]:
    """Read eos_token_id, which may be absent, null, one id or a list."""
    ids = _read_json(path).get("eos_token_id")
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _token_name(entry: str | dict[str, Any] | None) -> str | None:
    """Read a token given by name or, in older files, as an object with its name under "content"."""
    return entry["content"] if isinstance(entry, dict) else entry
