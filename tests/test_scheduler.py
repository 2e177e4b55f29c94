"""Who computes next: the order, the bites, the pages; and that whatever comes and goes, all end and no page is lost."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from expertmesh.system.serve.draft import NO_DRAFTS, Nested
from expertmesh.system.serve.request import Request, Sampling
from expertmesh.system.serve.scheduler import Batch, Copy, Scheduler

ANSWER = 3  # tokens of an answer, unless said otherwise


def scheduler_of(
    pages: int = 100, page_size: int = 4, lanes: int = 1, running: int = 8, tokens: int = 64, fewest: int = 1
) -> Scheduler:
    return Scheduler(pages, page_size, lanes, running, tokens, prefix_cache=True, fewest=fewest)


def add(scheduler: Scheduler, name: str, prompt: int | list[int], told: bool = False) -> None:
    """`prompt`: tokens, or how many of them: then they are like no other's."""
    fresh = [1000 * (ord(name[0]) + 1) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    sampling = Sampling(max_tokens=ANSWER, prompt_logprobs=0 if told else None)
    scheduler.add(Request(name, fresh, sampling), seed=0, longest=len(fresh) + ANSWER)


def shown(batch: Batch | None) -> list[tuple[str, int, int]]:
    return [] if batch is None else [(s.request.id, start, length) for s, start, length, _ in batch.pieces]


def finish(scheduler: Scheduler, batch: Batch, answer: int = ANSWER) -> None:
    """What the engine does when a micro-batch is done."""
    over, accepted = [], []
    for piece in batch.pieces:
        sequence, right = piece.sequence, piece.drafts // 2
        speaks = piece.speaks and not sequence.cancelled
        accepted.append(right if speaks else 0)
        for _ in range(right + 1 if speaks else 0):
            scheduler.append(sequence, 7)
        if speaks and len(sequence.token_ids) - len(sequence.request.prompt_token_ids) >= answer:
            over.append(sequence)
    scheduler.complete(batch, accepted)
    for sequence in over:
        scheduler.release(sequence)


def run(scheduler: Scheduler, steps: int) -> list[list[tuple[str, int, int]]]:
    """One micro-batch after the other."""
    seen = []
    for _ in range(steps):
        batch = scheduler.schedule()
        seen.append(shown(batch))
        if batch is not None:
            finish(scheduler, batch)
    return seen


def test_nothing_to_do():
    assert scheduler_of().schedule() is None


def test_a_request():
    scheduler = scheduler_of()
    add(scheduler, "a", 5)
    assert run(scheduler, 4) == [[("a", 0, 5)], [("a", 5, 1)], [("a", 6, 1)], []]
    assert not scheduler.has_work and scheduler.pool.free == 100


def test_answers_come_before_prompts_and_prompts_in_bites():
    scheduler = scheduler_of(tokens=6)
    add(scheduler, "a", 2)
    add(scheduler, "b", 11)
    assert run(scheduler, 4) == [
        [("a", 0, 2), ("b", 0, 4)],
        [("a", 2, 1), ("b", 4, 5)],
        [("a", 3, 1), ("b", 9, 2)],
        [("b", 11, 1)],
    ]


def test_requests_wait_for_a_place_in_order_of_arrival():
    scheduler = scheduler_of(running=2)
    for name in "abcd":
        add(scheduler, name, 1)
    assert [[piece[0] for piece in step] for step in run(scheduler, 6)] == [["a", "b"]] * 3 + [["c", "d"]] * 3


def test_nobody_is_in_two_micro_batches_and_they_are_of_one_size():
    scheduler = scheduler_of(lanes=3)
    for name in "abcdefg":
        add(scheduler, name, 4)
    flying = [scheduler.schedule() for _ in range(3)]
    assert [len(shown(batch)) for batch in flying] == [3, 3, 1] and scheduler.schedule() is None
    first = flying[0]
    assert first is not None
    finish(scheduler, first)
    again = scheduler.schedule()
    assert [piece[0] for piece in shown(again)] == ["a", "b", "c"]


def test_unequal_micro_batches_even_out():
    """Seven answers, five of them in one micro-batch: the next takes its third and leaves the rest to others."""
    scheduler = scheduler_of(lanes=3, running=9)
    for name in "abcde":
        add(scheduler, name, 1)
    flying = [scheduler.schedule(), scheduler.schedule(), scheduler.schedule()]
    for batch in flying:
        if batch:
            finish(scheduler, batch, answer=99)
    lone = Batch(scheduler.running[4:5], [])
    scheduler.running[4].in_flight = True
    assert [piece[0] for piece in shown(scheduler.schedule())] == ["a", "b"]
    assert [piece[0] for piece in shown(scheduler.schedule())] == ["c", "d"]
    assert scheduler.schedule() is None and lone.pieces


def test_small_micro_batches_come_together():
    """Twelve tokens of prompts are worth three micro-batches; three tokens of answers are worth one."""
    scheduler = scheduler_of(lanes=3, fewest=4)
    for name in "abc":
        add(scheduler, name, 4)
    flying = [scheduler.schedule() for _ in range(3)]
    assert list(map(shown, flying)) == [[("a", 0, 4)], [("b", 0, 4)], [("c", 0, 4)]]
    for batch in flying[:2]:
        assert batch is not None
        finish(scheduler, batch, answer=99)
    assert scheduler.schedule() is None, "the third comes soon, and then all go together"
    assert flying[2] is not None
    finish(scheduler, flying[2], answer=99)
    assert run(scheduler, 2) == [[(name, at, 1) for name in "abc"] for at in (4, 5)]


def test_a_lone_request_is_not_cut_into_shares():
    scheduler = scheduler_of(lanes=3)
    add(scheduler, "a", 40)
    assert run(scheduler, 1) == [[("a", 0, 40)]]


def test_a_step_has_no_more_tokens_than_it_may():
    """40 of 64 are in flight already: the next micro-batch has 24, not its half."""
    scheduler = scheduler_of(lanes=2)
    add(scheduler, "a", 40)
    assert shown(scheduler.schedule()) == [("a", 0, 40)]
    add(scheduler, "b", 40)
    assert shown(scheduler.schedule()) == [("b", 0, 24)]


def test_the_oldest_has_its_pages_first():
    """One page is left; the younger request misses one token and would come first, the older one is in its prompt."""
    scheduler = Scheduler(4, 2, 1, 8, 3, prefix_cache=False)
    add(scheduler, "a", 5)
    run(scheduler, 1)
    add(scheduler, "b", 3)
    younger = scheduler.waiting.pop()
    younger.computed, younger.pages = 2, scheduler.pool.take(1) or []
    scheduler.running.append(younger)
    assert scheduler.pool.free == 1
    assert run(scheduler, 1) == [[("a", 3, 2)]]


def test_a_found_beginning_is_not_computed():
    scheduler = scheduler_of()
    add(scheduler, "a", list(range(10)))
    run(scheduler, 3)
    add(scheduler, "b", [*range(9), 99])
    assert run(scheduler, 1) == [[("b", 8, 2)]]
    assert scheduler.counts.reused_tokens == 8


def test_a_prompt_that_is_all_there_computes_its_last_token_in_a_copy():
    scheduler = scheduler_of()
    add(scheduler, "a", list(range(8)))
    run(scheduler, 3)
    found = scheduler.pool.find(scheduler_names(range(8)))
    add(scheduler, "b", list(range(8)))
    batch = scheduler.schedule()
    assert shown(batch) == [("b", 7, 1)] and batch is not None
    (copy,) = batch.copies
    pages = batch.pieces[0].sequence.pages
    assert copy == Copy(found[1], pages[1]) and pages[0] == found[0] and pages[1] != found[1]
    assert scheduler.pool.holders(found[1]) == 1, "nobody may write to it before it is copied"
    scheduler.complete(batch, [0])
    assert scheduler.pool.holders(found[1]) == 0


def scheduler_names(tokens: range) -> list[bytes]:
    from expertmesh.system.serve.pages import name_pages

    names: list[bytes] = []
    name_pages(list(tokens), 4, names, len(tokens))
    return names


def test_without_room_for_a_copy_the_last_page_is_computed():
    scheduler = scheduler_of(pages=2)
    add(scheduler, "a", list(range(6)))
    run(scheduler, 3)
    add(scheduler, "b", [*range(6), 7, 7])  # with two tokens of the answer: two pages, found
    assert run(scheduler, 1) == [[("b", 4, 4)]]


def test_a_beginning_that_is_being_computed_is_waited_for_and_others_pass():
    scheduler = scheduler_of(lanes=2)
    add(scheduler, "a", list(range(8)))
    add(scheduler, "b", [*range(8), 50])
    add(scheduler, "c", [60, 61])
    first = scheduler.schedule()
    assert shown(first) == [("c", 0, 2), ("a", 0, 8)] or shown(first) == [("a", 0, 8), ("c", 0, 2)]
    assert scheduler.schedule() is None
    assert first is not None
    finish(scheduler, first)
    assert ("b", 8, 1) in shown(scheduler.schedule())


def test_whoever_is_told_about_the_prompt_computes_it():
    scheduler = scheduler_of()
    add(scheduler, "a", list(range(8)))
    run(scheduler, 3)
    add(scheduler, "b", list(range(8)), told=True)
    assert run(scheduler, 1) == [[("b", 0, 8)]]


def test_a_preempted_request_goes_on_where_it_was():
    """Six pages of two. Both prompts fit; when answers need pages, the younger leaves and comes back."""
    scheduler = Scheduler(6, 2, 1, 8, 64, prefix_cache=False)
    add(scheduler, "a", 4)
    add(scheduler, "b", 3)
    seen: list[list[tuple[str, int, int]]] = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        assert batch is not None
        seen.append(shown(batch))
        finish(scheduler, batch, answer=7)
    assert scheduler.counts.preemptions == 1 and scheduler.pool.free == 6
    b = [piece for step in seen for piece in step if piece[0] == "b"]
    again = next(i for i, (_, start, _) in enumerate(b) if i and start == 0)
    assert b[again][2] == b[again - 1][1] + 2, "all it had, and the token that was drawn last"
    assert [piece[0] for step in seen for piece in step][-1] == "b"


def test_what_a_preempted_request_had_is_found_again():
    scheduler = Scheduler(7, 2, 1, 8, 64, prefix_cache=True)
    add(scheduler, "a", 4)
    add(scheduler, "b", 4)
    starts = Counter[int]()
    while scheduler.has_work:
        batch = scheduler.schedule()
        assert batch is not None
        starts.update(start for name, start, _ in shown(batch) if name == "b")
        finish(scheduler, batch, answer=7)
    assert scheduler.counts.preemptions >= 1 and starts[0] == 1, "only the first time from the beginning"


def test_cancelled_while_waiting_running_and_in_flight():
    scheduler = scheduler_of(running=2)
    for name in "abc":
        add(scheduler, name, 4)
    batch = scheduler.schedule()
    assert batch is not None
    for name in "ac":
        scheduler.cancel(name)
    assert scheduler.pool.free == 98, "a is written to until the micro-batch is done"
    finish(scheduler, batch)
    assert [s.request.id for s in scheduler.running] == ["b"] and not scheduler.waiting
    scheduler.cancel("b")
    scheduler.cancel("nobody")
    assert not scheduler.has_work and scheduler.pool.free == 100


@pytest.mark.parametrize("seed", range(40))
def test_any_history_ends_and_keeps_the_books(seed):
    draw = random.Random(seed)
    size, lanes, count = draw.randint(1, 4), draw.randint(1, 4), draw.randint(6, 20)
    step_tokens = draw.choice([1, 5, 50])
    scheduler = Scheduler(
        *(count, size, lanes, draw.randint(1, 6), step_tokens, draw.random() < 0.7),
        drafter=draw.choice([NO_DRAFTS, Nested(3, 0.5)]),
        fewest=draw.choice([1, 4, 30]),
    )
    flying: list[Batch] = []
    written: dict[int, int] = {}  # page -> how often it is written to in flight
    coming = 30
    for _ in range(3000):
        if coming and draw.random() < 0.3:
            prompt = [draw.randint(0, 1) for _ in range(draw.randint(1, size * count - 4))]
            scheduler.add(Request(f"r{coming}", prompt, Sampling(max_tokens=4)), 0, min(len(prompt) + 4, size * count))
            coming -= 1
        if draw.random() < 0.05:
            scheduler.cancel(f"r{draw.randint(1, 30)}")
        if len(flying) < lanes and (batch := scheduler.schedule()):
            flying.append(batch)
            assert sum(piece.rows for batch in flying for piece in batch.pieces) <= step_tokens
            written = _pages_written(flying, size)
            assert all(times == 1 for times in written.values()), "two write to one page"
            for piece in batch.pieces:
                assert len(piece.sequence.pages) >= -(-(piece.start + piece.rows) // size)
                assert piece.start + piece.rows < piece.sequence.longest
                assert piece.start == piece.sequence.computed
        elif flying:
            finish(scheduler, flying.pop(draw.randrange(len(flying))), answer=draw.randint(1, 4))
        elif scheduler.has_work:
            raise AssertionError("nothing is in flight and nobody can go on")
        held = Counter(page for s in scheduler.running for page in (*s.pages, *s.borrowed))
        assert [scheduler.pool.holders(page) for page in range(count)] == [held[page] for page in range(count)]
        assert all(scheduler.pool.holders(page) == 1 for page in _pages_written(flying, size)), "written to by one"
        if not coming and not scheduler.has_work:
            assert scheduler.pool.free == count
            return
    raise AssertionError("it does not end")


def _pages_written(flying: list[Batch], size: int) -> dict[int, int]:
    return Counter(
        page
        for batch in flying
        for piece in batch.pieces
        for page in piece.sequence.pages[piece.start // size : (piece.start + piece.rows - 1) // size + 1]
    )
