"""Text as it arrives: stop strings over token borders, and scores of exactly what is shown."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.hf.tokenizer import load_tokenizer
from jaxft.programs.sampling import Scores
from jaxft.programs.texts import Piece
from jaxft.service.generator.text import Answer, Speller
from tests.tiny_run import write_base


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_base(tmp_path_factory.mktemp("home") / "base"))


def pieces_of(ids, size, ended="length"):
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        numbers = np.arange(start, start + len(part))
        likely = np.stack([numbers, numbers + 1], 1)
        scores = Scores(-numbers.astype(np.float32), likely % 30 + 5, -likely.astype(np.float32))
        yield Piece(1, part, ended if start + size >= len(ids) else "", scores)


@given(st.text("abc", min_size=1, max_size=30), st.lists(st.text("abc", min_size=1, max_size=4)))
def test_an_answer_ends_before_the_first_stop_string_whatever_the_pieces(tokenizer, text, stops):
    ids = tokenizer(text).input_ids
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    for size in (1, 2, 7):
        answer = Answer(tokenizer, stops=stops, speller=Speller(tokenizer), likely=1)
        shown, tokens, ended = "", [], ""
        for piece in pieces_of(ids, size):
            written = answer.add(piece)
            shown += written.text
            assert not any(stop in shown for stop in stops)
            tokens += [token for token, *_ in written.scores]
            assert len("".join(tokens)) == len(shown)
            if ended := written.ended:
                break
        assert text.startswith(shown)
        if not found:
            assert (shown, ended) == (text, "length")
        else:
            assert ended == "stop" and shown == text[: _first_end(text, stops)]


def _first_end(text, stops):
    """Returns where the stop string begins that is complete first."""
    return min((text.find(s) + len(s), text.find(s)) for s in stops if s in text)[1]
