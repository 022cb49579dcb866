import json
import shutil

import jax
import numpy as np
import pytest

from lmops_jax.models.diffusion.autoencoder import Autoencoder, from_latents, to_images, to_latents
from lmops_jax.models.diffusion.unet import UNet
from lmops_jax.models.transformer import Transformer
from lmops_jax.pretrained.pipelines import export_pipeline, load_pipeline
from lmops_jax.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="needs pip install -e '.[parity]'")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.pretrained import tiny_diffusion as tiny  # noqa: E402

WEIGHTS = {
  "unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
  "text_encoder": "model.safetensors",
}
FIRST_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.save(tmp_path_factory.mktemp("first") / "model")


@pytest.fixture(scope="module")
def second(tmp_path_factory):
  return tiny.save(tmp_path_factory.mktemp("second") / "model", second=True)


@pytest.fixture(scope="module")
def pipeline(folder):
  return load_pipeline(folder, attention="chunked")


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")


def edit(folder, part, change):
  """Rewrites a part's weights; `change` edits the dict of tensors."""
  path = folder / part / WEIGHTS[part]
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path, metadata={"format": "pt"})


def settings(folder, file, **fields):
  path = folder / file
  path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def close(got, want, tolerance=1e-5):
  want = want.detach().numpy()
  assert got.shape == want.shape
  assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()


def channels_last(array):
  return np.asarray(array).transpose(0, 2, 3, 1)


def normal(*shape):
  return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def same_trees(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


# The same numbers as diffusers and transformers


def predicted(config, params, latents, times, context):
  model = UNet(config)
  with jax.default_matmul_precision("highest"):
    return jax.jit(model.apply)({"params": params}, channels_last(latents), times, context)


def test_unet_predicts_as_diffusers_does(pipeline):
  latents, context = normal(2, 4, 12, 20), normal(2, 7, 32)  # 240 positions, 6 x 10, 3 x 5, 2 x 3
  times = np.array([0, 999])
  with torch.no_grad():
    want = tiny.unet()(torch.tensor(latents), torch.tensor(times), torch.tensor(context)).sample
  config = pipeline.unet.__class__(**{**vars(pipeline.unet), "attention_chunk": 64})
  got = predicted(config, pipeline.params["unet"], latents, times, context)
  close(got, want.permute(0, 2, 3, 1))


def test_unet_of_the_second_kind_predicts_as_diffusers_does(second):
  found = load_pipeline(second, attention="xla")
  assert found.unet.linear_projections and found.unet.num_heads == (2, 4)
  assert found.unet.with_attention == (True, False) and found.unet.num_blocks == 2
  assert found.schedule.prediction == "v_prediction"
  latents, context, times = normal(1, 4, 6, 4), normal(1, 7, 32), np.array([0.5], np.float32)
  with torch.no_grad():
    want = tiny.unet(True)(
      torch.tensor(latents), torch.tensor(times), torch.tensor(context)).sample
  close(predicted(found.unet, found.params["unet"], latents, times, context),
        want.permute(0, 2, 3, 1))


def test_autoencoder_does_as_diffusers_does_both_ways(pipeline):
  model, params = Autoencoder(pipeline.autoencoder), {"params": pipeline.params["autoencoder"]}
  images, latents = np.tanh(normal(2, 3, 16, 12)), normal(2, 4, 8, 6)
  with torch.no_grad():
    moments = tiny.vae().encode(torch.tensor(images)).latent_dist
    decoded = tiny.vae().decode(torch.tensor(latents) / 0.2).sample
  unscaled = from_latents(pipeline.autoencoder, channels_last(latents))

  @jax.jit
  def both(params, images, latents):
    return (
      model.apply(params, images, method="encode"), model.apply(params, latents, method="decode"))

  with jax.default_matmul_precision("highest"):
    (mean, log_variance), pixels = both(params, channels_last(images), unscaled)
  close(mean, moments.mean.permute(0, 2, 3, 1))
  close(log_variance, moments.logvar.permute(0, 2, 3, 1))
  close(pixels, decoded.permute(0, 2, 3, 1))
  noise = normal(*mean.shape)
  sampled = moments.mean + moments.std * torch.tensor(noise).permute(0, 3, 1, 2)
  close(to_latents(pipeline.autoencoder, mean, log_variance, noise),
        sampled.permute(0, 2, 3, 1) * 0.2)
  want = diffusers.image_processor.VaeImageProcessor().postprocess(decoded, output_type="np")
  want = (want * 255).round().astype(np.uint8)
  assert np.mean(want == to_images(decoded.permute(0, 2, 3, 1).numpy())) == 1


def test_text_states_are_those_of_transformers_at_all_positions(pipeline):
  text = "The CAT on  2 naïve 日本"
  theirs = transformers.CLIPTokenizer.from_pretrained(pipeline.tokenizer.path)
  rows = theirs([text, ""], padding="max_length", max_length=77)["input_ids"]
  for row, given in zip(rows, (text, "")):
    ids = pipeline.tokenizer.encode(given)
    assert ids + [pipeline.tokenizer.pad_id] * (77 - len(ids)) == row
  with torch.no_grad():
    want = tiny.text_encoder()(torch.tensor(rows)).last_hidden_state
  model = Transformer(pipeline.text, with_unembedding=False)
  with jax.default_matmul_precision("highest"):
    got = jax.jit(model.apply)({"params": pipeline.params["text"]}, np.array(rows))
  close(got, want)


def test_words_of_a_tokenizer_without_json_are_those_of_transformers(folder):
  theirs = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
  ours = load_tokenizer(folder / "tokenizer")
  for text in ("The cat, it's ART on 3 moons!", "<|endoftext|> naïve “Ü” 日本 a\tcat\n", "", "…"):
    ids = theirs(text)["input_ids"]
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(
      ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# Files


def same_modules(got, want):
  """Two networks of diffusers or transformers that compute the same, bit for bit."""
  got_fields, want_fields = (
    {name: value for name, value in dict(model.config).items() if name[0] != "_"}
    for model in (got, want))
  got_fields.pop("upcast_attention", None), want_fields.pop("upcast_attention", None)
  assert got_fields == want_fields
  got, want = got.state_dict(), want.state_dict()
  assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_an_export_is_the_same_model_for_diffusers(pipeline, folder, tmp_path):
  export_pipeline(tmp_path / "out", pipeline)
  ours, theirs = (
    diffusers.StableDiffusionPipeline.from_pretrained(
      path, safety_checker=None, requires_safety_checker=False)
    for path in (tmp_path / "out", folder))
  same_modules(ours.unet, theirs.unet)
  same_modules(ours.vae, theirs.vae)
  got, want = ours.text_encoder.state_dict(), theirs.text_encoder.state_dict()
  assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
  assert ours.text_encoder.config.to_diff_dict() == theirs.text_encoder.config.to_diff_dict()
  assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
  assert ours.scheduler.alphas_cumprod.equal(theirs.scheduler.alphas_cumprod)
  again = load_pipeline(tmp_path / "out")
  assert again[:3] == pipeline[:3] and again.schedule == pipeline.schedule
  same_trees(again.params, pipeline.params)
  with pytest.raises(ValueError, match="exists already"):
    export_pipeline(tmp_path / "out", pipeline)


def test_an_export_of_the_second_kind_is_the_same_model(second, tmp_path):
  export_pipeline(tmp_path / "out", load_pipeline(second))
  same_modules(*(
    diffusers.UNet2DConditionModel.from_pretrained(path / "unet")
    for path in (tmp_path / "out", second)))
  scheduler = diffusers.PNDMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
  assert scheduler.config.prediction_type == "v_prediction"


def test_first_names_and_prefixed_texts_give_the_same_trees(pipeline, copy):
  def rename(tensors):
    for name in [name for name in tensors if ".mid_block.attentions.0." in name]:
      old = name
      for new, first in FIRST_NAMES.items():
        old = old.replace(f".{new}.", f".{first}.")
      value = tensors.pop(name)
      is_matrix = value.ndim == 2 and name.startswith("encoder")  # the other stays one
      tensors[old] = value[:, :, None, None].contiguous() if is_matrix else value

  def prefix(tensors):
    for name in list(tensors):
      tensors[f"text_model.{name}"] = tensors.pop(name)
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

  edit(copy, "vae", rename)
  edit(copy, "text_encoder", prefix)
  assert any("proj_attn" in name for name in load_file(copy / "vae" / WEIGHTS["vae"]))
  same_trees(load_pipeline(copy).params, pipeline.params)


def test_torch_files_and_half_precision(pipeline, copy):
  unet, vae = (copy / part / WEIGHTS[part] for part in ("unet", "vae"))
  torch.save(load_file(unet), unet.with_suffix(".bin"))
  halves = {name: value.half() for name, value in load_file(vae).items()}
  save_file(halves, vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
  unet.unlink(), vae.unlink()
  found = load_pipeline(copy, param_dtype="float16")
  want = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), pipeline.params)
  same_trees(found.params, want)
  assert {x.dtype for x in jax.tree.leaves(found.params)} == {np.dtype(np.float16)}


def test_every_tensor_that_does_not_fit_is_named(copy):
  names = {
    "unet": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "vae": "encoder.conv_in.weight", "text_encoder": "final_layer_norm.bias"}
  added = [f"extra_{i}.weight" for i in range(20)]

  def transpose(tensors):
    tensors[names["unet"]] = tensors[names["unet"]].T.contiguous()
    del tensors["conv_out.bias"]

  def add(tensors):
    tensors.update({name: torch.zeros(2) for name in added})
    del tensors[names["vae"]]

  edit(copy, "unet", transpose)
  edit(copy, "vae", add)
  edit(copy, "text_encoder", lambda tensors: tensors.pop(names["text_encoder"]))
  with pytest.raises(ValueError) as error:
    load_pipeline(copy)
  said = str(error.value)
  assert f"{names['unet']} is [32, 16] and should be [16, 32]" in said
  assert "lacks conv_out.bias [4]" in said and "lacks text_model.final_layer_norm.bias [32]" in said
  assert f"lacks {names['vae']} [16, 3, 3, 3]" in said
  assert all(f"{name} [2]" in said for name in added)


@pytest.mark.parametrize("file, fields, said", [
  ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "_class_name="),
  ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, 'unet "UNet2DModel"'),
  ("model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}, 'tokenizer "T5Tok'),
  ("model_index.json", {"vae": None}, "vae="),
  ("unet/config.json", {"_class_name": "UNet2DModel"}, "_class_name="),
  ("unet/config.json", {"up_block_types": ["AttnUpBlock2D"] * 4}, "up_block_types"),
  ("unet/config.json", {"up_block_types": ["UpBlock2D"] * 4}, "up_block_types"),
  ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 3}, "down_block_types"),
  ("unet/config.json", {"attention_head_dim": [4, 4]}, "attention_head_dim"),
  ("unet/config.json", {"attention_head_dim": 5}, "num_heads"),
  ("unet/config.json", {"norm_num_groups": 32}, "norm_groups"),
  ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
  ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
  ("unet/config.json", {"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block"),
  ("unet/config.json", {"dual_cross_attention": True}, "dual_cross_attention"),
  ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block"),
  ("unet/config.json", {"use_linear_projection": True}, "proj_in.weight"),
  ("unet/config.json", {"in_channels": 9}, "in_channels=9 should be 4"),
  ("unet/config.json", {"cross_attention_dim": 64}, "cross_attention_dim=64 should be 32"),
  ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv"),
  ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
  ("vae/config.json", {"out_channels": 4}, "out_channels"),
  ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean"),
  ("text_encoder/config.json", {"model_type": "t5"}, "model_type"),
  ("text_encoder/config.json", {"num_hidden_layers": 10**12}, "num_hidden_layers"),
  ("text_encoder/config.json", {"hidden_act": "snake"}, "hidden_act"),
  ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type"),
  ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
  ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
  ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"},
   "_class_name"),
])
def test_what_is_not_modelled_is_refused_by_name(copy, file, fields, said):
  settings(copy, file, **fields)
  with pytest.raises(ValueError) as error:
    load_pipeline(copy)
  assert str(copy / file.split("/")[0]) in str(error.value) and said in str(error.value)
  assert len(str(error.value)) < 20_000


def test_a_folder_without_weights_or_of_no_pipeline_is_refused(copy, tmp_path):
  (copy / "vae" / WEIGHTS["vae"]).unlink()
  with pytest.raises(ValueError, match="diffusion_pytorch_model.fp16.safetensors"):
    load_pipeline(copy)
  with pytest.raises(ValueError, match="is no folder"):
    load_pipeline(tmp_path / "nowhere")
