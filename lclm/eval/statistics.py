"""Means, paired differences and ratios of means, with 95% bootstrap confidence intervals over samples."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


class Bootstrap:
    """Intervals by resampling samples with replacement, the same resamples for every figure.

    `count` is the number of samples. The sample (one document, one conversation) is what is drawn, not the
    token: tokens of one text are not independent. Percentile intervals. Fewer than two samples give no
    interval (low and high are None).
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError(f"an interval needs at least one sample, got {count}")
        self.count = count
        draws = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
        self._weights = np.zeros((RESAMPLES, count), np.float64)  # times each sample is drawn, as a share
        np.add.at(self._weights, (np.arange(RESAMPLES)[:, None], draws), 1.0 / count)

    def mean(self, values: np.ndarray) -> dict[str, float | None]:
        """Mean of `values` [count] as {"mean", "low", "high"}; paired differences are values too."""
        values = self._check(values)
        return self._interval(float(values.mean()), self._weights @ values)

    def proportion(self, values: np.ndarray) -> dict[str, float | None]:
        """Mean of `values` [count] between 0 and 1 (shares of tokens right, or right and wrong as 1 and 0).

        Resampling samples that are all 0 or all 1 would give an interval of no width; there, and for values
        that are only 0 and 1, it is Wilson's.
        """
        values = self._check(values)
        if not np.isin(values, (0.0, 1.0)).all() or self.count < 2:
            return self.mean(values)
        z, n, p = 1.959964, self.count, float(values.mean())
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
        return {"mean": p, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}

    def share(self, part: np.ndarray, whole: np.ndarray) -> dict[str, float | None]:
        """sum(part) / sum(whole) as {"mean", "low", "high"}; all None unless the whole is clearly positive.

        `part` and `whole` are paired by sample. When the interval of the whole touches zero, the ratio has no
        meaning (there was nothing to recover) and none is given.
        """
        part, whole = self._check(part), self._check(whole)
        wholes = self._weights @ whole
        if self.count < 2 or np.quantile(wholes, (1 - CONFIDENCE) / 2) <= 0:
            return {"mean": None, "low": None, "high": None}
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(wholes > 0, (self._weights @ part) / wholes, np.nan)
        return self._interval(float(part.mean() / whole.mean()), ratios[np.isfinite(ratios)])

    def _check(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float64)
        if values.shape != (self.count,):
            raise ValueError(f"expected {self.count} values, one per sample, got shape {values.shape}")
        return values

    def _interval(self, mean: float, resampled: np.ndarray) -> dict[str, float | None]:
        if self.count < 2:
            return {"mean": mean, "low": None, "high": None}
        low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return {"mean": mean, "low": float(low), "high": float(high)}
