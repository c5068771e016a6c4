"""Commands and flags. A user's mistake is one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from medattn_jax import console, studies
from medattn_jax.errors import UserError
from medattn_jax.signals import Stopped

SMALLER = "accepted: a smaller data.batch_size, evaluation.batch_size or data.full_size"


class Parser(argparse.ArgumentParser):
  """Answers a wrong flag with one line that names the flags there are."""

  def error(self, message: str) -> NoReturn:
    fail(f"{message} (see {self.prog} --help)")

  def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
    leave(status)  # after --help


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs one command and exits: 0, 2 for a user's mistake, 128 + n when signal n ended it."""
  lasting_streams()
  signal.signal(signal.SIGTERM, stop)
  quiet_libraries()
  parser = make_parser()
  known, rest = parser.parse_known_args(arguments)
  try:
    os.getcwd()
  except OSError as error:  # removed under the shell that is still in it
    fail(f"the current folder: {(error.strerror or str(error)).lower()}; accepted: one that is "
         "there")
  try:
    known.run(known, rest)
  except UserError as error:
    fail(str(error))
  except Stopped as stopped:
    leave(stopped.status, f"stopped by {stopped}")
  except KeyboardInterrupt:
    leave(130, "stopped by SIGINT")
  except MemoryError as error:
    fail(f"out of memory: {error}; {SMALLER}")
  except OSError as error:
    # Disks fill and permissions lack anywhere; what is no such matter is ours to mend.
    if error.errno is None or not (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
      crash(error)
    fail(f"{error.filename or 'output'}: {os.strerror(error.errno)}")
  except RuntimeError as error:
    if not str(error).startswith("RESOURCE_EXHAUSTED"):  # JAX's word for a device's memory
      crash(error)
    fail(f"out of memory: {str(error).splitlines()[0]}; {SMALLER}")
  except Exception as error:
    crash(error)
  leave(0)


def make_parser() -> Parser:
  parser = Parser(
      prog="medattn",
      description="Grades retinal photographs and shows why. For research; no medical device.",
      allow_abbrev=False,
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

  def command(name, run, help):
    made = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    made.set_defaults(run=run)
    return made

  add = command("train", train, "train a config page, or resume it, in a workdir")
  add.add_argument("--config", required=True, metavar="F", help="a page such as configs/demo.py")
  add.add_argument("--workdir", required=True, metavar="D", help="where the run lives")
  add_processes(add)
  add.epilog = "--config.KEY=VALUE changes a key of the page, such as --config.data.batch_size=8"

  add = command("evaluate", evaluate, "grade a split and write metrics, predictions and figures")
  add.add_argument("--workdir", required=True, metavar="D")
  add.add_argument("--data", metavar="NAME|DIR", help="another data set than the run's own")
  add.add_argument("--split", metavar="SPLIT", help="test; validation where there is no test")
  add.add_argument("--step", default="best", metavar="N|best|last")
  add.add_argument("--out", metavar="DIR", help="instead of WORKDIR/evaluation")
  add_processes(add)

  add = command("explain", explain, "draw attention maps, zoomed regions and boxes of photographs")
  add.add_argument("--workdir", required=True, metavar="D")
  add.add_argument("--data", metavar="NAME|DIR", help="another data set than the run's own")
  add.add_argument("--split", metavar="SPLIT", help="test; validation where there is no test")
  add.add_argument("--out", metavar="DIR", help="instead of WORKDIR/explanations")
  add.add_argument("--limit", type=int, default=16, metavar="N", help="how many photographs")

  add = command("predict", predict, "grade image files or folders of them")
  add.add_argument("--workdir", required=True, metavar="D")
  add.add_argument("images", nargs="+", metavar="IMAGE")
  add.add_argument("--out", metavar="F.csv", help="instead of standard output")

  add = command("export", export, "write a model as a bundle that needs JAX and safetensors alone")
  add.add_argument("--workdir", required=True, metavar="D")
  add.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
  add.add_argument("--step", default="best", metavar="N|best|last")

  add = command("import-weights", import_weights, "make published PyTorch weights of a backbone "
                "ready for model.init_from")
  add.add_argument("--model", required=True, metavar="NAME", help="the backbone, such as resnet50")
  add.add_argument("--weights", required=True, metavar="FILE", help=".safetensors, or .pth, .pt, "
                   ".bin, which PyTorch reads (as tensors alone)")
  add.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
  add.add_argument("--mean", metavar="R,G,B", help="of the input that the weights were trained "
                   "with, 0 to 1; as usual for the model by default")
  add.add_argument("--std", metavar="R,G,B")

  add = command("prepare", prepare, "make a data set of a raw one")
  add.add_argument("--source", required=True, metavar="S", help="csv: photographs and a "
                   "labels.csv; npz: arrays as MedMNIST has them; fer2013: its fer2013.csv; "
                   "eyepacs, messidor, messidor2, idrid, aptos, ddr, deepdrid: as published")
  add.add_argument("--input", required=True, metavar="DIR", help="or the .npz, the fer2013.csv")
  add.add_argument("--data-dir", metavar="DIR", help="where the data set is to be")
  add.add_argument("--full-size", type=int, metavar="PIXELS",
                   help="of the stored photographs; 1230, and with npz and fer2013 their own")
  add.add_argument("--frame", metavar="cropped|whole", help="cropped: each photograph by its own "
                   "black border, for fundus photographs; whole: as it is, for aligned images")
  add.add_argument("--workers", type=int, metavar="N", help="processes; the cores by default")
  add.add_argument("--seed", type=int, default=0, metavar="N", help="of the split of the patients")
  add.add_argument("--check", action="store_true", help="only say what there is, writing nothing")
  add.add_argument("--drop-duplicates", action="store_true", help="keep one of photographs that "
                   "are the same, where it is tested on; else two splits must not share one")

  add = command("decode", decode, "keep a page's photographs decoded, for hosts with few cores")
  add.add_argument("--config", required=True, metavar="F", help="a page such as configs/demo.py")
  add.add_argument("--splits", metavar="SPLIT,…", help="all of the data set by default")
  add.epilog = "--config.KEY=VALUE changes a key of the page, such as --config.data.full_size=800"

  add = command("study", study, "ask something of trained models: medattn study --help")
  names = add.add_subparsers(required=True, metavar="NAME", dest="study", parser_class=Parser)
  for name, (help, options) in studies.STUDIES.items():
    add = names.add_parser(name, help=help, description=help, allow_abbrev=False)
    for flag, option in options.items():
      add.add_argument(flag, **option)

  add = command("plan", plan, "reckon what a page would take on chips that need not be here: "
                "memory, images/s, hours")
  add.add_argument("--config", required=True, metavar="F", help="a page such as configs/demo.py")
  add.add_argument("--target", required=True, metavar="T", help="v5e, v5p, v6e, h100 or h200, "
                   "alone or with a topology (v5e:2x4, h200:8); cpu:8; here")
  add.epilog = "--config.KEY=VALUE changes a key of the page, such as --config.data.batch_size=8"

  command("doctor", doctor, "show versions, devices, a matmul rate and advice")
  return parser


def add_processes(command: argparse.ArgumentParser) -> None:
  command.add_argument(
      "--coordinator",
      metavar="HOST:PORT|auto",
      help="one of several processes: where process 0 listens; auto on TPU pods, Slurm, Open MPI",
  )
  command.add_argument("--processes", type=int, metavar="N", help="how many there are")
  command.add_argument("--process", type=int, metavar="I", help="this one's number, from 0")


def train(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  from medattn_jax import config

  page = config.load_page(flags.config, overrides(rest))
  from medattn_jax import processes

  processes.start(flags.coordinator, flags.processes, flags.process)
  from medattn_jax import train

  try:
    train.run(page, flags.workdir)
  except Stopped as stopped:
    print(f"medattn: stopped by {stopped}; the same command goes on", file=sys.stderr)
    leave(stopped.status, f"stopped by {stopped}")


def evaluate(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  refuse(rest)
  from medattn_jax import processes

  processes.start(flags.coordinator, flags.processes, flags.process)
  from medattn_jax import evaluate

  evaluate.run(flags.workdir, flags.data, flags.split, flags.step, flags.out)


def explain(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  refuse(rest)
  from medattn_jax import explain

  explain.run(flags.workdir, flags.data, flags.split, flags.out, flags.limit)


def predict(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  refuse(rest)
  from medattn_jax import predictor

  predictor.run(flags.workdir, flags.images, flags.out)


def export(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  refuse(rest)
  from medattn_jax import export

  export.run(flags.workdir, flags.out, flags.step)


def import_weights(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  refuse(rest)
  from medattn_jax import import_weights

  import_weights.run(flags.model, flags.weights, flags.out, flags.mean, flags.std)


def prepare(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  refuse(rest)
  if flags.check:
    from medattn_jax.data import check

    check.check(
        flags.source,
        flags.input,
        flags.data_dir,
        frame=flags.frame,
        workers=flags.workers,
        seed=flags.seed,
        drop_duplicates=flags.drop_duplicates,
    )
    return
  if not flags.data_dir:
    raise UserError("--data-dir is missing; accepted: the folder where the data set is to be, or "
                    "--check, which makes none")
  from medattn_jax.data import prepare

  prepare.prepare(
      flags.source,
      flags.input,
      flags.data_dir,
      full_size=flags.full_size,
      frame=flags.frame,
      workers=flags.workers,
      seed=flags.seed,
      drop_duplicates=flags.drop_duplicates,
  )


def decode(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  from medattn_jax import decode

  decode.run(flags.config, flags.splits, overrides(rest))


def study(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  refuse(rest)
  _, options = studies.STUDIES[flags.study]
  names = [flag.removeprefix("--").replace("-", "_") for flag in options]
  studies.load(flags.study).run(**{name: getattr(flags, name) for name in names})


def doctor(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  refuse(rest)
  from medattn_jax import doctor

  doctor.run()


def plan(flags: argparse.Namespace, rest: Sequence[str]) -> None:
  from medattn_jax import plan

  plan.run(flags.config, flags.target, overrides(rest))


def overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
  """(key, value) of each --config.KEY=VALUE or --config.KEY VALUE; anything else is refused."""
  found, words = [], list(rest)
  while words:
    word = words.pop(0)
    if not word.startswith("--config."):
      refuse([word])
    key, equals, value = word.removeprefix("--config.").partition("=")
    if not equals:
      if not words or words[0].startswith("--"):
        raise UserError(f"{word}: has no value; accepted: {word}=VALUE")
      value = words.pop(0)
    found.append((key, value))
  return found


def refuse(rest: Sequence[str]) -> None:
  """Raises UserError for an argument that no command knows."""
  if rest:
    raise UserError(f"unknown argument {rest[0]}; accepted: the flags of medattn COMMAND --help")


def stop(number: int, frame: FrameType | None) -> NoReturn:
  """Ends any command as its finally clauses do; a training has its own way."""
  raise Stopped(number)


def quiet_libraries() -> None:
  """Before TensorFlow and JAX start: only their errors are of use to a user."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def fail(message: str) -> NoReturn:
  message = console.plain(" ".join(message.split()))
  print(f"medattn: error: {message}", file=sys.stderr)
  leave(2, message)


def crash(error: Exception) -> NoReturn:
  """Shows the traceback of what is ours to mend; another process that is gone is the user's."""
  if (run := _of_several()) and (lost := run.why_lost(error)):
    fail(f"{lost}; the same commands go on")
  traceback.print_exception(error)
  leave(1)


def _of_several() -> Any:
  """The module that speaks with the other processes, where the run has got as far."""
  return sys.modules.get("medattn_jax.processes")


def leave(status: int, why: str = "") -> NoReturn:
  """Exits without waiting for library threads that may be compiling or reading still."""
  with contextlib.suppress(OSError, RuntimeError):  # a signal may come while one is written to
    sys.stderr.flush()
  try:
    sys.stdout.flush()
  except (OSError, RuntimeError) as error:
    if not status:
      print(f"medattn: error: standard output: {error}", file=sys.stderr)
    status = status or 2
  if run := _of_several():
    run.end(status, why)
  os._exit(status)


class _Lasting(io.FileIO):
  """A stream whose reader may leave, as `| head` and a closed terminal do: the work goes on."""

  def write(self, content: Any) -> int | None:
    try:
      return super().write(content)
    except OSError as error:
      if error.errno not in (errno.EPIPE, errno.EIO):
        raise
      return len(content)


def lasting_streams() -> None:
  """Standard streams that are there, opened or not, and outlive their readers."""
  while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass  # or the next file to be opened would be written what is said
  os.close(spare)
  for name, number in (("stdout", 1), ("stderr", 2)):
    old = getattr(sys, name)
    stream = io.TextIOWrapper(
        io.BufferedWriter(_Lasting(number, "w", closefd=False)),
        encoding=getattr(old, "encoding", "utf-8"),
        errors="backslashreplace",  # whatever is in a name
        line_buffering=True,
    )
    setattr(sys, name, stream)
