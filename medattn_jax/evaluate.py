"""Grades a split and says how well: metrics.json, predictions.csv and figures."""

from __future__ import annotations

import csv
import io
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import rich.console
import rich.table

from medattn_jax import console, experiment, files, metrics, models, processes, trained
from medattn_jax.analysis import lesions
from medattn_jax.data import datasets
from medattn_jax.errors import UserError
from medattn_jax.workdir import MetricsLog

IOM = 0.3  # overlap at which a region finds a lesion (papers §1)
BRANCHES = {"m_net": "M-Net", "m_a": "M + A", "zoom_in_net": "Zoom-in-Net"}
ANSWERS = ("logits", "y_M", "y_A", "y_C", "boxes")
Table = dict[str, Any]


def collect(
  now: experiment.Experiment, variables: Any, batches: Iterable[Mapping[str, np.ndarray]],
  wanted: Sequence[str] = ANSWERS, step: Callable[..., dict[str, jax.Array]] | None = None,
) -> Table:
  """Answers for every photograph that counts, once each, on any number of devices.

  Args:
    now: the experiment that answers.
    variables: {"params", "batch_stats"}.
    batches: of pipeline.eval_batches; padding has mask 0.
    wanted: which of the answers, the logits among them; those that there are not are left out.
    step: another eval step than the experiment's own (experiment.predictions).

  Returns:
    Columns of one row a photograph: image, patient, eye (object), level int32, and what is wanted,
    [n, …]: logits and those of y_M, y_A, y_C that the phase has (float32 [n, C]), boxes int32
    [n, N, 4] where there are regions; true_boxes, a list of float32 [k, 4], and their true_types,
    of int32 [k]. Regions and lesions are in the full_size frame.

  Raises:
    UserError: the model answers what is no number.
  """
  columns: dict[str, list] = {}
  add = lambda name, rows: columns.setdefault(name, []).append(rows)
  true_boxes: list[np.ndarray] = []
  true_types: list[np.ndarray] = []
  for batch, out in experiment.predictions(now, variables, batches, wanted, step):
    counts = batch["mask"] > 0
    add("image", batch["image_id"][counts])
    add("patient", np.repeat(batch["patient"][:, None], counts.shape[1], axis=1)[counts])
    add("eye", batch["eye"][counts])
    add("level", batch["level"][counts])
    for name in out:
      add(name, out[name][counts])
    kinds, boxes = batch["box_type"][counts], batch["boxes"][counts]
    true_boxes += [own[kind >= 0] for own, kind in zip(boxes, kinds, strict=True)]
    true_types += [kind[kind >= 0] for kind in kinds]
    if not np.isfinite(out["logits"][counts]).all():
      raise UserError(f"{batch['image_id'][counts][0]} and others: the model's answers are not "
                      "finite numbers; accepted: a checkpoint of a training that did not diverge")
  table = {name: np.concatenate(rows) for name, rows in columns.items()}
  return table | {"true_boxes": true_boxes, "true_types": true_types}


def validate(
  now: experiment.Experiment, variables: Any, dataset: Any, config: ml_collections.ConfigDict,
  between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Kappa on the validation split and the thresholds that give it, for the training loop.

  `between` is called before each batch, and may raise.

  Returns:
    score: what the best checkpoint is chosen by: kappa, or accuracy where the likeliest class
    decides; None where undefined. kappa, kappa_argmax, accuracy, auc_referable, auc_any;
    thresholds (list [C-1], or None).
  """
  table = graded(now, variables, dataset, "validation", config, between)
  probabilities = metrics.probabilities_of(table["logits"])
  thresholds = None
  if config.evaluation.decision == "thresholds":
    thresholds = metrics.tune_thresholds(
      metrics.expected_grade(probabilities), table["level"], config.model.num_classes)
  found = metrics.grading_metrics(
    table["level"], table["patient"], probabilities, thresholds, bootstrap=0)
  kept = ("kappa_argmax", "accuracy", "auc_referable", "auc_any", "thresholds")
  kappa = found["quadratic_weighted_kappa"]
  return {"kappa": kappa, "score": found["accuracy"] if thresholds is None else kappa,
          **{name: found[name] for name in kept}}


def graded(
  now: experiment.Experiment, variables: Any, dataset: Any, split: str,
  config: ml_collections.ConfigDict, between: Callable[[], None] = lambda: None, *,
  wanted: Sequence[str] = ANSWERS, step: Callable[..., dict[str, jax.Array]] | None = None,
  at_most: int | None = None, examples: np.ndarray | None = None,
) -> Table:
  """`collect` over a split of a data set. Raises UserError: empty, or levels the model has not.

  `between` is called before each batch; `wanted` and `step` are of `collect`, `at_most` and
  `examples` of `batches_of`.
  """
  def batches() -> Iterator[Mapping[str, np.ndarray]]:
    for batch in batches_of(dataset, split, config, at_most, examples):
      between()
      yield batch

  table = collect(now, variables, batches(), wanted, step)
  if not len(table.get("level", ())):
    raise UserError(f"data set {dataset.name}: split {split} has no photographs; "
                    f"there are {_splits(dataset)}")
  strange = np.flatnonzero((table["level"] < 0) | (table["level"] >= config.model.num_classes))
  if strange.size:
    raise UserError(
      f"data set {dataset.name}: {table['image'][strange[0]]} has level "
      f"{table['level'][strange[0]]}; accepted by this model: 0–{config.model.num_classes - 1}")
  return table


def batches_of(
  dataset: Any, split: str, config: ml_collections.ConfigDict, at_most: int | None = None,
  examples: np.ndarray | None = None,
) -> Iterator[Mapping[str, np.ndarray]]:
  """The batches of an evaluation: every patient of the split once.

  `at_most`: patients of a batch, where fewer than the config's are wanted; `examples`: the numbers
  of those wanted, all by default.
  """
  from medattn_jax.data import pipeline  # imports TensorFlow

  count = jax.process_count()
  size = min(config.evaluation.batch_size, at_most or config.evaluation.batch_size)
  size = math.ceil(size / count) * count
  return pipeline.eval_batches(
    dataset, split, batch_size=size, full_size=config.data.full_size,
    process_index=jax.process_index(), process_count=count,
    examples=examples, **experiment.layout(config))


def open_data(config: ml_collections.ConfigDict, data: str | None) -> Any:
  """The run's own data set, or another: a name or a folder.

  Raises UserError: no such set, or one whose photographs are not in the model's frame.
  """
  from medattn_jax.data import pipeline  # imports TensorFlow

  dataset = pipeline.open_dataset(
    config.data.name if data is None else data, config.data.dir,
    full_size=config.data.full_size, synthetic=config.data.synthetic.to_dict())
  if dataset.frame not in (None, frame := experiment.frame(config)):
    if config.model.name == "global_attention":
      raise UserError(
        f"data set {dataset.name} in {dataset.folder} has {dataset.frame} photographs where "
        f"data.frame is {frame!r}; accepted: data.frame = {dataset.frame!r}, or the set made with "
        f"`medattn prepare --frame={frame}`")
    console.say(f"data set {dataset.name} has {dataset.frame} photographs; this model crops those "
                "it is given to predict")
  return dataset


def choose_split(dataset: Any, split: str | None) -> str:
  """`split`; or test, or validation where there is no test (said on stderr)."""
  if split is None:
    if "test" in dataset.splits:
      return "test"
    if "validation" in dataset.splits:
      console.say(f"data set {dataset.name} has no test split: the validation split is taken")
      return "validation"
    raise UserError(f"data set {dataset.name} has neither test nor validation; accepted: "
                    f"--split= one of {_splits(dataset)}")
  if split not in dataset.splits:
    raise UserError(f"--split={split}: data set {dataset.name} has no such split; accepted: "
                    f"{_splits(dataset)}")
  return split


def check_same(dataset: Any) -> None:
  """Raises UserError unless all processes read the same data set, wherever each has it."""
  levels = {split: zlib.crc32(dataset.levels(split).tobytes()) for split in dataset.splits}
  processes.same("data set", {"name": dataset.name, "splits": dataset.splits, "levels": levels})


def _splits(dataset: Any) -> str:
  return ", ".join(f"{name} ({count})" for name, count in dataset.splits.items())


def run(
  workdir: str, data: str | None = None, split: str | None = None, step: str | int = "best",
  out: str | None = None, once: bool = False,
) -> dict[str, Any]:
  """`medattn evaluate`: grades a split, writes the evaluation and prints it.

  The decision's thresholds are tuned on the data set's validation split, never on test; without
  one they are the checkpoint's (said on stderr).

  Args:
    workdir: of the run.
    data: another data set, by name or folder; the run's own by default.
    split: test by default, validation where there is none.
    step: "best", "last" or a number.
    out: the folder for the files; WORKDIR/evaluation by default.
    once: nothing is done again where these very weights are evaluated there already.

  Returns:
    What metrics.json holds.

  Raises:
    UserError: nothing was written.
  """
  place = pathlib.Path(out) if out else pathlib.Path(workdir) / "evaluation"
  files.check_folder(place)
  model = trained.open_workdir(workdir, step)
  dataset = open_data(model.config, data)
  split = choose_split(dataset, split)
  read = {split, "validation"} & set(dataset.splits)
  datasets.check_levels(dataset, sorted(read), model.config.model.num_classes)
  check_same(dataset)
  identity = {
    "data": dataset.name, "own_data": data is None, "split": split, "step": model.step,
    "phase": model.phase, "checkpoint_sha256": model.fingerprint,
    "bootstrap": model.config.evaluation.bootstrap}
  records = MetricsLog(model.workdir / "metrics.jsonl").read()
  if found := processes.from_first(_evaluated(place, identity) if once else None):
    console.say(f"step {model.step} is evaluated already: {place / 'metrics.json'}")
    if jax.process_index() == 0:
      files.write_all(place, {"training_curves.png": _curves(records, model.workdir)})
    return found
  table = graded(model.experiment, model.variables, dataset, split, model.config)
  tuning = tuning_of(model, dataset, split, table)
  if jax.process_index() == 0:
    found = identity | summarise(table, tuning, model)
    if "constants" in model.variables:
      weights = np.asarray(model.variables["constants"]["map"])
      found["attention"] = attention(weights, dataset.region)
    contents = {
      "predictions.csv": predictions_csv(table, found["thresholds"]).encode(),
      **_figures(table, found),
      "training_curves.png": _curves(records, model.workdir),
      "metrics.json": (json.dumps(found, indent=2, allow_nan=False) + "\n").encode(),
    }
    files.write_all(place, contents)
    _print(found, place, contents)
  return processes.from_first(found)


def _evaluated(place: pathlib.Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
  try:
    found = json.loads(files.read_bytes(place / "metrics.json"))
    there = (place / "predictions.csv").is_file()
    return found if there and {name: found[name] for name in identity} == identity else None
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return None


def tuning_of(
  model: trained.Trained, dataset: Any, split: str, table: Table
) -> tuple[Table | None, str, np.ndarray]:
  """What the decision's thresholds are tuned on, never test: for `rule`.

  Returns:
    (rows to tune on or None, where the thresholds come from, thresholds if none are tuned).
  """
  if model.thresholds is None:
    return None, model.thresholds_from, None
  if split == "validation":
    console.say("the thresholds are tuned on the validation split, which is what is evaluated: "
                "its kappa is optimistic")
    return table, "validation, the split evaluated", model.thresholds
  if dataset.splits.get("validation"):
    rows = graded(model.experiment, model.variables, dataset, "validation", model.config)
    return rows, "validation", model.thresholds
  console.say(f"data set {dataset.name} has no validation split: the thresholds are those of "
              f"{model.thresholds_from}")
  return None, model.thresholds_from, model.thresholds


def rule(
  names: Sequence[str], tuning: tuple[Table | None, str, np.ndarray], num_classes: int
) -> np.ndarray | None:
  """The thresholds for the sum of the stops `names`; None where the likeliest class decides."""
  tuned_on, _, thresholds = tuning
  if tuned_on is None or thresholds is None:
    return thresholds
  score = metrics.expected_grade(metrics.probabilities_of(_sum(tuned_on, names)))
  return metrics.tune_thresholds(score, tuned_on["level"], num_classes)


def summarise(
  table: Table, tuning: tuple[Table | None, str, np.ndarray], model: trained.Trained
) -> dict[str, Any]:
  """The figures of a graded split, of all that the phase answers and of each branch alone."""
  config = model.config
  classes = config.model.num_classes
  settings = {"bootstrap": config.evaluation.bootstrap, "seed": config.seed}

  final = rule(["logits"], tuning, classes)
  found = metrics.grading_metrics(
    table["level"], table["patient"], metrics.probabilities_of(table["logits"]), final, **settings)
  branches = {}
  for name, stops in models.ANSWERS[config.model.name].items():
    if all(stop in table for stop in stops):
      # The whole is what the model itself added up, to the last bit.
      stops = ("logits",) if all(y in stops for y in table if y.startswith("y_")) else stops
      whole = metrics.grading_metrics(
        table["level"], table["patient"], metrics.probabilities_of(_sum(table, stops)),
        rule(stops, tuning, classes), bootstrap=0)
      kept = ("quadratic_weighted_kappa", "kappa_argmax", "accuracy", "auc_referable", "thresholds")
      branches[name] = {key: whole[key] for key in kept}
  found = dict(found) | {"thresholds_from": tuning[1], "branches": branches}
  if "boxes" in table and any(len(boxes) for boxes in table["true_boxes"]):
    found["lesion_recall"] = lesion_recall(
      table["true_boxes"], table["boxes"], config.model.crop_size, config.data.full_size,
      config.seed)
  return found


def attention(weights: np.ndarray, region: np.ndarray | None) -> dict[str, float | None]:
  """Of a map float [H, W]: area, the share of pixels above one half; mean; and, where the set's
  region (bool [H, W]) is known, iou, their intersection over union with it."""
  attended = weights > 0.5
  iou = None
  if region is not None:
    iou = float((attended & region).sum() / (attended | region).sum())
  return {"area": float(attended.mean()), "mean": float(weights.mean()), "iou": iou}


def _sum(table: Table, names: Sequence[str]) -> np.ndarray:
  return np.sum([table[name] for name in names], axis=0, dtype=np.float32)


def lesion_recall(
  true_boxes: Sequence[np.ndarray], regions: np.ndarray, size: int, full_size: int, seed: int
) -> dict[str, float | int | None]:
  """How many lesions the regions find, beside as many random and best possible squares."""
  number = regions.shape[1]
  box, image = lesions.recall(true_boxes, regions, IOM)
  random = lesions.random_recall(true_boxes, number, size, full_size, threshold=IOM, seed=seed)
  best = lesions.best_recall(true_boxes, number, size, full_size, threshold=IOM)
  return {
    "box": box, "image": image, "iom": IOM, "boxes_per_image": number,
    "random_box": random[0], "random_image": random[1],
    "best_box": best[0], "best_image": best[1],
    "lesions": sum(map(len, true_boxes)), "images": sum(len(own) > 0 for own in true_boxes)}


def predictions_csv(table: Table, thresholds: Sequence[float]) -> str:
  """image,patient,eye,level,grade,score,p0,…: numbers as short as they read back exactly.

  Of the table's probabilities where it has them, of its logits else.
  """
  probabilities = table.get("probabilities")
  if probabilities is None:
    probabilities = metrics.probabilities_of(table["logits"])
  score = metrics.expected_grade(probabilities)
  grade = metrics.grades(probabilities, thresholds)
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["image", "patient", "eye", "level", "grade", "score"]
                  + [f"p{level}" for level in range(probabilities.shape[1])])
  writer.writerows(
    [*names, repr(float(own_score)), *(repr(float(p)) for p in row)]
    for *names, own_score, row in zip(
      table["image"], table["patient"], table["eye"], table["level"], grade, score, probabilities,
      strict=True))
  return text.getvalue()


def _figures(table: Table, found: Mapping[str, Any]) -> dict[str, bytes]:
  from medattn_jax.analysis import figures  # imports matplotlib

  probabilities, level = metrics.probabilities_of(table["logits"]), table["level"]
  about = f"{found['data']}, {found['split']} split, step {found['step']}"
  kappa = found["quadratic_weighted_kappa"]
  shown = "not defined" if kappa is None else f"{kappa:.3f}"
  curves = {
    "any sign (level ≥ 1)": metrics.roc(level >= 1, probabilities[:, 1:].sum(1)),
    "referable (level ≥ 2)": metrics.roc(level >= 2, probabilities[:, 2:].sum(1))}
  areas = dict(zip(curves, (found["auc_any"], found["auc_referable"]), strict=True))
  intervals = dict(zip(curves, (None, found["auc_referable_ci"]), strict=True))
  drawn = {
    "confusion_matrix.png": figures.confusion(
      np.array(found["confusion_matrix"]), title=f"{about}\nquadratic weighted kappa {shown}"),
    "roc.png": figures.roc(curves, areas, intervals, title=about),
    "reliability.png": figures.reliability(
      *metrics.reliability(probabilities, level), error=found["expected_calibration_error"],
      title=about)}
  return {name: figures.png(figure) for name, figure in drawn.items()}


def _curves(records: Sequence[Mapping[str, Any]], workdir: pathlib.Path) -> bytes:
  from medattn_jax.analysis import figures  # imports matplotlib

  return figures.png(figures.training_curves(records, title=f"training in {workdir.name}"))


def _print(found: Mapping[str, Any], place: pathlib.Path, contents: Mapping[str, bytes]) -> None:
  show = lambda value: "–" if value is None else f"{value:.3f}"
  table = rich.table.Table(show_header=bool(found["branches"]))
  table.add_column("")
  branches = {BRANCHES[name]: branch for name, branch in found["branches"].items()}
  for name in branches or ("",):
    table.add_column(name, justify="right")
  rows = {"quadratic weighted kappa": "quadratic_weighted_kappa", "accuracy": "accuracy",
          "AUC, referable": "auc_referable", "AUC, any": "auc_any"}
  for label, key in rows.items():
    figures = [branch.get(key) for branch in branches.values() or [found]]
    if any(figure is not None for figure in figures):
      table.add_row(label, *map(show, figures))
  recall = found.get("lesion_recall")
  if recall:
    blank = [""] * (len(branches) - 1)
    table.add_row("lesion recall (iom ≥ .3)", *blank, show(recall["box"]))
  output = rich.console.Console(highlight=False, markup=False, soft_wrap=True)
  output.print(f"{found['data']} · {found['split']} · {found['images']:,} photographs of "
               f"{found['patients']:,} patients · step {found['step']}")
  output.print(table)
  if found["kappa_ci"]:
    low, high = found["kappa_ci"]
    output.print(f"kappa {show(found['quadratic_weighted_kappa'])}, 95 % interval over patients "
                 f"{show(low)} to {show(high)}")
  if recall:
    output.print(
      f"lesions found by {recall['boxes_per_image']} regions: {show(recall['box'])} (random "
      f"{show(recall['random_box'])}, best possible {show(recall['best_box'])}); photographs with "
      f"at least one found: {show(recall['image'])}")
  if weighed := found.get("attention"):
    truth = "" if weighed["iou"] is None else f", IoU with the true region {show(weighed['iou'])}"
    output.print(f"attended: {weighed['area']:.1%} of the pixels{truth}")
  if found["thresholds"]:
    output.print("thresholds " + ", ".join(f"{value:.2f}" for value in found["thresholds"])
                 + f" from {found['thresholds_from']}")
  for name in contents:
    output.print(f"  {place / name}")
