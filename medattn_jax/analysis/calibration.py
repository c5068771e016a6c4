"""Are probabilities as often right as they say? Their errors, and the one number that mends them.

Temperature scaling (Guo et al., ICML 2017): logits divided by T, which is fitted on other images
by the negative log-likelihood. Grades by the likeliest class stay as they are.
"""

from __future__ import annotations

import numpy as np
from scipy import optimize, special

from medattn_jax import metrics

# Half of what written probabilities are multiples of (metrics.probabilities_of): a zero is less
# than that, and no less is known of it.
LEAST = 2.0**-33
TEMPERATURES = (0.05, 20.0)


def logits_of(probabilities: np.ndarray) -> np.ndarray:
  """Logits float64 [n, C] whose softmax the probabilities [n, C] are; zeros are taken as LEAST.

  A softmax forgets a constant per row, which temperature scaling does not need: log p divided by T
  differs from the model's own logits divided by T by such a constant alone.
  """
  return np.log(np.maximum(np.asarray(probabilities, np.float64), LEAST))


def cooled(probabilities: np.ndarray, temperature: float) -> np.ndarray:
  """The probabilities float64 [n, C] at another temperature; above 1 they are less sure."""
  return special.softmax(logits_of(probabilities) / temperature, axis=1)


def temperature(probabilities: np.ndarray, level: np.ndarray) -> float:
  """The temperature with the least negative log-likelihood, within TEMPERATURES.

  The likelihood is convex in 1/T, so there is one best; an end of the range where it lies beyond;
  1 where none is better.

  Args:
    probabilities: float [n, C].
    level: int [n].
  """
  logits = logits_of(probabilities)
  own = np.take_along_axis(logits, np.asarray(level, np.int64)[:, None], 1)[:, 0]

  def loss(heat: float) -> float:
    return float(np.mean(special.logsumexp(logits / heat, axis=1) - own / heat))

  found = optimize.minimize_scalar(
    lambda log_heat: loss(np.exp(log_heat)), bounds=np.log(TEMPERATURES), method="bounded",
    options={"xatol": 1e-9})
  best = min((*TEMPERATURES, float(np.exp(found.x))), key=loss)
  return best if loss(best) < loss(1.0) - 1e-12 else 1.0  # more than rounding


def negative_log_likelihood(probabilities: np.ndarray, level: np.ndarray) -> float:
  """Mean of -log of the probability of the true level (no less than LEAST)."""
  own = np.take_along_axis(logits_of(probabilities), np.asarray(level, np.int64)[:, None], 1)
  return float(-own.mean())


def brier(probabilities: np.ndarray, level: np.ndarray) -> float:
  """Mean over images of the squared distance to what was true, summed over classes: 0 to 2."""
  truth = np.eye(np.asarray(probabilities).shape[1])[np.asarray(level, np.int64)]
  return float(((probabilities - truth) ** 2).sum(1).mean())


def of_probabilities(
  probabilities: np.ndarray, level: np.ndarray, bins: int = 15
) -> dict[str, object]:
  """expected_calibration_error, negative_log_likelihood, brier, mean confidence, accuracy, curve.

  No interval is given for the expected calibration error: it is biased upward, the more so the
  fewer images a bin has, and a bootstrap adds that bias once more.
  """
  confidence, accuracy, count = metrics.reliability(probabilities, level, bins)
  return {
    "expected_calibration_error": metrics.expected_calibration_error(probabilities, level, bins),
    "negative_log_likelihood": negative_log_likelihood(probabilities, level),
    "brier": brier(probabilities, level),
    "confidence": float(probabilities.max(1).mean()),
    "accuracy": float((probabilities.argmax(1) == level).mean()),
    "curve": {"confidence": confidence.tolist(), "accuracy": accuracy.tolist(),
              "images": count.tolist()}}
