"""Functions over items on Beam: every item once it is needed, sums, groups, options, refusals."""

import os

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="needs the extra `beam`")

from lmops_jax.data.distributed.engine import Engine

THREADS = Engine(["--direct_num_workers=3", "--direct_running_mode=multi_threading"])
both = pytest.mark.parametrize("engine", [Engine(), THREADS], ids=["one", "three"])


@both
def test_each_item_is_done_with_what_the_worker_has_set_up(tmp_path, engine):
  def write(base, item):
    (tmp_path / f"{item}").write_text(str(base + item))

  engine.each(write, range(7), setup=lambda: 100)
  assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
    str(i): str(100 + i) for i in range(7)
  }


def test_nothing_to_do_starts_no_pipeline(monkeypatch):
  monkeypatch.setattr(Engine, "_run", lambda *args: pytest.fail("a pipeline was started"))
  Engine().each(print, [])


@both
def test_totals(tmp_path, engine):
  zero = np.zeros(2, np.int64)
  got = engine.total(lambda item: np.array([1, item]), range(100), zero, tmp_path)
  np.testing.assert_array_equal(got, [100, 4950])
  np.testing.assert_array_equal(zero, [0, 0])
  np.testing.assert_array_equal(engine.total(lambda item: 1, [], zero, tmp_path), [0, 0])
  assert not list(tmp_path.iterdir())


@both
def test_groups(tmp_path, engine):
  engine.group(
    lambda item: [(item % 3, item), (9, -item)], range(10),
    lambda key, values: (tmp_path / str(key)).write_text(str(sorted(values))),
  )
  assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
    "0": "[0, 3, 6, 9]", "1": "[1, 4, 7]", "2": "[2, 5, 8]",
    "9": str([-i for i in range(9, -1, -1)]),
  }


def test_options_reach_beam_untouched(monkeypatch):
  import apache_beam
  from apache_beam.options import pipeline_options

  seen = {}

  class Spy(apache_beam.Pipeline):
    def __init__(self, runner, options):
      seen["runner"] = runner
      seen["flink"] = options.view_as(pipeline_options.FlinkRunnerOptions).flink_master
      seen["all"] = options._flags
      super().__init__("FnApiRunner", options=pipeline_options.PipelineOptions([]))

  monkeypatch.setattr(apache_beam, "Pipeline", Spy)
  flags = ["--runner=FlinkRunner", "--flink_master=host:8081", "--a_flag_of_another_runner=5"]
  Engine(flags).each(lambda item: None, [1])
  assert seen == {"runner": "FlinkRunner", "flink": "host:8081", "all": flags}


def test_what_a_worker_refuses_is_one_sentence():
  def refuse(item):
    raise ValueError(f"item {item} is bad; set another.") if item else OSError("no")

  with pytest.raises(ValueError) as error:
    Engine().each(refuse, [3])
  assert str(error.value) == "item 3 is bad; set another."
  with pytest.raises(OSError, match="no"):  # not the user's: with all that Beam knows
    Engine().each(refuse, [0])


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"options": "--runner=FlinkRunner"}, "options='--runner=FlinkRunner' must be a list"),
    ({"options": ["--parallelism", 4]}, r"options\[1\]=4 must be an option such as"),
    ({"options": ["--parallelism", "4"]}, r"options\[1\]='4' must be an option such as"),
    ({"num_buckets": 0}, "num_buckets=0"),
  ],
)
def test_bad_settings(kwargs, message):
  with pytest.raises(ValueError, match=message):
    Engine(**kwargs)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_workers_in_processes_of_their_own(tmp_path):
  engine = Engine(["--direct_num_workers=2", "--direct_running_mode=multi_processing"])

  def write(item):
    import os

    (tmp_path / f"{item}").write_text(str(os.getpid()))

  engine.each(write, range(8))
  assert len(list(tmp_path.iterdir())) == 8
  assert str(os.getpid()) not in {p.read_text() for p in tmp_path.iterdir()}
