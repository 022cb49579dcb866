"""Gin files resolved into one checked tree: merged as gin merges, refused where gin is silent."""

import dataclasses
import enum
import math
import random
import textwrap
from collections.abc import Callable
from typing import Any

import gin
import pytest

from lmops_jax.config import gin_files, resolve
from lmops_jax.config.resolve import ConfigError, load

# A small system, registered as the library's are.


@gin.register(module="toy_optim")
def sgd(learning_rate=0.1, momentum=None):
  return ("sgd", learning_rate, momentum)


@gin.register(module="toy_optim")
def adamw(learning_rate, b1=0.9, weight_decay=0.01):
  if isinstance(learning_rate, float) and learning_rate <= 0:
    raise ValueError(f"learning_rate={learning_rate} is not positive; give a positive one.")
  return ("adamw", learning_rate, b1, weight_decay)


@gin.register(module="toy_optim")
def warmup(peak, total_steps):
  return ("warmup", peak, total_steps)


@gin.register(module="toy")
@dataclasses.dataclass(frozen=True)
class Method:
  optimizer: Any
  hessian: bool = True
  name: str = "plain"
  loss: Callable = math.hypot


@gin.register(module="toy")
@dataclasses.dataclass(frozen=True)
class System:
  methods: Any = ()
  steps: Any = 3
  extra: Any = None


@gin.register(module="toy")
@dataclasses.dataclass(frozen=True)
class Holder:
  part: Method | None = None


@gin.register(module="toy")
def keywords(first=1, **others):
  return {"first": first, **others}


@gin.register(module="toy", denylist=["hidden"])
def guarded(shown=1, hidden=2):
  return shown, hidden


@gin.constants_from_enum(module="toy")
class Mode(enum.Enum):
  FAST = 1
  EXACT = 2


ADAMW = """
  # adamw.gin: defines OPTIMIZER; needs LEARNING_RATE, STEPS.
  OPTIMIZER = @toy_optim.adamw()
  toy_optim.adamw:
    learning_rate = @toy_optim.warmup()
  toy_optim.warmup:
    peak = %LEARNING_RATE
    total_steps = %STEPS
"""
DEFAULT = """
  # A toy system. It has two methods.
  include "adamw.gin"
  STEPS = 4
  LEARNING_RATE = 1e-3
  run.system = @toy.System()
  toy.System:
    methods = [@toy.Method(), @no_hessian/toy.Method()]
    steps = %STEPS
  toy.Method.optimizer = %OPTIMIZER
  no_hessian/toy.Method.hessian = False
  no_hessian/toy.Method.name = "no_hessian"
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes gin files into an empty current directory; returns the name of the last one."""
  monkeypatch.chdir(tmp_path)

  def write_files(**texts):
    for name, text in texts.items():
      (tmp_path / f"{name}.gin").write_text(textwrap.dedent(text))
    return f"{name}.gin"

  return write_files


@pytest.fixture
def default(write):
  return write(adamw=ADAMW, default=DEFAULT)


def _schedule(steps=4, peak=1e-3):
  return ("warmup", peak, steps)


def test_build_constructs_what_the_files_say(default):
  optimizer = ("adamw", _schedule(), 0.9, 0.01)
  assert load([default]).build() == System(
    [Method(optimizer), Method(optimizer, False, "no_hessian")], steps=4)


def test_later_bindings_win(default):
  system = load([default], ["STEPS = 5", "toy_optim.adamw.b1=0.5", "STEPS=6"]).build()
  assert system.steps == 6
  assert system.methods[0].optimizer == ("adamw", _schedule(6), 0.5, 0.01)


def test_component_swapped_from_the_command_line(default):
  """The included file goes on binding the parameters of the optimizer that is not used."""
  resolved = load([default], ["OPTIMIZER=@toy_optim.sgd()", "toy_optim.sgd.learning_rate=0.2"])
  assert resolved.build().methods[0].optimizer == ("sgd", 0.2, None)
  assert "adamw" not in resolved.text()


def test_component_swapped_by_a_users_file(write, default):
  mine = write(mine="""
    include "default.gin"
    OPTIMIZER = @toy_optim.sgd()
    toy_optim.sgd.momentum = 0.9
  """)
  assert load([mine]).build().methods[1].optimizer == ("sgd", 0.1, 0.9)
  assert load(["default.gin", mine]).build().methods[1].optimizer == ("sgd", 0.1, 0.9)


def test_a_file_may_not_configure_what_it_has_swapped_out(write, default):
  mine = write(mine="""
    include "default.gin"
    OPTIMIZER = @toy_optim.sgd()
    toy_optim.adamw.b1 = 0.5
  """)
  with pytest.raises(ConfigError, match=r"^mine.gin:4: toy_optim.adamw.b1 has no effect, since "
                     r"nothing in this run uses toy_optim.adamw; .*toy_optim.sgd"):
    load([mine])


# ------------------------------------------------------------------ the same as gin itself builds

SAME_AS_GIN = {
  "default": ADAMW + DEFAULT.replace('include "adamw.gin"', ""),
  "nested scopes": """
    run.system = @toy.System()
    toy.System.methods = [@toy.Method(), @a/toy.Method(), @a/b/toy.Method(), @b/toy.Method()]
    toy.Method.optimizer = 1
    a/toy.Method.hessian = False
    a/toy.Method.name = "a"
    a/b/toy.Method.name = "a then b"
  """,
  "scope passed on to unscoped references": """
    run.system = @a/toy.System()
    toy.System.methods = @toy.Method()
    a/toy.System.steps = 9
    toy.Method.optimizer = @toy_optim.sgd()
    toy_optim.sgd.learning_rate = 0.5
    a/toy_optim.sgd.momentum = 0.9
    a/toy.Method.name = "in a"
  """,
  "a reference's scope replaces the outer one": """
    run.system = @a/toy.System()
    toy.System.methods = @b/toy.Method()
    toy.Method.optimizer = @toy_optim.sgd()
    b/toy_optim.sgd.momentum = 0.1
    toy_optim.sgd.learning_rate = 3
  """,
  "macro as a scope": """
    OPT = @toy_optim.sgd()
    run.system = @toy.System()
    toy.System.methods = %OPT
    toy.System.extra = @toy_optim.sgd()
    OPT/toy_optim.sgd.learning_rate = 7
  """,
  "scoped macro": """
    steps = 1
    train/steps = 2
    run.system = @toy.System()
    toy.System.steps = %train/steps
    toy.System.extra = %steps
  """,
  "macro of macros, containers": """
    A = [1, (2,), {"k": %B}]
    B = {1: @toy_optim.sgd(), "two": [%C, %C]}
    C = -1.5e-7
    run.system = @toy.System()
    toy.System.extra = %A
    toy.System.steps = ()
  """,
  "constants": """
    run.system = @toy.System()
    toy.System.steps = %toy.Mode.FAST
    toy.System.extra = [%EXACT]
  """,
  "free keywords": """
    run.system = @toy.System()
    toy.System.methods = [@toy.keywords(), @x/toy.keywords()]
    toy.keywords.second = 2
    x/toy.keywords.third = "3"
  """,
}


def _built_by_gin(text):
  gin.clear_config()
  try:
    gin.parse_config(textwrap.dedent(text))
    gin.finalize()
    return gin.get_configurable("lmops.run")()
  finally:
    gin.clear_config()


@pytest.mark.parametrize("text", SAME_AS_GIN.values(), ids=SAME_AS_GIN.keys())
def test_builds_what_gin_builds(write, text):
  resolved = load([write(file=text)])
  want = _built_by_gin(text)
  assert resolved.run() == want
  assert _built_by_gin(resolved.text()) == want
  again = load([write(shown=resolved.text())])
  assert again.run() == want
  assert again.text() == resolved.text()
  assert again.tree.flatten() == resolved.tree.flatten()


def test_nothing_is_left_in_gin(default):
  load([default], ["STEPS=7"]).build()
  assert not gin.config._CONFIG and not gin.config_is_locked()


# ----------------------------------------------------------------------------------------- text


def test_resolved_text(default):
  assert load([default], ["STEPS=5"]).text() == textwrap.dedent("""\
    run:
      system = @toy.System()
      mesh = None
      stages = None

    toy.System:
      methods = [@toy.Method(), @no_hessian/toy.Method()]
      steps = 5
      extra = None

    # toy.Method.loss is math.hypot
    toy.Method:
      optimizer = @toy_optim.adamw()
      hessian = True
      name = 'plain'

    toy_optim.adamw:
      learning_rate = @toy_optim.warmup()
      b1 = 0.9
      weight_decay = 0.01

    toy_optim.warmup:
      peak = 0.001
      total_steps = 5

    # no_hessian/toy.Method.loss is math.hypot
    no_hessian/toy.Method:
      optimizer = @toy_optim.adamw()
      hessian = False
      name = 'no_hessian'
    """)


def test_calls_that_differ_only_below_get_scopes_of_their_own(write):
  file = write(file="""
    run.system = @toy.System()
    toy.System.methods = @toy.Method()
    toy.System.extra = @other/toy.Method()
    toy.Method.optimizer = @toy_optim.sgd()
    other/toy_optim.sgd.momentum = 0.5
  """)
  text = load([file]).text()
  assert "extra = @other/toy.Method()" in text
  assert "\nother/toy.Method:\n  optimizer = @optimizer/toy_optim.sgd()" in text
  assert "\noptimizer/toy_optim.sgd:\n  learning_rate = 0.1\n  momentum = 0.5" in text


def test_unscoped_block_is_avoided_where_it_would_leak(write):
  """A free keyword bound without a scope would reach the scoped call as well."""
  file = write(file="""
    run.system = @toy.System()
    toy.System.methods = [@a/toy.keywords(), @b/toy.keywords()]
    a/toy.keywords.one = 1
    b/toy.keywords.two = 2
  """)
  resolved = load([file])
  assert resolved.build().methods == [{"first": 1, "one": 1}, {"first": 1, "two": 2}]
  assert load([write(again=resolved.text())]).build() == resolved.build()


def _random_literal(rng, depth):
  kind = rng.randrange(9 if depth else 6)
  if kind == 0:
    return rng.choice([None, True, False])
  if kind == 1:
    return rng.randrange(-10**12, 10**12)
  if kind == 2:
    return rng.choice([1e-300, -0.0, 1e22, math.inf, -math.inf, rng.gauss(0, 1)])
  if kind <= 5:
    return "".join(rng.choice("ab\\'\"\n\t é#@%=()[]{},:\x00") for _ in range(rng.randrange(12)))
  items = [_random_literal(rng, depth - 1) for _ in range(rng.randrange(5))]
  if kind == 6:
    return tuple(items)
  return items if kind == 7 else {f"k{i}": item for i, item in enumerate(items)}


def test_literals_survive_the_text(write):
  rng = random.Random(0)
  for _ in range(60):
    value = [_random_literal(rng, 3) for _ in range(3)]
    tree = resolve.Settings("run", {"system": resolve.Settings(
      "toy.System", {"methods": (), "steps": 3, "extra": value}), "mesh": None, "stages": None})
    text = resolve.Resolved(tree).text()
    assert all(len(line) <= 100 or " " not in line.strip() for line in text.splitlines()[:4])
    again = load([write(file=text)]).settings["extra"]
    assert repr(again) == repr(value)


def test_long_values_are_broken_into_lines(write):
  names = [f"a_rather_long_name_{i}" for i in range(12)]
  file = write(file=f"run.system = @toy.System()\ntoy.System.extra = {names}\n")
  text = load([file]).text()
  assert max(map(len, text.splitlines())) <= 100
  assert load([write(again=text)]).build().extra == names


# ------------------------------------------------------------------------------------- settings


def test_settings_tree(default):
  settings = load([default]).settings
  assert settings.selector == "toy.System"
  assert settings.child("steps") == 4
  assert settings.child("methods", 1)["hessian"] is False
  assert settings.child("methods")[1].scope == ("no_hessian",)
  assert settings.child("methods", 0).defaults == {"hessian", "name", "loss"}
  with pytest.raises(KeyError, match="toy.System has no setting 'step'.*'steps'"):
    settings["step"]


def test_flatten_names_everything_below(default):
  settings = load([default]).settings
  flat = settings.child("methods", 1).flatten()
  assert flat == {
    "component": "toy.Method", "optimizer": "toy_optim.adamw",
    "optimizer.learning_rate": "toy_optim.warmup", "optimizer.learning_rate.peak": "0.001",
    "optimizer.learning_rate.total_steps": "4", "optimizer.b1": "0.9",
    "optimizer.weight_decay": "0.01", "hessian": "False", "name": "'no_hessian'",
    "loss": "math.hypot"}
  assert settings.flatten("pds")["pds.methods[0].optimizer.b1"] == "0.9"
  assert settings.flatten("pds")["pds"] == "toy.System"


def test_flatten_depends_on_values_not_on_how_they_were_bound(write):
  one = write(one="""
    run.system = @toy.System()
    toy.System.methods = @toy.Method()
    toy.Method.optimizer = 1
  """)
  two = write(two="""
    OPT = 1
    METHOD = @x/toy.Method()
    run.system = @toy.System()
    toy.System.methods = %METHOD
    toy.System.steps = 3
    x/toy.Method.optimizer = %OPT
  """)
  assert load([one]).tree.flatten() == load([two]).tree.flatten()


def test_settings_build_alone(default):
  assert load([default]).settings.child("methods", 0, "optimizer").build()[0] == "adamw"


def test_macros_tell_what_can_be_set(default):
  assert load([default], ["STEPS=9"]).macros == {
    "OPTIMIZER": "@toy_optim.adamw()", "STEPS": "9", "LEARNING_RATE": "0.001"}
  swapped = load([default], ["OPTIMIZER=@toy_optim.sgd()"])
  assert list(swapped.macros) == ["OPTIMIZER", "STEPS"]


# ------------------------------------------------------------------------- references and objects


def test_macro_builds_a_new_object_for_each_use_and_singleton_one(write):
  file = write(file="""
    MACRO = @toy.keywords()
    run.system = @toy.System()
    toy.System.methods = [%MACRO, %MACRO]
    toy.System.extra = [@one/gin.singleton(), @one/gin.singleton(), @two/gin.singleton()]
    one/gin.singleton.constructor = @toy.keywords
    two/gin.singleton.constructor = @toy.keywords
  """)
  resolved = load([file])
  for built in (resolved.build(), load([write(again=resolved.text())]).build()):
    first, second = built.methods
    assert first == second and first is not second
    one, same, two = built.extra
    assert one is same and one is not two
  assert resolved.build().extra[0] is not resolved.build().extra[0]


def test_reference_without_call_hands_over_the_function(write):
  file = write(file="""
    run.system = @toy.System()
    toy.System.methods = @toy_optim.adamw
    toy.System.extra = @plain/toy_optim.sgd
    toy_optim.adamw.b1 = 0.5
  """)
  built = load([file]).build()
  assert built.extra is sgd
  assert built.methods(0.1) == ("adamw", 0.1, 0.5, 0.01)
  assert built.methods(0.1, 0.7, weight_decay=0.0) == ("adamw", 0.1, 0.7, 0.0)
  assert built.methods.__name__ == "adamw"
  with pytest.raises(ConfigError, match=r"run.system.methods=@toy_optim.adamw: .*learning_rate"):
    built.methods()


def test_constructor_errors_name_the_place(default):
  with pytest.raises(ConfigError, match=r"^run.system.methods\[0\].optimizer=@toy_optim.adamw: "
                     r"learning_rate=-1.0 is not positive; give a positive one.$"):
    load([default], ["toy_optim.adamw.learning_rate=-1.0"]).build()


def test_stages_of_the_root(default):
  assert load([default]).run().stages is None
  assert load([default], ["run.stages='select'"]).run().stages == ("select",)
  assert load([default], ["run.stages=['a', 'b']"]).run().stages == ("a", "b")
  with pytest.raises(ConfigError, match=r"^run: lmops.run.stages=\[\] must be a list of one or"):
    load([default], ["run.stages=[]"]).build()


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("binding, parts", [
  ("STEPZ=3", ["--gin.STEPZ=3 has no effect", "%STEPZ", "'STEPS'"]),
  ("toy_optim.sgd.learning_rate=1", ["no effect", "toy_optim.adamw.learning_rate"]),
  ("toy_optim.adamw.learning_rat=1", ["no parameter 'learning_rat'", "'learning_rate'"]),
  ("toy_optim.adamv.b1=1", ["nothing is registered as 'toy_optim.adamv'", "toy_optim.adamw"]),
  ("OPTIMIZER=@toy_optim.sdg()", ["'toy_optim.sdg'", "'toy_optim.sgd'"]),
  ("OPTIMIZER=[@toy_optim.sdg]", ["'toy_optim.sdg'", "'toy_optim.sgd'"]),
  ("STEPS=%STEPZ", ["%STEPZ is defined nowhere", "'STEPS'"]),
  ("no_hesian/toy.Method.hessian=True", ["in that scope", "no_hessian/toy.Method.hessian"]),
  ("learning_rate=0.1", ["%learning_rate", "LEARNING_RATE"]),
  ("STEPS=solve", ["'solve' is not a gin value", """--gin.STEPS='"solve"'"""]),
  ("STEPS=[1", ["'[1' is not a gin value"]),
  ("STEPS", ["no value", "--gin.NAME=VALUE"]),
  ("STEPS=%gin.REQUIRED", ["STEPS must be given", "--gin.STEPS=VALUE"]),
  ("STEPS=%STEPS", ["%STEPS refers to itself"]),
  ("toy.System.extra=@toy.System()", ["@toy.System refers to itself"]),
  ("toy.guarded.hidden=3", ["no parameter 'hidden'", "'shown'"]),
  ("import no_such_module", ["--gin_import no_such_module", "cannot import"]),
  ("include 'x.gin'", ["--gin_file"]),
])
def test_refused_bindings(default, binding, parts):
  with pytest.raises(ConfigError) as error:
    load([default], [binding])
  message = str(error.value)
  assert all(part in message for part in parts), message
  assert "\n" not in message and message.endswith(".")


def test_binding_that_every_scope_overrides_is_refused(write):
  file = write(file="""
    run.system = @toy.System()
    toy.System.methods = @a/toy.Method()
    a/toy.Method.optimizer = 1
  """)
  load([file], ["toy.Method.name='x'"])
  with pytest.raises(ConfigError, match="every use of toy.Method binds optimizer in its own scope"):
    load([file], ["toy.Method.optimizer=2"])


@pytest.mark.parametrize("line, parts", [
  ("STEPZ = 3", ["bad.gin:3: STEPZ has no effect", "'STEPS'"]),
  ("toy_optim.sgd.momentum = 1", ["bad.gin:3: toy_optim.sgd.momentum has no effect", "adamw"]),
  ("toy.System.step = 1", ["bad.gin:3: toy.System has no parameter 'step'", "'steps'"]),
  ("toy.Holder.hessian = True", [
    "bad.gin:3: toy.Holder has no parameter 'hessian'; its 'part' has one, which is bound as "
    "toy.Method.hessian."]),
  ("toy.Sistem.steps = 1", ["bad.gin:3", "'toy.Sistem'", "'toy.System'"]),
  ("toy.Sistem:\n  steps = 1", ["bad.gin:3", "'toy.Sistem'", "'toy.System'"]),
  ("STEPS = %STEBS", ["bad.gin:3", "'STEPS'"]),
  ("toy.System.extra = @toy.Metod()", ["bad.gin:3", "'toy.Metod'", "'toy.Method'"]),
  ("toy.System.extra = [\n  @toy.Metod()]", ["bad.gin:4", "'toy.Metod'", "'toy.Method'"]),
  ("STEPS = = 3", ["bad.gin:3: this is not gin syntax"]),
  ("STEPS = (3", ["bad.gin", "this is not gin syntax"]),
  ("include 'defualt.gin'", ["bad.gin:3: there is no gin file 'defualt.gin'", "default.gin"]),
  ("include 'bad.gin'", ["bad.gin includes itself (bad.gin -> bad.gin)"]),
  ("import no.such", ["bad.gin:3: cannot import no.such"]),
  ("from __gin__ import dynamic_registration", ["bad.gin:3", "gin.external_configurable"]),
])
def test_refused_files(write, default, line, parts):
  file = write(bad=f'\ninclude "default.gin"\n{line}\n')
  with pytest.raises(ConfigError) as error:
    load([file])
  assert all(part in str(error.value) for part in parts), str(error.value)


def test_missing_values(write):
  with pytest.raises(ConfigError, match="toy.Method needs a value for 'optimizer'; bind toy.Method"
                     ".optimizer, for example with --gin.toy.Method.optimizer=VALUE"):
    load([write(file="run.system = @toy.System()\ntoy.System.extra = @toy.Method()")])
  with pytest.raises(ConfigError, match="no run.system is bound, so there is nothing to run"):
    load([write(file="# nothing")])
  with pytest.raises(ConfigError, match="no gin file is given"):
    load([])
  owed = write(owed="N = %gin.REQUIRED\nrun.system = @toy.System()\ntoy.System.steps = %N")
  with pytest.raises(ConfigError, match=r"owed.gin:1: N must be given; add --gin.N=VALUE"):
    load([owed])
  assert load([owed], ["N=3"]).build().steps == 3


def test_ambiguous_name(write):
  gin.register("twin", module="toy_a")(lambda: None)
  gin.register("twin", module="toy_b")(lambda: None)
  with pytest.raises(ConfigError, match="'twin' may be any of toy_a.twin, toy_b.twin"):
    load([write(file="run.system = @twin()")])
  assert load([write(file="run.system = @toy_a.twin()")]).build() is None


# ----------------------------------------------------------------------------------------- files


def test_files_are_found_from_anywhere(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  for name in gin_files.packaged():
    path = gin_files.root() / name
    assert gin_files.find(name) == gin_files.find(f"gin/{name}") == path.resolve()
    assert gin_files.find(str(path)) == path.resolve()
    assert gin_files.describe(path), f"gin/{name} has no comment on top"
    assert gin_files.display(path.resolve()) == f"gin/{name}"


def test_a_file_in_the_current_directory_comes_first(write, tmp_path):
  (tmp_path / "pds").mkdir()
  write(**{"pds/default": "# mine"})
  assert gin_files.find("pds/default.gin") == (tmp_path / "pds/default.gin").resolve()
  # but not for an include of a packaged file
  beside = gin_files.root() / "pds"
  assert gin_files.find("pds/default.gin", beside) == (beside / "default.gin").resolve()


def test_includes_are_found_beside_the_including_file(write, tmp_path, monkeypatch):
  (tmp_path / "sub").mkdir()
  write(**{"sub/part": "toy.System.steps = 8", "sub/whole": """
    include "part.gin"
    run.system = @toy.System()
  """})
  monkeypatch.chdir("/")
  assert load([tmp_path / "sub/whole.gin"]).build().steps == 8


def test_nearest_file(write, default):
  with pytest.raises(ConfigError, match="there is no gin file 'defualt.gin'; the nearest valid "
                     "name is 'default.gin'"):
    load(["defualt.gin"])
  with pytest.raises(ConfigError, match="the nearest valid name is 'pds/smoke.gin'"):
    load(["gin/pds/smok.gin"])


def test_unreadable_file(tmp_path):
  path = tmp_path / "latin.gin"
  path.write_bytes(b"# caf\xe9\n")
  with pytest.raises(ConfigError, match="latin.gin cannot be read: 'utf-8' codec"):
    load([path])


def test_first_sentence_describes_a_file(write, default):
  assert gin_files.describe("default.gin") == "A toy system"
  assert gin_files.describe("adamw.gin") == "defines OPTIMIZER"
