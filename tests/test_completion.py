"""From tokens to pieces of text: stop strings against a letter-by-letter reference, failures, and leaving early."""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from fake_engine import END, FakeEngine, byte_tokenizer

from expertmesh.launch import completion as completion_module
from expertmesh.launch.completion import Completion, Piece, StopStrings
from expertmesh.launch.openai_api import ApiError, CompletionBody
from expertmesh.system.serve.request import Output, Request, RequestFailed

TOKENIZER = byte_tokenizer()


def cut_ref(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read letter by letter; at the first letter that completes a stop string, cut before the longest such."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def test_stop_strings_do_not_depend_on_the_borders() -> None:
    """Two letters only, so that stop strings overlap each other and themselves all the time."""
    draw = random.Random(0)
    hits = 0
    for _ in range(5000):
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 5))) for _ in range(draw.randint(0, 3))]
        text = "".join(draw.choices("abc", weights=[4, 4, 1], k=draw.randint(0, 15)))
        filter, given, rest = StopStrings(stops), "", text
        while rest:
            size = draw.randint(1, 4)
            given += filter.push(rest[:size])
            rest = rest[size:]
            assert cut_ref(text, stops)[0].startswith(given)
        given += filter.finish()
        assert (given, filter.hit) == cut_ref(text, stops), (text, stops)
        hits += filter.hit
    assert 1000 < hits < 4500


def test_only_a_possible_stop_string_is_held_back() -> None:
    stops = StopStrings(["\n\nUser:"])
    assert [stops.push(text) for text in ["Hi", "\n", "\nUs", "ed", "\n"]] == ["Hi", "", "", "\n\nUsed", ""]
    assert stops.finish() == "\n" and not stops.hit


def gather(engine: FakeEngine, prompts: list[list[int]] | None = None, **body: Any) -> tuple[list[Piece], Completion]:
    fields = CompletionBody.model_validate({"model": "m", "prompt": "x", **body})
    whole = Completion("id", engine, TOKENIZER, prompts or [[65]], fields, param="prompt")

    async def run() -> list[Piece]:
        async with aclosing(whole.pieces()) as pieces:
            gathered = [piece async for piece in pieces]
        assert not engine.running
        return gathered

    return asyncio.run(asyncio.wait_for(run(), 10)), whole


def text_of(pieces: list[Piece], index: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.index == index)


def test_end_of_text_is_counted_but_not_written() -> None:
    pieces, whole = gather(FakeEngine(lambda _: [*TOKENIZER.encode("é!"), END]))
    assert pieces == [Piece(0, "é"), Piece(0, "!"), Piece(0, "", "stop")]
    assert whole.usage == {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}


def test_the_end_token_is_not_written_even_if_it_is_an_ordinary_one() -> None:
    class Ends(FakeEngine):
        async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
            yield Output(request.id, 66, "stop")

    pieces, _ = gather(Ends(lambda _: []))
    assert pieces == [Piece(0, "", "stop")]


def test_half_a_character_at_the_end() -> None:
    pieces, _ = gather(FakeEngine(lambda _: TOKENIZER.encode("a🙂")), max_tokens=3)
    assert pieces == [Piece(0, "a"), Piece(0, "\ufffd"), Piece(0, "", "length")]


def test_a_stop_string_ends_the_request_in_the_engine() -> None:
    class Kept(FakeEngine):
        """Holds its iterators, so that Python's garbage collection cannot close them."""

        def generate(self, request: Request) -> AsyncGenerator[Output, None]:
            self.kept = super().generate(request)
            return self.kept

    engine = Kept(lambda _: TOKENIZER.encode("one two three four"))
    pieces, whole = gather(engine, stop=[" th"])
    assert text_of(pieces) == "one two" and pieces[-1].finish_reason == "stop"
    assert whole.completion_tokens == len("one two th") and not engine.running


@pytest.mark.parametrize(("min_tokens", "text"), [(1, ""), (2, "ab cd"), (7, "ab cd"), (8, "ab cd ab ef")])
def test_no_stop_string_ends_the_text_before_min_tokens(min_tokens: int, text: str) -> None:
    """One that is complete only after them does, though it began before."""
    engine = FakeEngine(lambda _: [*TOKENIZER.encode("ab cd ab ef"), END])
    pieces, _ = gather(engine, stop=["ab"], min_tokens=min_tokens, max_tokens=30)
    assert text_of(pieces).rstrip() == text and pieces[-1].finish_reason == "stop"


def test_a_held_prefix_comes_out_at_the_end() -> None:
    pieces, _ = gather(FakeEngine(lambda _: [*TOKENIZER.encode("one t"), END]), stop=[" two"])
    assert text_of(pieces) == "one t"


def test_choices_are_numbered_prompt_by_prompt() -> None:
    engine = FakeEngine(lambda r: [*TOKENIZER.encode(f"{r.prompt_token_ids}{r.sampling.seed}"), END])
    pieces, whole = gather(engine, [[7], [8, 9]], n=2, seed=1)
    assert [text_of(pieces, index) for index in range(4)] == ["[7]1", "[7]2", "[8, 9]1", "[8, 9]2"]
    assert whole.prompt_tokens == 3
    assert [request.id for request in engine.requests] == ["id-0", "id-1", "id-2", "id-3"]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (RuntimeError("worker 3 is gone"), "RuntimeError: worker 3 is gone"),
        (asyncio.CancelledError(), "CancelledError"),
        (None, "without a finish reason"),
    ],
)
def test_an_engine_that_fails_never_hangs_the_caller(failure: BaseException | None, message: str) -> None:
    """Choice 0 fails, choice 1 would run on for ten seconds."""
    engine = FakeEngine(lambda r: [66] if r.id == "id-0" else [66] * 50)
    engine.pause, engine.failure = 0.2, failure
    with pytest.raises(ApiError, match=message) as caught:
        gather(engine, n=2, max_tokens=60)
    assert caught.value.status == 503 and not engine.running


def test_a_request_that_fails_alone_says_so() -> None:
    engine = FakeEngine(lambda r: [66] if r.id == "id-0" else [66] * 50)
    engine.pause, engine.failure = 0.2, RequestFailed("of its own making")
    with pytest.raises(ApiError, match="the request failed: of its own making") as caught:
        gather(engine, n=2, max_tokens=60)
    assert caught.value.status == 500 and not engine.running


def test_an_engine_that_does_not_let_go_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(FakeEngine):
        async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
            if request.id == "id-0":
                raise RuntimeError("broken")
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(60)
            yield Output(request.id, END)

    monkeypatch.setattr(completion_module, "CLEANUP_SECONDS", 0.05)
    with pytest.raises(ApiError, match="broken"):
        gather(Stuck(lambda _: []), n=2)


def test_leaving_early_frees_every_choice() -> None:
    engine = FakeEngine(lambda _: [66] * 60)
    engine.pause = 0.2
    fields = CompletionBody.model_validate({"model": "m", "prompt": "x", "n": 4, "max_tokens": 60})

    async def run() -> None:
        async with aclosing(Completion("id", engine, TOKENIZER, [[65]], fields, param="prompt").pieces()) as pieces:
            async for _ in pieces:
                assert len(engine.running) == 4
                break
        assert not engine.running

    asyncio.run(run())


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "prompt is empty"),
        ([261], 1, "token ids go from 0 to 260"),
        ([-1], 1, "token ids go from 0 to 260"),
        ([65] * 60, 5, "holds 64 tokens, the request needs 65: 60 in prompt and 5 to generate"),
        ([65] * 64, None, "needs 65: 64 in prompt and 1 to generate"),
        ([65] * 99, None, "needs 100"),
    ],
)
def test_prompts_that_cannot_be_continued(prompt: list[int], max_tokens: int | None, message: str) -> None:
    fields = CompletionBody.model_validate({"model": "m", "prompt": "x", "max_tokens": max_tokens})
    with pytest.raises(ApiError, match=message) as caught:
        Completion("id", FakeEngine(lambda _: []), TOKENIZER, [[65], prompt], fields, param="prompt")
    assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_the_default_is_cut_to_the_room_left() -> None:
    pieces, whole = gather(FakeEngine(lambda _: [66] * 30), [[65] * 60])
    assert whole.completion_tokens == 4 and pieces[-1].finish_reason == "length"
