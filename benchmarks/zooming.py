"""Does zooming pay? M-Net against Zoom-in-Net on the same data, over several seeds.

`python -m benchmarks.zooming [--seeds=0,1,2] [--workdir=runs/proof] [--least=0.02] [--json]`

Trains configs/proof_zoom.py once a seed, each in a workdir of its own; what is trained already is
not trained again, so the command may be stopped and run anew. Ends with a table, and exits with 1
where the mean gain in kappa is below --least.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

PAGE = "configs/proof_zoom.py"
ANSWERS = {"m_net": "M-Net", "m_a": "M + A", "zoom_in_net": "Zoom-in-Net"}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seeds", default="0,1,2", help="numbers, with commas between")
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/proof"))
  parser.add_argument("--least", type=float, default=0.02, help="gain in kappa that is asked for")
  parser.add_argument("--json", action="store_true", help="the JSON line alone")
  flags = parser.parse_args()
  rows = {seed: train(flags.workdir / f"seed_{seed}", seed)
          for seed in map(int, flags.seeds.split(","))}
  summary = summarise(rows)
  if not flags.json:
    print(table(rows, summary))
  print(json.dumps({"seeds": rows, **summary}, allow_nan=False))
  sys.exit(summary["gain"]["mean"] < flags.least)


def train(workdir: pathlib.Path, seed: int) -> dict[str, float]:
  """Trains or resumes one seed; {answer: kappa on the test split, "lesion_recall": …}."""
  subprocess.run(
    [sys.executable, "-m", "medattn_jax", "train", f"--config={PAGE}", f"--workdir={workdir}",
     f"--config.seed={seed}"],
    check=True, stdout=sys.stderr)
  metrics = json.loads((workdir / "evaluation" / "metrics.json").read_text())
  kappas = {
    name: metrics["branches"][name]["quadratic_weighted_kappa"] for name in ANSWERS}
  return kappas | {"lesion_recall": metrics["lesion_recall"]["box"]}


def summarise(rows: dict[int, dict[str, float]]) -> dict[str, dict[str, float]]:
  """Mean and standard deviation over the seeds of each figure, and of the gain by zooming."""
  columns = {name: [row[name] for row in rows.values()] for name in next(iter(rows.values()))}
  columns["gain"] = [row["zoom_in_net"] - row["m_net"] for row in rows.values()]
  return {
    name: {"mean": statistics.mean(values),
           "spread": statistics.stdev(values) if len(values) > 1 else 0.0}
    for name, values in columns.items()
  }


def table(rows: dict[int, dict[str, float]], summary: dict[str, dict[str, float]]) -> str:
  names = {**ANSWERS, "gain": "gain", "lesion_recall": "lesion recall"}
  lines = [f"{'kappa, test split':20}" + "".join(f"{title:>15}" for title in names.values())]
  for seed, row in rows.items():
    row = row | {"gain": row["zoom_in_net"] - row["m_net"]}
    lines.append(f"{f'seed {seed}':20}" + "".join(f"{row[name]:15.3f}" for name in names))
  figures = [f"{summary[name]['mean']:.3f} ± {summary[name]['spread']:.3f}" for name in names]
  lines.append(f"{'mean ± deviation':20}" + "".join(f"{text:>15}" for text in figures))
  return "\n".join(lines)


if __name__ == "__main__":
  main()
