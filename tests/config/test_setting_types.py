"""Settings held against the annotations of components, and what is said where one does not fit."""

import dataclasses
import importlib.util
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import gin
import numpy as np
import pytest
from gin import config as gin_config

import lmops_jax
from lmops_jax.config import resolve, settings
from lmops_jax.config.setting_types import (
  Count,
  Distinct,
  ExistingPath,
  Name,
  NonEmpty,
  Part,
  Positive,
  PositiveInt,
  Seeds,
  Share,
  Text,
  at_least,
  component,
)
from lmops_jax.data.installed_text import InstalledText
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.stages import skeleton


@component(module="typed")
@dataclasses.dataclass(frozen=True)
class Part1:
  size: PositiveInt = 1


@component(module="typed")
@dataclasses.dataclass(frozen=True)
class Whole:
  """All kinds of settings."""

  num: PositiveInt | None = None
  rate: Positive | Callable = 0.1
  share: Share = 0.5
  part: Part = 0.5
  seeds: Seeds = (0,)
  kind: Literal["area", "terminal"] | None = None
  flag: bool = True
  path: ExistingPath = "/"
  name: Name = "a"
  below: Part1 | None = None
  weights: Mapping[str, Positive] | None = None
  pair: tuple[Text, Count] | None = None
  texts: Annotated[Sequence[Text], NonEmpty, Distinct] | Text | None = None
  anything: Any = None


@pytest.mark.parametrize("name, value", [
  ("num", None), ("num", 3), ("num", np.int64(3)), ("rate", 2), ("rate", np.float32(0.5)),
  ("rate", abs), ("share", 1), ("part", 0.99), ("seeds", [0, 5]), ("seeds", (2**32 - 1,)),
  ("kind", "area"), ("flag", False), ("path", "<CORPUS>"), ("below", Part1(2)),
  ("weights", {"a": 1}), ("pair", ["a", 0]), ("texts", "a"), ("texts", ["a", "b"]),
  ("anything", object()), ("name", "seed-0.5"),
])
def test_what_fits_is_kept_as_it_is(name, value):
  assert getattr(Whole(**{name: value}), name) is value


@pytest.mark.parametrize("name, value, message", [
  ("num", 0, "num=0 must be an integer of at least 1 and at most 2^31 - 1, or None."),
  ("num", True, "num=True must be an integer"), ("num", 1.5, "num=1.5 must be an integer"),
  ("num", "2", "num='2' must be an integer"),
  ("num", 10**30, f"num={10**30} must be an integer of at least 1 and at most 2^31 - 1"),
  ("num", float("inf"), "num=1e999 must be an integer"),
  ("rate", float("inf"), "rate=1e999 must be a number above 0, or a function."),
  ("rate", float("nan"), "rate=nan must be a number above 0"),
  ("share", 1.01, "share=1.01 must be a number above 0 and at most 1."),
  ("part", 1, "part=1 must be a number above 0 and below 1."),
  ("seeds", [1, 1], "seeds=[1, 1] must be a list of one or more different values, each an "
                    "integer of at least 0 and below 2^32."),
  ("seeds", [], "seeds=[] must be a list of one or more"),
  ("seeds", "ab", "seeds='ab' must be a list"),
  ("seeds", ["a"], "seeds[0]='a' must be an integer"),
  ("seeds", [0, 1.5], "seeds[1]=1.5 must be an integer of at least 0 and below 2^32."),
  ("kind", "middle", "kind='middle' must be 'area' or 'terminal', or None."),
  ("flag", 1, "flag=1 must be True or False."),
  ("path", "/no/such", "path='/no/such' must be an existing path."),
  ("name", "a/b", "name='a/b' must be a name without"),
  ("below", 5, "below=5 must be a component such as @typed.Part1(), or None."),
  ("below", Whole(), "below=@typed.Whole() must be a component such as @typed.Part1(), or None."),
  ("weights", {"a": 0}, "weights={'a': 0} must be a mapping from a text to a number above 0"),
  ("pair", ["a"], "pair=['a'] must be a list of a text that is not empty and an integer"),
  ("texts", ["a", ""], "texts[1]='' must be a text that is not empty."),
])
def test_what_does_not_fit_is_named_in_one_sentence(name, value, message):
  with pytest.raises(ValueError) as error:
    Whole(**{name: value})
  text = str(error.value)
  assert text.startswith("typed.Whole." + message) and text.endswith(".") and "\n" not in text


def test_functions_are_checked_and_wrong_calls_stay_python_errors():
  @component(module="typed")
  def made(steps: at_least(2), *, rate: Positive = 1.0):
    return steps, rate

  assert made(2, rate=3) == (2, 3)
  with pytest.raises(ValueError, match="typed.made.steps=1 must be an integer of at least 2"):
    made(1)
  with pytest.raises(TypeError, match="missing 1 required positional argument"):
    made()
  with pytest.raises(TypeError, match="unexpected keyword"):
    made(2, size=1)


class Runs(Protocol):
  def stages(self): ...


@gin.register(module="typed")
@dataclasses.dataclass(frozen=True)
class OfAUser:
  """Registered with gin alone, as a user may; one annotation is for type checkers only."""

  steps: PositiveInt = 1
  runs: Runs | None = None
  unreadable: "NoSuchName | None" = None  # noqa: F821
  name = "user"

  def stages(self, partitioner):
    return []


@gin.register(module="typed")
@dataclasses.dataclass(frozen=True)
class AnotherOfAUser:
  steps: PositiveInt = 1
  runs: Runs | None = None

  def stages(self, partitioner):
    return []


def test_components_of_a_user_are_checked_where_their_annotations_can_be_read(tmp_path):
  path = tmp_path / "own.gin"
  path.write_text("run.system = @typed.AnotherOfAUser()\ntyped.AnotherOfAUser.steps = %STEPS\n"
                  "typed.AnotherOfAUser.runs = 'anything'\nSTEPS = 2\n")
  assert resolve.load([path]).build().steps == 2
  with pytest.raises(resolve.ConfigError, match="steps=True must be an integer"):
    resolve.load([path], ["STEPS = True"]).build()
  path.write_text("run.system = @typed.OfAUser()\ntyped.OfAUser.steps = 'many'\n")
  assert resolve.load([path]).build().steps == "many"


# Modules that cannot be imported without a package of an extra.
NEEDS = {"lmops_jax.data.distributed.transforms": "apache_beam",
         "lmops_jax.evaluation.lm_eval_adapter": "lm_eval"}


def _components():
  """Our registered classes and functions, by name."""
  for module in pkgutil.walk_packages(lmops_jax.__path__, "lmops_jax."):
    if module.name not in NEEDS or importlib.util.find_spec(NEEDS[module.name]):
      importlib.import_module(module.name)
  return {name: found.wrapped for name, found in gin_config._REGISTRY.items()
          if found.wrapped.__module__.startswith("lmops_jax.")}


def test_every_component_says_what_its_settings_are():
  components = _components()
  assert len(components) > 60
  for name, made in components.items():
    hints = typing.get_type_hints(made, include_extras=True)  # raises where one cannot be read
    assert set(inspect.signature(made).parameters) <= set(hints), name
    call = made.__init__ if inspect.isclass(made) else made
    assert hasattr(call, "checks_arguments"), f"{name} is registered without its types"


# ---------------------------------------------------------------- every knob of every default file

NONSENSE = ("None", "True", "-1", "0", "1.5", "1e999", "'nope'", "''", "[]", "{}", "['a']",
            "[1.5]", "[1, 1]", "[None]", str(10**30), "@optim.sgd()", "@data.PythonReference()")
# What means something after all, by knob.
SENSE = {
  "pds/default.gin": {
    "CORPUS": {"@data.PythonReference()"}, "TARGET": {"@data.PythonReference()"},
    **{name: {"@optim.sgd()"} for name in (
      "OPTIMIZER", "INNER_OPTIMIZER", "PROXY_OPTIMIZER", "SCORER_OPTIMIZER")},
    **{name: {"None"} for name in (
      "CORPUS_BYTES", "MESH", "ENGINE", "INIT", "PROXY_INIT", "TARGET_INSTANCES")},
    "SELECTION_SEED": {"0"},
  },
  "learning_law/default.gin": {
    "OPTIMIZER": {"@optim.sgd()"}, "MESH": {"None"}, "LABEL_FLIP": {"0"},
    "STEP_SIZE": {"0", "1.5", str(10**30)}, "MIRROR_STEP_SIZE": {"0", "1.5", str(10**30)},
    "PRACTICAL": {"[]"}, "POLICY_OPTIMIZERS": {"[]"}, "OTHER_INITS": {"[]"},
  },
  "structured_prompting/default.gin": {
    "BOS": {"None", "True"}, "SEPARATOR": {"'nope'"}, "STORE": {"None", "'nope'"},
    **{name: {"None"} for name in (
      "MESH", "MODEL", "DATA", "LABELS", "RETRIEVAL", "FLAVOUR", "ROWS", "GROUP_TOKENS")},
  },
  "meta_optimizer/default.gin": {
    "DEMONSTRATIONS": {"0"}, "RATES": {"[1.5]"}, "CONTROLS": {"[]"},
    **{name: {"None"} for name in ("MESH", "MODEL", "DATA", "LABELS", "FLAVOUR", "ROWS")},
  },
}
PYTHON = re.compile(
  r"<class|object|TypeError|NoneType|\b(int|str|bool|float|dict|tuple)\b|pydantic")


@pytest.mark.parametrize("file", list(SENSE))
def test_nonsense_is_refused_before_a_stage_starts(file, monkeypatch):
  monkeypatch.setattr(InstalledText, "fingerprint", lambda self: "text")  # reads all of it
  partitioner = MeshConfig().build()
  accepted, bad = {}, []
  for knob in resolve.load([file]).macros:
    if knob == "STAGES":  # held against the names of the stages when they run
      continue
    for value in NONSENSE:
      try:
        resolved = resolve.load([file], [f"{knob} = {value}"])
        system = resolved.run().system
        skeleton.resolve_stages(system, system.stages(partitioner), resolved.settings)
        accepted.setdefault(knob, set()).add(value)
      except settings.ConfigError as error:
        text = str(error)
        if "\n" in text or PYTHON.search(re.sub(r"='[^']*'|@[\w.]+", "", text)):
          bad.append((knob, value, text))
  assert not bad
  assert accepted == SENSE[file]
