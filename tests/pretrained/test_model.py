"""A model on disk: opened, read onto a mesh, converted, exported for transformers, refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from lmops_jax.mesh.meshes import MeshConfig  # noqa: E402
from lmops_jax.pretrained import exporting, sources  # noqa: E402
from lmops_jax.pretrained import model as model_lib  # noqa: E402
from tests.pretrained.tiny_models import CASES, CAUSAL, ENCODERS, make  # noqa: E402

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """`(family, variant) -> folder` as transformers saves it."""
  made = {}

  def folder(family, variant=0):
    if (family, variant) not in made:
      path = tmp_path_factory.mktemp(f"{family}{variant}")
      make(family, variant).save_pretrained(path)
      made[family, variant] = path
    return made[family, variant]

  return folder


def _torch_logits(model):
  with torch.no_grad():
    return np.asarray(model(torch.tensor(TOKENS.astype(np.int64))).logits)


def _logits(source, params):
  return jax.jit(
    lambda p: source.model.apply({"params": p}, jnp.asarray(TOKENS), method="logits")
  )(params)


def _tensors(folder):
  with sources.open_source(folder) as source:
    return {name: np.array(source.read(name)) for name in source.names()}


@pytest.mark.parametrize("family,variant", CASES)
def test_import_and_export_give_the_same_bits_and_a_model_for_transformers(
  folders, family, variant, tmp_path
):
  folder = folders(family, variant)
  source = model_lib.load(str(folder))
  params = source.params()
  exporting.export(tmp_path / "out", source, params)
  before, after = _tensors(folder), _tensors(tmp_path / "out")
  unused = {"cls.predictions.bias", "lm_head.bias"}  # by an untied head, which has its own
  dropped = unused if family in ENCODERS and variant == 1 else set()
  assert after.keys() == before.keys() - dropped
  for name in after:
    tensor = before[name]
    assert tensor.dtype == after[name].dtype
    np.testing.assert_array_equal(tensor, after[name], err_msg=name)
  want = json.loads((folder / "config.json").read_text())
  got = json.loads((tmp_path / "out" / "config.json").read_text())
  assert {**want, "dtype": "float32"} == got
  if variant == 0:
    again = type(make(family, variant)).from_pretrained(
      tmp_path / "out", attn_implementation="eager"
    )
    logits = _torch_logits(again)
    np.testing.assert_array_equal(logits, _torch_logits(make(family, variant)))
    np.testing.assert_allclose(_logits(source, params), logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_without_the_published_config_the_written_one_describes_the_same_model(
  folders, family, tmp_path
):
  source = model_lib.load(str(folders(family, 1)))
  source = model_lib.dataclasses.replace(source, original={})
  exporting.export(tmp_path / "out", source)
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", attn_implementation="eager"
  )
  np.testing.assert_allclose(
    _torch_logits(again), _torch_logits(make(family, 1)), rtol=1e-5, atol=1e-6
  )
  reloaded = model_lib.load(str(tmp_path / "out"))
  assert reloaded.config == source.config


def test_converted_model_loads_with_the_same_bits(folders, tmp_path):
  source = model_lib.load(str(folders("llama", 1)))
  params = source.params()
  model_lib.save_model(tmp_path / "converted", source, params)
  again = model_lib.load(str(tmp_path / "converted"), scan_layers=False)
  assert again.family == "llama" and not again.config.scan_layers
  jax.tree.map(np.testing.assert_array_equal, params, again.params())
  exporting.export(tmp_path / "exported", again)
  before, after = _tensors(folders("llama", 1)), _tensors(tmp_path / "exported")
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    np.testing.assert_array_equal(tensor, after[name])
  with pytest.raises(ValueError, match="converted exists already; choose a new folder"):
    model_lib.save_model(tmp_path / "converted", source, params)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["converted", "exported"]


def test_bfloat16_weights_round_trip(folders, tmp_path):
  peer = make("qwen2", 0)
  half = type(peer)(peer.config).to(torch.bfloat16)
  half.load_state_dict({k: v.to(torch.bfloat16) for k, v in peer.state_dict().items()})
  half.save_pretrained(tmp_path / "half")
  source = model_lib.load(str(tmp_path / "half"))
  exporting.export(tmp_path / "out", source, dtype="bfloat16")
  before, after = _tensors(tmp_path / "half"), _tensors(tmp_path / "out")
  for name, tensor in before.items():
    assert after[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensor.view(np.uint16), after[name].view(np.uint16))


def test_sharded_params_are_read_part_by_part_and_give_the_same_logits(folders, monkeypatch):
  folder = folders("llama", 0)
  source = model_lib.load(str(folder))
  want = source.params()
  partitioner = MeshConfig(data=1, fsdp=2, tensor=4).build()
  sizes = []
  split = sources.np.stack

  def stack(parts, *args, **kwargs):
    sizes.append(sum(part.size for part in parts))
    return split(parts, *args, **kwargs)

  monkeypatch.setattr("lmops_jax.pretrained.importing.np.stack", stack)
  got = source.params(partitioner)
  query = got["layers"]["attention"]["query"]["kernel"]
  assert query.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)
  assert max(sizes) <= max(
    leaf.size // 8 for leaf in jax.tree.leaves(want["layers"]["mlp"])
  )  # never a whole matrix
  jax.tree.map(np.testing.assert_array_equal, got, want)
  with partitioner.activate():
    logits = _logits(source, got)
  np.testing.assert_allclose(logits, _logits(source, want), rtol=1e-5, atol=1e-5)


def test_a_bare_body_loads_and_exports_as_one(tmp_path):
  peer = make("gpt2", 0).transformer
  peer.config.architectures = ["GPT2Model"]
  peer.save_pretrained(tmp_path / "body")
  source = model_lib.load(str(tmp_path / "body"))
  np.testing.assert_allclose(
    _logits(source, source.params()), _torch_logits(make("gpt2", 0)), rtol=1e-4, atol=2e-5
  )


def _change(folder, tmp_path, **fields):
  shutil.copytree(folder, tmp_path / "changed")
  config = json.loads((folder / "config.json").read_text())
  (tmp_path / "changed" / "config.json").write_text(json.dumps({**config, **fields}))
  return str(tmp_path / "changed")


@pytest.mark.parametrize(
  "fields,message",
  [
    ({"model_type": "t5"}, "model_type 't5'.*families that it can read are gpt2, opt, xglm"),
    ({"hidden_act": "snake"}, "hidden_act='snake'; the activations"),
    ({"num_attention_heads": None}, "config.json: num_attention_heads=null should be a whole"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "positions by 'yarn' without factor"),
    ({"rope_parameters": {"rope_type": "su"}}, "positions by 'su'; lmops_jax reads default, lin"),
    ({"num_hidden_layers": 4}, "lacks model.layers.3.input_layernorm.weight"),
    ({"num_hidden_layers": 2}, "no place for its model.layers.2"),
    ({"vocab_size": 60}, r"embed_tokens.weight is \[61, 24\] and should be \[60, 24\]"),
  ],
)
def test_misfits_are_one_sentence(folders, tmp_path, fields, message):
  path = _change(folders("llama", 0), tmp_path, **fields)
  with pytest.raises(ValueError, match=message) as error:
    model_lib.load(path).params()
  assert "\n" not in str(error.value)


def test_paths_that_hold_no_model_are_refused(tmp_path):
  with pytest.raises(ValueError, match="neither a folder nor a .gguf file"):
    model_lib.load(str(tmp_path / "absent"))
  with pytest.raises(ValueError, match="config.json cannot be read"):
    model_lib.load(str(tmp_path))
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json is not valid JSON"):
    model_lib.load(str(tmp_path))


def test_further_tensors_can_be_left_out_by_name(folders, tmp_path):
  folder = tmp_path / "extra"
  shutil.copytree(folders("bert", 0), folder)
  from safetensors.numpy import load_file, save_file

  tensors = load_file(folder / "model.safetensors")
  save_file({**tensors, "classifier.weight": np.zeros((2, 24), np.float32)},
            folder / "model.safetensors")
  with pytest.raises(ValueError, match=r"no place for its classifier.weight \[2, 24\]"):
    model_lib.load(str(folder)).params()
  model_lib.load(str(folder), ignore=["classifier.*"]).params()
