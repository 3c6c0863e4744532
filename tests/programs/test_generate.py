"""Generation: the cache against full forward passes, rows against each other, sampling."""

import functools

import jax
import numpy as np
import pytest

from jaxft.errors import ConfigError
from jaxft.programs.generate import generate_tokens
from jaxft.programs.sampling import Sampling
from tests.tiny import load_tiny

NEW = 12
SHAPES = {
    "gqa": [[3], [1, 2, 3, 4, 5], [*range(60)], [7, 7]],
    "llama3_rope_tied_published": [[*range(1, 64), 5, 4, 3], [9, 8], [1] * 64],
    "head_dim_6": [[50, 1], [2, 4, 6, 8, 10, 12], [0]],
}


@functools.cache
def tiny_of(case: str):
    return load_tiny(case)


def generate(case: str, prompts, *, stop_ids=(), new: int = NEW, **sampling) -> list[list[int]]:
    tiny = tiny_of(case)
    return generate_tokens(
        tiny.architecture.config,
        tiny.abstract.graphdef,
        tiny.params,
        prompts,
        max_new_tokens=new,
        stop_ids=stop_ids,
        sampling=Sampling(**sampling) if sampling else None,
    )


@pytest.mark.slow(seconds=3, but=r"^gqa$")
@pytest.mark.parametrize("case", SHAPES)
def test_decoding_with_a_cache_equals_full_forward_passes(case):
    prompts = SHAPES[case]
    tiny = tiny_of(case)
    forward = jax.jit(lambda params, tokens: tiny.merge(params)(tokens))
    width = max(map(len, prompts)) + NEW
    rows = [list(prompt) for prompt in prompts]
    for _ in range(NEW):
        padded = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
        logits = forward(tiny.params, padded)
        for number, row in enumerate(rows):
            row.append(int(np.argmax(logits[number, len(row) - 1])))
    expected = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    assert generate(case, prompts) == expected


@pytest.mark.slow(seconds=2)
def test_a_prompt_is_continued_alike_alone_and_beside_others():
    prompts = SHAPES["gqa"]
    together = generate("gqa", prompts)
    assert [generate("gqa", [prompt])[0] for prompt in prompts] == together


@pytest.mark.slow(seconds=2)
def test_a_row_ends_before_its_stop_token_and_the_others_go_on():
    prompts = SHAPES["gqa"]
    whole = generate("gqa", prompts)
    stop = next(token for token in whole[1][3:] if token not in whole[2])
    stopped = generate("gqa", prompts, stop_ids={stop})
    for row, ids in zip(stopped, whole, strict=True):
        assert row == (ids[: ids.index(stop)] if stop in ids else ids)
    assert len(stopped[1]) < NEW == len(stopped[2])
    first = {ids[0] for ids in whole}
    assert generate("gqa", prompts, stop_ids=first) == [[]] * len(prompts)


@pytest.mark.slow(seconds=2)
def test_one_new_token_is_the_first_of_many():
    prompts = SHAPES["gqa"]
    assert generate("gqa", prompts, new=1) == [ids[:1] for ids in generate("gqa", prompts)]


@pytest.mark.slow(seconds=3)
def test_a_seed_fixes_the_text_of_each_row_whatever_the_others_hold():
    prompts = SHAPES["gqa"]
    text = generate("gqa", prompts, temperature=1.0, seed=5)
    assert generate("gqa", prompts, temperature=1.0, seed=5) == text
    assert generate("gqa", prompts, temperature=1.0, seed=6) != text
    assert text != generate("gqa", prompts)
    other = generate("gqa", [[11, 12], *prompts[1:-1], [13]], temperature=1.0, seed=5)
    assert other[1:-1] == text[1:-1]
    same = generate("gqa", [prompts[0]] * len(prompts), temperature=1.0, seed=5)
    assert len(set(map(tuple, same))) > 1


@pytest.mark.parametrize("sampling", [{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_without_freedom_is_greedy(sampling):
    prompts = SHAPES["gqa"]
    sampling = {"temperature": 1.0, "seed": 3} | sampling
    assert generate("gqa", prompts, **sampling) == generate("gqa", prompts)


def test_sampling_out_of_range_is_refused_with_every_problem():
    with pytest.raises(ConfigError) as error:
        Sampling(temperature=-1.0, top_k=-1, top_p=0.0)
    assert len(error.value.problems) == 3
    with pytest.raises(ConfigError, match="max_new_tokens is 0; expected at least 1"):
        generate("gqa", [[1]], new=0)
