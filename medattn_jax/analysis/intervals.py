"""Intervals of figures from what they were in resamples of whole patients (metrics.resampled).

The plain percentiles of a bootstrap are too narrow with few patients and useless where a figure
reaches its end: a sensitivity of one in the sample is one in every resample. Each kind of figure
has here the interval that covered best in simulation (tests/analysis/test_interval_coverage.py).
"""

from __future__ import annotations

import numpy as np
from scipy import stats


def of_kappa(
  kappa: float | None, found: np.ndarray, patients: int, coverage: float = 0.95
) -> list[float] | None:
  """Of an agreement: Fisher's z, which makes its spread nearly even, and Student's t.

  Args:
    kappa: of the sample.
    found: float [r]; in the resamples, NaN where undefined.
    patients: who were resampled.
    coverage: of the interval.

  Returns:
    [low, high]; None where kappa is undefined, or all right or all wrong: no resample tells of
    grades the sample has not.
  """
  error = _error(found)
  if kappa is None or error is None or patients < 2 or not abs(kappa) < 1:
    return None
  reach = stats.t.ppf((1 + coverage) / 2, patients - 1) * error / (1 - kappa**2)
  return [float(edge) for edge in np.tanh(np.arctanh(kappa) + np.array([-reach, reach]))]


def of_share(
  share: float | None, found: np.ndarray, images: int, patients: int, coverage: float = 0.95
) -> list[float] | None:
  """Of a share, such as accuracy, or sensitivity at a given specificity: Wilson's score interval.

  It counts as many independent images as would spread like the resamples, which know of images
  that belong together and of a threshold that moves; never more than there are. At an end of the
  scale resamples know nothing: there each patient counts as one image.

  Args:
    share: of the sample.
    found: float [r]; in the resamples, NaN where undefined.
    images: of how many the share is (for sensitivity: the positive ones).
    patients: whose these images are.
    coverage: of the interval.

  Returns:
    [low, high] within [0, 1]; None where the share is undefined.
  """
  error = _error(found)
  if share is None or error is None or images == 0:
    return None
  number = share * (1 - share) / error**2 if error > 0 and 0 < share < 1 else patients
  number = min(number, images)
  z = stats.norm.ppf((1 + coverage) / 2) ** 2
  middle = (share + z / (2 * number)) / (1 + z / number)
  reach = np.sqrt(z * (share * (1 - share) / number + z / (4 * number**2))) / (1 + z / number)
  return [float(edge) for edge in np.clip([middle - reach, middle + reach], 0, 1)]


def of_area(area: float, variance: float, coverage: float = 0.95) -> list[float] | None:
  """Of an area under the ROC curve, by the variance delong.areas gives, on the logit scale.

  None where the variance is nothing (all ranked right, or all wrong) or unknown.
  """
  if not variance > 0 or not 0 < area < 1:
    return None
  reach = stats.norm.ppf((1 + coverage) / 2) * np.sqrt(variance) / (area * (1 - area))
  middle = np.log(area / (1 - area))
  return [float(1 / (1 + np.exp(-edge))) for edge in (middle - reach, middle + reach)]


def of_difference(
  difference: float | None, found: np.ndarray, patients: int, coverage: float = 0.95
) -> dict[str, float | list[float] | None]:
  """Of a difference of two figures of the same images: Student's t, with the resamples' spread.

  Args:
    difference: of the sample.
    found: float [r]; in the resamples (the same ones for both figures), NaN where undefined.
    patients: who were resampled.
    coverage: of the interval.

  Returns:
    {difference, interval, p}: p, two-sided, of no difference. The last two are None where the
    figures differ alike in every resample, or not at all.
  """
  error = _error(found)
  if difference is None or not error or patients < 2:
    return {"difference": difference, "interval": None, "p": None}
  reach = float(stats.t.ppf((1 + coverage) / 2, patients - 1) * error)
  return {"difference": difference, "interval": [difference - reach, difference + reach],
          "p": float(2 * stats.t.sf(abs(difference) / error, patients - 1))}


def _error(found: np.ndarray) -> float | None:
  """The standard error that resamples show; None of fewer than two."""
  found = found[np.isfinite(found)]
  return float(found.std(ddof=1)) if found.size > 1 else None
