"""Does a global attention pay? Its sources against no attention, over backbones and seeds.

`python -m benchmarks.global_attention [--size=full|small] [--config=configs/planted_region.py]
[--backbones=cnn,…] [--sources=none,free,bank-linear,bank-conv,batch,stats] [--seeds=0,1,2]
[--set=KEY=VALUE …] [--workdir=runs/global_attention] [--least-gain=0] [--least-iou=0.6] [--json]
[--plot=FILE]`

Trains the page once for each backbone, source and seed, each in a workdir of its own; what is
trained already is not trained again, so the command may be stopped and run anew. Where the images
are drawn, each seed draws a set with another region. A source is one of the page's, and for those
that classify pixels the classifier: bank:100-conv is 100 images of the bank, and convolutions.
--size=small, two minutes at most, shows how it goes: one seed and few steps, too few to judge by.

Ends with a table. Figures are those of the test split. The gain is in accuracy, over `none` of the
same backbone and seed; intervals are Student's, of 95 %, over seeds. Exits with 1 where a run
failed, where the lower end of bank-linear's gain is not above --least-gain, or where its mean
intersection over union with the true region is below --least-iou.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import rows

SIZES = {
  "small": {"sources": ["none", "bank-linear"], "seeds": [0],
            "workdir": pathlib.Path("runs/global_attention_small")},
  "full": {"sources": ["none", "free", "bank-linear", "bank-conv", "batch", "stats"],
           "seeds": [0, 1, 2], "workdir": pathlib.Path("runs/global_attention")},
}
FEW = (("phases.joint.steps", "140"), ("phases.frozen.steps", "40"))  # of --size=small
FIGURES = ("accuracy", "auc", "iou", "area")
WITHOUT = "none"  # what the others are held against
JUDGED = "bank-linear"  # of which --least-gain and --least-iou ask
NO_CLASSIFIER = ("none", "free")
DONE = "compared.json"  # in a cell's workdir: its config and figures, once it is evaluated


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/planted_region.py")
  parser.add_argument("--backbones", type=_words, help="with commas between; else the page's")
  parser.add_argument("--sources", type=_words, help="with commas between")
  parser.add_argument("--seeds", type=_numbers, help="with commas between")
  parser.add_argument("--workdir", type=pathlib.Path)
  parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", type=_pair, nargs="+",
                      action="extend", default=[], help="keys of the page, for all runs")
  parser.add_argument("--least-gain", type=float, help=f"that {JUDGED} must surely have")
  parser.add_argument("--least-iou", type=float, help=f"that {JUDGED} must have in the mean")
  flags = rows.parsed(parser, SIZES, usual="full")
  if flags.size == "small":
    flags.overrides = [*FEW, *flags.overrides]
  if flags.least_gain is not None and not {WITHOUT, JUDGED} <= set(flags.sources):
    rows.stop("global_attention", f"--least-gain asks for --sources={WITHOUT},{JUDGED}")
  if flags.least_iou is not None and JUDGED not in flags.sources:
    rows.stop("global_attention", f"--least-iou asks for --sources={JUDGED}")
  runs = plan(flags)
  outcomes: dict[tuple[str, str], dict[int, Any]] = {}
  for place, (cell, seed, *asked) in enumerate(runs, 1):
    name = f"[{place} of {len(runs)}] {cell[0]}, {cell[1]}, seed {seed}"
    outcomes.setdefault(cell, {})[seed] = train(folder(flags.workdir, cell, seed), name, *asked)
  cells = summarise(outcomes)
  about = {"page": flags.config, "set": dict(flags.overrides)}
  cells = [{"name": "global_attention", "config": about, **cell} for cell in cells]
  rows.say(cells, table(cells), flags.json)
  if flags.plot:
    plot(cells, flags.plot)
  missed = shortfalls(cells, flags.least_gain, flags.least_iou)
  for line in missed:
    print(line, file=sys.stderr)
  sys.exit(bool(missed))


def plan(flags: argparse.Namespace) -> list[tuple[tuple[str, str], int, list[str], dict]]:
  """All runs, a seed at a time: the cell (backbone, source), the seed, flags and whole config.

  Ends the program where a page would be refused, before anything is trained.
  """
  from medattn_jax import config as pages
  from medattn_jax.data import datasets
  from medattn_jax.errors import UserError

  runs = []
  try:
    page = pages.load_page(flags.config, flags.overrides)
    if page.model.name != "global_attention":
      raise UserError(f"--config={flags.config}: model.name = {page.model.name}; accepted: "
                      "global_attention")
    for seed in flags.seeds:
      for backbone in flags.backbones or [page.model.backbone]:
        for source in flags.sources:
          own = {**keys_of(source), "model.backbone": backbone, "seed": str(seed)}
          if page.data.name in datasets.DRAWN:
            own["data.synthetic.seed"] = str(seed)
          overrides = [*flags.overrides, *own.items()]
          whole = pages.to_dict(pages.load_page(flags.config, overrides))
          words = [f"--config={flags.config}", *(f"--config.{k}={v}" for k, v in overrides)]
          runs.append(((backbone, source), seed, words, whole))
  except UserError as error:
    rows.stop("global_attention", error)
  return runs


def keys_of(source: str) -> dict[str, str]:
  """The page's keys that a source's name stands for. Raises UserError for a name that means none.
  """
  from medattn_jax.errors import UserError

  kind, _, classifier = source.partition("-")
  if classifier and kind in NO_CLASSIFIER:
    raise UserError(f"--sources: {source}: {kind} classifies no pixels; accepted: {kind}")
  return {"attention.source": kind, "attention.classifier": classifier or "linear"}


def folder(workdir: pathlib.Path, cell: tuple[str, str], seed: int) -> pathlib.Path:
  backbone, source = cell
  return workdir / backbone / source.replace(":", "_") / f"seed_{seed}"


def train(
  workdir: pathlib.Path, name: str, flags: Sequence[str], config: Mapping[str, Any]
) -> dict[str, float | None] | str:
  """Trains or resumes one run: its figures on the test split, or in words why there are none."""
  config = json.loads(json.dumps(config))  # tuples are lists there, as in the file
  done = workdir / DONE
  if done.is_file() and (kept := json.loads(done.read_text()))["config"] == config:
    print(f"{name}: done before", file=sys.stderr)
    return kept["figures"]
  log = workdir.with_name(f"{workdir.name}.log")
  log.parent.mkdir(parents=True, exist_ok=True)
  print(f"{name}: training ({log})", file=sys.stderr, flush=True)
  start = time.monotonic()
  command = [sys.executable, "-m", "medattn_jax", "train", f"--workdir={workdir}", *flags]
  with (
    log.open("w") as file,
    subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as running,
  ):
    try:
      status = running.wait()
    except KeyboardInterrupt:
      running.wait()  # it was told too, and saves where it stands
      raise
  metrics = workdir / "evaluation" / "metrics.json"
  lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
  if status or not metrics.is_file():
    reason = f"exit status {status}: {lines[-1] if lines else 'no word'}"
    print(f"{name}: failed, {reason}", file=sys.stderr)
    return reason
  found = figures(json.loads(metrics.read_text()))
  done.write_text(json.dumps({"config": config, "figures": found}, indent=1))
  print(f"{name}: accuracy {found['accuracy']:.4f}, {time.monotonic() - start:.0f} s",
        file=sys.stderr, flush=True)
  return found


def figures(metrics: Mapping[str, Any]) -> dict[str, float | None]:
  """What is compared, of a metrics.json; None where it is not defined."""
  weighed = metrics.get("attention") or {}
  return {"accuracy": metrics["accuracy"], "auc": metrics["auc_any"],
          "iou": weighed.get("iou"), "area": weighed.get("area")}


def summarise(outcomes: Mapping[tuple[str, str], Mapping[int, Any]]) -> list[dict[str, Any]]:
  """Of each cell (backbone, source) {seed: figures, or why the run failed}: a line's dict.

  Holds the seeds' figures, the mean and interval of each figure, and of the gain over `none` of the
  same backbone and seed (in accuracy; gain_auc, in the AUC), with its verdict in words.
  """
  cells = []
  for (backbone, source), seeds in outcomes.items():
    known = {seed: row for seed, row in seeds.items() if not isinstance(row, str)}
    line: dict[str, Any] = {
      "backbone": backbone, "source": source, "seeds": known,
      "failed": {seed: row for seed, row in seeds.items() if isinstance(row, str)}}
    line |= {name: interval([row[name] for row in known.values()]) for name in FIGURES}
    others = outcomes.get((backbone, WITHOUT), {})
    shared = [seed for seed in known if not isinstance(others.get(seed, ""), str)]
    if source != WITHOUT:
      for key, name in (("gain", "accuracy"), ("gain_auc", "auc")):
        pairs = [(known[seed][name], others[seed][name]) for seed in shared]
        whole = all(None not in pair for pair in pairs)
        line[key] = interval([own - other for own, other in pairs] if whole else [])
      line["verdict"] = verdict(line["gain"])
    cells.append(line)
  return cells


def interval(values: Sequence[float | None]) -> dict[str, Any]:
  """{mean, low, high, count}: the mean and its 95 % interval by Student's t.

  The interval is None for fewer than two values, all is where one value is undefined.
  """
  if not values or None in values:
    return {"mean": None, "low": None, "high": None, "count": 0}
  count, mean = len(values), statistics.fmean(values)
  if count < 2:
    return {"mean": mean, "low": None, "high": None, "count": 1}
  from scipy import stats

  reach = stats.t.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count)
  return {"mean": mean, "low": mean - reach, "high": mean + reach, "count": count}


def verdict(gain: Mapping[str, Any]) -> str:
  """What the interval of a gain says: better, worse, no gain (it holds zero), or not known."""
  if gain["low"] is None:
    return "not known"
  return "better" if gain["low"] > 0 else "worse" if gain["high"] < 0 else "no gain"


def shortfalls(
  cells: Sequence[Mapping[str, Any]], least_gain: float | None, least_iou: float | None
) -> list[str]:
  """Every run that failed, and every threshold that is missed, in words."""
  found = []
  for cell in cells:
    name = f"{cell['backbone']}, {cell['source']}"
    found += [f"{name}, seed {seed}: {reason}" for seed, reason in cell["failed"].items()]
    if cell["source"] != JUDGED:
      continue
    low, iou = cell.get("gain", {}).get("low"), cell["iou"]["mean"]
    if least_gain is not None and (low is None or not low > least_gain):
      found.append(f"{name}: the lower end of the gain, {_signed(low)}, is not above {least_gain}")
    if least_iou is not None and (iou is None or iou < least_iou):
      found.append(f"{name}: the mean intersection over union, {_plain(iou)}, is below {least_iou}")
  return found


def table(cells: Sequence[Mapping[str, Any]]) -> str:
  """The lines to read: each figure as mean and half the interval, the gain as its interval."""
  wide = max(len(word) for cell in cells for word in (cell["backbone"], cell["source"], "backbone"))
  heads = ("accuracy", "AUC", "IoU", "area")
  lines = [f"{'backbone':{wide}}  {'source':{wide}}{'seeds':>7}"
           + "".join(f"{head:>16}" for head in heads) + f"{'gain [95 % interval]':>30}"]
  for cell in cells:
    there, failed = len(cell["seeds"]), len(cell["failed"])
    seeds = f"{there}/{there + failed}" if failed else f"{there}"
    line = f"{cell['backbone']:{wide}}  {cell['source']:{wide}}{seeds:>7}"
    line += "".join(f"{_within(cell[name]):>16}" for name in FIGURES)
    if gain := cell.get("gain"):
      around = f"[{_signed(gain['low'])}, {_signed(gain['high'])}]"
      line += f"{_signed(gain['mean']) + ' ' + around:>30}  {cell['verdict']}"
      if gain["count"] < there:
        line += f" ({gain['count']} pairs)"
    lines.append(line)
  lines.append(f"mean ± half of its 95 % interval over seeds; gain: accuracy over {WITHOUT} of the "
               "same backbone and seed")
  return "\n".join(lines)


def plot(cells: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Accuracy by source, a panel for each backbone: every seed a point, mean and interval."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  backbones = list(dict.fromkeys(cell["backbone"] for cell in cells))
  figure, panels = pyplot.subplots(
    1, len(backbones), sharey=True, squeeze=False, layout="constrained",
    figsize=(1.5 + 3.2 * len(backbones), 3.6))
  for panel, backbone in zip(panels[0], backbones, strict=True):
    own = [cell for cell in cells if cell["backbone"] == backbone]
    for number, seed in enumerate(sorted({seed for cell in own for seed in cell["seeds"]})):
      there = [(at, cell["seeds"][seed]["accuracy"]) for at, cell in enumerate(own)
               if seed in cell["seeds"]]
      panel.plot(*zip(*there, strict=True), "o-", color="0.65", linewidth=0.6, markersize=3,
                 label=None if number else "each seed")
    for at, cell in enumerate(own):
      middle = cell["accuracy"]
      if middle["mean"] is None:
        continue
      reach = 0 if middle["low"] is None else middle["high"] - middle["mean"]
      panel.errorbar(at + 0.12, middle["mean"], reach, fmt="s", color="C0", markersize=4, capsize=3,
                     label=None if at else "mean, 95 % interval")
    panel.set_xticks(range(len(own)), [cell["source"] for cell in own], rotation=40, ha="right")
    panel.set_title(backbone)
    panel.margins(x=0.3)
    panel.grid(axis="y", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
  figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                frameon=False, fontsize=8)
  panels[0][0].set_ylabel("accuracy, test split")
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def _within(of: Mapping[str, Any]) -> str:
  if of["low"] is None:
    return _plain(of["mean"])
  return f"{of['mean']:.3f} ± {of['high'] - of['mean']:.3f}"


def _plain(value: float | None) -> str:
  return "–" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
  return "–" if value is None else f"{value:+.3f}"


def _words(text: str) -> list[str]:
  """Words with commas between, each once."""
  found = list(dict.fromkeys(word.strip() for word in text.split(",")))
  if "" in found:
    raise argparse.ArgumentTypeError(f"{text!r} has an empty word; accepted: words, with commas")
  return found


def _numbers(text: str) -> list[int]:
  if not all(word.isdecimal() for word in _words(text)):
    raise argparse.ArgumentTypeError(f"{text!r}; accepted: numbers from 0 on, with commas")
  return [int(word) for word in _words(text)]


def _pair(text: str) -> tuple[str, str]:
  key, equals, value = text.partition("=")
  if not equals or not key:
    raise argparse.ArgumentTypeError(f"{text!r}; accepted: KEY=VALUE, a key of the page")
  return key, value


if __name__ == "__main__":
  main()
