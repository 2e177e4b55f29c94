"""Which pages of the cache are whose: counts and names, no tensor.

The cache is cut into pages of `page_size` tokens, and a request holds as many as its tokens fill (PagedAttention, arXiv
2309.06180). Pages whose tokens are all computed get a name, the hash of those tokens and of all before them:

    name(page) = sha256(name(page before) + its tokens)

Equal names mean equal prompts up to there, so the same page can serve every request that begins so. A page counts its
holders. With none it is free; a free page that has a name keeps it, and can be taken again under it, until the page is
needed for something else. The one let go longest ago goes first:

    free:  [ nameless pages | named pages, least recently used first ]         held: count 1, 2, ...
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def name_pages(token_ids: Sequence[int], page_size: int, names: list[bytes], known: int) -> None:
    """Append the names of the full pages of `token_ids[:known]` to `names`, which holds those of the first ones."""
    for first in range(len(names) * page_size, known - page_size + 1, page_size):
        before = names[-1] if names else b""
        names.append(hashlib.sha256(before + array("q", token_ids[first : first + page_size]).tobytes()).digest())


class PagePool:
    """Pages 0 .. count - 1. Not thread-safe."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._nameless = list(range(count))[::-1]
        self._idle: OrderedDict[int, None] = OrderedDict()  # free pages with a name, least recently used first
        self._holders = [0] * count
        self._by_name: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """How many pages could be taken now."""
        return len(self._nameless) + len(self._idle)

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The pages of the longest beginning of `names` that is here. They are not held yet."""
        found: list[int] = []
        for name in names:
            page = self._by_name.get(name)
            if page is None:
                break
            found.append(page)
        return found

    def idle_among(self, pages: Sequence[int]) -> int:
        """How many of `pages` nobody holds: holding them uses up so many free ones."""
        return sum(not self._holders[page] for page in pages)

    def hold(self, pages: Sequence[int]) -> None:
        """One holder more for each of `pages`, found just now."""
        for page in pages:
            if not self._holders[page]:
                del self._idle[page]
            self._holders[page] += 1

    def take(self, count: int) -> list[int] | None:
        """`count` pages of whatever content, with one holder; None, and nothing is taken, where so many are not free.

        Those without a name are taken first, then those used least recently, which lose theirs.
        """
        if count > self.free:
            return None
        taken = []
        for _ in range(count):
            if self._nameless:
                page = self._nameless.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._by_name[self._names.pop(page)]
            assert not self._holders[page]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """One holder less for each of a request's pages, given in order; of those left free the last goes first."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} was given back twice"
            self._holders[page] -= 1
            if not self._holders[page]:
                if page in self._names:
                    self._idle[page] = None
                else:
                    self._nameless.append(page)

    def publish(self, page: int, name: bytes) -> None:
        """All of a held page is computed: from now on it is found by its name, unless another page already is."""
        assert self._holders[page] > 0
        if name not in self._by_name and page not in self._names:
            self._by_name[name] = page
            self._names[page] = name

    def holders(self, page: int) -> int:
        return self._holders[page]

    def forget(self) -> None:
        """Take the names from all pages, held or not."""
        self._nameless.extend(self._idle)
        self._idle.clear()
        self._by_name.clear()
        self._names.clear()
