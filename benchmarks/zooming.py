"""Does zooming pay? M-Net against Zoom-in-Net on the same data, over several seeds.

`python -m benchmarks.zooming [--size=full|small] [--seeds=0,1,2] [--workdir=runs/proof]
[--least=0.02] [--json] [--plot=FILE]`

Trains configs/proof_zoom.py once a seed, each in a workdir of its own; what is trained already is
not trained again, so the command may be stopped and run anew. Ends with a table, and exits with 1
where the mean gain in kappa is below --least. --size=small takes configs/smoke.py and one seed: two
minutes at most to see how it goes, with networks that have learned nothing and are not judged.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import rows

SIZES = {
  "small": {"page": "configs/smoke.py", "seeds": "0", "least": -2.0,
            "workdir": pathlib.Path("runs/zooming_small")},
  "full": {"page": "configs/proof_zoom.py", "seeds": "0,1,2", "least": 0.02,
           "workdir": pathlib.Path("runs/proof")},
}
ANSWERS = {"m_net": "M-Net", "m_a": "M + A", "zoom_in_net": "Zoom-in-Net"}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seeds", help="numbers, with commas between")
  parser.add_argument("--workdir", type=pathlib.Path)
  parser.add_argument("--least", type=float, help="gain in kappa that is asked for")
  parser.set_defaults(page=None)
  flags = rows.parsed(parser, SIZES, usual="full")
  if not all(word.isdecimal() for word in flags.seeds.split(",")):
    rows.stop("zooming", f"--seeds={flags.seeds}; accepted: numbers from 0 on, with commas")
  seeds = {seed: train(flags.page, flags.workdir / f"seed_{seed}", seed)
           for seed in map(int, flags.seeds.split(","))}
  found = {"name": "zooming", "config": {"page": flags.page}, "seeds": seeds, **summarise(seeds)}
  rows.say([found], table(found), flags.json)
  if flags.plot:
    plot(found, flags.plot)
  sys.exit(found["gain"]["mean"] < flags.least)


def train(page: str, workdir: pathlib.Path, seed: int) -> dict[str, float]:
  """Trains or resumes one seed; {answer: kappa on the test split, "lesion_recall": …}."""
  done = subprocess.run(
    [sys.executable, "-m", "medattn_jax", "train", f"--config={page}", f"--workdir={workdir}",
     f"--config.seed={seed}"],
    check=False, stdout=sys.stderr)
  if done.returncode:  # it has said why
    sys.exit(done.returncode)
  metrics = json.loads((workdir / "evaluation" / "metrics.json").read_text())
  kappas = {
    name: metrics["branches"][name]["quadratic_weighted_kappa"] for name in ANSWERS}
  return kappas | {"lesion_recall": metrics["lesion_recall"]["box"]}


def summarise(seeds: Mapping[int, Mapping[str, float]]) -> dict[str, dict[str, float]]:
  """Mean and standard deviation over the seeds of each figure, and of the gain by zooming."""
  columns = {name: [row[name] for row in seeds.values()] for name in next(iter(seeds.values()))}
  columns["gain"] = [row["zoom_in_net"] - row["m_net"] for row in seeds.values()]
  return {
    name: {"mean": statistics.mean(values),
           "spread": statistics.stdev(values) if len(values) > 1 else 0.0}
    for name, values in columns.items()
  }


def table(found: Mapping[str, Any]) -> str:
  names = {**ANSWERS, "gain": "gain", "lesion_recall": "lesion recall"}
  lines = []
  for seed, row in found["seeds"].items():
    row = row | {"gain": row["zoom_in_net"] - row["m_net"]}
    lines.append((f"seed {seed}", *(f"{row[name]:.3f}" for name in names)))
  figures = [f"{found[name]['mean']:.3f} ± {found[name]['spread']:.3f}" for name in names]
  lines.append(("mean ± deviation", *figures))
  return rows.table(("kappa, test split", *names.values()), lines)


def plot(found: Mapping[str, Any], path: pathlib.Path) -> None:
  """Kappa of each answer: a line for each seed, and their mean."""

  def draw(panel):
    for seed, row in found["seeds"].items():
      panel.plot(list(ANSWERS.values()), [row[name] for name in ANSWERS], "o-", color="0.6",
                 linewidth=1, markersize=4, label=f"seed {seed}")
      panel.annotate(f"{seed}", (2, row["zoom_in_net"]), (6, 0), textcoords="offset points",
                     va="center", fontsize=8, color="0.4")
    panel.plot(list(ANSWERS.values()), [found[name]["mean"] for name in ANSWERS], "s",
               color="#4c78a8", markersize=8, label="mean")
    panel.set_ylabel("quadratic weighted kappa, test split")
    panel.margins(x=0.15)
    panel.grid(axis="y", alpha=0.3)
    handles, labels = panel.get_legend_handles_labels()
    panel.legend([handles[0], handles[-1]], ["each seed", labels[-1]], frameon=False, fontsize=8)
    panel.set_title(f"{found['config']['page']}, gain {found['gain']['mean']:+.3f} ± "
                    f"{found['gain']['spread']:.3f}", fontsize=10)

  rows.figure(path, 4.6, 3.6, draw)


if __name__ == "__main__":
  main()
