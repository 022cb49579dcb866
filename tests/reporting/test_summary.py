"""summary.json: what is written comes back, and what must not be written is named."""

import json
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.reporting import summary

REQUIRED = (
  "methods.*.seeds[]",
  "methods.*.target_test_loss[]",
  "methods.*.steps_to_match_random",
  "selected_share_by_kind.*.*",
  "corpus_share_by_kind.*",
  "scorer.validation_spearman",
  "stages[].name",
  "stages[].seconds",
  "stages[].flops",
)


def _summary():
  return {
    "methods": {
      "pds": {
        "seeds": [0, 1],
        "target_test_loss": [5.45, 5.47],
        "steps_to_match_random": [215.0, None],
      },
      "random": {
        "seeds": [0, 1],
        "target_test_loss": [5.8, 5.84],
        "steps_to_match_random": [400.0, 400.0],
      },
    },
    "selected_share_by_kind": {"pds": {"code": 0.4, "prose": 0.6}},
    "corpus_share_by_kind": {"code": 0.8, "prose": 0.2},
    "scorer": {"validation_spearman": 0.59},
    "stages": [{"name": "prepare", "seconds": 48.0, "flops": 0.0}],
  }


class _Point(NamedTuple):
  step: int
  loss: float


def test_round_trip(tmp_path):
  path = summary.write_summary(tmp_path / "report" / "summary.json", _summary(), required=REQUIRED)
  assert summary.read_summary(path) == _summary()
  assert [file.name for file in path.parent.iterdir()] == ["summary.json"]


def test_numbers_of_numpy_and_jax_become_plain(tmp_path):
  path = summary.write_summary(
    tmp_path / "summary.json",
    {
      "a": np.float32(0.5), "b": np.int64(2**53 + 1), "c": np.arange(3), "d": jnp.float32(2),
      "e": np.bool_(True), "f": {0: (1, 2)}, "g": _Point(3, 0.25), "h": jnp.ones(2, jnp.bfloat16),
      "i": "Grüße", "j": None,
    },
  )
  assert json.loads(path.read_text("utf-8")) == {
    "a": 0.5, "b": 2**53 + 1, "c": [0, 1, 2], "d": 2.0, "e": True, "f": {"0": [1, 2]},
    "g": {"step": 3, "loss": 0.25}, "h": [1.0, 1.0], "i": "Grüße", "j": None,
  }


@pytest.mark.parametrize("bad", [np.nan, float("inf"), np.float32("-inf"), jnp.nan])
def test_a_number_that_is_not_finite_is_named(tmp_path, bad):
  data = _summary()
  data["methods"]["pds"]["target_test_loss"][1] = bad
  path = tmp_path / "summary.json"
  with pytest.raises(ValueError, match=r"methods\.pds\.target_test_loss\[1\] is -?(nan|inf)"):
    summary.write_summary(path, data)
  assert not path.exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = summary.write_summary(tmp_path / "summary.json", {"a": 1})
  with pytest.raises(ValueError):
    summary.write_summary(path, {"a": np.nan})
  assert summary.read_summary(path) == {"a": 1}


@pytest.mark.parametrize(
  "keys, message",
  [
    (("methods", "random", "seeds"), r"lacks methods\.random\.seeds \(required: methods\.\*"),
    (("scorer", "validation_spearman"), r"lacks scorer\.validation_spearman"),
    (("scorer",), r"lacks scorer \(|lacks scorer\.validation"),
    (("corpus_share_by_kind",), r"lacks corpus_share_by_kind"),
    (("stages", 0, "flops"), r"lacks stages\[0\]\.flops"),
  ],
)
def test_a_missing_figure_is_named(tmp_path, keys, message):
  data = _summary()
  place = data
  for key in keys[:-1]:
    place = place[key]
  del place[keys[-1]]
  with pytest.raises(ValueError, match=message):
    summary.write_summary(tmp_path / "summary.json", data, required=REQUIRED)


def test_empty_containers_do_not_pass_as_present(tmp_path):
  for change, message in (({"stages": []}, r"stages\[0\]"), ({"methods": {}}, r"methods\.\*")):
    with pytest.raises(ValueError, match=f"lacks {message}"):
      summary.write_summary(tmp_path / "s.json", _summary() | change, required=REQUIRED)


def test_values_without_a_json_form(tmp_path):
  for bad, message in (
    ({"a": {"b": {1, 2}}}, r"a\.b is a set"),
    ({"a": b"x"}, "a is a bytes"),
    ({"a": {(1, 2): 3}}, r"a has the key \(1, 2\)"),
    ({"a": {1: 0, "1": 0}}, "a has the key '1' twice"),
  ):
    with pytest.raises(ValueError, match=message):
      summary.write_summary(tmp_path / "s.json", bad)


def test_reading_what_is_no_summary(tmp_path):
  path = tmp_path / "s.json"
  for text in ("{", "[1]"):
    path.write_text(text)
    with pytest.raises(ValueError, match="s.json is not a summary"):
      summary.read_summary(path)
