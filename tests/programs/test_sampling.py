"""The choice of tokens against the definitions of top-k and top-p, and rows against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.programs import sampling
from jaxft.programs.sampling import Draws, choose_tokens, rank


def draws_of(count: int, *, temperature=1.0, top_k=0, top_p=1.0, seed=0) -> Draws:
    return Draws(
        np.full(count, seed, np.uint32),
        np.arange(count, dtype=np.uint32),
        np.full(count, temperature, np.float32),
        np.full(count, top_k, np.int32),
        np.full(count, top_p, np.float32),
    )


def kept_probabilities(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The distribution that sampling draws from, a token at a time."""
    order = np.argsort(-logits)
    if top_k:
        order = order[:top_k]
    weights = np.exp(logits[order] - logits.max())
    weights /= weights.sum()
    kept, reached = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if reached >= top_p:
            break
        kept.append(token)
        reached += weight
    out = np.zeros_like(logits)
    out[kept] = np.exp(logits[kept] - logits.max())
    return out / out.sum()


FILTERS = [(0, 0.7), (3, 1.0), (5, 0.6), (0, 0.05), (100, 0.999), (1, 1.0), (0, 0.999)]


@pytest.mark.parametrize("candidates", [4, 20])
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_what_is_ranked_is_what_top_k_and_top_p_keep_or_is_known_to_lack_some(
    top_k, top_p, candidates
):
    logits = (2 * np.random.RandomState(0).randn(6, 20)).astype(np.float32)
    ranked = rank(draws_of(6, top_k=min(top_k, 20), top_p=top_p), jnp.asarray(logits), candidates)
    weights, complete = np.asarray(ranked.weights), np.asarray(ranked.complete)
    assert candidates < 20 or complete.all()
    for row in range(6):
        expected = kept_probabilities(logits[row], top_k, top_p)
        # The share of k tokens is known once all k are.
        needed = min(top_k, 20) or np.count_nonzero(expected)
        assert complete[row] == (needed <= candidates)
        if complete[row]:
            found = np.zeros(20)
            found[ranked.ids[row]] = weights[row] / weights[row].sum()
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_equally_likely_tokens_are_kept_in_the_order_of_their_ids():
    ranked = rank(draws_of(1, top_k=2), jnp.zeros((1, 9)), 4)
    assert ranked.ids[0, :2].tolist() == [0, 1] and ranked.weights[0].tolist() == [1, 1, 0, 0]


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("candidates", [256, 3])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), *FILTERS])
def test_draws_have_the_distribution_of_the_filtered_logits(monkeypatch, top_k, top_p, candidates):
    """Every row draws on its own; five standard deviations of a binomial count."""
    monkeypatch.setattr(sampling, "_CANDIDATES", candidates)
    count, temperature, vocab = 4000, 2.0, 600
    logits = (3 * np.random.RandomState(1).randn(vocab)).astype(np.float32)
    draws = draws_of(count, temperature=temperature, top_k=top_k, top_p=top_p, seed=7)
    has_token = np.arange(vocab) % 7 > 0
    tokens = jax.jit(choose_tokens)(
        draws, jnp.broadcast_to(logits, (count, vocab)), np.zeros(count, np.int32), has_token
    )
    allowed = np.where(has_token, logits.astype(np.float64), -np.inf)
    expected = kept_probabilities(allowed / temperature, top_k, top_p)
    counts = np.bincount(tokens, minlength=vocab)
    deviation = np.sqrt(count * expected * (1 - expected))
    assert np.all(np.abs(counts - count * expected) <= 5 * deviation + 1e-9)


def test_each_row_chooses_as_it_does_alone_whatever_the_others_ask_for(monkeypatch):
    monkeypatch.setattr(sampling, "_CANDIDATES", 8)
    rows = [
        (0.0, 0, 1.0),
        (1.0, 0, 1.0),
        (1.0, 3, 1.0),
        (0.7, 0, 0.9),
        (2.0, 0, 0.99),
        (1.0, 30, 1),
    ]
    logits = np.random.RandomState(2).randn(len(rows), 700).astype(np.float32)
    temperature, top_k, top_p = (np.asarray(x) for x in zip(*rows, strict=True))
    draws = draws_of(len(rows))._replace(
        temperature=temperature.astype(np.float32),
        top_k=top_k.astype(np.int32),
        top_p=top_p.astype(np.float32),
    )
    choose = jax.jit(choose_tokens)
    for step in range(4):
        steps = np.full(len(rows), step, np.int32)
        together = choose(draws, logits, steps)
        alone = [
            int(choose(Draws(*(x[i : i + 1] for x in draws)), logits[i : i + 1], steps[:1])[0])
            for i in range(len(rows))
        ]
        assert together.tolist() == alone
        assert together[0] == logits[0].argmax()


def test_a_token_without_probability_is_never_drawn():
    """Not even by the largest number below 1, where rounding of sums may lead beyond the last."""
    weights = np.zeros((3, 600), np.float32)
    weights[0, :3], weights[1, 300], weights[2, [5, 400]] = 0.1, 1e-30, 1.0
    almost = jnp.full(3, np.nextafter(np.float32(1), np.float32(0)))
    assert sampling._invert_in_blocks(jnp.asarray(weights), almost).tolist() == [2, 300, 400]
    assert sampling._invert_in_blocks(jnp.asarray(weights), jnp.zeros(3)).tolist() == [0, 300, 5]
