"""The fields of a request through the real door and engine, by the real client: the model's own forward is the judge.

Chats tell the bytes of each token, so which token it was; their prompt is the chat template's. All of it joined, and
split over two FFN workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pydantic
import pytest
import torch
from doors import MODEL, open_door, tiny_checkpoint
from fake_engine import END, byte_tokenizer
from openai.types.chat import ChatCompletion
from serving import pools_in_threads
from tiny import context_of

from expertmesh.system.model.checkpoint import Checkpoint, load_weights
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.workers import joined_engine

TOKENIZER = byte_tokenizer()
ID_OF = {TOKENIZER.bytes_of(token_id): token_id for token_id in range(TOKENIZER.vocab_size)}
CHAT: Any = [{"role": "user", "content": "hi"}]
PROMPT = TOKENIZER.encode(TOKENIZER.render_chat(CHAT))
BEYOND_OPENAI = {"top_k", "min_p", "min_tokens", "repetition_penalty", "stop_token_ids"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("door"))


@pytest.fixture(scope="module", params=["joined", "split"])
def client(checkpoint: Checkpoint, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    if request.param == "joined":
        loops, pool = [joined_engine(checkpoint, ServeConfig())], []
    else:
        loops, pool = pools_in_threads(checkpoint, ServeConfig(), attention=1, ffn=2)
    with open_door(checkpoint, loops) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30)
    for worker in pool:
        worker.join(30)
        assert not worker.is_alive()


@pytest.fixture(scope="module")
def logits_after(checkpoint: Checkpoint) -> Callable[[list[int]], torch.Tensor]:
    """[T, V] float64, of a whole text computed at once."""
    model = Transformer(checkpoint.config).eval()
    load_weights(model, checkpoint.folder)

    @torch.inference_mode()
    def of(token_ids: list[int]) -> torch.Tensor:
        return model.lm_head(model(torch.tensor(token_ids), context_of(len(token_ids))).hidden_TD).double()

    return of


def chat(client: openai.OpenAI, ignore_eos: bool = True, **fields: Any) -> Any:
    """To the end of its tokens: what random weights say may be the end of the text."""
    beyond = {name: fields.pop(name) for name in BEYOND_OPENAI & fields.keys()}
    asked = {"messages": CHAT, "max_tokens": 8, "logprobs": True, "extra_body": {"ignore_eos": ignore_eos, **beyond}}
    return client.chat.completions.create(**{"model": MODEL, **asked, **fields})


def ids_of(answer: ChatCompletion, choice: int = 0) -> list[int]:
    return [ID_OF[bytes(one.bytes)] for one in answer.choices[choice].logprobs.content]


def test_greedy_tokens_and_their_logprobs(client, logits_after):
    answer = chat(client, temperature=0, top_logprobs=3)
    said = ids_of(answer)
    logprobs_TV = logits_after([*PROMPT, *said]).log_softmax(-1)[len(PROMPT) - 1 : -1]
    assert said == logprobs_TV.argmax(-1).tolist() and len(set(said)) > 3
    for one, row_V in zip(answer.choices[0].logprobs.content, logprobs_TV, strict=True):
        likeliest = row_V.topk(3)
        assert one.logprob == pytest.approx(float(likeliest.values[0]), abs=1e-4)
        assert [ID_OF[bytes(top.bytes)] for top in one.top_logprobs] == likeliest.indices.tolist()
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(likeliest.values.tolist(), abs=1e-4)


TEXTS = ["The import", "é"]
IDS = [TOKENIZER.encode(text) for text in TEXTS]


@pytest.mark.parametrize("prompt", [TEXTS, IDS], ids=["texts", "ids"])
def test_an_echoed_prompt_and_its_logprobs(client, logits_after, prompt):
    """Several prompts, then each alone; as they are, and with an answer."""
    for max_tokens in (0, 4):
        fields = {"model": MODEL, "echo": True, "logprobs": 2, "max_tokens": max_tokens, "temperature": 0}
        together = client.completions.create(prompt=prompt, **fields).choices
        alone = [client.completions.create(prompt=one, **fields).choices[0] for one in prompt]
        for choice, lone, text, ids in zip(together, alone, TEXTS, IDS, strict=True):
            assert choice.text.startswith(text) and choice.text == lone.text
            logprobs_TV = logits_after(ids).log_softmax(-1)
            right = logprobs_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
            if max_tokens:
                right.append(float(logprobs_TV[-1].max()))
            for none, *told in (choice.logprobs.token_logprobs, lone.logprobs.token_logprobs):
                assert none is None and told[: len(right)] == pytest.approx(right, abs=1e-4)
                assert max_tokens or len(told) == len(right)


def test_a_bias_of_100_forces_a_token_and_of_minus_100_forbids_it(client, logits_after):
    forced = chat(client, logit_bias={str(ID_OF[b"A"]): 100}, temperature=2)
    assert forced.choices[0].message.content == "A" * 8
    first, second = logits_after(PROMPT)[-1].topk(2).indices.tolist()
    assert ids_of(chat(client, temperature=0, max_tokens=1)) == [first]
    assert ids_of(chat(client, temperature=0, max_tokens=1, logit_bias={str(first): -100})) == [second]


def ref_choice(logits_V: torch.Tensor, answer: list[int], fields: dict[str, Any]) -> int:
    """The likeliest token after bias, repetition penalty and OpenAI's two penalties, token by token."""
    values = logits_V.tolist()
    for name, bias in fields.get("logit_bias", {}).items():
        values[int(name)] += bias
    factor = fields.get("repetition_penalty", 1.0)
    for token in {*PROMPT, *answer}:
        values[token] *= factor if values[token] < 0 else 1 / factor
    for token in set(answer):
        values[token] -= fields.get("presence_penalty", 0) + fields.get("frequency_penalty", 0) * answer.count(token)
    return max(range(len(values)), key=values.__getitem__)


LIKED = {str(ID_OF[byte]): bias for byte, bias in ((b"A", 4.0), (b"B", 3.5), (b"C", 3.0))}  # greedy says little else
PENALTIES = [
    {},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.75},
    {"frequency_penalty": -1.0, "presence_penalty": 2.0},
    {"repetition_penalty": 1.75},
    {"repetition_penalty": 0.5, "frequency_penalty": 2.0},
]


def test_penalties_change_logits_as_their_formulas_say(client, logits_after):
    texts = []
    for penalties in PENALTIES:
        fields = {"logit_bias": LIKED, **penalties}
        said = ids_of(chat(client, temperature=0, max_tokens=12, **fields))
        for place in range(len(said)):
            logits_V = logits_after([*PROMPT, *said[:place]])[-1]
            assert said[place] == ref_choice(logits_V, said[:place], fields), (penalties, place)
        texts.append(tuple(said))
    assert len(set(texts)) == len(texts), "penalties that change nothing prove nothing"


def test_seeds(client):
    """The same text for the same seed, in any company; choice i has seed + i."""
    fields = {"max_tokens": 12, "temperature": 1.2}
    together = chat(client, n=3, seed=7, **fields)
    said = [ids_of(together, choice) for choice in range(3)]
    assert said == [ids_of(chat(client, seed=seed, **fields)) for seed in (7, 8, 9)]
    assert len(set(map(tuple, said))) == 3
    assert ids_of(chat(client, **fields)) != ids_of(chat(client, **fields)), "without one, it is drawn"


CUTS = [
    ({"top_k": 1}, lambda p_V: p_V == p_V.max()),
    ({"top_k": 3}, lambda p_V: p_V >= p_V.topk(3).values[-1]),
    ({"min_p": 0.4}, lambda p_V: p_V >= 0.4 * p_V.max()),
    ({"top_p": 1e-6}, lambda p_V: p_V == p_V.max()),
]


@pytest.mark.parametrize(("fields", "support"), CUTS, ids=["top_k 1", "top_k 3", "min_p", "top_p"])
def test_only_tokens_that_are_left_are_drawn(client, logits_after, fields, support):
    """At temperature 2, where nearly all could be drawn otherwise."""
    asked = {"max_tokens": 12, "temperature": 2.0, "n": 4, "seed": 1}

    def left(answer: ChatCompletion) -> int:
        """How many of its 48 tokens are among those that `fields` leave."""
        count = 0
        for said in (ids_of(answer, choice) for choice in range(4)):
            p_TV = (logits_after([*PROMPT, *said])[len(PROMPT) - 1 : -1] / 2).softmax(-1)
            count += sum(bool(support(p_V)[token]) for p_V, token in zip(p_TV, said, strict=True))
        return count

    assert left(chat(client, **asked, **fields)) == 48 and left(chat(client, **asked)) < 40


def test_the_end_of_text_ends_it_where_it_may(client):
    """The model is made to say nothing else."""

    def ask(**fields: Any) -> tuple[str, str, int]:
        answer = chat(client, temperature=0, logit_bias={str(END): 100}, **fields)
        choice = answer.choices[0]
        return choice.message.content, choice.finish_reason, answer.usage.completion_tokens

    assert ask(ignore_eos=False) == ("", "stop", 1)
    assert ask() == ("", "length", 8)
    text, reason, tokens = ask(ignore_eos=False, min_tokens=3)
    assert (reason, tokens) == ("stop", 4) and 1 <= len(text) <= 3


def test_stop_strings_and_stop_tokens(client):
    """Of an answer of ABABAB..., which frequency makes."""
    fields = {"temperature": 0, "logit_bias": {str(ID_OF[b"A"]): 99, str(ID_OF[b"B"]): 98.5}, "frequency_penalty": 2}
    whole = chat(client, **fields).choices[0]
    assert set(whole.message.content) == {"A", "B"} and whole.finish_reason == "length"
    at = whole.message.content.index("BA")
    cut = chat(client, stop=["BA"], **fields).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole.message.content[:at], "stop")
    assert len(cut.logprobs.content) == at
    ended = chat(client, stop_token_ids=[ID_OF[b"B"]], **fields).choices[0]
    assert (ended.message.content, ended.finish_reason) == (whole.message.content[:at], "stop")


class Weather(pydantic.BaseModel, extra="forbid"):
    degrees: int = pydantic.Field(ge=0, le=9)
    rain: bool


@pytest.mark.parametrize("stream", [False, True])
def test_json_of_a_schema(client, stream):
    schema = {"type": "json_schema", "json_schema": {"name": "weather", "schema": Weather.model_json_schema()}}
    fields = {"response_format": schema, "temperature": 1.5, "seed": 4, "max_tokens": 40, "ignore_eos": False}
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chat(client, stream=True, **fields))
    else:
        text = chat(client, **fields).choices[0].message.content
        parsed = client.chat.completions.parse(
            model=MODEL, messages=CHAT, response_format=Weather, temperature=1.5, seed=4, max_tokens=40
        )
        assert parsed.choices[0].message.parsed == Weather.model_validate_json(text)
    assert set(json.loads(text)) == {"degrees", "rain"}


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_tells_what_the_whole_answer_tells(client, n):
    fields = {"n": n, "seed": 5, "max_tokens": 10, "top_logprobs": 2}
    whole = chat(client, **fields)
    *chunks, last = list(chat(client, stream=True, stream_options={"include_usage": True}, **fields))
    assert last.usage == whole.usage and last.choices == [] and whole.usage.completion_tokens == 10 * n
    assert whole.usage.prompt_tokens == len(PROMPT)
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        told = [token for one in mine if one.logprobs for token in one.logprobs.content]
        assert [(token.bytes, token.logprob) for token in told] == [
            (token.bytes, pytest.approx(token.logprob, abs=1e-4)) for token in choice.logprobs.content
        ]
        assert [one.finish_reason for one in mine if one.finish_reason] == [choice.finish_reason]
