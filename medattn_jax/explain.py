"""Why a photograph was graded as it was: one page each, and boxes.csv."""

from __future__ import annotations

import csv
import io
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np

from medattn_jax import console, crops, evaluate, experiment, explain_map, files, metrics, trained
from medattn_jax.analysis import figures, overlays
from medattn_jax.data import schema
from medattn_jax.errors import UserError


class Region(NamedTuple):
  """One region of a photograph: its box in the photograph, and why it was chosen.

  Level and strength are None where the masks of stronger regions had left nothing to choose.
  """

  box: tuple[int, int, int, int]  # y0, x0, y1, x1
  level: int | None  # whose gated map responded most
  strength: float | None  # the response


def run(
  workdir: str, data: str | None = None, split: str | None = None, out: str | None = None,
  limit: int = 16,
) -> None:
  """`medattn explain`: pages of the first `limit` photographs of a split, and their boxes.csv.

  A global attention has one map for all: see explain_map.write.

  boxes.csv has `image,rank,y0,x0,y1,x1,level,strength`: pixels of the photograph as the network
  was given it (data.full_size square), rank 1 the strongest.

  Args:
    workdir: of the run.
    data: another data set, by name or folder; the run's own by default.
    split: test by default, validation where there is none.
    out: the folder for the files; WORKDIR/explanations by default.
    limit: how many photographs.

  Raises:
    UserError: a wrong argument, or a model without regions and without a map.
  """
  if limit < 1:
    raise UserError(f"--limit={limit}; accepted: a whole number of at least 1")
  place = pathlib.Path(out) if out else pathlib.Path(workdir) / "explanations"
  files.check_folder(place)
  model = trained.open_workdir(workdir)
  if model.config.model.name == "global_attention":
    explain_map.write(model, place, data, split, limit)
    return
  check_regions(model, "a zoom_in_net past its phase m, or a global_attention")
  dataset = evaluate.open_data(model.config, data)
  split = evaluate.choose_split(dataset, split)
  if model.thresholds_from == trained.ROUNDING:
    console.say("no thresholds were tuned for this checkpoint: grades are rounded scores")
  batches = evaluate.batches_of(dataset, split, model.config, at_most=limit)
  text = io.StringIO()
  table = csv.writer(text, lineterminator="\n")
  table.writerow(["image", "rank", "y0", "x0", "y1", "x1", "level", "strength"])
  taken: set[str] = set()
  for row in itertools.islice(_rows(model, batches), limit):
    regions = regions_of(row["G"], row["boxes"], model.config)
    place.mkdir(parents=True, exist_ok=True)
    files.write_bytes(place / file_name(row["image"], taken), _page(row, regions, model))
    table.writerows(
      [row["image"], rank, *region.box, region.level, region.strength]
      for rank, region in enumerate(regions, start=1))
  if not taken:
    raise UserError(f"data set {dataset.name}: split {split} has no photographs")
  files.write_text(place / "boxes.csv", text.getvalue())
  print(f"{len(taken)} photographs explained in {place}, their regions in {place / 'boxes.csv'}")


def check_regions(model: trained.Trained, accepted: str = "a zoom_in_net past its phase m") -> None:
  """Raises UserError where a model chooses no regions."""
  if "a_net" not in model.variables["params"] or model.phase == "m":
    raise UserError(f"{model.workdir}: step {model.step} (model.name = {model.config.model.name}, "
                    f"phase {model.phase}) chooses no regions; accepted: {accepted}")


def regions_of(
  gated: np.ndarray, boxes: np.ndarray, config: ml_collections.ConfigDict
) -> list[Region]:
  """Why each region of one photograph was chosen: the selection followed.

  Args:
    gated: float [h, w, C]; the gated attention maps.
    boxes: int [N, 4]; the regions as the model gave them, strongest first.
    config: of the model.
  """
  found = crops.responses(
    jnp.asarray(gated)[None], config.data.image_size, config.model.mask_size, len(boxes),
    config.model.mask_scope, config.model.coords)
  regions = []
  for box, level, strength in zip(
      boxes, np.asarray(found.levels[0]), np.asarray(found.strengths[0]), strict=True):
    there = bool(np.isfinite(strength))
    why = (int(level), float(strength)) if there else (None, None)
    regions.append(Region(tuple(map(int, box)), *why))
  return regions


def _rows(
  model: trained.Trained, batches: Iterable[Mapping[str, np.ndarray]]
) -> Iterator[dict[str, Any]]:
  """The photographs that count, one by one, with what is known and answered of each."""
  for batch, out in experiment.predictions(model.experiment, model.variables, batches):
    for at in zip(*np.nonzero(batch["mask"] > 0), strict=True):
      kinds = batch["box_type"][at]
      yield {
        "photograph": batch["image"][at], "image": batch["image_id"][at],
        "level": int(batch["level"][at]), "true_boxes": batch["boxes"][at][kinds >= 0],
        "true_types": kinds[kinds >= 0], "G": out["G"][at], "boxes": out["boxes"][at],
        "probabilities": metrics.probabilities_of(out["logits"][at])}


def _page(row: Mapping[str, Any], regions: Sequence[Region], model: trained.Trained) -> bytes:
  return figures.png(dpi=100, figure=overlays.explanation(
    row["photograph"], row["G"], row["boxes"], row["probabilities"], name=row["image"],
    grade=int(metrics.grades(row["probabilities"], model.thresholds)), level=row["level"],
    region_levels=[region.level for region in regions], true_boxes=row["true_boxes"],
    true_types=row["true_types"], type_names=schema.TYPES))


def file_name(image: str, taken: set[str]) -> str:
  """A file name for an image id, whatever is in it, new among `taken`, to which it is added."""
  plain = re.sub(r"[^\w.-]+", "_", image).lstrip(".")[:80].encode()[:120].decode(errors="ignore")
  name, number = f"{plain or 'image'}.png", 2
  while name.casefold() in taken:
    name, number = f"{plain or 'image'}-{number}.png", number + 1
  taken.add(name.casefold())
  return name
