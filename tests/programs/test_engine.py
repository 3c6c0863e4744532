"""Continuous batching: texts that begin and end at different times, each as if it were alone."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.models.config import Numerics
from jaxft.models.families import architecture_from_hf
from jaxft.models.module import init_params
from jaxft.programs import engine as module
from jaxft.programs.engine import Engine
from jaxft.programs.generate import generate_tokens
from jaxft.programs.sampling import Sampling
from jaxft.programs.texts import Request
from jaxft.training.program import make_placement
from tests.oracle.cases import CASES
from tests.tiny import Tiny, load_tiny

LONG = {"max_position_embeddings": 4096}


def engine_of(tiny: Tiny, rows: int, slots: int = 0) -> Engine:
    config = tiny.architecture.config
    return Engine(config, tiny.abstract.graphdef, tiny.params, rows=rows, slots=slots)


def alone(tiny: Tiny, request: Request) -> list[int]:
    engine = engine_of(tiny, 1, 192)
    ticket = engine.submit(request)
    return run(engine)[ticket][0]


def run(engine: Engine, most: int = module.BLOCK) -> dict[int, tuple[list[int], str]]:
    found: dict[int, tuple[list[int], str]] = {}
    while not engine.idle:
        for piece in engine.step(most):
            tokens, ended = found.get(piece.ticket, ([], ""))
            assert not ended
            found[piece.ticket] = (tokens + piece.tokens, piece.ended)
    return found


def requests_of(vocab: int) -> list[Request]:
    """Prompts and answers of all lengths, each with its own way to choose tokens."""
    random = np.random.RandomState(0)
    ways = [
        Sampling(),
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=1.5, top_k=5, seed=4),
        Sampling(temperature=1.0, top_p=0.8, seed=2**40 + 1),
    ]
    lengths = [(1, 9), (40, 3), (2, 1), (33, 20), (17, 5), (63, 12), (5, 50), (1, 1), (90, 7)]
    return [
        Request(random.randint(0, vocab, n).tolist(), new, (7, 8, 9), ways[i % 4], number=i)
        for i, (n, new) in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    ("case", "most"),
    [
        ("gqa", 3),
        pytest.param("gqa", module.BLOCK, marks=pytest.mark.slow(seconds=4)),
        pytest.param("gpt_oss_packed", 7, marks=pytest.mark.slow(seconds=10)),
    ],
)
def test_texts_that_take_turns_in_few_rows_are_what_they_are_alone(case, most):
    tiny = load_tiny(case, **LONG)
    requests = requests_of(tiny.architecture.config.vocab)
    engine = engine_of(tiny, rows=4, slots=192)
    tickets = [engine.submit(request) for request in requests[:6]]
    engine.step(most)
    tickets += [engine.submit(request) for request in requests[6:]]
    # What the first step gave is missing in `found`, so all of it is asked for again.
    whole = engine_of(tiny, rows=4, slots=192)
    for request in requests:
        whole.submit(request)
    found, together = run(engine, most), run(whole, most)
    for ticket, request in zip(tickets, requests, strict=True):
        expected = alone(tiny, request)
        tokens, ended = together[ticket]
        assert tokens == expected
        assert ended == ("length" if len(expected) == request.max_new_tokens else "stop")
        later = found.get(ticket, ([], ""))[0]
        assert expected[len(expected) - len(later) :] == later


def test_a_row_is_taken_by_the_next_text_as_soon_as_it_ends():
    tiny = load_tiny("gqa", **LONG)
    engine = engine_of(tiny, rows=2)
    for new in (2, 30, 4, 1):
        engine.submit(Request([1, 2, 3], new))
    steps = [{p.ticket: (len(p.tokens), p.ended) for p in engine.step()} for _ in range(4)]
    assert steps == [
        {1: (2, "length"), 2: (2, "")},
        {3: (4, "length"), 2: (4, "")},
        {4: (1, "length"), 2: (24, "length")},
        {},
    ]
    assert engine.idle and engine.step() == []


def test_a_step_decodes_no_more_than_it_is_asked_to():
    engine = engine_of(load_tiny("gqa", **LONG), rows=2)
    engine.submit(Request([1], 70))
    sizes = [len(engine.step(most)[0].tokens) for most in (1, 4, 1000)]
    assert sizes == [1, 4, module.BLOCK]


@pytest.mark.slow(seconds=2)
def test_a_long_prompt_that_is_read_in_parts_keeps_nobody_waiting():
    tiny = load_tiny("gqa", **LONG)
    engine = engine_of(tiny, rows=2, slots=768)
    first, long = Request([1, 2, 3], 40), Request([5, 6] * 300, 3)
    engine.submit(first)
    engine.step(4, parts=1)
    engine.submit(long)
    found: dict[int, list[int]] = {}
    steps = []
    while not engine.idle:
        pieces = engine.step(4, parts=1)
        steps.append([piece.ticket for piece in pieces])
        for piece in pieces:
            found.setdefault(piece.ticket, []).extend(piece.tokens)
    # 599 tokens are parts of 256, 256, 64, 16 and 7.
    assert steps[:5] == [*[[1]] * 4, [1, 2]]
    at_once = engine_of(tiny, rows=2, slots=768)
    at_once.submit(long)
    assert run(at_once)[1][0] == found[2]


def test_a_cancelled_text_gives_nothing_more_and_the_others_go_on():
    tiny = load_tiny("gqa", **LONG)
    engine = engine_of(tiny, rows=2)
    request = Request([1, 2, 3], 40)
    first, second, third = (engine.submit(request) for _ in range(3))
    engine.step(4)
    engine.cancel(first)
    engine.cancel(third)
    engine.cancel(99)
    assert {ticket: len(tokens) for ticket, (tokens, _) in run(engine).items()} == {second: 36}


def test_what_a_row_holds_of_a_prompt_is_not_read_again(monkeypatch):
    tiny = load_tiny("gqa", **LONG)
    engine = engine_of(tiny, rows=3)
    read: list[tuple[int, int]] = []
    real = Engine._read_part

    def spy(engine, rows, part):
        real(engine, rows, part)
        read.append((len(rows), part))

    monkeypatch.setattr(Engine, "_read_part", spy)
    system = list(range(50))
    for last in (51, 52, 53):
        engine.submit(Request([*system, last, 4], 2))
    run(engine)
    assert read == [(1, 64)] * 3  # 51 tokens each, and three rows are no group
    read.clear()
    request = Request([*system, 53, 4, *range(17)], 3)
    engine.submit(request)
    [(tokens, _)] = run(engine).values()
    assert read == [(1, 16)]
    assert tokens == alone(tiny, request)


@pytest.mark.slow(seconds=3)
def test_a_cache_that_grows_or_shrinks_keeps_what_is_being_written(monkeypatch):
    monkeypatch.setattr(module, "_CALM", 3)
    monkeypatch.setattr(module, "_MUCH", 2)
    tiny = load_tiny("gqa", **LONG)
    engine = engine_of(tiny, rows=2)
    short, long = Request([1, 2, 3], 60), Request([5] * 100, 8)
    engine.submit(short)
    first = engine.step(5)[0].tokens
    assert engine.slots == 64
    engine.submit(long)
    found = run(engine)
    assert engine.slots == 128
    assert first + found[1][0] == alone(tiny, short)
    assert found[2][0] == alone(tiny, long)
    engine.submit(short)
    again = run(engine, 4)[3][0]
    assert engine.slots == 64 and again == first + found[1][0]


def test_an_interrupt_costs_no_token_of_any_row(monkeypatch):
    tiny = load_tiny("gqa", **LONG)
    engine = engine_of(tiny, rows=2)
    requests = [Request([1, 2, 3], 12, (), Sampling(temperature=1.0)), Request([4] * 20, 9)]
    for request in requests:
        engine.submit(request)
    first = {piece.ticket: piece.tokens for piece in engine.step(4)}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            module, "decode_tokens", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        engine.step(4)
    found = run(engine)
    for ticket, request in enumerate(requests, start=1):
        assert first[ticket] + found[ticket][0] == alone(tiny, request)


@pytest.mark.slow(seconds=5)
def test_there_are_as_many_rows_as_texts_ask_for_and_each_goes_on(monkeypatch):
    monkeypatch.setattr(module, "_CALM", 2)
    tiny = load_tiny("gqa", **LONG)
    config, graphdef = tiny.architecture.config, tiny.abstract.graphdef
    engine = Engine(config, graphdef, tiny.params, rows=16, elastic=True, slots=96)
    requests = [dataclasses.replace(r, max_new_tokens=12) for r in requests_of(config.vocab)[:6]]
    tickets, found, sizes = [], {}, []

    def step(most):
        for piece in engine.step(most):
            found.setdefault(piece.ticket, []).extend(piece.tokens)
        sizes.append(len(engine._rows))

    for count in (1, 2, 3):  # and so 1, 3 and 6 texts
        for request in requests[len(tickets) : len(tickets) + count]:
            tickets.append(engine.submit(request))
        step(2)
    for ticket in tickets[1:]:
        engine.cancel(ticket)
    step(1)
    step(1)
    tickets.append(engine.submit(requests[1]))
    while not engine.idle:
        step(8)
    assert sizes[:6] == [1, 4, 16, 16, 1, 4]
    assert found[tickets[0]] == alone(tiny, requests[0])
    assert found[tickets[-1]] == alone(tiny, requests[1])
    for ticket, request in zip(tickets[1:6], requests[1:], strict=True):
        assert found[ticket] == alone(tiny, request)[: len(found[ticket])]


@pytest.mark.slow(seconds=3)
def test_few_programs_are_compiled_whatever_the_lengths():
    tiny = load_tiny("head_dim_6", **LONG)
    before = module.read_tokens._cache_size(), module.decode_tokens._cache_size()
    for length in (1, 2, 16, 17, 18, 31, 39, 50, 60, 63, 70, 100, 150):
        run_one = engine_of(tiny, rows=1, slots=192)
        run_one.submit(Request([1] * length, 3))
        run(run_one)
    read, decoded = module.read_tokens._cache_size(), module.decode_tokens._cache_size()
    assert (read - before[0], decoded - before[1]) == (2, 1)


def test_more_prompts_than_rows_are_continued_in_their_order():
    tiny = load_tiny("gqa", **LONG)
    prompts = [[1 + i % 50, i % 7] for i in range(70)]
    args = (tiny.architecture.config, tiny.abstract.graphdef, tiny.params)
    found = generate_tokens(*args, prompts, max_new_tokens=3, stop_ids=())
    assert len(found) == 70
    for i in (0, 33, 69):
        assert found[i] == alone(tiny, Request(prompts[i], 3))


def test_what_does_not_fit_the_context_is_refused():
    engine = engine_of(load_tiny("gqa"), rows=1)
    limit = engine.config.max_length
    for prompt, new in ([], 1), ([1], 0), ([1] * limit, 1):
        with pytest.raises(ConfigError, match=f"at least one of each, and {limit} in all"):
            engine.submit(Request(prompt, new))
    assert engine.idle


def on_devices(tiny: Tiny, strategy: str, count: int) -> Tiny:
    config = RunConfig()
    config.strategy = strategy
    placement = make_placement(config, jax.devices()[:count])
    shardings = placement.shardings(tiny.abstract.params, tiny.abstract.axes)
    return dataclasses.replace(tiny, params=jax.device_put(tiny.params, shardings))


@pytest.mark.slow(seconds=6)
@pytest.mark.parametrize("strategy", ["fsdp", "tp"])
def test_parameters_on_several_devices_give_what_one_device_gives(strategy):
    tiny = load_tiny("gqa", **LONG)
    engine = engine_of(on_devices(tiny, strategy, 2), rows=2, slots=128)
    requests = requests_of(tiny.architecture.config.vocab)[:5]
    tickets = [engine.submit(request) for request in requests]
    found = run(engine)
    for ticket, request in zip(tickets, requests, strict=True):
        assert found[ticket][0] == alone(tiny, request)
    cache = engine._cache
    assert cache is not None
    assert cache.layers[0][0].sharding.is_fully_replicated == (strategy == "fsdp")


@pytest.mark.slow(seconds=10)
def test_layers_whose_heads_cannot_be_split_have_theirs_on_every_device():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 4}
    architecture = architecture_from_hf(CASES["qwen3_5_gqa"] | heads)
    params = init_params(architecture.build(Numerics()), seed=0)
    tiny = Tiny(architecture, architecture.abstract(Numerics()), params)
    engine = engine_of(on_devices(tiny, "tp", 4), rows=2, slots=16)
    request = Request([5, 9, 3, 7], 3)
    ticket = engine.submit(request)
    assert run(engine)[ticket][0] == alone(tiny, request)
    assert engine._cache is not None
    recurrent, attending, *_ = engine._cache.layers
    # Four heads of keys and of values under the rule, and two of attention's.
    assert not recurrent.state.sharding.is_fully_replicated
    assert attending.k.sharding.is_fully_replicated


@pytest.mark.slow(seconds=5)
def test_latents_are_on_every_device_and_are_read_by_the_heads_of_each():
    tiny = load_tiny("deepseek_v3_published")
    engine = engine_of(on_devices(tiny, "tp", 2), rows=2, slots=16)
    request = Request([5, 9, 3, 7], 3)
    ticket = engine.submit(request)
    assert run(engine)[ticket][0] == alone(tiny, request)
    assert engine._cache is not None
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(engine._cache))
