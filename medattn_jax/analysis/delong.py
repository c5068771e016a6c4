"""Areas under correlated ROC curves: their covariance, and the test of a difference.

DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988) for images that are independent;
Obuchowski (Biometrics 53, 1997) for images that come in clusters, as two eyes of a patient do.
Both are written with midranks (Sun and Xu, IEEE Signal Processing Letters 21, 2014), so ties count
one half and the cost is that of sorting.
"""

from __future__ import annotations

import numpy as np
from scipy import stats


def areas(
  positive: np.ndarray, scores: np.ndarray, patient: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Areas of k scores of the same n images, and the covariance of these areas.

  Args:
    positive: bool [n], with some of either kind.
    scores: float [k, n]; higher means positive is more likely.
    patient: [n]; whose image it is. None: the images are independent.

  Returns:
    float64 [k] and float64 [k, k]. The covariance is NaN where it cannot be estimated: one
    positive or one negative image (patient, where given) alone.
  """
  positive, scores = np.asarray(positive, bool), np.asarray(scores, np.float64)
  ill, well = placements(positive, scores)
  found = ill.mean(1)
  if patient is None:
    return found, _spread(ill) / ill.shape[1] + _spread(well) / well.shape[1]
  _, owner = np.unique(np.asarray(patient, str), return_inverse=True)
  # How far each patient's images lie from the mean, in sum: a patient is one observation.
  off = [np.stack([np.bincount(owner[rows], row, owner.max() + 1) for row in part - found[:, None]])
         for part, rows in ((ill, positive), (well, ~positive))]
  number = owner.max() + 1
  having = [len(np.unique(owner[rows])) for rows in (positive, ~positive)]
  if min(having) < 2:
    return found, np.full((len(found), len(found)), np.nan)
  shares = [part / kind.shape[1] for part, kind in zip(off, (ill, well), strict=True)]
  own = sum(part @ part.T * count / (count - 1)
            for part, count in zip(shares, having, strict=True))
  both = shares[0] @ shares[1].T * number / (number - 1)
  return found, own + both + both.T


def placements(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where each image stands among those of the other kind.

  Returns:
    float64 [k, m]: of each positive, the share of negatives it is above; float64 [k, n - m]: of
    each negative, the share of positives it is below. A tie counts one half.
  """
  among_all = stats.rankdata(scores, axis=1)
  inside = [stats.rankdata(scores[:, kind], axis=1) for kind in (positive, ~positive)]
  count = [rows.shape[1] for rows in inside]
  ill = (among_all[:, positive] - inside[0]) / count[1]
  well = 1 - (among_all[:, ~positive] - inside[1]) / count[0]
  return ill, well


def _spread(part: np.ndarray) -> np.ndarray:
  """The covariance [k, k] of rows float64 [k, m]; NaN of one observation."""
  if part.shape[1] < 2:
    return np.full((len(part), len(part)), np.nan)
  return np.atleast_2d(np.cov(part))


def compared(
  areas: np.ndarray, covariance: np.ndarray, coverage: float = 0.95
) -> dict[str, float | list[float] | None]:
  """Is the second area another than the first? {difference, interval, z, p}.

  `difference` is the second less the first. The rest is None where the variance of the difference
  is nothing (the two rank the images alike) or unknown.
  """
  difference = float(areas[1] - areas[0])
  variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
  # What rounding leaves of variances that cancel is no variance.
  if not variance > 1e-12 * (covariance[0, 0] + covariance[1, 1]):
    return {"difference": difference, "interval": None, "z": None, "p": None}
  error = float(np.sqrt(variance))
  reach = float(stats.norm.ppf((1 + coverage) / 2)) * error
  z = difference / error
  return {"difference": difference, "interval": [difference - reach, difference + reach],
          "z": z, "p": float(2 * stats.norm.sf(abs(z)))}
