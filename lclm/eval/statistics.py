"""Means, paired differences and ratios of means, with 95% bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


class Bootstrap:
    """Intervals by resampling with replacement, the same resamples for every figure (percentile intervals).

    `groups` [samples] says which document each sample is of (None: each its own). What is drawn is the
    document with all its samples: neither the tokens of a text nor the texts of a document are independent.
    Fewer than two documents give no interval (low and high are None).
    """

    def __init__(self, count: int, seed: int, groups: Sequence[int] | None = None) -> None:
        if count < 1:
            raise ValueError(f"an interval needs at least one sample, got {count}")
        self.count = count
        _, group = np.unique(np.arange(count) if groups is None else np.asarray(groups), return_inverse=True)
        self.groups = int(group.max()) + 1
        draws = np.random.default_rng(seed).integers(0, self.groups, (RESAMPLES, self.groups))
        times = np.zeros((RESAMPLES, self.groups))
        np.add.at(times, (np.arange(RESAMPLES)[:, None], draws), 1.0)
        weights = times[:, group]
        self._weights = weights / weights.sum(axis=1, keepdims=True)

    def mean(self, values: np.ndarray) -> dict[str, float | None]:
        """Mean of `values` [count] as {"mean", "low", "high"}; paired differences are values too."""
        values = self._check(values)
        return self._interval(float(values.mean()), self._weights @ values)

    def proportion(self, values: np.ndarray) -> dict[str, float | None]:
        """Mean of `values` [count] between 0 and 1 (shares of tokens right, or right and wrong as 1 and 0).

        Resampling values that are all 0 or all 1 would give an interval of no width; there it is Wilson's.
        """
        values = self._check(values)
        p = float(values.mean())
        if p not in (0.0, 1.0) or self.groups < 2:
            return self.mean(values)
        z = 1.959964
        width = z * z / (self.groups + z * z)
        return {"mean": p, "low": 0.0 if p == 0 else 1 - width, "high": width if p == 0 else 1.0}

    def share(self, part: np.ndarray, whole: np.ndarray) -> dict[str, float | None]:
        """sum(part) / sum(whole) as {"mean", "low", "high"}; all None unless the whole is clearly positive.

        `part` and `whole` are paired by sample. When the interval of the whole touches zero, the ratio has no
        meaning (there was nothing to recover) and none is given.
        """
        part, whole = self._check(part), self._check(whole)
        wholes = self._weights @ whole
        if self.groups < 2 or np.quantile(wholes, (1 - CONFIDENCE) / 2) <= 0:
            return {"mean": None, "low": None, "high": None}
        kept = wholes > 0
        return self._interval(float(part.mean() / whole.mean()), (self._weights @ part)[kept] / wholes[kept])

    def _check(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float64)
        if values.shape != (self.count,):
            raise ValueError(f"expected {self.count} values, one per sample, got shape {values.shape}")
        return values

    def _interval(self, mean: float, resampled: np.ndarray) -> dict[str, float | None]:
        if self.groups < 2:
            return {"mean": mean, "low": None, "high": None}
        low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return {"mean": mean, "low": float(low), "high": float(high)}
