"""The tokenizer: any text comes back, transformers agrees, streams never show half a character, errors say where."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models
from transformers import AutoTokenizer

from expertmesh.system.tokenizer import SPECIAL_TOKENS, Tokenizer

TEXTS = [
    "the cat sat on the mat, the dog sat on the log",
    "les élèves naïfs",
    "世界 世界 🙂🙂",
    "x = 1\n\n\tif x:\r\n",
] * 4
ODD_TEXTS = ["", " ", "  lead and trail  ", "\x00\x7f\u2028", "🇨🇭👩‍👩‍👧", "ﬁ Å Å", "\ufffd", "日本語\n", "a" * 300]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <|end|> there"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "世界?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(TEXTS), 340)


@pytest.mark.parametrize("text", TEXTS[:4] + ODD_TEXTS)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_are_learned_and_training_repeats(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 1.5
    assert tokenizer.vocab_size <= 340
    tokenizer.save(tmp_path / "a")
    Tokenizer.train(iter(TEXTS), 340).save(tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert [tokenizer.encode(name) for name in SPECIAL_TOKENS] == [[0], [1], [2], [3], [4]]
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (0, {0})
    typed = tokenizer.encode("a<|endoftext|>b")
    assert typed.count(0) == 1 and tokenizer.decode(typed) == "ab"


def test_vocabulary_too_small() -> None:
    assert Tokenizer.train(iter(TEXTS), 261).vocab_size == 261
    with pytest.raises(ValueError, match="vocab_size 260 is too small.* 261$"):
        Tokenizer.train(iter(TEXTS), 260)


def test_transformers_reads_the_saved_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    assert (len(theirs), theirs.eos_token_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert again.eos_ids == tokenizer.eos_ids
    for text in [*TEXTS, *ODD_TEXTS, "typed <|user|> token"]:
        ids = tokenizer.encode(text)
        assert ids == again.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == again.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    chat = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert chat == tokenizer.render_chat(MESSAGES) == again.render_chat(MESSAGES)
    assert chat.endswith("<|assistant|>\n") and "Hello.<|endoftext|>\n" in chat


EOS = {"eos_token": "<|end|>"}
LAYOUTS = {  # the files beside tokenizer.json -> eos_id, eos_ids, what a chat of one "hi" renders to
    "name": ({"tokenizer_config.json": EOS}, 4, {4}, None),
    "object": ({"tokenizer_config.json": {"eos_token": {"content": "<|end|>"}}}, 4, {4}, None),
    "older template": ({"tokenizer_config.json": EOS | {"chat_template": "{{ messages[0].content }}!"}}, 4, {4}, "hi!"),
    "newer template wins": (
        {"tokenizer_config.json": EOS | {"chat_template": "old"}, "chat_template.jinja": "{{ eos_token }}new"},
        4,
        {4},
        "<|end|>new",
    ),
    "named templates": (
        {
            "tokenizer_config.json": EOS
            | {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}
        },
        4,
        {4},
        "d",
    ),
    "more stops": ({"tokenizer_config.json": EOS, "generation_config.json": {"eos_token_id": [4, 2]}}, 4, {4, 2}, None),
    "more stops, elsewhere": ({"tokenizer_config.json": EOS, "config.json": {"eos_token_id": [4, 2]}}, 4, {4, 2}, None),
    "only ids": ({"generation_config.json": {"eos_token_id": [3, 2]}}, 3, {3, 2}, None),
    "only config": ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": 3}}, 3, {3}, None),
}


def write(folder: Path, files: dict) -> None:
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_in_the_wild(tokenizer: Tokenizer, tmp_path: Path, case: str) -> None:
    files, eos_id, eos_ids, chat = LAYOUTS[case]
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    write(tmp_path, files)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert (loaded.eos_id, loaded.eos_ids) == (eos_id, eos_ids)
        loaded.save(tmp_path / "again")
        assert Tokenizer.load(tmp_path / "again").eos_ids == eos_ids
        if chat is None:
            with pytest.raises(ValueError, match="this tokenizer has no chat template"):
                loaded.render_chat([{"role": "user", "content": "hi"}])
        else:
            assert loaded.render_chat([{"role": "user", "content": "hi"}]) == chat


BROKEN = {  # the files of the folder -> what the message must say
    "no file": ({}, r"tokenizer\.json does not exist"),
    "no tokenizer in it": ({"tokenizer.json": "{}"}, r"tokenizer\.json is not a tokenizer"),
    "no end": ({"tokenizer_config.json": {}}, "no end-of-text token in .*tokenizer_config.json.*config.json"),
    "unknown end": ({"tokenizer_config.json": {"eos_token": "</s>"}}, "'</s>' is not in the vocabulary"),
    "unknown id": ({"config.json": {"eos_token_id": 9999}}, "no end-of-text token in"),
    "bad config": ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json is not JSON"),
    "no object": ({"tokenizer_config.json": "[]"}, r"tokenizer_config\.json holds no JSON object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_named(tokenizer: Tokenizer, tmp_path: Path, case: str) -> None:
    files, message = BROKEN[case]
    if files:
        tokenizer.save(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()
        write(tmp_path, files)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_saved_cut_is_not_applied(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    cut = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    cut.enable_truncation(4)
    cut.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("a b c d e f g h")) > 4


@pytest.mark.parametrize(
    "template", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{% if %}", "{{ 1 + '' }}"]
)
def test_templates_are_sandboxed(tmp_path: Path, tokenizer: Tokenizer, template: str) -> None:
    tokenizer.save(tmp_path)
    write(tmp_path, {"chat_template.jinja": template})
    with pytest.raises(ValueError, match="the chat template cannot write"):
        Tokenizer.load(tmp_path).render_chat(MESSAGES)


def test_a_template_may_refuse(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path)
    write(tmp_path, {"chat_template.jinja": "{{ raise_exception('roles must alternate') }}"})
    with pytest.raises(ValueError, match="roles must alternate"):
        Tokenizer.load(tmp_path).render_chat(MESSAGES)


def check_stream(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert all(not piece.endswith("\ufffd") for piece in pieces)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    assert stream.finish() == ""


def test_stream_is_decode_for_any_tokens(tokenizer: Tokenizer) -> None:
    """Random ids: most are bytes that fit no character, some are special tokens."""
    draw = random.Random(0)
    for _ in range(3000):
        check_stream(tokenizer, [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randint(0, 12))])


def test_stream_gives_characters_when_they_are_whole() -> None:
    tokenizer = Tokenizer.train(iter([]), 261)
    stream = tokenizer.stream()
    assert [stream.push(token_id) for token_id in tokenizer.encode("a🙂é")] == ["a", "", "", "", "🙂", "", "é"]
    assert stream.push(tokenizer.encode("🙂")[0]) == "" and stream.finish() == "\ufffd"


def test_stream_with_byte_fallback() -> None:
    """Mixtral's kind of vocabulary: word starts are marked, unknown characters fall apart into bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "é"]
    backend = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.add_special_tokens(pieces[:3])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend, "</s>")
    draw = random.Random(0)
    for _ in range(1000):
        check_stream(tokenizer, tokenizer.encode("".join(draw.choice("ab▁é世🙂\n") for _ in range(8))))
    stream = tokenizer.stream()  # bytes that fit no character: never an exception
    assert isinstance("".join(stream.push(draw.randrange(len(pieces))) for _ in range(500)) + stream.finish(), str)


@pytest.mark.parametrize("text", ["plain words, 3 of them", "Grüße\n\t 🙂 Ā\u00a0x", "\x00\x7f\xad"])
def test_the_bytes_of_tokens_are_those_of_the_text(text):
    tokenizer = Tokenizer.train(iter(["plain words of Grüße"] * 3), 300)
    assert b"".join(tokenizer.bytes_of(token_id) for token_id in tokenizer.encode(text)) == text.encode()
    assert tokenizer.bytes_of(tokenizer.eos_id) == b"<|endoftext|>"


def test_bytes_of_a_sentencepiece_vocabulary():
    pieces = {"<unk>": 0, "</s>": 1, "<0xC3>": 2, "<0xBC>": 3, "\u2581a": 4}
    backend = tokenizers.Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend, "</s>")
    assert [tokenizer.bytes_of(token_id) for token_id in (2, 3, 4)] == [b"\xc3", b"\xbc", b" a"]
