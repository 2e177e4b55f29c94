"""The serving bench compares before it times: who says something else than `generate` has no time, and says why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expertmesh.launch.bench import serve
from expertmesh.launch.bench.serve import OURS, Answer, Contender, ServeCase, bench_serve, everyone
from expertmesh.launch.bench.table import serve_table
from expertmesh.launch.cli import app

TINY = ServeCase((1, 3), 5, 6, layers=1, hidden_size=64, ffn_size=32, experts=4, rounds=2)


@contextmanager
def counting(checkpoint: Path, case: ServeCase, first: int = 0) -> Iterator[Answer]:
    yield lambda prompts, new_tokens: [list(range(first, first + new_tokens)) for _ in prompts]


@contextmanager
def not_installed(checkpoint: Path, case: ServeCase) -> Iterator[Answer]:
    raise ImportError("no such peer")
    yield


def quiet(line: str) -> None:
    pass


def test_ours_and_transformers_say_the_same():
    joined, *_, generate, continuous = everyone("float32")
    tables = list(bench_serve(TINY, quiet, [joined, generate, continuous]))
    assert [[row["what"] for row in rows] for rows in tables] == [[OURS, generate.what, continuous.what]] * 2
    assert [rows[0]["concurrent"] for rows in tables] == [1, 3]
    for row in (row for rows in tables for row in rows):
        assert row["same_tokens"] == 1 and row["rounds"] == TINY.rounds and row["seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["concurrent"] * 6 / row["seconds"])
    assert tables[0][0]["ratio_to_ours"] == 1


def test_a_bfloat16_checkpoint_is_computed_in_float32():
    (rows,) = bench_serve(replace(TINY, concurrent=(2,), dtype="bfloat16"), quiet, everyone("bfloat16")[:1])
    assert rows[0]["same_tokens"] == 1


@pytest.fixture
def without_a_model(monkeypatch):
    """Who counts from 0 is right."""
    monkeypatch.setattr(serve, "_in_process", lambda *_: None)
    monkeypatch.setattr(serve, "REFERENCE", Contender("reference", counting))


OTHERS = [Contender("wrong", partial(counting, first=1)), Contender("nobody", not_installed)]


def test_who_is_wrong_or_fails_has_no_time(without_a_model):
    ours, wrong, nobody = next(bench_serve(TINY, quiet, [Contender(OURS, counting), *OTHERS]))
    assert ours["rounds"] == TINY.rounds
    assert wrong["seconds"] is None and wrong["note"] == "wrong: 0% of its tokens are those of generate"
    assert nobody["seconds"] is None and nobody["note"] == "failed: ImportError: no such peer"
    shown = serve_table([ours, wrong, nobody])
    assert shown.row_count == 1 and "nobody: failed" in str(shown.caption)


def test_in_bfloat16_who_says_something_else_is_timed(without_a_model):
    case = replace(TINY, dtype="bfloat16")
    _, wrong = next(bench_serve(case, quiet, [Contender(OURS, counting), OTHERS[0]]))
    assert wrong["same_tokens"] == 0 and wrong["rounds"] == TINY.rounds


@pytest.mark.parametrize("fault, why", [(OTHERS[0], "our own engine is wrong: "), (OTHERS[1], f"{OURS}: failed: ")])
def test_our_own_engine_must_be_right(without_a_model, fault, why):
    with pytest.raises(RuntimeError, match=f"^{why}"):
        list(bench_serve(TINY, quiet, [fault._replace(what=OURS)]))


@pytest.mark.parametrize(
    "option, why",
    [
        ("--concurrent 1,x", "concurrent=1,x: give numbers"),
        ("--concurrent 0", "concurrent=0: "),
        ("--hidden-size 100", "hidden_size=100: "),
        ("--top-k 17", "top_k=17 is more than experts=16"),
        ("--dtype half", "dtype=half: it must be one of float32, bfloat16"),
        ("--rounds 0", "rounds=0: it must be 1 or more"),
    ],
)
def test_sizes_that_cannot_be(option, why):
    refused = CliRunner().invoke(app, ["bench", "serve", *option.split()])
    assert refused.exit_code == 2 and why in refused.output
