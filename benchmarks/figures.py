"""
Series of measurements, and the ratio of two of them with its spread.

A ratio is the median of the rounds' own ratios: what disturbs a machine for some seconds meets both sides of a round.
(In 49 rounds of training steps, blocks of 6 spread by 0.06 that way and by 0.08 where medians are divided.) Where sides
were not measured in the same rounds, or are differences that may be zero, medians are divided. The spread is the 90%
interval under resampling of the rounds (bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Ratio", "Sample", "Series", "ratio_of"]

_RESAMPLES = 1000
_INTERVAL = (5.0, 95.0)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement, where the caller of `rounds` measures by itself: a value, and the CPU seconds it took."""

    value: float
    cpu_s: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """
    The values of one thing, a value per round; `cpu_s` beside them where it was measured.

    `a + b`, `a - b` and `a * 2` go round by round: use them for what was measured in the same rounds.
    """

    values: tuple[float, ...]
    cpu_s: tuple[float, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[float | Sample]) -> Series:
        """CPU seconds count only where all samples have them."""
        whole = [sample if isinstance(sample, Sample) else Sample(float(sample)) for sample in samples]
        cpu = tuple(sample.cpu_s for sample in whole if sample.cpu_s is not None)
        return cls(tuple(sample.value for sample in whole), cpu if len(cpu) == len(whole) else ())

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def low(self) -> float:
        """The lower quartile."""
        return float(np.percentile(self.values, 25))

    @property
    def high(self) -> float:
        """The upper quartile."""
        return float(np.percentile(self.values, 75))

    @property
    def cpu_median_s(self) -> float | None:
        return float(np.median(self.cpu_s)) if self.cpu_s else None

    def __add__(self, other: Series) -> Series:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: Series) -> Series:
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, factor: float) -> Series:
        return Series(tuple(value * factor for value in self.values), tuple(value * factor for value in self.cpu_s))

    def __truediv__(self, divisor: float) -> Series:
        return self * (1 / divisor)

    def _with(self, other: Series, combine: Callable[[float, float], float]) -> Series:
        values = tuple(combine(a, b) for a, b in zip(self.values, other.values, strict=True))
        both = bool(self.cpu_s) and bool(other.cpu_s)
        cpu = tuple(combine(a, b) for a, b in zip(self.cpu_s, other.cpu_s, strict=True)) if both else ()
        return Series(values, cpu)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio, and the interval that it lies in."""

    value: float
    low: float
    high: float


def ratio_of(above: Series, below: Series) -> Ratio:
    """The ratio of two series; seeded, so that the same figures give the same interval."""
    random = np.random.default_rng(0)
    a, b = np.asarray(above.values), np.asarray(below.values)
    of_a = random.integers(len(a), size=(_RESAMPLES, len(a)))
    of_b = of_a if len(a) == len(b) else random.integers(len(b), size=(_RESAMPLES, len(b)))
    if len(a) == len(b) and min(*a, *b) > 0:
        value, resampled = np.median(a / b), np.median((a / b)[of_a], axis=1)
    else:
        value = _divide(np.median(a), np.median(b))
        resampled = _divide(np.median(a[of_a], axis=1), np.median(b[of_b], axis=1))
    low, high = np.percentile(resampled, _INTERVAL)
    return Ratio(float(value), float(low), float(high))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.divide(a, b), nan=1.0, posinf=1e9, neginf=-1e9)
