"""PDS from published models: the proxy and the scorer start from their weights and vocabulary."""

import json

import jax
import numpy as np
import pytest

from lmops_jax import cli, pretrained
from lmops_jax.config import resolve
from lmops_jax.mesh import checkpoints
from lmops_jax.stages import skeleton
from tests import model_folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return str(model_folders.write(tmp_path_factory.mktemp("model"), spread=1.0))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  """A gin file on texts of the test's own, with a byte vocabulary."""
  path = tmp_path_factory.mktemp("own")
  rng = np.random.default_rng(0)
  for name, num in (("corpus", 60), ("target", 12)):
    (path / f"{name}.jsonl").write_text("".join(
      json.dumps({"text": f"{name} {i} " + " ".join(rng.choice(list("abcdefgh"), 150))}) + "\n"
      for i in range(num)
    ))
  (path / "own.gin").write_text(
    "include 'pds/smoke.gin'\ninclude 'data/jsonl.gin'\ninclude 'data/target_jsonl.gin'\n"
    f"include 'data/model_tokenizer.gin'\nCORPUS_PATH = '{path}/corpus.jsonl'\n"
    f"TARGET_PATH = '{path}/target.jsonl'\nMESH = None\nTARGET_INSTANCES = None\n"
  )
  return str(path / "own.gin")


def _bindings(folder, *more):
  return [
    f"VOCABULARY_PATH = '{folder}'", f"pretrained.load.path = '{folder}'",
    "PROXY_INIT = @pretrained.load()", *more,
  ]


def test_the_proxy_trains_on_from_the_published_weights(folder, own, tmp_path):
  code = cli.main([
    "run", own, "--workdir", str(tmp_path / "w"), '--gin.STAGES=["prepare", "proxy"]',
    "--gin.PROXY_STEPS=3", "--gin.CHECKPOINTS=(0, 3)",
    *(f"--gin.{b.replace(' = ', '=')}" for b in _bindings(folder)),
  ])
  assert code == 0
  source = pretrained.load(folder)
  kept = checkpoints.load_params(tmp_path / "w" / "proxy" / "params" / "0")
  jax.tree.map(np.testing.assert_array_equal, kept, source.params())
  trained = checkpoints.load_params(tmp_path / "w" / "proxy" / "params" / "3")
  assert np.abs(trained["embedding"] - kept["embedding"]).max() > 0


def test_configuration_comes_from_the_model_and_weights_are_part_of_the_settings(folder, own):
  resolved = resolve.load([own], _bindings(folder, "INIT = @pretrained.load()"))
  system = resolved.run().system
  assert system.proxy.model == system.pretrain.model == pretrained.load(folder).config
  stages = {stage.name: stage for stage in skeleton.resolve_stages(
    system, system.stages(None), resolved.settings)}
  for name, key in (("proxy", "proxy.init"), ("pretrain/pds/seed0", "pretrain.init")):
    assert stages[name].settings[f"{key}.fingerprint"] == pretrained.load(folder).fingerprint()


def test_a_scorer_may_start_from_another_model(folder, own):
  bindings = _bindings(
    folder, "pds.Scorer.init = @pretrained.load()", "pds.Scorer.from_proxy = False"
  )
  system = resolve.load([own], bindings).run().system
  assert system.scorer.trunk(system.proxy) == pretrained.load(folder).config
  with pytest.raises(ValueError, match="pds.Scorer.init is set, so its trunk cannot start from"):
    resolve.load([own], bindings[:-1]).run()


def test_another_vocabulary_is_refused(folder, own, tmp_path):
  with pytest.raises(ValueError, match="instances are in another vocabulary; include 'data/model_"):
    resolve.load([own], _bindings(folder, "VOCABULARY = @data.TrainSentencePiece()")[1:]).run()
