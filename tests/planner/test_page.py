"""The page of `jaxft plan`: what it shows of plans and searches made by hand; nothing compiles."""

import dataclasses
import math
import random
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from jaxft.config import RunConfig, to_dict
from jaxft.planner.memory import KINDS, Memory
from jaxft.planner.page import write_page
from jaxft.planner.page.search import pareto
from jaxft.planner.plan import Exchange, Plan, Remedy, Speed, StepTime, Work
from jaxft.planner.timeline import Loop, Span, Timeline
from jaxft.planner.topology import parse

GIB = 1 << 30
VOID = {"meta", "br", "wbr", "path", "circle", "rect"}
NAME = '<b>"tiny" & more'
STEP = StepTime(
    seconds=4.0,
    terms={"compute": 2.5, "memory": 1.0, "ici": 0.5, "dcn": 0.0, "host": 0.0},
    spent={"matmul": 2.9, "attention": 0.5, "memory": 0.2, "wait ici": 0.4},
    by_cycles=0.0,
    low=3.5,
    high=4.6,
)
SPEED = Speed(
    tokens_per_second=80_000.0,
    tokens_per_second_per_chip=10_000.0,
    mfu=0.412,
    mfu_full=0.456,
    price_per_hour=21.6,
    price_per_million_tokens=0.075,
    currency="USD",
    priced="2026-09-17",
)


class Tags(HTMLParser):
    """Collects tags with their attributes, and checks that elements close in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += " " + data

    @property
    def words(self):
        return " ".join(self.text.split())


def timeline() -> Timeline:
    """A step of 4 s: a prologue, 10 runs of 0.1 s, 5 of 0.5 s with a loop in them, an end."""
    inner = Timeline(0.05, (Span("core", "matmul", 0.0, 0.05, "windowed.1", "jvp()"),))
    forward = Timeline(
        0.1,
        (
            Span("core", "matmul", 0.0, 0.08, "fusion.1", "jit(step)/jvp()/dot_general"),
            Span("ici", "all-gather", 0.02, 0.08, "all-gather.1", "jvp()"),
            Span("core", "wait ici", 0.08, 0.02, "all-gather.1"),
            Span("host", "host", 0.0, 0.05, "copy-out"),
            Span("host", "host", 0.0, 0.04, "copy-in"),
        ),
    )
    backward = Timeline(
        0.5,
        (
            Span("core", "attention", 0.0, 0.1, "splash.1", "transpose(jvp())"),
            Span("sparsecore", "sparsecore", 0.1, 0.1, "gather.1"),
            Span("dcn", "all-reduce", 0.3, 0.2, "all-reduce.1"),
        ),
        (Loop(0.1, 8, inner),),
    )
    return Timeline(
        4.0,
        (
            Span("core", "memory", 0.0, 0.25, "prologue"),
            Span("copy", "copy", 0.0, 0.1, "copy.1"),
            Span("core", "memory", 3.75, 0.25, "adam"),
        ),
        (Loop(0.25, 10, forward), Loop(1.25, 5, backward)),
    )


def memory_of(used: int, limit: int = 31 * GIB) -> Memory:
    kinds = dict.fromkeys(KINDS, 0)
    kinds |= {"parameters": 4 * GIB, "optimizer": 8 * GIB, "gradients": 2 * GIB}
    kinds["temporaries"] = used - sum(kinds.values())
    return Memory(limit=limit, used=used, kinds=kinds, host=5 * GIB)


def plan_of(**changes) -> Plan:
    settings = to_dict(RunConfig()) | {"model.remat": "qkv<attention>"}
    exchange = Exchange(
        kind="all-gather",
        axes=("fsdp",),
        network="ici",
        count=450,
        exact=False,
        bytes=27 * GIB,
        wire_bytes=24 * GIB,
        seconds=0.15,
        overlapped=0.93,
    )
    values = {
        "model": NAME,
        "parameters": 8_030_261_248,
        "trained": 8_030_261_248,
        "topology": parse("v6e-8"),
        "strategy": "fsdp",
        "mesh": {"data": 1, "fsdp": 8},
        "settings": settings,
        "source": "compiled",
        "memory": memory_of(22 * GIB),
        "work": Work(model_flops=1e15, model_flops_full=1.1e15, flops=1.3e15, bytes=1e12),
        "time": STEP,
        "speed": SPEED,
        "exchanges": (exchange,),
        "timeline": timeline(),
    }
    return Plan(**values | changes)


def too_large(**changes) -> Plan:
    remedies = (
        Remedy(change="all again", flags={"model.remat": "full"}, fits=True, used=9, seconds=5.0),
        Remedy(change="more chips", flags={"topology": "v6e:4x4"}, fits=False, used=40 * GIB),
    )
    nothing = {"time": None, "speed": None, "exchanges": (), "timeline": None}
    return plan_of(memory=memory_of(41 * GIB), remedies=remedies, **nothing | changes)


def candidate(seconds: float, gib: float, outcome: str, plan: Plan | None = None):
    """What the page reads of a candidate."""
    return SimpleNamespace(
        name=f"fsdp <{seconds}>",
        plan=plan,
        outcome=outcome,
        seconds=seconds,
        bytes=round(gib * GIB),
        estimate_seconds=seconds * 1.1,
        estimate_bytes=round(gib * GIB),
    )


def search_of(*candidates):
    compiled = [one for one in candidates if one.plan is not None]
    return SimpleNamespace(
        topology=parse("v6e-8"),
        candidates=candidates,
        considered=len(candidates),
        compiled=len(compiled),
        seconds=12.0,
        best=next((one for one in compiled if one.plan.fits), None),
    )


@pytest.fixture
def page(tmp_path):
    def write(plans, searches=()) -> str:
        return write_page(str(tmp_path / "plan.html"), plans, searches).read_text("utf-8")

    return write


def percent(style: str, name: str) -> float:
    match = re.search(rf"{name}:([\d.]+)%", style)
    assert match is not None, style
    return float(match[1])


def inside(page: str, start: str, end: str) -> str:
    return page[page.index(start) :].split(end)[0]


def test_a_page_needs_nothing_else_and_is_well_formed(page):
    found = search_of(candidate(4.0, 20, "compiled", plan_of()))
    text = page([plan_of(), too_large()], [found])
    assert not re.search(r"https?://|<link|<img|<iframe|src=|@import|url\(", text)
    assert {href for _, a in Tags(text).tags if (href := a.get("href"))} == {"#plan-1", "#plan-2"}


def test_every_kind_and_lane_is_there(page):
    words = Tags(page([plan_of()])).words
    for kind in ("parameters", "optimizer", "gradients", "temporaries"):
        assert kind in words
    text = page([plan_of()])
    for lane in ("core", "ici", "dcn", "host", "copy", "sparsecore"):
        assert f'class="lane {lane}"' in text
    for kind in ("matmul", "attention", "wait ici", "all-gather", "all-reduce"):
        assert kind in words
    without = page([plan_of(timeline=Timeline(1.0, (Span("core", "matmul", 0.0, 1.0, "f"),)))])
    assert 'class="lane core"' in without
    assert 'class="lane ici"' not in without


def test_figures_are_told_and_times_are_called_estimates(page):
    words = Tags(page([plan_of()])).words
    assert "Memory Fits 9 GiB left: 22 GiB of 31 GiB" in words
    assert "Step time 4.00 s estimate, 3.50 to 4.60 s" in words
    assert "Tokens/s a chip 10,000 estimate, 80,000 of all chips" in words
    assert "MFU 41.2 % estimate, attention once a visible pair; 45.6 % in full" in words
    assert "0.075 USD estimate, 21.6 USD an hour by the price of 2026-09-17" in words
    assert "all-gather fsdp ICI at least 450 27 GiB 24 GiB 150 ms 93 %" in words
    for title in ("Timeline of a step", "Where the time goes"):
        assert f"{title} estimate" in words
    assert "Facts of the compiled program, as is the total: parameters, optimizer" in words
    assert "model.remat qkv<attention> full" in words
    assert "5 GiB of the host's memory" in words


def test_a_plan_that_does_not_fit_is_marked_with_its_excess_and_remedies(page):
    text = page([too_large()])
    words = Tags(text).words
    assert "Memory Does not fit by 10 GiB: 41 GiB of 31 GiB" in words
    assert 'class="tile lead bad"' in text
    over = re.search(r'class="over" style="([^"]*)"', text)
    assert over is not None
    assert percent(over[1], "left") == pytest.approx(100 * 31 / 41, abs=0.01)
    assert percent(over[1], "left") + percent(over[1], "width") == pytest.approx(100, abs=0.01)
    assert "all again --config.model.remat=full fits 9 B 5.00 s" in words
    assert "more chips --topology=v6e:4x4 does not fit 40 GiB –" in words
    assert "Timeline" not in words
    assert 'class="over"' not in page([plan_of()])


def test_a_plan_whose_host_or_evaluation_does_not_fit_says_so(page):
    memory = dataclasses.replace(memory_of(22 * GIB), host_limit=4 * GIB)
    text = page([plan_of(memory=memory)])
    words = Tags(text).words
    assert "Memory Does not fit the host by 1 GiB: 22 GiB of 31 GiB" in words
    assert 'class="over"' not in text, "the device has room"
    words = Tags(page([plan_of(evaluation_memory=50 * GIB)])).words
    assert "Memory Training fits evaluation does not: 22 GiB of 31 GiB" in words


@pytest.mark.parametrize(("used", "limit"), [(22, 31), (41, 31), (22, 0)])
def test_the_widths_of_the_memory_bar_add_up(page, used, limit):
    plan = plan_of(memory=memory_of(used * GIB, limit * GIB))
    bar = inside(page([plan]), '<div class="bar">', "</div>")
    kinds = [percent(style, "width") for style in re.findall(r'<i [^>]*style="([^"]*)"', bar)]
    whole = max(used, limit)
    assert kinds[0] == pytest.approx(100 * 4 / whole, abs=0.01)
    left = re.search(r'class="left" style="width:([\d.]+)%', bar)
    assert sum(kinds) + (float(left[1]) if left else 0) == pytest.approx(100, abs=0.01)


def test_texts_cannot_break_the_page(page):
    bad = '</script><script>alert("x")</script>'
    found = search_of(candidate(math.inf, 0, f"refused: {bad}"), candidate(2.0, 9, bad))
    span = Span("core", bad, 0.0, 1.0, bad, bad)
    settings = to_dict(RunConfig()) | {"model.path": bad, bad: bad}
    plan = plan_of(model=bad, settings=settings, notes=(bad,), timeline=Timeline(1.0, (span,)))
    tags = Tags(page([plan, too_large()], [found]))
    assert NAME in tags.text
    assert "script" not in {tag for tag, _ in tags.tags}
    assert tags.text.count(bad) >= 8


def test_loops_are_to_scale_and_one_run_of_each_is_drawn(page):
    text = page([plan_of()])
    whole = inside(text, 'aria-label="The whole step"', "</div></div></div></div>")
    core = inside(whole, 'class="lane core"', "</div>")
    loops = re.findall(r'class="loop" style="([^"]*)" title="([^"]*)"', core)
    assert [(percent(s, "left"), percent(s, "width")) for s, _ in loops] == [
        (6.25, 25.0),
        (31.25, 62.5),
    ]
    assert loops[0][1] == "×10 forward, 100 ms each\ncore: matmul 80 %, wait ici 20 %"
    assert loops[1][1].startswith("×5 forward, 500 ms each")
    heights = [float(h) for h in re.findall(r"height:([\d.]+)%", core)]
    assert heights == [80, 20, 80, 20]
    titles = re.findall(r'aria-label="(One of [^"]*)"', text)
    assert titles == [
        "One of 10 runs of the forward loop: 100 ms, 25 % of the step in all",
        "One of 5 runs of the forward loop: 500 ms, 62 % of the step in all",
        "One of 5 × 8 runs of the forward loop: 50.0 ms, 50 % of the step in all",
    ]


def test_what_runs_at_once_on_a_lane_gets_rows_of_its_own(page):
    text = page([plan_of()])
    run = inside(text, 'aria-label="One of 10 runs', 'class="axis"')
    assert run.count("copy-out") == run.count("copy-in") == 1
    host = inside(run, 'class="lane host"', "</div>")
    assert ("copy-out" in host) != ("copy-in" in host)
    waits = re.findall(r'class="k wait" style="left:80%;width:20%" title="([^"]*)"', run)
    assert waits == ["wait ici 20.0 ms\nall-gather.1"]


def test_a_body_that_runs_once_is_part_of_what_it_is_in(page):
    body = Timeline(1.0, (Span("core", "attention", 0.5, 0.5, "inner"),))
    step = Timeline(2.0, (Span("core", "matmul", 0.0, 1.0, "outer"),), (Loop(1.0, 1, body),))
    text = page([plan_of(timeline=step)])
    assert 'class="k k-attention" style="left:75%;width:25%"' in text
    assert 'class="loop"' not in text


def test_a_long_program_has_a_small_page_that_loses_no_time(page):
    rng, spans, now = random.Random(0), [], 0.0
    for i in range(20_000):
        seconds = rng.expovariate(1.0)
        kind = rng.choice(["matmul", "memory", "wait ici"])
        spans.append(Span("core", kind, now, seconds, f"fusion.{i}", "jit(step)/jvp()/dot" * 9))
        spans.append(Span("ici", "all-gather", now, 0.9 * seconds, f"gather.{i}"))
        now += seconds
    text = page([plan_of(timeline=Timeline(now, tuple(spans)))])
    assert len(text) < 400_000
    core = inside(text, 'class="lane core"', "</div>")
    widths = [percent(s, "width") for s in re.findall(r'style="([^"]*)"', core)]
    assert sum(widths) == pytest.approx(100, abs=1)


def test_several_plans_are_compared_first(page):
    text = page([plan_of(), too_large()])
    table = inside(text, "<h2>Comparison", "</section>")
    words = " ".join(re.sub("<[^>]*>", " ", table).split())
    assert "fits, 9 GiB left 22 GiB / 31 GiB 4.00 s 3.50 to 4.60 s 10,000 41.2 %" in words
    assert "does not fit, by 10 GiB 41 GiB / 31 GiB – – – –" in words
    assert "Comparison" not in page([plan_of()])


def test_the_mesh_says_what_lies_within_a_slice(page):
    plan = plan_of(topology=parse("2xv5e:16x16"), strategy="hsdp", mesh={"data": 4, "fsdp": 128})
    text = page([plan])
    words = Tags(text).words
    between = "data 4 : data centre network (dcn), 2 parts; 2 devices of each by links of the slice"
    assert between in words
    assert "fsdp 128 : links of the slice (ici)" in words
    assert text.count("· slice 0</title>") == text.count("· slice 1</title>") == 256
    gpus = plan_of(topology=parse("h100:16"), strategy="fsdp_tp", mesh={"fsdp": 2, "tensor": 8})
    words = Tags(page([gpus])).words
    assert "fsdp 2 : network between domains" in words
    assert "tensor 8 : NVLink" in words


def test_a_mesh_of_thousands_is_not_drawn_whole(page):
    text = page([plan_of(topology=parse("v5p:16x16x16"), mesh={"data": 1, "fsdp": 4096})])
    assert "The first 1,024 of 4,096 devices are drawn." in text
    assert len(text) < 300_000


def test_an_estimate_without_a_compiler_says_so_everywhere(page):
    gpus = plan_of(source="estimate", topology=parse("h100:16"), mesh={"fsdp": 16}, timeline=None)
    words = Tags(page([gpus])).words
    assert "All figures are estimates" in words
    assert "Facts" not in words
    assert "22 GiB of 31 GiB, an estimate" in words
    assert "Collectives estimate" in words


def test_an_evaluation_step_is_told(page):
    fits = plan_of(evaluation=STEP, evaluation_memory=3 * GIB)
    assert "4.00 s by estimate, 3.50 to 4.60 s; it takes 3 GiB" in Tags(page([fits])).words
    misses = plan_of(evaluation_memory=50 * GIB)
    assert "It would take 50 GiB on a device and does not fit" in Tags(page([misses])).words


def test_the_front_has_exactly_the_points_that_no_other_beats():
    rng = random.Random(1)
    for _ in range(200):
        points = [(rng.randrange(8), rng.randrange(8)) for _ in range(rng.randrange(12))]
        beaten = {
            i
            for i, (x, y) in enumerate(points)
            if any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
        }
        front = pareto(points)
        assert sorted(front) == sorted(set(range(len(points))) - beaten)
        assert [points[i] for i in front] == sorted(points[i] for i in front)


def test_a_search_is_ranked_and_drawn(page):
    small = plan_of(time=dataclasses.replace(STEP, seconds=5.0))
    found = search_of(
        candidate(4.0, 20, "compiled", plan_of()),
        candidate(5.0, 10, "compiled", small),
        candidate(6.0, 20, "compiled", plan_of()),
        candidate(3.9, 41, "does not fit", too_large()),
        candidate(4.5, 15, "estimated slower"),
        candidate(3.0, 40, "estimated not to fit"),
        candidate(math.inf, 0, "refused: 31 layers cannot be cut into 4 stages."),
    )
    text = page([], [found])
    words = Tags(text).words
    assert "The best: fsdp <4.0>, 4.00 s a step by estimate." in words
    assert "7 candidates were estimated in closed form and 4 compiled in 12.0 s" in words
    assert "1 31 layers cannot be cut into 4 stages." in words
    dots = re.findall(r'<circle class="([^"]*)"[^>]*><title>(\d+)\.', text)
    assert sorted((int(rank), name) for name, rank in dots) == [
        (1, "dot compiled"),
        (2, "dot compiled"),
        (3, "dot compiled"),
        (4, "dot compiled over"),
        (5, "dot estimated"),
        (6, "dot estimated over"),
    ]
    centres = {
        rank: (x, y) for x, y, rank in re.findall(r'cx="(.*?)" cy="(.*?)".*?<title>(\d+)', text)
    }
    line = re.search(r'class="front" d="M(.*?) (.*?)L(.*?) (.*?)"', text)
    assert line is not None
    assert [line.group(1, 2), line.group(3, 4)] == [centres["2"], centres["1"]]


def test_a_search_that_compiled_nothing_joins_estimates_that_fit(page):
    found = search_of(
        candidate(3.0, 40, "estimated not to fit"),
        candidate(4.0, 20, "estimated slower"),
        candidate(5.0, 10, "estimated slower"),
    )
    text = page([], [found])
    assert "None was compiled." in text
    assert inside(text, 'class="front"', "/>").count("L") == 1
    refused = search_of(candidate(math.inf, 0, "refused: nothing suits."))
    assert "nothing suits" in page([], [refused])
