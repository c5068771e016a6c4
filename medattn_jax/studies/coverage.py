"""`medattn study coverage`: how many of the lesions lie in what the network looked at."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from medattn_jax import console, crops, evaluate, explain, trained
from medattn_jax.analysis import agreement, coverage, lesions
from medattn_jax.data import schema
from medattn_jax.errors import UserError
from medattn_jax.studies import answers, writing

MOST = 64  # boxes
SHARE = 0.5  # of a peak's height: what of a gated map belongs to it
LABELS = {
  "regions": "C-Net's regions", "maps": "A-Net's gated maps",
  "random": "regions at random", "maps_random": "A-Net's boxes at random",
  "best": "best possible regions"}


def run(
  workdir: str, data: str | None = None, split: str | None = None, step: str | int = "best",
  out: str | None = None, boxes: int = 16,
) -> dict[str, Any]:
  """Lesion coverage (papers §1, "Lesions"): recall at an overlap of .3 by 1, 2, … boxes.

  C-Net's regions: those it looks into, and those the same greedy selection would take next, each
  crop_size². A-Net's maps: a box around every peak of the gated maps (coverage.peaks), whatever its
  size. Beside both the same boxes placed by chance (the mean of 20 draws), and beside the regions
  the best possible squares of their size.

  Args:
    workdir: of the run.
    data, split, step: what is looked at, as in evaluate.run.
    out: the folder for the files; WORKDIR/studies/coverage by default.
    boxes: up to how many.

  Returns:
    What coverage.json holds.

  Raises:
    UserError: a model without regions, a split without boxes of lesions; nothing was written.
  """
  place = answers.folder("coverage", [workdir], out)
  model = trained.open_workdir(workdir, step)
  explain.check_regions(model)
  config = model.config
  if not config.model.num_regions <= boxes <= MOST:
    raise UserError(f"--boxes={boxes}; accepted: model.num_regions = {config.model.num_regions} to "
                    f"{MOST}")
  dataset = evaluate.open_data(config, data)
  split = evaluate.choose_split(dataset, split)
  table = evaluate.graded(
    model.experiment, model.variables, dataset, split, config, wanted=("logits", "G", "boxes"))
  there = [at for at, own in enumerate(table["true_boxes"]) if len(own)]
  if not there:
    raise UserError(f"data set {dataset.name}, split {split}: none of {len(table['level'])} "
                    "photographs has a box around a lesion; accepted: a set with boxes")
  source = {"workdir": str(workdir), "data": dataset.name, "split": split, "step": model.step,
            "checkpoint_sha256": model.fingerprint}
  found = {"run": source, "photographs": len(table["level"]), **summarise(
    [table["true_boxes"][at] for at in there], [table["true_types"][at] for at in there],
    table["patient"][there], table["G"][there], table["boxes"][there], boxes, config)}
  if found["regions_left"] < boxes:
    console.say(f"the masks of the stronger regions (model.mask_size = {config.model.mask_size}) "
                f"leave {found['regions_left']:.1f} of {boxes} regions a photograph in the mean")
  return writing.finish(
    "coverage", place, found, _figures(found, writing.about(source)),
    title=f"{writing.about(source)}: {found['lesions']:,} lesions in {found['images']:,} of "
          f"{found['photographs']:,} photographs", **_table(found))


def summarise(
  true_boxes: Sequence[np.ndarray], types: Sequence[np.ndarray], patient: np.ndarray,
  gated: np.ndarray, own_boxes: np.ndarray, number: int, config: ml_collections.ConfigDict,
) -> dict[str, Any]:
  """The figures of photographs that have lesions.

  Args:
    true_boxes: a float [k, 4] of each.
    types: an int [k] of each; numbers of schema.TYPES.
    patient: [n].
    gated: float [n, h, w, C].
    own_boxes: int [n, N, 4]; the regions the model looked into.
    number: of boxes up to which recall is asked for.
    config: of the model.
  """
  size, full = config.model.crop_size, config.data.full_size
  regions = regions_of(gated, own_boxes, number, config)
  edges = [crops.cell_edges(cells, config.data.image_size, full, config.model.coords)
           for cells in gated.shape[1:3]]
  maps = [coverage.peaks(own, *edges, number, share=SHARE) for own in gated]
  seen = lambda proposed: [
    coverage.found(true, own, number, evaluate.IOM)
    for true, own in zip(true_boxes, proposed, strict=True)]
  rng = np.random.default_rng(config.seed)
  squares = lambda: [lesions.random_boxes(rng, number, size, full) for _ in true_boxes]
  scattered = lambda: [coverage.scattered(rng, own, full) for own in maps]
  # One draw of what is certain, several of what is left to chance.
  draws = {
    "regions": [seen(regions)], "maps": [seen(maps)],
    "random": [seen(squares()) for _ in range(coverage.DRAWS)],
    "maps_random": [seen(scattered()) for _ in range(coverage.DRAWS)],
    "best": [[coverage.found_by_best(true, number, size, full, evaluate.IOM)
              for true in true_boxes]]}
  curves = {name: coverage.mean_curve([coverage.curve(one) for one in drawn])
            for name, drawn in draws.items()}
  looked = {"regions": regions, "maps": maps}
  there = np.unique(np.concatenate(types))
  kinds = {
    schema.TYPES[kind]: {
      "lesions": int(sum((own == kind).sum() for own in types)),
      **{name: _listed(coverage.mean_curve(
        [coverage.curve(coverage.of_type(one, types, kind)) for one in drawn]))
         for name, drawn in draws.items()}}
    for kind in there}
  return {
    "images": len(true_boxes), "patients": len(np.unique(np.asarray(patient, str))),
    "lesions": sum(map(len, true_boxes)), "iom": evaluate.IOM,
    "boxes_per_image": own_boxes.shape[1], "crop_size": size, "full_size": full,
    "map_share": SHARE, "draws": coverage.DRAWS, "resamples": agreement.RESAMPLES,
    "regions_left": float(np.mean([len(own) for own in regions])),
    "map_boxes": float(np.mean([len(own) for own in maps])),
    "curves": {name: _listed(curve) for name, curve in curves.items()},
    "intervals": {
      name: _listed(coverage.interval(
        draws[name][0], patient, resamples=agreement.RESAMPLES, seed=config.seed))
      for name in looked},
    "covered": {
      name: np.mean([coverage.covered(own, number, full) for own in proposed], axis=0).tolist()
      for name, proposed in looked.items()},
    "types": kinds, "paper": coverage.PAPER}


def regions_of(
  gated: np.ndarray, own_boxes: np.ndarray, number: int, config: ml_collections.ConfigDict
) -> list[np.ndarray]:
  """int [m, 4] a photograph, m ≤ number: where the model looked, and where it would have next.

  Args: see `summarise`. Where the masks of the stronger leave nothing, there are no more.
  """
  model, image_size, full = config.model, config.data.image_size, config.data.full_size
  select = jax.jit(functools.partial(
    crops.responses, image_size=image_size, mask_size=model.mask_size, num=number,
    mask_scope=model.mask_scope, coords=model.coords))
  regions, at_once = [], 16
  for begin in range(0, len(gated), at_once):
    part = gated[begin : begin + at_once]
    padded = np.concatenate([part, np.zeros((at_once - len(part), *part.shape[1:]), part.dtype)])
    found = select(jnp.asarray(padded))
    first = np.asarray(crops.corners(found.centres, image_size, full, model.crop_size))
    there = np.isfinite(np.asarray(found.strengths))
    for own, corner, left in zip(own_boxes[begin : begin + at_once], first, there, strict=False):
      more = corner[len(own) :][left[len(own) :]]
      regions.append(np.concatenate([own, np.concatenate([more, more + model.crop_size], 1)]))
  return regions


def _listed(curve: coverage.Curve | None) -> dict[str, list] | None:
  return None if curve is None else {"box": curve.box.tolist(), "image": curve.image.tolist()}


def _table(found: Mapping[str, Any]) -> dict[str, Any]:
  at, last = found["boxes_per_image"] - 1, len(found["curves"]["regions"]["box"]) - 1
  rows = []
  for name, curve in found["curves"].items():
    interval = found["intervals"].get(name)
    area = found["covered"].get(name)
    rows.append((
      LABELS[name], writing.shown(curve["box"][at]),
      writing.interval(interval["box"][at]) if interval else "", writing.shown(curve["image"][at]),
      f"{area[at]:.0%}" if area else "", writing.shown(curve["box"][last])))
  paper = found["paper"]
  rows.append((f"the paper by {paper['boxes']}, its own", f"{paper['box']:.2f}", "",
               f"{paper['image']:.2f}", "", ""))
  kinds = ", ".join(
    f"{kind.replace('_', ' ')} {own['regions']['box'][at]:.2f} and {own['maps']['box'][at]:.2f} of "
    f"{own['lesions']:,}" for kind, own in found["types"].items())
  return {
    "header": (f"by {at + 1} boxes", "lesions", "95 % interval", "images", "area",
               f"lesions by {last + 1}"),
    "rows": rows,
    "notes": [f"found by {at + 1} regions and by {at + 1} boxes of the maps: {kinds}"]}


def _figures(found: Mapping[str, Any], about: str) -> dict[str, bytes]:
  from medattn_jax.analysis import figures, recall_curves  # import matplotlib

  at = found["boxes_per_image"]
  counted = f"{about}\n{found['lesions']:,} lesions in {found['images']:,} photographs"
  drawn = {
    "recall.png": recall_curves.recall(
      found["curves"], LABELS, intervals=found["intervals"], marked=at, paper=found["paper"],
      iom=found["iom"], title=counted),
    "types.png": recall_curves.by_type(
      {kind: {name: own[name]["box"][at - 1] for name in LABELS}
       for kind, own in found["types"].items()},
      {kind: own["lesions"] for kind, own in found["types"].items()}, LABELS, boxes=at,
      iom=found["iom"], title=counted)}
  return {name: figures.png(figure) for name, figure in drawn.items()}
