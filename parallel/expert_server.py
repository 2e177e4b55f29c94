"""The FFN side of split serving: answers whoever asks, and what waits for the same layer together.

Each link has a thread that hears, waits for an answer and tells it. Whichever of them finds nobody at work computes its
own rows and all others that are waiting for the same layer in one grouped GEMM: so the batch of an expert grows with
the number of attention workers, which is what a separate FFN pool is for, and nobody waits for workers that have
nothing to ask. It holds no state of any request.

Legend: X tokens, R rows, E experts of a layer here, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Condition, Thread
from typing import NamedTuple

import torch

from expertmesh.kernels.rows import Rows
from expertmesh.parallel.exchange import Answered, Form, Layout, Work, tell
from expertmesh.parallel.link import Link, Listener
from expertmesh.parallel.timeline import now


class Experts(NamedTuple):
    """The experts of an FFN worker."""

    compute: Callable[[int, Rows, float], torch.Tensor]
    """(layer, rows, share of the experts' width) -> answers_RD, not weighted."""
    held: Callable[[int], range]
    """Those of a layer that are here."""
    device: str


class _Question:
    """Rows that wait for their answer."""

    def __init__(self, work: Work) -> None:
        self.work, self.heard = work, now()
        self.answer: torch.Tensor | BaseException | None = None
        self.answered = Answered(0, 0)

    def asks_the_same(self, other: _Question) -> bool:
        """Whether both are for the same experts."""
        return (self.work.layer, self.work.width) == (other.work.layer, other.work.width)


class ExpertServer:
    """Answers the links of a listener, each in a thread of its own."""

    def __init__(self, experts: Experts, form: Form, layout: Layout) -> None:
        self._experts, self._form, self._layout = experts, form, layout
        self._condition = Condition()
        self._waiting: list[_Question] = []
        self._at_work = False
        self._failures: list[BaseException] = []
        self._come = self._open = 0  # links
        self._closed = False
        self._answering: dict[Thread, Link] = {}

    def serve(self, listener: Listener, links: int) -> None:
        """Let links in and answer them, until `links` or more have come and all are gone, or `close` is called.

        Closes the listener.

        Raises what the experts raised, as soon as they did. No thread is left: one that drops the last hold on a
        tensor while the process ends aborts it.
        """
        letting_in = Thread(target=self._let_in, args=(listener,), name="listener", daemon=True)
        letting_in.start()
        with self._condition:
            self._condition.wait_for(lambda: self._closed or self._failures or (self._come >= links and not self._open))
        listener.close()
        letting_in.join()
        for thread, link in self._answering.items():
            link.close()
            thread.join()
        if self._failures:
            raise self._failures[0]

    def close(self) -> None:
        """Have `serve` return: nobody is to ask any more. Safe to call from any thread."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def _let_in(self, listener: Listener) -> None:
        while True:
            try:
                link, who = listener.accept()
            except OSError:  # nobody is let in any more
                return
            with self._condition:
                self._come += 1
                self._open += 1
            name = f"attention-{who.attention}-{who.micro_batch}"
            thread = Thread(target=self._answer, args=(link,), name=name, daemon=True)
            self._answering = {old: its for old, its in self._answering.items() if old.is_alive()} | {thread: link}
            thread.start()

    def _answer(self, link: Link) -> None:
        """Answer one link until the other side is gone."""
        try:
            while True:
                question = _Question(self._form.hear(link, self._layout, self._experts.held))
                self._wait_for_answer(question)
                if isinstance(question.answer, BaseException):  # whoever asked sees the link close
                    self._failures.append(question.answer)
                    return
                assert question.answer is not None
                tell(link, question.answer, question.answered)
        except OSError:  # the attention worker closed the link, or died
            pass
        finally:
            link.close()
            with self._condition:
                self._open -= 1
                self._condition.notify_all()

    def _wait_for_answer(self, question: _Question) -> None:
        with self._condition:
            self._waiting.append(question)
            while self._at_work and question.answer is None:
                self._condition.wait()
            if question.answer is not None:
                return
            together = [other for other in self._waiting if other.asks_the_same(question)]
            self._waiting = [other for other in self._waiting if not other.asks_the_same(question)]
            self._at_work = True
        try:
            self._compute(together)
        except BaseException as error:
            for other in together:
                other.answer = error
        finally:
            with self._condition:
                self._at_work = False
                self._condition.notify_all()

    @torch.inference_mode()
    def _compute(self, questions: list[_Question]) -> None:
        began, device = now(), self._experts.device
        works = [question.work for question in questions]
        rows, order_R = together_rows([work.rows for work in works])
        on_device = Rows(
            rows.source_XD.to(device),
            None if rows.index_R is None else rows.index_R.to(device),
            rows.counts_E.to(device),
        )
        answers_RD = self._experts.compute(works[0].layer, on_device, works[0].width)
        if order_R is not None:
            answers_RD = torch.empty_like(answers_RD).index_copy_(0, order_R.to(device), answers_RD)
        shares = answers_RD.split([int(work.rows.counts_E.sum()) for work in works])
        answers = [work.finish(share).cpu() for work, share in zip(works, shares, strict=True)]
        ended = now()
        for question, answer in zip(questions, answers, strict=True):
            # Whoever was computed together says its share of the work, so that the sum over all is the time at work.
            question.answered = Answered(began - question.heard, (ended - began) // len(questions))
            question.answer = answer


def together_rows(several: Sequence[Rows]) -> tuple[Rows, torch.Tensor | None]:
    """The rows of several questions as those of one, sorted by expert.

    Also order_R: the row at place i of the result is row order[i] of all, one question after the other; None: all are.
    """
    if len(several) == 1:
        return several[0], None
    indices, experts, first = [], [], 0
    for rows in several:
        index_R = torch.arange(len(rows.source_XD)) if rows.index_R is None else rows.index_R
        indices.append(index_R + first)
        experts.append(torch.repeat_interleave(rows.counts_E))
        first += len(rows.source_XD)
    order_R = torch.cat(experts).argsort(stable=True)
    counts_E = torch.stack([rows.counts_E for rows in several]).sum(0)
    return Rows(torch.cat([rows.source_XD for rows in several]), torch.cat(indices)[order_R], counts_E), order_R
