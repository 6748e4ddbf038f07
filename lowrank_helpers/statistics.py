"""What several runs say: Student's t intervals of a mean and of one more value, and relative differences in pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit  # not scipy.stats, whose import takes seconds

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean of ``n`` independent values and the limits of its interval, in their unit."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: npt.ArrayLike, confidence: float = CONFIDENCE, *, of_one_more: bool = False) -> Interval:
    """Return the mean of independent values with its interval (Student's t); of one value the limits are infinite.

    Parameters
    ----------
    values : array of shape (n,)
        Of normal distribution.
    confidence : float
        How often such an interval holds what it is for.
    of_one_more : bool
        Whether the interval is for one more value, mean ± t·s·√(1 + 1/n), and not for the true mean, mean ± t·s·√(1/n)
        (Hahn & Meeker 1991, *Statistical Intervals*, section 4.8).

    Raises
    ------
    ValueError
        There is no value, or one is not finite.

    Examples
    --------
    >>> interval([97.0, 98.0, 99.0])
    Interval(mean=98.0, low=95.51..., high=100.48..., n=3)
    >>> interval([97.0, 98.0, 99.0], of_one_more=True)
    Interval(mean=98.0, low=93.03..., high=102.96..., n=3)
    """
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"values {values!r} must be a row of at least one finite number")
    n, mean = array.size, float(array.mean())
    if n == 1:
        return Interval(mean, -np.inf, np.inf, n)
    t = stdtrit(n - 1, (1 + confidence) / 2)
    half_width = float(t * array.std(ddof=1) * np.sqrt(of_one_more + 1 / n))
    return Interval(mean, mean - half_width, mean + half_width, n)


@dataclass(frozen=True)
class RelativeDifference(Interval):
    """How much larger one of two quantities is on average, as a share of the mean of both, and what it amounts to.

    ``verdict`` is ``larger``, ``smaller``, ``alike`` or ``not settled``.
    """

    verdict: str

    def __str__(self) -> str:
        return f"{self.mean:+.1%} ({self.low:+.1%} to {self.high:+.1%})".replace("%", " %").replace("-", "−")


def relative_difference(
    first: Sequence[float | None], second: Sequence[float | None], *, margin: float
) -> RelativeDifference:
    """Compare two quantities over the same runs, by the 95 % interval of their mean paired difference.

    The difference is ``larger`` where the interval lies above ``margin``, ``smaller`` where it lies below ``-margin``,
    ``alike`` where it lies between the two, and ``not settled`` otherwise, as with one run.

    Parameters
    ----------
    first, second : sequence of float or None
        One value a run, in the same order; runs without a value in both are left out.
    margin : float
        The least difference that matters, as a share of the mean of both quantities.

    Raises
    ------
    ValueError
        The runs differ in number, or none has both values.

    Examples
    --------
    >>> relative_difference([150, 149, 151], [100, 99, 101], margin=0.1).verdict
    'larger'
    >>> relative_difference([150, 90, 110], [100, 99, 101], margin=0.1).verdict
    'not settled'
    """
    both = [pair for pair in zip(first, second, strict=True) if None not in pair]
    pairs = np.array(both, dtype=float).reshape(-1, 2)
    scale = np.abs(pairs).mean() if len(pairs) else 0.0
    found = interval((pairs[:, 0] - pairs[:, 1]) / (scale or 1))
    if found.low > margin:
        verdict = "larger"
    elif found.high < -margin:
        verdict = "smaller"
    else:
        verdict = "alike" if -margin <= found.low and found.high <= margin else "not settled"
    return RelativeDifference(found.mean, found.low, found.high, found.n, verdict)
