"""The `lmops` command: run a system or any gin file, show a configuration, use published models.

Nothing heavy is imported before the arguments are understood: `lmops --help` and `lmops list` load
neither jax nor TensorFlow.
"""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import lmops_jax
from lmops_jax.commands import imagine as imagine_command
from lmops_jax.commands import models as model_commands
from lmops_jax.commands import plans as plan_commands
from lmops_jax.commands import promptist as promptist_commands
from lmops_jax.commands import prototypes as prototypes_commands
from lmops_jax.commands import socratic as socratic_commands
from lmops_jax.commands.demo import command as demo_commands
from lmops_jax.commands.serve import command as serve_commands
from lmops_jax.config import gin_files, refusals
from lmops_jax.mesh import processes

_COMMANDS = {
  "run": "run gin files",
  "show": "print the resolved configuration of a system or of gin files, and run nothing",
  "list": "list the systems and the gin files, or the tasks of lmops score",
}
_EPILOG = """\
bindings:
  --gin.NAME=VALUE        set a macro or a parameter, for example --gin.TRAIN_STEPS=400,
                          --gin.OPTIMIZER='@optim.sgd()', --gin.optim.sgd.learning_rate=0.1;
                          strings keep their quotes: --gin.STAGES='["select"]'

examples:
  lmops pds
  lmops pds --workdir /tmp/pds --gin.TRAIN_STEPS=400
  lmops learning-law evaluate --policy lmops_runs/learning_law/policy/clean/projected/seed0
  lmops run gin/pds/smoke.gin --workdir /tmp/smoke
  lmops show pds
  lmops plan pds
  lmops generate --model MODEL --prompt "The capital of France is"
  lmops promptist rewrite --model POLICY --prompt "a cat in the rain"

to read: the README.md of each system, whose paths lmops list shows
"""


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    raise _UsageError(message)


class _UsageError(ValueError):
  pass


_ACTIONS = {  # of systems, which have options of their own
  (of.SYSTEM, action): parts for of in (promptist_commands, prototypes_commands, socratic_commands)
  for action, parts in of.ACTIONS.items()
}


def _split_bindings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Takes `--gin.NAME=VALUE` and `--gin_import MODULE` out of the arguments, in order."""
  rest, bindings = [], []
  arguments = iter(argv)
  for argument in arguments:
    if argument.startswith("--gin."):
      name, equals, value = argument.removeprefix("--gin.").partition("=")
      if not equals:
        raise _UsageError(f"{argument} has no value; write {argument}=VALUE.")
      bindings.append(f"{name} = {value}")
    elif argument == "--gin_import" or argument.startswith("--gin_import="):
      module = argument.partition("=")[2] or next(arguments, "")
      bindings.append(f"import {module}")
    else:
      rest.append(argument)
  return rest, bindings


def _parser(systems: Sequence[str]) -> argparse.ArgumentParser:
  parser = _Parser(
    prog="lmops", description="Research systems for language models, launched from gin files.",
    epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  parser.add_argument("--version", action="version", version=f"lmops_jax {lmops_jax.__version__}")
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

  def add(name: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                  epilog=_EPILOG, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--traceback", action="store_true", help="show where an error came from")
    return command

  def add_gin(command: argparse.ArgumentParser) -> None:
    command.add_argument("--gin_file", action="append", default=[], metavar="FILE",
                         help="a further gin file; may be given several times")
    command.add_argument("--gin_import", metavar="MODULE",
                         help="import a module that registers components of yours")

  def add_workdir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workdir", metavar="DIR",
                         help="where the stages write and resume (default lmops_runs/NAME)")

  for system in systems:
    command = add(system, f"run gin/{gin_files.system_file(system)}")
    command.add_argument("action", nargs="?", default="default", metavar="ACTION",
                         help="another gin file of the system, such as smoke (default: default); "
                              "a macro NAME that it requires is also the option --name VALUE")
    add_gin(command)
    add_workdir(command)
  for name, text in _COMMANDS.items():
    command = add(name, text)
    if name == "list":
      command.add_argument("what", nargs="?", choices=("tasks",), metavar="tasks",
                           help="the named tasks of lmops score instead")
      continue
    command.add_argument("files", nargs="*", metavar="FILE" if name == "run" else "SYSTEM_OR_FILE")
    add_gin(command)
    if name == "run":
      add_workdir(command)
  options = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
  plan_commands.add_parsers(commands, options, add_gin)
  model_commands.add_parsers(commands, options)
  imagine_command.add_parsers(commands, options)
  demo_commands.add_parsers(commands, options)
  serve_commands.add_parsers(commands, options)
  return parser


def _files(arguments: argparse.Namespace, systems: Sequence[str]) -> list[str]:
  if arguments.command in systems:
    named = [gin_files.system_file(arguments.command, arguments.action)]
  else:
    named = [gin_files.system_file(n) if n in systems else n for n in arguments.files]
  files = named + arguments.gin_file
  if not files:
    raise _UsageError(f"lmops {arguments.command} was given no gin file; name one, such as "
                      f"lmops {arguments.command} pds/smoke.gin (lmops list shows all).")
  return files


def _required_options(options: Sequence[str], file: str) -> list[str]:
  """Bindings from `--name VALUE` for the macros that a gin file requires; refuses other options."""
  names = {f"--{name.lower().replace('_', '-')}": name
           for name in gin_files.required(gin_files.find(file))}
  bindings, rest = [], iter(options)
  for option in rest:
    flag, equals, value = option.partition("=")
    if flag not in names:
      known = [*names, "--workdir", "--gin_file", "--gin_import", "--traceback"]
      raise _UsageError(f"there is no option {flag!r}{refusals.nearest(flag, known)}")
    if not equals:
      value = next(rest, None)
      if value is None:
        raise _UsageError(f"{flag} has no value; write {flag} VALUE.")
    bindings.append(f"{names[flag]} = {value!r}")
  return bindings


def _default_workdir(file: Path) -> Path:
  """`lmops_runs/pds` for gin/pds/default.gin, `pds-smoke` for smoke.gin, `mine` for mine.gin."""
  name = gin_files.display(file)
  if name.startswith("gin/"):
    name = "-".join(Path(name).parts[1:])
  return Path("lmops_runs") / Path(name).stem.removesuffix("-default")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns its exit code.

  It is 0, or 2 for an error, 75 if another process of the job has gone, 130 or 143 if stopped.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  show_traceback = "--traceback" in argv
  try:
    processes.handle_sigterm()
    return _dispatch(argv)
  except KeyboardInterrupt:
    return _stopped("interrupted", 130)
  except processes.Terminated:
    return _stopped("terminated", 143)
  except BrokenPipeError:  # the reader of our output went away, as `head` does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
  except Exception as error:
    if show_traceback:
      traceback.print_exc()
    text, code = _one_line(error), 2
    if processes.is_lost_peer(error):
      code = 75  # EX_TEMPFAIL: the same command may succeed
      text = ("another process of this job has ended, see its output; run the same command again "
              f"on all hosts to continue where it stopped ({text[:200]})")
    print(f"lmops: error: {text}", file=sys.stderr, flush=True)
    if _is_one_of_several(argv):
      from lmops_jax.mesh import agreement
      agreement.refuse_before_joining(text)
    processes.leave_others(code)
    return code


def _is_one_of_several(argv: Sequence[str]) -> bool:
  """Whether this run belongs to a job of several processes, which this one has not joined."""
  command = next((argument for argument in argv if not argument.startswith("-")), None)
  if processes.is_joined() or command not in ("run", *gin_files.systems()):
    return False
  with contextlib.suppress(ValueError):
    return processes.are_expected(os.environ)
  return False


def _stopped(how: str, code: int) -> int:
  print(f"lmops: {how}; run the same command again to continue where it stopped.",
        file=sys.stderr)
  return code


def _one_line(error: Exception) -> str:
  """An error's stage, its type if that is not a plain one, and its message."""
  text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error)
                  .split()) or "no message"
  stage = "".join(f"{note.removeprefix('in ')}: " for note in getattr(error, "__notes__", ())
                  if note.startswith("in stage "))
  if isinstance(error, ValueError | OSError | RuntimeError | FloatingPointError):
    return stage + text
  return f"{stage}{type(error).__name__}: {text} (--traceback shows where)"


def _dispatch(argv: list[str]) -> int:
  rest, bindings = _split_bindings(argv)
  if tuple(rest[:2]) in _ACTIONS:
    return _act(*rest[:2], rest[2:], bindings)
  systems = gin_files.systems()
  names = [*systems, *_COMMANDS, *plan_commands.COMMANDS, *model_commands.COMMANDS,
           *imagine_command.COMMANDS, *demo_commands.COMMANDS, *serve_commands.COMMANDS]
  command = next((argument for argument in rest if not argument.startswith("-")), None)
  if command is not None and command not in names:
    if command.endswith(".gin"):
      raise _UsageError(f"{command!r} is not a command; to run that file, write lmops run "
                        f"{command}.")
    raise _UsageError(f"there is no system or command {command!r}"
                      f"{refusals.nearest(command, names)}")
  parser = _parser(systems)
  arguments, options = parser.parse_known_args(rest)
  if arguments.command in systems:
    bindings += _required_options(
      options, gin_files.system_file(arguments.command, arguments.action))
  elif options:
    parser.error(f"unrecognized arguments: {' '.join(options)}")
  if arguments.command == "list":
    if bindings:
      raise _UsageError("lmops list takes no bindings; they belong to a run.")
    if arguments.what == "tasks":
      from lmops_jax.data.tasks import table  # loads neither jax nor TensorFlow
      print(table.table())
    else:
      print(_listing(systems))
    return 0
  for own in (model_commands, imagine_command, demo_commands, serve_commands):
    if arguments.command not in own.COMMANDS:
      continue
    if bindings:
      raise _UsageError(f"lmops {arguments.command} takes no bindings; it has options of its own, "
                        f"see lmops {arguments.command} --help.")
    _set_environment()
    return own.run(arguments)
  files = _files(arguments, systems)
  for file in files:
    gin_files.find(file)
  if "://" in (getattr(arguments, "workdir", None) or ""):
    raise _UsageError(f"--workdir {arguments.workdir} is an address, not a folder; mount the "
                      "storage and give the path of a folder on it.")
  _set_environment()
  describes = arguments.command in plan_commands.COMMANDS
  if describes:
    plan_commands.set_environment(arguments)
  from lmops_jax.sizing import memory  # loads no jax, and must be first
  if arguments.command != "show" and not describes:
    memory.keep_freed_memory()
  from lmops_jax.config import resolve
  resolved = resolve.load(files, bindings, owed="named" if describes else "refused")
  if describes:
    return plan_commands.run(arguments, resolved)
  if arguments.command == "show":
    _print_config(resolved)
    return 0
  workdir = arguments.workdir or _default_workdir(gin_files.find(files[-1]))
  return _run(resolved, Path(workdir))


def _act(system: str, action: str, options: list[str], bindings: list[str]) -> int:
  """An action of a system that has options of its own instead of a gin file."""
  name = f"lmops {system} {action}"
  if bindings:
    raise _UsageError(f"{name} takes no bindings; it has options of its own, see {name} --help.")
  parser = _Parser(prog=name, formatter_class=argparse.RawDescriptionHelpFormatter,
                   allow_abbrev=False)
  add_options, run = _ACTIONS[system, action]
  parser.add_argument("--traceback", action="store_true", help="show where an error came from")
  add_options(parser)
  arguments = parser.parse_args(options, argparse.Namespace(command=f"{system} {action}"))
  _set_environment()
  return run(arguments)


def _listing(systems: Sequence[str]) -> str:
  root = gin_files.root()
  files = gin_files.packaged()
  width = max(map(len, [*systems, *files]), default=0)
  lines = ["systems (lmops NAME)"]
  lines += [f"  {name:{width}}  {gin_files.describe(root / gin_files.system_file(name))}"
            for name in systems]
  lines += ["", f"gin files (lmops run FILE, lmops show FILE), in {root}"]
  lines += [f"  {name:{width}}  {gin_files.describe(root / name)}" for name in files]
  lines += ["", "to read", *(f"  {guide}" for guide in gin_files.guides())]
  lines += ["", "named tasks of lmops score: lmops list tasks"]
  return "\n".join(line.rstrip() for line in lines)


def _print_config(resolved) -> None:
  print(f"# {', '.join(resolved.files)}, resolved by lmops_jax {lmops_jax.__version__}")
  if resolved.macros:
    print("#\n# --gin.NAME=VALUE sets:")
    for name, value in resolved.macros.items():
      print(f"#   {name} = {value}")
  print("\n" + resolved.text(), end="")


def cache_folder() -> Path:
  """The folder of this user's compiled programs and other files that can be made again."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmops_jax"


def _set_environment() -> None:
  """Sets defaults that jax and TensorFlow read when they are imported; the user's own win."""
  for name, value in {
    "JAX_COMPILATION_CACHE_DIR": str(cache_folder() / "xla"),
    "TF_CPP_MIN_LOG_LEVEL": "2",  # TensorFlow only reads and writes data here
    "GRPC_VERBOSITY": "ERROR",
  }.items():
    os.environ.setdefault(name, value)


def _run(resolved, workdir: Path) -> int:
  from lmops_jax.config import resolve, setting_words
  from lmops_jax.host import progress
  from lmops_jax.reporting import run_report
  from lmops_jax.stages import pipeline, skeleton
  group = pipeline.Group()
  if resolved.tree["mesh"] is not None:
    group = _join_group()  # before anything touches a device
  elif processes.are_expected(os.environ):
    raise refusals.ConfigError(
      "this job has several processes and run.mesh is None, so each would run by itself; bind "
      "run.mesh, for example to @mesh.make(), or start it once.")
  try:
    job = resolved.run()  # constructs everything, so that bad values are found before any work
    if not isinstance(job.system, resolve.System):
      raise refusals.ConfigError(f"run.system={setting_words.shown(job.system)} must be "
                                 f"{setting_words.described(resolve.System)}.")
    group.council.start()
    partitioner = job.mesh.build() if job.mesh is not None else None
    declared = job.system.stages(partitioner)
    stages = skeleton.resolve_stages(job.system, declared, resolved.settings)
    records = pipeline.run_stages(stages, workdir, only=job.stages, system=job.system.name,
                                  group=group, config=resolved.text())
  except BaseException as error:
    group.council.refuse(
      _one_line(error) if isinstance(error, Exception) else "it was interrupted")
    raise
  if group.index == 0:
    print(_record_table(records, progress))
    if {record.name for record in records} == {stage.name for stage in stages}:
      print("\n" + run_report.ending(job.system, declared, workdir))
  return 0


def _join_group():
  """Joins the other processes of this job, if the environment says that there are some."""
  from lmops_jax.mesh import agreement, meshes
  from lmops_jax.stages import pipeline
  if not meshes.initialize_distributed():
    return pipeline.Group()
  from jax.experimental import multihost_utils
  index, count = processes.place()
  return pipeline.Group(index, count, multihost_utils.sync_global_devices, processes.stop_between,
                        agreement.Council(index, count))


def _record_table(records, progress) -> str:
  """A line for each stage: whether it ran, and its time and FLOPs over all attempts."""
  rows = [("stage", "", "time", "FLOPs")]
  totals = sum(record.seconds for record in records), sum(record.flops for record in records)
  for name, status, seconds, flops in [*((r.name, r.status, r.seconds, r.flops) for r in records),
                                       ("total", "", *totals)]:
    rows.append((name, status, progress.format_seconds(seconds),
                 progress.format_count(flops) if flops else "-"))
  width = max(len(row[0]) for row in rows)
  return "\n".join(f"  {name:{width}}  {status:7}  {seconds:>8}  {flops:>8}"
                   for name, status, seconds, flops in rows)


if __name__ == "__main__":
  sys.exit(main())
