"""95 % intervals: of a proportion, of a ratio of sums, and of a paired difference of ratios."""

from dataclasses import dataclass

import numpy as np

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval, and the number of rows or answers it rests on."""

    value: float
    low: float
    high: float
    count: int


def proportion(successes: int, count: int) -> Estimate:
    """Share of successes with Wilson's score interval (JASA 22, 1927)."""
    if count == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    share = successes / count
    spread = _Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * np.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return Estimate(share, max(0.0, float(centre - half)), min(1.0, float(centre + half)), count)


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """Ratio of sums over rows, with a bootstrap interval over rows (percentile, seeded)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = numerators.sum() / denominators.sum()
        resampled = _resampled_ratio(numerators, denominators)
    return _estimate(value, resampled, len(numerators))


def paired_difference(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
) -> Estimate:
    """Ratio of `b` minus ratio of `a`, over the same rows, resampled together.

    Args:
      a: Numerators and denominators, `[rows]` each.
      b: The same for the other model, rows in the same order.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = b[0].sum() / b[1].sum() - a[0].sum() / a[1].sum()
        resampled = _resampled_ratio(*b) - _resampled_ratio(*a)
    return _estimate(value, resampled, len(a[0]))


def _resampled_ratio(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Ratios of bootstrap samples, `[resamples]`; equal draws for equal lengths."""
    generator = np.random.default_rng(0)
    values = np.stack([numerators, denominators], axis=1).astype(np.float64)
    rows = len(values)
    # One draw at a time: memory stays at one row of indices however many rows there are.
    sums = [values[generator.integers(0, rows, rows)].sum(axis=0) for _ in range(_RESAMPLES)]
    totals = np.array(sums)
    return totals[:, 0] / totals[:, 1]


def _estimate(value: float, resampled: np.ndarray, count: int) -> Estimate:
    # A resample without any trained token has no ratio, and one row says nothing of its spread.
    finite = resampled[np.isfinite(resampled)]
    known = count > 1 and len(finite) > 0
    low, high = np.quantile(finite, (0.025, 0.975)) if known else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high), count)
