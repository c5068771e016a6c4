"""analysis.delong: against what pROC finds, against the definition, and for eyes of one patient."""

import numpy as np
import pytest
from sklearn import metrics as sk

from medattn_jax.analysis import delong, intervals

# aSAH: 113 patients with a bleeding aneurysm, three markers of theirs, and who fared poorly. Turck
# et al., A multiparameter panel method for outcome prediction following aneurysmal subarachnoid
# hemorrhage, Intensive Care Medicine 36 (2010); the data set of the R package pROC (Robin et al.,
# BMC Bioinformatics 12, 2011), whose own tests (test-var.R, test-cov.R, test-roc.test.R) state what
# its DeLong finds. In its order; WFNS is a grade of five levels, with many ties.
_POOR = (
  "00001101001011001011101000000000100110110000000001100010001010011101101111000110"
  "100000010000000000001111110001000")
_WFNS = (
  "11113254125255125225211112121134214541425511241125521251222151125214524414121421"
  "232421451154221113125225552445111")
_S100B = """
  13 14 10 4 13 10 47 16 18 10 12 10 44 71 4 8 49 4 7 33 9 9 7 11 7 17 7 11 13 19 5 16 41 14 34
  35 48 9 96 25 50 46 16 7 43 45 11 8 9 86 52 8 6 13 207 10 14 15 7 6 77 5 9 30 3 9 4 23 70 9 27
  71 8 26 8 16 9 13 10 8 11 33 11 28 7 10 32 22 7 5 24 38 10 15 8 14 10 7 4 19 56 14 58 32 82 74
  15 47 17 44 15 50 48
"""
_NDKA = """
  301 854 809 1042 1740 1275 600 1320 1554 601 1596 1786 518 890 1341 2075 1160 1611 3237 5482
  3241 4994 4034 947 629 1253 654 630 8030 1280 980 981 985 1821 503 1404 2193 802 742 838 659
  963 1312 796 1434 4143 763 706 1259 1356 387 944 766 1298 41919 2719 2227 995 2122 1173 1040
  5883 639 1109 1222 1367 1721 2263 1290 970 2157 823 7257 1554 1051 1060 1457 519 963 461 2148
  1730 1271 944 1107 1946 1083 537 1197 775 983 1055 2849 853 1257 1290 4683 1168 1267 901 957
  3406 1172 1426 4761 1167 2458 1033 1387 1589 2243 679 1345
"""

POOR = np.array([letter == "1" for letter in _POOR])
WFNS = np.array([float(letter) for letter in _WFNS])
S100B = np.array(_S100B.split(), np.float64) / 100  # µg/l
NDKA = np.array(_NDKA.split(), np.float64) / 100

AREAS = {"wfns": 0.823678861788618, "s100b": 0.731368563685637, "ndka": 0.611957994579946}
VARIANCES = {
  "wfns": 0.00146991470882363, "s100b": 0.00266868245717244, "ndka": 0.0031908105493913}
COVARIANCES = {
  ("wfns", "ndka"): -0.000532967856762438, ("ndka", "s100b"): -0.000756164938056579,
  ("s100b", "wfns"): 0.00119615567376754}
# (first, second) → Z, p, interval of the first less the second.
TESTS = {
  ("wfns", "s100b"): (2.20898359144091, 0.0271757822291882, 0.0104061769564846, 0.174214419249478),
  ("wfns", "ndka"): (2.79777591868904, 0.00514557970691098, 0.0634011709339876, 0.3600405634833566),
  ("ndka", "s100b"): (-1.39077002573558, 0.164295175223054, -0.2876917446341914,
                      0.0488706064228094)}


MARKERS = {"wfns": WFNS, "s100b": S100B, "ndka": NDKA}


def by_definition(positive, score):
  """The area and its placements, pair by pair."""
  pairs = np.subtract.outer(score[positive], score[~positive])
  won = (pairs > 0) + 0.5 * (pairs == 0)
  return won.mean(), won.mean(1), won.mean(0)


def test_areas_and_covariances_are_procs():
  areas, covariance = delong.areas(POOR, np.stack(list(MARKERS.values())))
  names = list(MARKERS)
  for k, name in enumerate(names):
    assert areas[k] == pytest.approx(AREAS[name], abs=1e-12)
    assert covariance[k, k] == pytest.approx(VARIANCES[name], abs=1e-12)
  for (first, second), value in COVARIANCES.items():
    assert covariance[names.index(first), names.index(second)] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("pair", "told"), TESTS.items())
def test_the_test_of_a_difference_is_procs(pair, told):
  first, second = (MARKERS[name] for name in pair)
  found = delong.compared(*delong.areas(POOR, np.stack([second, first])))
  np.testing.assert_allclose(
    [found["z"], found["p"], *found["interval"]], told, rtol=0, atol=1e-9)
  turned = delong.compared(*delong.areas(POOR, np.stack([first, second])))
  assert turned["p"] == pytest.approx(found["p"]) and turned["z"] == pytest.approx(-found["z"])


@pytest.mark.parametrize("digits", [1, 9])
def test_midranks_are_the_definition(digits):
  """With many ties (one digit) and with none."""
  rng = np.random.default_rng(digits)
  positive = rng.random(80) < 0.3
  scores = (rng.normal(size=(3, 80)) + positive).round(digits)
  areas, covariance = delong.areas(positive, scores)
  direct = [by_definition(positive, score) for score in scores]
  np.testing.assert_allclose(areas, [area for area, _, _ in direct], atol=1e-12)
  np.testing.assert_allclose(
    areas, [sk.roc_auc_score(positive, score) for score in scores], atol=1e-12)
  expected = sum(np.cov([placed[kind] for placed in direct]) / count
                 for kind, count in ((1, positive.sum()), (2, (~positive).sum())))
  np.testing.assert_allclose(covariance, expected, atol=1e-12)


def test_patients_of_one_image_are_delongs():
  scores, patient = np.stack([WFNS, NDKA]), np.arange(len(POOR))
  for one, other in zip(delong.areas(POOR, scores, patient), delong.areas(POOR, scores),
                        strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_clusters_by_obuchowskis_formulas():
  """Her sums over clusters, written out loop by loop, where patients have eyes of both kinds."""
  rng = np.random.default_rng(0)
  patient = np.repeat(np.arange(40), 2)[:-3]  # some of one eye
  positive = rng.random(len(patient)) < 0.4
  scores = (rng.normal(size=(2, len(patient))) + positive).round(1)
  areas, covariance = delong.areas(positive, scores, patient)
  ill, well = (np.stack([by_definition(positive, score)[kind] for score in scores])
               for kind in (1, 2))
  whose_ill, whose_well = patient[positive], patient[~positive]
  s10, s01, s11 = (np.zeros((2, 2)) for _ in range(3))
  for one in set(patient):
    x = ill[:, whose_ill == one].sum(1) - (whose_ill == one).sum() * areas
    y = well[:, whose_well == one].sum(1) - (whose_well == one).sum() * areas
    s10, s01, s11 = s10 + np.outer(x, x), s01 + np.outer(y, y), s11 + np.outer(x, y)
  m, n = ill.shape[1], well.shape[1]
  i10, i01, i = (len(set(names)) for names in (whose_ill, whose_well, patient))
  expected = (i10 / (i10 - 1) * s10 / m**2 + i01 / (i01 - 1) * s01 / n**2
              + i / (i - 1) * (s11 + s11.T) / (m * n))
  np.testing.assert_allclose(covariance, expected, atol=1e-15)


def test_a_second_eye_that_says_the_same_adds_nothing():
  """Doubled rows under their own patient leave the variance; under another they would halve it."""
  patient = np.arange(len(POOR))
  double = lambda values: np.repeat(values, 2)
  _, once = delong.areas(POOR, WFNS[None], patient)
  _, twice = delong.areas(double(POOR), double(WFNS)[None], double(patient))
  _, apart = delong.areas(double(POOR), double(WFNS)[None], np.arange(2 * len(POOR)))
  assert twice[0, 0] == pytest.approx(once[0, 0], rel=1e-9)
  assert apart[0, 0] == pytest.approx(once[0, 0] / 2, rel=0.03)


def test_what_cannot_be_told_is_none():
  """Models that rank alike, sets that are ranked without a fault, and one positive image."""
  alike = delong.compared(*delong.areas(POOR, np.stack([NDKA, 3 * NDKA + 1])))
  assert alike == {"difference": 0.0, "interval": None, "z": None, "p": None}
  areas, covariance = delong.areas(POOR, POOR[None].astype(float))
  assert areas[0] == 1 and intervals.of_area(areas[0], covariance[0, 0]) is None
  one = np.arange(len(POOR)) == 4
  for patient in (None, np.arange(len(POOR))):
    areas, covariance = delong.areas(one, np.stack([WFNS, NDKA]), patient)
    assert np.isnan(covariance).all() and delong.compared(areas, covariance)["p"] is None
