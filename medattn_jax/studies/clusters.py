"""`medattn study clusters`: what the network looks at, grouped by what it sees there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from medattn_jax import console, crops, evaluate, explain, trained
from medattn_jax import step as steps
from medattn_jax.analysis import clusters
from medattn_jax.data import schema
from medattn_jax.errors import UserError
from medattn_jax.studies import answers, writing

STOPS = ("features", "corners", "levels", "strengths", "patches")
SHEETS = 40  # contact sheets at most, of the largest groups
SHOWN = 48  # pictures on a sheet
NOTHING = "no lesion"


def run(
  workdir: str, data: str | None = None, split: str | None = None, step: str | int = "best",
  out: str | None = None, top: int = 4, points: int = 2000, preference: float = 0.5,
  damping: float = 0.9,
) -> dict[str, Any]:
  """Affinity Propagation (papers §1, "Clustering") of M's features where G is strongest.

  The places of a photograph are its `top` strongest responses above zero over levels 1–4, each
  outside of the masks of the stronger ones in whatever level, so that none comes twice. What lies
  there is shown, and compared with known lesions, in a square of half the crops' side. [choice]

  Args:
    workdir: of the run.
    data, split, step: what is looked at, as in evaluate.run.
    out: the folder for the files; WORKDIR/studies/clusters by default.
    top: places a photograph.
    points: at most so many places in all; of a larger split, patients are drawn by the run's seed.
    preference, damping: see clusters.affinity.

  Returns:
    What clusters.json holds.

  Raises:
    UserError: a wrong flag, a model without regions; nothing was written.
  """
  if top < 1 or points < 2 * top:
    raise UserError(f"--top={top}, --points={points}; accepted: --top from 1, --points from twice "
                    "--top")
  if not 0 <= preference <= 1:
    raise UserError(f"--preference={preference}; accepted: 0 to 1")
  if not 0.5 <= damping < 1:
    raise UserError(f"--damping={damping}; accepted: 0.5 to below 1")
  place = answers.folder("clusters", [workdir], out)
  model = trained.open_workdir(workdir, step)
  explain.check_regions(model)
  config = model.config
  dataset = evaluate.open_data(config, data)
  split = evaluate.choose_split(dataset, split)
  examples = _drawn(dataset, split, points // (2 * top), config.seed)
  side = patch_side(config.model.crop_size)
  table = evaluate.graded(
    model.experiment, model.variables, dataset, split, config, wanted=("logits", *STOPS),
    step=_step(model, top, side), examples=examples)
  rows = places(table, side)
  if len(rows["image"]) < 2:
    raise UserError(f"{workdir}: step {model.step} responds above zero at {len(rows['image'])} "
                    f"places of {split}; accepted: a model whose gated maps speak for some level")
  grouped = clusters.affinity(
    rows["features"], preference=preference, damping=damping, seed=config.seed)
  if not grouped.converged:
    console.warn(f"the groups had not settled after {grouped.iterations} rounds; accepted: a "
                 "--damping nearer to 1")
  known = any(map(len, table["true_boxes"]))
  source = {"workdir": str(workdir), "data": dataset.name, "split": split, "step": model.step,
            "checkpoint_sha256": model.fingerprint}
  found = {
    "run": source, "photographs": len(table["level"]),
    "patients": len(np.unique(table["patient"].astype(str))),
    "patients_of_split": dataset.splits[split], "top": top, "points": len(rows["image"]),
    "patch": side, "preference": preference, "damping": damping,
    "converged": grouped.converged, "rounds": grouped.iterations,
    "agreement": clusters.agreement(grouped.labels, rows["kind"]) if known else None,
    "clusters": [_described(rows, grouped, number, known=known)
                 for number in range(len(grouped.exemplars))]}
  drawn = _sheets(found, rows, grouped)
  _say_what_is_old(place, drawn)
  return writing.finish("clusters", place, found, drawn, **_table(found))


def patch_side(crop_size: int) -> int:
  return max(1, crop_size // 2)


def _drawn(dataset: Any, split: str, most: int, seed: int) -> np.ndarray | None:
  """The numbers of `most` examples, drawn by the seed; None where there are no more (said)."""
  count = dataset.splits[split]
  if count <= most:
    return None
  console.say(f"{most:,} of {count:,} patients of {split} are drawn: --points")
  return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def _step(model: trained.Trained, top: int, side: int) -> Callable[..., dict[str, jax.Array]]:
  """An eval step that answers STOPS as well, all found and cut on the device."""
  config = model.config
  image_size, coords = config.data.image_size, config.model.coords

  def apply(variables, image, train):
    logits, out = model.experiment.apply(variables, image, train=train)
    together = lambda x: x.reshape(-1, *x.shape[2:])
    apart = lambda x: x.reshape(*image.shape[:2], *x.shape[1:])
    features = together(out["M"])
    found = crops.responses(
      together(out["G"]), image_size, config.model.mask_size, top, "all", coords)
    cells = crops.cells_of(found.centres, features.shape[1:3], image_size, coords)
    corners = crops.corners(found.centres, image_size, image.shape[2], side)
    kept = {
      "features": jax.vmap(lambda one, at: one[at[:, 0], at[:, 1]])(features, cells),
      "corners": corners, "levels": found.levels, "strengths": found.strengths,
      "patches": crops.cut(together(image), corners, side)}
    return logits, jax.tree.map(apart, kept)

  return steps.make_eval_step(apply, model.experiment.mesh, STOPS)


def places(table: evaluate.Table, side: int) -> dict[str, np.ndarray]:
  """One row a place: the table of `evaluate.collect` with STOPS [n, top, …], unrolled.

  Returns:
    image, patient, grade (the photograph's level), features [m, d], corners [m, 2], level,
    strength, patches [m, side, side, 3], kind (the nearest lesion's under the patch).
  """
  there = table["strengths"] > 0  # -inf where the masks left nothing; else it speaks against
  photograph, _ = np.nonzero(there)
  corners = table["corners"][there]
  kinds = [
    clusters.kind_under(np.concatenate([corner, corner + side]), table["true_boxes"][of],
                        table["true_types"][of], threshold=evaluate.IOM)
    for of, corner in zip(photograph, corners, strict=True)]
  return {
    "image": table["image"][photograph], "patient": table["patient"][photograph],
    "grade": table["level"][photograph], "features": table["features"][there],
    "corners": corners, "level": table["levels"][there], "strength": table["strengths"][there],
    "patches": table["patches"][there],
    "kind": np.array([NOTHING if kind is None else schema.TYPES[kind] for kind in kinds], object)}


def _described(
  rows: Mapping[str, np.ndarray], grouped: clusters.Clusters, number: int, *, known: bool
) -> dict[str, Any]:
  members = clusters.nearest_first(
    rows["features"], np.flatnonzero(grouped.labels == number), grouped.exemplars[number])
  kinds, counts = np.unique(rows["kind"][members].astype(str), return_counts=True)
  order = np.argsort(-counts, kind="stable")
  return {
    "number": number + 1, "size": len(members),
    "photographs": len(set(rows["image"][members])),
    "mean_grade": float(rows["grade"][members].mean()),
    "lesions": {str(kinds[at]): int(counts[at]) for at in order} if known else None,
    "purity": float(counts.max() / len(members)) if known else None,
    "sheet": _sheet_name(number) if number < SHEETS and len(members) > 1 else None,
    "members": [_member(rows, member) for member in members]}


def _member(rows: Mapping[str, np.ndarray], at: int) -> dict[str, Any]:
  top, left = map(int, rows["corners"][at])
  side = rows["patches"].shape[1]
  return {"image": str(rows["image"][at]), "box": [top, left, top + side, left + side],
          "level": int(rows["level"][at]), "strength": float(rows["strength"][at])}


def _sheet_name(number: int) -> str:
  return f"cluster_{number + 1:02d}.png"


def _sheets(
  found: Mapping[str, Any], rows: Mapping[str, np.ndarray], grouped: clusters.Clusters
) -> dict[str, bytes]:
  from medattn_jax.analysis import contact_sheets, figures  # import matplotlib

  groups, about = found["clusters"], writing.about(found["run"])
  shown = groups[:SHOWN]
  left_out = f"; the {len(groups) - SHOWN} smallest are not shown" if groups[SHOWN:] else ""
  drawn = {"exemplars.png": contact_sheets.sheet(
    rows["patches"][grouped.exemplars[: len(shown)]],
    [f"{group['number']}: {group['size']} place{'s' if group['size'] > 1 else ''}"
     for group in shown],
    [f"{next(iter(group['lesions']))} ({group['mean_grade']:.1f})" if group["lesions"] else
     f"grade {group['mean_grade']:.1f}" for group in shown],
    title=f"{len(groups)} groups of {found['points']:,} places",
    about=f"{about}: the place that stands for each; what most of its group's places show (their "
          f"photographs' mean grade){left_out}", framed=None)}
  for number, group in enumerate(groups):
    if group["sheet"] is None:
      continue
    members = clusters.nearest_first(
      rows["features"], np.flatnonzero(grouped.labels == number), grouped.exemplars[number])
    members = members[:SHOWN]
    most = math.inf if len(members) == group["size"] else len(members)
    lesions = ", ".join(f"{kind.replace('_', ' ')} {count}"
                        for kind, count in (group["lesions"] or {}).items())
    drawn[group["sheet"]] = contact_sheets.sheet(
      rows["patches"][members], [str(image) for image in rows["image"][members]],
      [f"{rows['kind'][at]} ({rows['grade'][at]})" if lesions else f"grade {rows['grade'][at]}"
       for at in members],
      title=f"group {group['number']} of {len(groups)}: {group['size']} places in "
            f"{group['photographs']} photographs, mean grade {group['mean_grade']:.2f}",
      about=(lesions or about) + (f" · the {most} most like the first" if most < math.inf else ""))
  return {name: figures.png(figure, dpi=100) for name, figure in drawn.items()}


def _say_what_is_old(place: Any, drawn: Mapping[str, bytes]) -> None:
  old = sorted(path.name for path in place.glob("cluster_*.png") if path.name not in drawn)
  if old:
    console.say(f"{place}: {', '.join(old[:5])}{', …' if old[5:] else ''} of an earlier run stay")


def _table(found: Mapping[str, Any]) -> dict[str, Any]:
  rows = []
  for group in found["clusters"][:20]:
    lesions = ", ".join(f"{kind.replace('_', ' ')} {count}"
                        for kind, count in list((group["lesions"] or {}).items())[:3])
    rows.append((str(group["number"]), str(group["size"]), str(group["photographs"]),
                 f"{group['mean_grade']:.2f}", lesions))
  notes = []
  if found["clusters"][20:]:
    notes.append(f"and {len(found['clusters']) - 20} smaller groups")
  if agreement := found["agreement"]:
    notes.append(
      f"purity {agreement['purity']:.3f} (by chance {agreement['purity_by_chance']:.3f}), adjusted "
      f"mutual information with the lesions {agreement['adjusted_mutual_information']:.3f}")
  settled = "settled" if found["converged"] else "NOT settled"
  return {
    "title": f"{writing.about(found['run'])}: {found['points']:,} places of "
             f"{found['photographs']:,} photographs in {len(found['clusters'])} groups ({settled} "
             f"after {found['rounds']} rounds)",
    "header": ("group", "places", "photographs", "mean grade", "what lies there"),
    "rows": rows, "notes": notes}
