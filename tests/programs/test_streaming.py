"""Streaming: the same tokens as in one go, nothing read twice, nothing compiled twice."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import jaxft
from jaxft.errors import ConfigError
from jaxft.hf.tokenizer import load_tokenizer
from jaxft.programs import engine
from jaxft.programs.engine import Engine
from jaxft.programs.generate import generate_tokens
from jaxft.programs.sampling import Sampling
from jaxft.programs.streaming import Session, text_pieces
from tests.tiny import Tiny, load_tiny
from tests.tiny_run import write_base

LONG = {"max_position_embeddings": 4096}
PROMPTS = [[1, 2, 3, 4, 5], [*range(60)], [3] * 64, [5, 9] * 40]


def session_of(tiny: Tiny) -> Session:
    return Session(tiny.architecture.config, tiny.abstract.graphdef, tiny.params)


def stream(session: Session, prompt, new: int = 13, stops=(), **sampling) -> list[int]:
    ids = session.generate(
        prompt, max_new_tokens=new, stop_ids=stops, sampling=Sampling(**sampling)
    )
    return [token for piece in ids for token in piece]


def at_once(tiny: Tiny, prompt, new: int = 13, stops=(), **sampling) -> list[int]:
    [ids] = generate_tokens(
        tiny.architecture.config,
        tiny.abstract.graphdef,
        tiny.params,
        [prompt],
        max_new_tokens=new,
        stop_ids=stops,
        sampling=Sampling(**sampling),
    )
    return ids


@pytest.mark.slow(seconds=4, but=r"gemma3_text_gqa")
@pytest.mark.parametrize(
    "case",
    [
        "gqa",
        "gemma3_text_gqa",
        "gpt2_tied",
        "mixtral_gqa_published",
        "gpt_oss_packed",
        "phi3_longrope_long",
    ],
)
def test_a_stream_gives_the_tokens_of_one_go(case):
    tiny = load_tiny(case)
    session = session_of(tiny)
    prompts = [p for p in PROMPTS if len(p) + 13 <= tiny.architecture.config.max_length]
    for prompt in prompts or [[1, 2]]:
        assert stream(session, prompt) == at_once(tiny, prompt)


@pytest.mark.slow(seconds=3)
@pytest.mark.parametrize(
    "sampling", [{"temperature": 1.5, "seed": 4}, {"temperature": 1, "top_k": 5}]
)
def test_a_stream_draws_what_one_go_draws(sampling):
    tiny = load_tiny("gqa")
    assert stream(session_of(tiny), PROMPTS[0], **sampling) == at_once(tiny, PROMPTS[0], **sampling)


@pytest.mark.parametrize("place", range(6))
def test_a_stop_token_ends_it_wherever_it_falls_among_the_pieces(place):
    tiny = load_tiny("gqa")
    whole = at_once(tiny, PROMPTS[0], temperature=1.5)
    session = session_of(tiny)
    found = stream(session, PROMPTS[0], stops={whole[place]}, temperature=1.5)
    assert found == whole[: whole.index(whole[place])]
    assert session.ended
    stream(session, PROMPTS[0], new=1)
    assert not session.ended


@pytest.mark.slow(seconds=6)
def test_turns_read_only_what_is_new_and_compile_nothing(monkeypatch):
    tiny = load_tiny("gqa", **LONG)
    session = session_of(tiny)
    text = list(PROMPTS[1])
    read = []
    real = Engine._read_part

    def spy(reader, rows, part):
        before = len(rows[0].held)
        real(reader, rows, part)
        if reader is session.engine:
            read.append(len(rows[0].held) - before)

    def compiled() -> tuple[int, int]:
        return engine.read_tokens._cache_size(), engine.decode_tokens._cache_size()

    monkeypatch.setattr(Engine, "_read_part", spy)
    text += stream(session, text, temperature=1.0)
    for turn in range(4):
        read.clear()
        text += [7 + turn, 8, 9]
        before = compiled()
        answer = stream(session, text, temperature=1.0, seed=turn)
        assert turn == 0 or compiled() == before  # the first one reads a smaller part
        assert answer == at_once(tiny, text, temperature=1.0, seed=turn)
        assert sum(read) == 3
        text += answer
    read.clear()
    changed = [*text[:20], 50, *text[21:]]
    assert stream(session, changed) == at_once(tiny, changed)
    assert sum(read) == len(changed) - 21  # and the last token is decoded


def test_a_stream_that_is_left_in_the_middle_does_no_harm():
    tiny = load_tiny("gqa", **LONG)
    session = session_of(tiny)
    pieces = session.generate(PROMPTS[0], max_new_tokens=50, stop_ids=())
    first = next(pieces)
    pieces.close()
    text = [*PROMPTS[0], *first, 3]
    assert stream(session, text) == at_once(tiny, text)


def test_an_interrupt_inside_a_program_only_costs_reading_again(monkeypatch):
    tiny = load_tiny("gqa", **LONG)
    session = session_of(tiny)
    stream(session, PROMPTS[0])
    with monkeypatch.context() as patch:
        patch.setattr(
            engine, "decode_tokens", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            stream(session, [*PROMPTS[0], 4])
    assert stream(session, [*PROMPTS[0], 4]) == at_once(tiny, [*PROMPTS[0], 4])


@pytest.mark.slow(seconds=5)
def test_the_cache_grows_up_to_the_context():
    tiny = load_tiny("gqa", max_position_embeddings=3000)
    session = session_of(tiny)
    assert session.engine.slots == 0
    stream(session, [1, 2], new=2)
    assert session.engine.slots == 1024
    long = [1, 2] * 600
    assert stream(session, long, new=3) == at_once(tiny, long, new=3)
    assert session.engine.slots == 1536
    stream(session, [1] * 2999, new=1)
    assert session.engine.slots == 3000
    with pytest.raises(ConfigError, match="3000 in all"):
        session.generate([1] * 2999, max_new_tokens=2, stop_ids=())


@pytest.mark.slow(seconds=4)
def test_a_text_that_outgrows_short_rotary_factors_is_read_anew():
    tiny = load_tiny("phi3_longrope_long")
    [kind] = tiny.architecture.config.kinds
    edge = kind.rope.scaling.original_length
    text = np.random.RandomState(0).randint(0, 60, edge + 1).tolist()
    for seed in range(3):
        session = session_of(tiny)
        for prompt in (text[: edge - 8], text, text[: edge - 8]):
            found = stream(session, prompt, new=8, temperature=2.0, seed=seed)
            assert found == at_once(tiny, prompt, new=8, temperature=2.0, seed=seed)


def pieces_of(tokenizer, text: str) -> list[str]:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = list(text_pieces(tokenizer, [[i] for i in ids]))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    return pieces


TEXTS = [
    "Grüße an 東京 und 😀👩‍👩‍👧 !",
    "don't stop , it 's fine .",
    "  two  spaces\n\nend ",
    "é" * 9,
]


@pytest.mark.slow(seconds=2, but=r"mistral|gpt2")
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["gpt2", "mistral-v3", "qwen3-hf", "bert-base-uncased"])
def test_pieces_join_to_the_whole_and_hold_no_half_characters(shared, name, text):
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    pieces = pieces_of(tokenizer, text)
    assert not any("\ufffd" in piece for piece in pieces)
    if name != "bert-base-uncased":
        assert len(pieces) > 2 or text == "é" * 9


@pytest.mark.parametrize("tidies", [False, True])
def test_bytes_that_never_make_a_character_come_at_the_end(tidies):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(alphabet))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=tidies
    )
    assert len(pieces_of(tokenizer, "a b 😀 c")) > 2
    ids = tokenizer("ab😀").input_ids[:-1]
    pieces = list(text_pieces(tokenizer, [[i] for i in ids]))
    assert "".join(pieces) == tokenizer.decode(ids) and "\ufffd" in pieces[-1]


@pytest.mark.slow(seconds=7)
def test_a_model_streams_what_it_generates(tmp_path):
    model = jaxft.load(write_base(tmp_path / "base"))
    messages = [{"role": "user", "content": "say abc"}]
    for prompt in (messages, "say abc"):
        pieces = list(model.stream(prompt, max_new_tokens=9, temperature=1.0, seed=2))
        text = model.generate(prompt, max_new_tokens=9, temperature=1.0, seed=2)
        assert "".join(pieces) == text
    padded = dataclasses.replace(model)
    assert "".join(padded.stream(messages, session=model.session(), max_new_tokens=4)) == (
        model.generate(messages, max_new_tokens=4)
    )
    with pytest.raises(ConfigError, match="context has"):
        model.stream("a", max_new_tokens=model.architecture.config.max_length)
    with pytest.raises(ConfigError, match="no tokens"):
        model.stream("")
    assert np.all(model.has_token[: len(model.tokenizer)])


@pytest.mark.slow(seconds=5)
def test_a_real_model_streams_sentencepiece_words_with_their_spaces(shared):
    model = jaxft.load(shared / "models/stories260K")
    prompt = "Once upon a time"
    pieces = list(model.stream(prompt, max_new_tokens=60))
    assert len(pieces) > 10
    assert "".join(pieces) == model.generate(prompt, max_new_tokens=60)
    assert pieces[0].startswith(", ") and any(piece.startswith(" ") for piece in pieces)
