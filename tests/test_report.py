"""The report page: its figures are those of the logs, its drawings are to scale, and broken logs still give a page."""

import json
import math
import random
import re
from html.parser import HTMLParser

import pytest
from run_logs import NAMES, START, routers, step, validation, write_log

from expertmesh.system.train.read_run import read_run
from expertmesh.system.train.report import (
    MOST_POINTS,
    expert_groups,
    heat_map,
    human_count,
    plot,
    thin,
    ticks,
    write_report,
)


class Page(HTMLParser):
    """Checks that tags are balanced; gathers text, titles and anything that would be fetched."""

    VOID = {"meta", "br", "hr", "link", "img", "input"}

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.cells, self.tags = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"
        self.words = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def having(self, tag, kind):
        return [attrs for name, attrs in self.tags if name == tag and kind in attrs.get("class", "").split()]


def page_of(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text("utf-8"))


def test_a_finished_run_shows_its_figures(tmp_path):
    write_log(tmp_path, START, *[step(n, 8 - n / 50) for n in range(1, 101)], validation(50, 7.2), validation(100, 6.1))
    result = {
        "steps": 100,
        "validation_loss": 6.05,
        "unigram_loss": 6.9,
        "tokens_per_second": 4321.9,
        "ffn_experts_per_token": 1.234,
        "zero_computation_share": 0.383,
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    page = page_of(tmp_path)
    for words in [
        "finished 2 ranks: ep 2, dp 2 Held-out loss",
        "Held-out loss 6.050 nats/token 0.85 below unigram's 6.90",
        "Steps 100 of 200 planned",
        "Speed 4,322 tokens/s",
        "FFN experts per token 1.23",
        "Zero-computation share 38.3 %",
        "Parameters 3.5 million 1.2 million active per token",
        "Dispatched 300.0 KiB by all ranks in 100 steps",
        "Kept off the wire 100.0 KiB 25.0 % of what would have travelled",
        "sent 300.0 KiB, 75.0 %",
        "saved 100.0 KiB, 25.0 %",
    ]:
        assert words in page.words, words
    assert "unfinished" not in page.words
    assert len(page.having("circle", "point")) == 2
    assert len(page.having("path", "curve")) == 2, "loss and imbalance"


def test_the_page_fetches_nothing(tmp_path):
    write_log(tmp_path, START, step(1))
    page = page_of(tmp_path)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "image", "use"}
    html = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"https?:|url\(|@import", html)
    assert "default-src 'none'" in html


def test_text_from_the_logs_is_escaped(tmp_path):
    event = {"kind": "event", "what": "<script>alert(1)</script>", "step": 1, "why": '"><b>'}
    write_log(tmp_path, START | {"run": "a<b>&"}, step(1), event)
    page = page_of(tmp_path)
    assert "a<b>&" in page.words and "<script>alert(1)</script>" in page.words
    assert not {"script", "b"} & {tag for tag, _ in page.tags}


def test_one_step_of_an_unfinished_run_without_traffic(tmp_path):
    write_log(tmp_path, START | {"parallel": {"ep": 1, "dp": 1}}, step(1, dispatch_bytes=0, dispatch_bytes_saved=0))
    page = page_of(tmp_path)
    for words in [
        "unfinished 2 ranks Held-out loss – not measured yet",
        "Steps 1 of 200",
        "Speed 5,001",
        "in 1 step Kept off the wire 0 Bytes nothing had to travel",
        "No bytes: all experts are on the rank of their tokens",
    ]:
        assert words in page.words, words
    assert len(page.having("circle", "alone")) == 2, "a single step must show as a dot"


def test_what_is_kept_for_the_backward_is_told_where_it_was_measured(tmp_path):
    write_log(tmp_path, START, step(1, activation_bytes=3 * 2**20))
    assert "Kept for the backward 3.0 MiB" in page_of(tmp_path).words


def test_a_run_that_has_only_started_gives_a_page(tmp_path):
    page = page_of(write_log(tmp_path, START))
    assert "No step has been logged yet" in page.words and "Speed –" in page.words


@pytest.mark.parametrize("content", [None, "", '{"kind": "st'])
def test_without_a_start_there_is_no_report(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match="metrics.jsonl"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "torn",
    [
        json.dumps(step(3))[:-9].encode(),  # inside the line
        '{"kind": "step", "note": "é'.encode()[:-1],  # inside a character
        b"3",  # what is left is JSON, but no record
        f"{json.dumps(step(3))[:-9]}{json.dumps(step(3))}\n{json.dumps(step(3, 4.0))}\n".encode(),  # written on
    ],
)
def test_a_torn_line_is_skipped(tmp_path, torn):
    run = read_run(write_log(tmp_path, START, step(1), step(2, 4.0), torn=torn))
    assert [record["step"] for record in run.steps] == ([1, 2, 3] if b"\n" in torn else [1, 2])
    assert run.steps[-1]["loss"] == 4.0
    page_of(tmp_path)


def test_a_resumed_run_counts_each_step_once(tmp_path):
    first = [step(n, 9.0) for n in range(1, 9)]
    again = [step(n, 3.0, load_LN=[[1, 0, 0, 0, 0, 1]], layers=routers(7)) for n in range(5, 7)]
    resumed = {"kind": "event", "what": "resumed", "step": 4}
    write_log(tmp_path, START, *first[:4], validation(4, 5.5), *first[4:], validation(8, 6.6), START, resumed, *again)
    run = read_run(tmp_path)
    assert [(record["step"], record["loss"]) for record in run.steps] == [
        *((n, 9.0) for n in range(1, 5)),
        *((n, 3.0) for n in range(5, 7)),  # the later line wins; 7 and 8 belong to the abandoned attempt
    ]
    assert [(record["step"], record["loss"]) for record in run.validations] == [(4, 5.5)]
    assert run.load_LN == [[1, 0, 0, 0, 0, 1]]
    page = page_of(tmp_path)
    assert "Steps 6 of 200" in page.words and "Dispatched 18.0 KiB" in page.words
    assert "step 4: resumed" in page.words and len(page.having("line", "event")) == 1


def test_losses_that_are_no_number_are_left_out_and_counted(tmp_path):
    write_log(tmp_path, START, step(1, 5.0), step(2, math.nan), step(3, math.inf), step(4, 4.0))
    page = page_of(tmp_path)
    assert "2 steps had a loss that is no finite number and are not drawn" in page.words
    path = page.having("path", "curve")[0]["d"]
    assert path.count("L") == 1 and "nan" not in path and "inf" not in path
    write_log(tmp_path, START, step(1, math.nan))
    assert "No step has been logged yet" not in page_of(tmp_path).words


def test_heat_map_cells_hold_shares_in_percent(tmp_path):
    rows, largest = heat_map([[30, 20, 10, 20, 15, 5], [0, 0, 0, 0, 0, 0]], NAMES, [0, 2])
    assert [cell.text for cell in rows[0]] == ["30", "20", "10", "20", "15", "5.0"]
    assert [cell.text for cell in rows[1]] == ["0"] * 6
    assert largest == pytest.approx(2 / 6) and rows[0][0].strength == pytest.approx(0.9, abs=1e-4)
    assert [cell.kind for cell in rows[0]] == ["ffn"] * 3 + ["free"] * 3
    assert [cell.opens_group for cell in rows[0]] == [False, False, False, True, True, True]
    assert rows[0][0].title == "layer 0, FFN 0: 30 slots, 30.00%"
    assert rows[1][0].title == "layer 2, FFN 0: 0 slots, 0.00%"
    rows, largest = heat_map([[98, 1, 1, 0, 0, 0]], NAMES, [0])
    assert largest == 0.98 and rows[0][0].strength == 1.0
    page = page_of(write_log(tmp_path, START, step(1)))
    assert len(page.having("td", "cell")) == 12 and len(page.having("td", "free")) == 6
    assert "FFN constant copy zero layer 0 1 2 0 0 0 0 30 20 10" in page.words
    assert "0 0.12 0.12 12.5 % 45.6 % 12.5 % 12.5 % 0.12 0.125 0.12 1 0.12" in page.words, "what each router did"


def test_many_experts_are_drawn_without_lettering(tmp_path):
    names = [f"ffn {n}" for n in range(64)] + ["zero 0"]
    write_log(tmp_path, START | {"expert_names": names}, step(1, load_LN=[[2] * 65] * 3, layers=routers(0, 1, 2)))
    page = page_of(tmp_path)
    assert len(page.having("td", "cell")) == 3 * 65
    assert "FFN zero 0 1 2 FFN: 0 %" in page.words, "only layers are numbered"


def test_expert_groups():
    assert expert_groups(NAMES) == [("FFN", 3), ("constant", 1), ("copy", 1), ("zero", 1)]


def test_ticks_are_round_inside_and_enough():
    assert [tick.label for tick in ticks(0, 200, 6)] == ["0", "50", "100", "150", "200"]
    assert [tick.label for tick in ticks(0, 1, 6, smallest=1)] == ["0", "1"]
    assert [tick.label for tick in ticks(4.9, 5.2, 4)] == ["4.9", "5.0", "5.1", "5.2"]
    generator = random.Random(2)
    for _ in range(500):
        low = generator.uniform(-10, 10) * 10 ** generator.uniform(-4, 5)
        high = low + 10 ** generator.uniform(-2, 6)
        marks = ticks(low, high, 6)
        slack = (high - low) * 1e-6
        assert 1 <= len(marks) <= 7 and low - slack <= marks[0].at and marks[-1].at <= high + slack
        labels = [float(tick.label.replace(",", "")) for tick in marks]
        assert labels == pytest.approx([tick.at for tick in marks], abs=slack + 1e-9), "labels must not be rounded"


def test_thin_keeps_every_value_in_a_mean_and_a_range():
    generator = random.Random(3)
    for size in (1, 7, 99, 100, 101, 1234):
        curve = [(n, generator.gauss(0, 1)) for n in range(1, size + 1)]
        buckets = thin(curve, 100)
        assert len(buckets) <= 100
        assert [bucket.first for bucket in buckets[1:]] == [bucket.last + 1 for bucket in buckets[:-1]]
        assert (buckets[0].first, buckets[-1].last) == (1, size)
        total = sum(bucket.mean * (bucket.last - bucket.first + 1) for bucket in buckets)
        assert total == pytest.approx(sum(value for _, value in curve))
        assert max(bucket.high for bucket in buckets) == max(value for _, value in curve)
        assert min(bucket.low for bucket in buckets) == min(value for _, value in curve)


def test_plot_is_to_scale_and_inside_its_frame():
    curve = [(n, 8 - 3 * n / 100) for n in range(1, 101)]
    drawing = plot(curve, height=300, unit="nats", points=[(50, 6.5), (60, math.nan)], reference=6.5)
    assert drawing is not None and drawing.reference is not None
    spots = [*drawing.samples, *drawing.points]
    assert all(drawing.left <= spot.x <= drawing.right and drawing.top <= spot.y <= drawing.bottom for spot in spots)
    # 6.5 is the curve's value at step 50, the held-out value there, and the level compared with.
    assert drawing.samples[49].y == drawing.points[0].y == drawing.reference.at
    assert drawing.samples[49].x == drawing.points[0].x == pytest.approx((drawing.left + drawing.right) / 2)
    assert drawing.samples[0].y < drawing.samples[99].y, "a higher loss must be drawn higher"
    scale = {tick.label: tick.at for tick in drawing.y_ticks}
    assert drawing.samples[99].y == scale["5"]
    assert drawing.samples[49].title == "step 50: 6.500 nats"
    assert drawing.band == ""


def test_a_long_run_is_thinned_and_shows_its_range():
    curve = [(n, 5.0 + (n == 5000)) for n in range(1, 10_001)]
    drawing = plot(curve, height=300, unit="nats")
    assert drawing is not None
    assert len(drawing.samples) <= MOST_POINTS and drawing.band.startswith("M")
    assert re.match(r"steps 1 to 28, mean: 5.000 nats", drawing.samples[0].title)
    heights = [float(pair.split()[1]) for pair in drawing.band[1:].split("L")]
    assert min(heights) < min(sample.y for sample in drawing.samples) - 100, "one bad step must be seen in the range"


def test_nothing_finite_is_nothing_to_plot():
    assert plot([], height=300, unit="nats", reference=6.9) is None
    assert plot([(1, math.nan)], height=300, unit="nats") is None


def test_counts_in_words():
    counts = (999, 12_345, 1_234_567, 235_000_000_000)
    assert [human_count(count) for count in counts] == ["999", "12,345", "1.2 million", "235.0 billion"]
