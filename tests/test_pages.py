"""Pages are neither lost nor given twice, whatever is done; equal beginnings share them, and the oldest go first."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from expertmesh.system.serve.pages import PagePool, name_pages


def names_of(token_ids: list[int], page_size: int = 2) -> list[bytes]:
    names: list[bytes] = []
    name_pages(token_ids, page_size, names, len(token_ids))
    return names


NAMES = [
    ([], 0, "no tokens"),
    ([1], 0, "less than a page"),
    ([1, 2], 1, "a page"),
    ([1, 2, 3], 1, "a page and a half"),
    ([1, 2, 3, 4], 2, "two pages"),
]


@pytest.mark.parametrize("token_ids, count, reason", NAMES, ids=[row[-1] for row in NAMES])
def test_full_pages_have_names(token_ids, count, reason):
    assert len(names_of(token_ids)) == count


def test_a_name_tells_all_tokens_up_to_there():
    assert names_of([1, 2, 3, 4])[0] == names_of([1, 2, 9, 9])[0]
    assert names_of([1, 2, 3, 4])[1] != names_of([5, 6, 3, 4])[1], "the same page after another beginning"
    assert names_of([1, 2, 3, 4], 4) != names_of([1, 2, 3, 4], 2)[1:]
    assert names_of([258, 0]) != names_of([2, 1]), "tokens are not bytes"
    grown = names_of([1, 2])
    name_pages([1, 2, 3, 4, 5], 2, grown, 5)
    assert grown == names_of([1, 2, 3, 4, 5])
    name_pages([1, 2, 3, 4, 5, 6], 2, grown, 5)
    assert len(grown) == 2, "the third page is full, but not computed yet"


def test_sharing():
    pool, (first, second) = PagePool(4), names_of([1, 2, 3, 4])
    mine = pool.take(2)
    assert pool.find([first, second]) == []
    for page, name in zip(mine, (first, second), strict=True):
        pool.publish(page, name)
    assert pool.find([first, second]) == mine and pool.find([second]) == [mine[1]]
    assert pool.find([first, b"other", second]) == mine[:1], "only a beginning"
    pool.hold(mine)
    pool.give_back(mine)
    assert pool.free == 2 and [pool.holders(page) for page in mine] == [1, 1]
    pool.give_back(mine)
    assert pool.free == 4 and pool.find([first, second]) == mine, "free pages keep their content"
    assert pool.idle_among(mine) == 2
    pool.hold(mine)
    assert pool.free == 2


def test_the_least_recently_used_goes_first_and_of_one_request_the_last():
    pool = PagePool(4)
    old, new = pool.take(2), pool.take(2)
    for page, name in zip(old + new, [b"o0", b"o1", b"n0", b"n1"], strict=True):
        pool.publish(page, name)
    pool.give_back(new)
    pool.give_back(old)
    gone = []
    for _ in range(4):
        gone += pool.take(1)
    assert gone == [*reversed(new), *reversed(old)]
    assert pool.find([b"o0"]) == pool.find([b"n0"]) == []


def test_nothing_is_taken_where_not_all_can_be():
    pool = PagePool(2)
    assert pool.take(3) is None and pool.free == 2
    assert pool.take(0) == [] and len(pool.take(2)) == 2 and pool.take(1) is None


def test_two_pages_of_one_content():
    pool = PagePool(2)
    first, second = pool.take(2)
    pool.publish(first, b"x")
    pool.publish(second, b"x")
    assert pool.find([b"x"]) == [first]
    pool.give_back([second])
    assert pool.take(1) == [second], "without a name it is the first to go"
    pool.give_back([first])
    pool.forget()
    assert pool.free == 1 and pool.find([b"x"]) == []


def test_giving_back_twice_is_noticed():
    pool = PagePool(1)
    pages = pool.take(1)
    pool.give_back(pages)
    with pytest.raises(AssertionError, match="twice"):
        pool.give_back(pages)


@pytest.mark.parametrize("seed", range(20))
def test_any_history_keeps_the_books(seed):
    """Requests over a few tokens come, grow, publish, share and go; after each act a count by hand must agree."""
    draw = random.Random(seed)
    count, size = draw.randint(1, 9), draw.randint(1, 3)
    pool = PagePool(count)
    requests: list[tuple[list[int], list[int]]] = []  # tokens, pages
    for _ in range(300):
        act = draw.random()
        if act < 0.45:
            tokens = [draw.randint(0, 1) for _ in range(draw.randint(1, 12))]
            names: list[bytes] = []
            name_pages(tokens, size, names, len(tokens))
            found = pool.find(names)
            missing = -(-len(tokens) // size) - len(found)
            fits = missing + pool.idle_among(found) <= pool.free
            if fits:
                pool.hold(found)
            taken = pool.take(missing) if fits else None
            assert (taken is not None) == fits
            if taken is not None:
                requests.append((tokens, [*found, *taken]))
                for page, name in zip(requests[-1][1], names, strict=False):
                    if draw.random() < 0.8:
                        pool.publish(page, name)
        elif act < 0.9 and requests:
            pool.give_back(requests.pop(draw.randrange(len(requests)))[1])
        elif act > 0.98:
            pool.forget()
        held = Counter(page for _, pages in requests for page in pages)
        assert [pool.holders(page) for page in range(count)] == [held[page] for page in range(count)]
        assert pool.free == count - len(held)
    for _, pages in requests:
        pool.give_back(pages)
    assert pool.free == count and sorted(pool.take(count)) == list(range(count))
