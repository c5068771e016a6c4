"""Metrics of graded images: kappa, AUC, calibration, and their intervals over patients.

Numpy in, plain numbers out. A figure that is not defined (one class only, nothing to count) is
None, never NaN, so that whatever is written from it is strict JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

# Resamples are drawn in blocks of about this many numbers, so memory does not follow the data.
_BLOCK = 4_000_000


# Probabilities are multiples of this: every sum of them is then exact in float64, whatever its
# order, so p1 + p2 + … and 1 - p0 rank (and tie) alike in whoever computes from predictions.csv.
_GRAIN = 2.0**-32


def probabilities_of(logits: np.ndarray) -> np.ndarray:
  """The softmax of logits [n, C]: float64 [n, C], whole multiples of 2⁻³² that sum to exactly 1."""
  logits = np.asarray(logits, np.float64)
  raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
  grains = np.round(raised / raised.sum(axis=-1, keepdims=True) / _GRAIN)
  top = grains.argmax(axis=-1)[..., None]
  rest = grains.sum(axis=-1, keepdims=True) - np.take_along_axis(grains, top, -1)
  np.put_along_axis(grains, top, 1 / _GRAIN - rest, -1)
  return grains * _GRAIN


def expected_grade(probabilities: np.ndarray) -> np.ndarray:
  """The mean of the grade under probabilities [n, C]: float64 [n] in 0..C-1."""
  probabilities = np.asarray(probabilities, np.float64)
  return probabilities @ np.arange(probabilities.shape[-1], dtype=np.float64)


def start_thresholds(num_classes: int) -> np.ndarray:
  """Where rounding would cut: .5, 1.5, …; float64 [C-1] (papers: .5, 1.5, 2.5, 3.5)."""
  return np.arange(num_classes - 1) + 0.5


def decide(score: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
  """Grades int64 [n]: how many of the (ascending) thresholds a score has reached."""
  return np.searchsorted(np.asarray(thresholds, np.float64), score, side="right")


def grades(probabilities: np.ndarray, thresholds: Sequence[float] | None) -> np.ndarray:
  """The decision, int64 [n]: the expected grade through `thresholds`, or the likeliest class.

  Args:
    probabilities: float [n, C].
    thresholds: float [C-1]; None where classes have no order.
  """
  if thresholds is None:
    return probabilities.argmax(-1)
  return decide(expected_grade(probabilities), thresholds)


def confusion_matrix(level: np.ndarray, grade: np.ndarray, num_classes: int) -> np.ndarray:
  """Counts int64 [C, C]: rows the true level, columns the given grade."""
  cell = np.asarray(level, np.int64) * num_classes + np.asarray(grade, np.int64)
  return np.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes)


def kappa_of_confusion(confusion: np.ndarray) -> np.ndarray:
  """Quadratic weighted kappa of counts [..., C, C]: float64 [...], NaN where undefined.

  The weight of a cell is (level - grade)² over the whole scale 0..C-1, also where a level does
  not occur: scikit-learn's cohen_kappa_score with labels=range(C).
  """
  confusion = np.asarray(confusion, np.float64)
  index = np.arange(confusion.shape[-1], dtype=np.float64)
  weight = (index[:, None] - index[None, :]) ** 2
  seen = (weight * confusion).sum((-2, -1)) * confusion.sum((-2, -1))
  by_chance = np.einsum("ij,...i,...j->...", weight, confusion.sum(-1), confusion.sum(-2))
  defined = by_chance > 0
  return np.where(defined, 1.0 - seen / np.where(defined, by_chance, 1.0), np.nan)


def quadratic_weighted_kappa(
  level: np.ndarray, grade: np.ndarray, num_classes: int = 5
) -> float | None:
  """Agreement beyond chance of grades with levels, both int [n]; None where undefined."""
  return _number(kappa_of_confusion(confusion_matrix(level, grade, num_classes)))


def tune_thresholds(score: np.ndarray, level: np.ndarray, num_classes: int = 5) -> np.ndarray:
  """Four ascending thresholds on the expected grade that maximise kappa (papers §1).

  A coordinate search: one threshold at a time takes the best of the gaps between scores (at most
  1,000 of them), until none moves. It starts at .5, 1.5, … and again at the quantiles that would
  give every level its share, and keeps the better end. A threshold pays (move²/n)/(C-1) for its
  distance from .5, 1.5, …: nothing with many examples, a rein with few. Since the start pays
  nothing, the end is never worse than it on this set. Deterministic.

  Args:
    score: float [n]; expected grades.
    level: int [n]; true levels.
    num_classes: C.

  Returns:
    float64 [C-1]; .5, 1.5, … where kappa is undefined (no example, one level only).
  """
  score, level = np.asarray(score, np.float64), np.asarray(level, np.int64)
  start = start_thresholds(num_classes)
  if len(score) == 0 or np.unique(level).size < 2:
    return start
  values = np.unique(score)
  gaps = (values[1:] + values[:-1]) / 2
  if gaps.size > 1000:
    gaps = gaps[np.linspace(0, gaps.size - 1, 1000).round().astype(int)]
  candidates = np.unique(np.concatenate([gaps, start]))
  # below[l, j]: examples of level l whose score is under candidate j.
  below = np.stack([
    np.searchsorted(np.sort(score[level == one]), candidates) for one in range(num_classes)
  ])
  totals = np.bincount(level, minlength=num_classes)

  def worth(chosen: np.ndarray) -> np.ndarray:
    """Kappa less the rein, for candidate indices int [m, C-1]."""
    counts = np.moveaxis(below[:, chosen], 0, 1)  # [m, C, C-1]
    edges = np.concatenate(
      [np.zeros_like(counts[..., :1]), counts,
       np.broadcast_to(totals[:, None], (*counts.shape[:2], 1))], axis=-1)
    kappa = np.nan_to_num(kappa_of_confusion(np.diff(edges, axis=-1)), nan=-1.0)
    return kappa - ((candidates[chosen] - start) ** 2).mean(-1) / len(score)

  def climb(chosen: np.ndarray) -> tuple[float, np.ndarray]:
    best = float(worth(chosen[None])[0])
    for _ in range(50):
      before = best
      for which in range(num_classes - 1):
        low = chosen[which - 1] if which else 0
        high = chosen[which + 1] if which + 2 < num_classes else candidates.size - 1
        trials = np.repeat(chosen[None], high - low + 1, axis=0)
        trials[:, which] = np.arange(low, high + 1)
        found = worth(trials)
        if found.max() > best + 1e-12:
          best, chosen = float(found.max()), trials[int(found.argmax())]
      if best <= before:
        break
    return best, chosen

  shares = np.cumsum(totals)[:-1] / len(level)
  beginnings = [start, np.quantile(score, shares)]
  ends = [
    climb(np.searchsorted(candidates, point).clip(0, candidates.size - 1)) for point in beginnings
  ]
  return candidates[max(ends, key=lambda end: end[0])[1]]


def auc(positive: np.ndarray, score: np.ndarray) -> float | None:
  """Area under the ROC curve; None where all or none are positive."""
  positive = np.asarray(positive, bool)
  if positive.all() or not positive.any():
    return None
  from sklearn.metrics import roc_auc_score  # takes a second to import

  return float(roc_auc_score(positive, score))


def roc(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
  """False and true positive rates, both float64 [k] ascending; None where undefined."""
  positive = np.asarray(positive, bool)
  if positive.all() or not positive.any():
    return None
  from sklearn.metrics import roc_curve

  false_rate, true_rate, _ = roc_curve(positive, score, drop_intermediate=False)
  return false_rate, true_rate


def sensitivity_at_specificity(
  positive: np.ndarray, score: np.ndarray, specificity: float = 0.5
) -> float | None:
  """The highest sensitivity at a specificity not under `specificity` (papers §1, Messidor)."""
  curve = roc(positive, score)
  if curve is None:
    return None
  false_rate, true_rate = curve
  return float(true_rate[false_rate <= 1 - specificity + 1e-12].max())


def reliability(
  probabilities: np.ndarray, level: np.ndarray, bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Top-label calibration in equal bins of confidence: (confidence, accuracy, count), each [bins].

  Empty bins hold zeros. A confidence on an edge belongs to the bin under it.
  """
  confidence = probabilities.max(-1)
  correct = probabilities.argmax(-1) == level
  which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
  count = np.bincount(which, minlength=bins)
  divisor = np.maximum(count, 1)
  return (np.bincount(which, confidence, bins) / divisor,
          np.bincount(which, correct, bins) / divisor, count)


def expected_calibration_error(
  probabilities: np.ndarray, level: np.ndarray, bins: int = 15
) -> float | None:
  """Mean |confidence - accuracy| over the bins, weighted by their counts; None if empty."""
  if len(level) == 0:
    return None
  confidence, accuracy, count = reliability(probabilities, level, bins)
  return float((np.abs(confidence - accuracy) * count).sum() / count.sum())


def bootstrap_intervals(
  patient: np.ndarray, level: np.ndarray, grade: np.ndarray, score: np.ndarray,
  *, num_classes: int = 5, resamples: int = 1000, seed: int = 0, coverage: float = 0.95,
) -> tuple[list[float] | None, list[float] | None]:
  """Percentile intervals of kappa and of the referable AUC, resampling whole patients.

  Args:
    patient: [n] patient of each image.
    level: int [n].
    grade: int [n]; the decision, for kappa.
    score: float [n]; higher means level >= 2 more likely, for AUC.
    num_classes: C.
    resamples: how many; 0 gives (None, None).
    seed: the draw is a function of it and of the number of patients.
    coverage: of the interval.

  Returns:
    ([low, high] of kappa, [low, high] of AUC); None where undefined. Resamples in which the figure
    is undefined are left out.
  """
  statistics = (kappa_under(level, grade, num_classes), auc_under(np.asarray(level) >= 2, score))
  return tuple(interval(found, coverage)
               for found in resampled(patient, statistics, resamples, seed))


# A figure under weights: from float64 [r, n], how often each of the n images is in each of r
# resamples, to float64 [r], NaN where undefined.
Statistic = Callable[[np.ndarray], np.ndarray]


def resampled(
  patient: np.ndarray, statistics: Sequence[Statistic], resamples: int, seed: int = 0
) -> np.ndarray:
  """The figures in resamples of whole patients: float64 [len(statistics), resamples].

  Both eyes of a patient travel together: their grades correlate, and eyes drawn one by one would
  give intervals that are too narrow. A resample is a row of counts, never a copy of the data, and
  all figures see the same ones, so that differences between them can be taken.

  Args:
    patient: [n] patient of each image.
    statistics: what to compute.
    resamples: how many.
    seed: the draw is a function of it and of the number of patients.
  """
  _, owner = np.unique(np.asarray(patient, str), return_inverse=True)
  patients = int(owner.max()) + 1 if len(owner) else 0
  if patients == 0 or resamples == 0:
    return np.zeros((len(statistics), 0))
  rng = np.random.default_rng(seed)
  block = max(1, _BLOCK // len(owner))
  found = []
  for begin in range(0, resamples, block):
    rows = min(block, resamples - begin)
    drawn = rng.integers(0, patients, (rows, patients)) + np.arange(rows)[:, None] * patients
    times = np.bincount(drawn.ravel(), minlength=rows * patients).reshape(rows, patients)
    weight = times.astype(np.float64)[:, owner]
    found.append(np.stack([statistic(weight) for statistic in statistics]))
  return np.concatenate(found, axis=1)


def kappa_under(level: np.ndarray, grade: np.ndarray, num_classes: int) -> Statistic:
  """Quadratic weighted kappa of grades int [n] with levels int [n], under weights."""
  cells = np.eye(num_classes**2)[
    np.asarray(level, np.int64) * num_classes + np.asarray(grade, np.int64)]
  return lambda weight: kappa_of_confusion(
    (weight @ cells).reshape(-1, num_classes, num_classes))


def mean_under(value: np.ndarray) -> Statistic:
  """The mean of values [n] under weights."""
  value = np.asarray(value, np.float64)
  return lambda weight: weight @ value / weight.sum(1)


def auc_under(positive: np.ndarray, score: np.ndarray) -> Statistic:
  """Area under the ROC curve under weights, from weighted ranks: a tie counts one half."""
  order = np.argsort(score, kind="stable")
  ill = np.asarray(positive, bool)[order]
  _, first = np.unique(np.asarray(score)[order], return_index=True)  # the runs of equal scores

  def area(weight: np.ndarray) -> np.ndarray:
    weight = weight[:, order]
    above = np.add.reduceat(weight * ill, first, axis=1)
    below = np.add.reduceat(weight * ~ill, first, axis=1)
    pairs = above.sum(1) * below.sum(1)
    won = (above * (np.cumsum(below, axis=1) - below / 2)).sum(1)
    return np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan)

  return area


def interval(found: np.ndarray, coverage: float = 0.95) -> list[float] | None:
  """The middle `coverage` of resampled figures float [r], NaN left out; None of none."""
  found = found[np.isfinite(found)]
  if found.size == 0:
    return None
  tail = (1 - coverage) / 2
  return [float(edge) for edge in np.quantile(found, [tail, 1 - tail])]


def _number(value: float | np.ndarray) -> float | None:
  return float(value) if np.isfinite(value) else None


def grading_metrics(
  level: np.ndarray, patient: np.ndarray, probabilities: np.ndarray,
  thresholds: Sequence[float] | None, *, bootstrap: int = 1000, seed: int = 0,
) -> Mapping[str, object]:
  """Every figure of one set of graded images, ready for strict JSON.

  Args:
    level: int [n] true levels 0..C-1.
    patient: [n]; whose image it is.
    probabilities: float [n, C].
    thresholds: float [C-1], ascending; the decision rule on the expected grade, tuned elsewhere.
      None: the likeliest class decides.
    bootstrap: resamples of the intervals, 0 for none.
    seed: of the resamples.

  Returns:
    The contract's keys of metrics.json from `images` to `expected_calibration_error`. `accuracy`,
    the confusion matrix and `quadratic_weighted_kappa` are of the decision (`kappa_thresholds` too,
    None without thresholds); referable is level >= 2 scored by p2 + p3 + …, any is level >= 1.
  """
  level = np.asarray(level, np.int64)
  probabilities = np.asarray(probabilities, np.float64)
  num_classes = probabilities.shape[1]
  grade = grades(probabilities, thresholds)
  kappa = quadratic_weighted_kappa(level, grade, num_classes)
  referable, any_sign = probabilities[:, 2:].sum(1), probabilities[:, 1:].sum(1)
  kappa_ci, auc_ci = bootstrap_intervals(
    patient, level, grade, referable, num_classes=num_classes, resamples=bootstrap, seed=seed)
  auc_referable = auc(level >= 2, referable)
  return {
    "images": len(level),
    "patients": len(set(np.asarray(patient, str).tolist())),
    "accuracy": _number(np.mean(grade == level)) if len(level) else None,
    "quadratic_weighted_kappa": kappa,
    "kappa_argmax": quadratic_weighted_kappa(level, probabilities.argmax(1), num_classes),
    "kappa_thresholds": None if thresholds is None else kappa,
    "thresholds": None if thresholds is None else [float(value) for value in thresholds],
    "kappa_ci": None if kappa is None else kappa_ci,
    "confusion_matrix": confusion_matrix(level, grade, num_classes).tolist(),
    "auc_referable": auc_referable,
    "auc_referable_ci": None if auc_referable is None else auc_ci,
    "auc_any": auc(level >= 1, any_sign),
    "sensitivity_at_specificity_50_any": sensitivity_at_specificity(level >= 1, any_sign),
    "sensitivity_at_specificity_50_referable": sensitivity_at_specificity(level >= 2, referable),
    "expected_calibration_error": expected_calibration_error(probabilities, level),
  }
