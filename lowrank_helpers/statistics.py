"""What several seeds say: intervals, and the one rule by which the series calls two things different or the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds with the limits of its interval, in the unit of the values."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the interval's length."""
        return (self.high - self.low) / 2

    def __format__(self, spec: str) -> str:
        """Write ``mean ± half_width`` with the given format; of one seed the mean alone."""
        mean = format(self.mean, spec)
        if not set(mean) & set("123456789"):
            mean = mean.lstrip("-")  # of zero
        return mean if self.n == 1 else f"{mean} ± {format(self.half_width, spec)}"

    def __str__(self) -> str:
        return format(self, ".2f")


@dataclass(frozen=True)
class Comparison:
    """A paired difference over seeds, and what it amounts to.

    Attributes
    ----------
    difference : Interval
        Of the first less the second.
    margin : float
        The smallest difference that matters, in the unit of the values.
    verdict : str
        ``larger``, ``smaller``, ``the same within <margin>`` or ``undecided``.
    """

    difference: Interval
    margin: float
    verdict: str


def interval(values: npt.ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of independent values with Student's t interval; of one value the limits are infinite.

    Parameters
    ----------
    values : array of shape (n,)
        One a seed.
    confidence : float
        How often such an interval holds the true mean, for normal values.

    Raises
    ------
    ValueError
        There is no value, one is not finite, or the confidence is not between 0 and 1.

    Examples
    --------
    >>> print(interval([97.0, 98.0, 99.0]))
    98.00 ± 2.48
    """
    return _around_mean(values, confidence, lambda n: 1 / n)


def prediction_interval(values: npt.ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Return the interval in which one more value falls with the given confidence: mean ± t·s·√(1 + 1/n).

    For normal values, as :func:`interval` otherwise (Hahn & Meeker 1991, *Statistical Intervals*, section 4.8).

    Examples
    --------
    >>> print(prediction_interval([97.0, 98.0, 99.0]))
    98.00 ± 4.97
    """
    return _around_mean(values, confidence, lambda n: 1 + 1 / n)


def _around_mean(values: npt.ArrayLike, confidence: float, variance_factor: Callable[[int], float]) -> Interval:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"values {values!r} must be a row of at least one finite number")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} must be between 0 and 1")
    n, mean = array.size, float(array.mean())
    if n == 1:
        return Interval(mean, -np.inf, np.inf, n)
    t = stats.t.ppf((1 + confidence) / 2, n - 1)
    half_width = float(t * array.std(ddof=1) * np.sqrt(variance_factor(n)))
    return Interval(mean, mean - half_width, mean + half_width, n)


def compare(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    margin: float,
    n_comparisons: int = 1,
    confidence: float = CONFIDENCE,
) -> Comparison:
    """Say whether the first is larger than the second, from the same seeds of both.

    The interval of the mean paired difference (Student's t) decides. It is ``larger`` where the interval lies above
    ``margin``, ``smaller`` where it lies below ``-margin``, ``the same within <margin>`` where it lies between the two,
    and ``undecided`` otherwise, as with one seed. So neither a difference that is too small to matter is called one,
    nor a noisy one.

    Parameters
    ----------
    first, second : array of shape (n,)
        A value a seed, in the same order; ``second`` may be one number, to compare with.
    margin : float
        The smallest difference that matters, at least 0, in the unit of the values.
    n_comparisons : int
        How many comparisons the same statement rests on: the level is divided among them (Bonferroni).
    confidence : float
        Of the statement as a whole.

    Raises
    ------
    ValueError
        The seeds differ in number, or the margin is negative.

    Examples
    --------
    >>> compare([98.0, 98.4, 98.2], [96.9, 97.5, 97.1], margin=0.5).verdict
    'larger'
    >>> compare([98.0, 98.4, 98.2], [96.9, 98.5, 97.1], margin=0.5).verdict
    'undecided'
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if second.ndim and first.shape != second.shape:
        raise ValueError(f"{first.size} and {second.size} values: both must come from the same seeds")
    if margin < 0:
        raise ValueError(f"margin {margin} must be at least 0")
    difference = interval(first - second, 1 - (1 - confidence) / n_comparisons)
    return Comparison(difference, margin, _verdict(difference, margin))


def _verdict(difference: Interval, margin: float) -> str:
    if difference.low > margin:
        return "larger"
    if difference.high < -margin:
        return "smaller"
    if -margin <= difference.low and difference.high <= margin:
        return f"the same within {margin:g}"
    return "undecided"


def shared_verdict(comparisons: Sequence[Comparison]) -> str:
    """Return the verdict on which all comparisons agree, or ``undecided`` where they do not.

    Examples
    --------
    >>> shared_verdict([compare([1, 2, 3], 0, margin=0), compare([3, 3, 4], 0, margin=0)])
    'undecided'
    """
    verdicts = {comparison.verdict for comparison in comparisons}
    return verdicts.pop() if len(verdicts) == 1 else "undecided"
