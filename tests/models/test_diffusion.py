"""The UNet and the autoencoder alone; tests/pretrained/test_pipelines.py has diffusers beside."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.diffusion.autoencoder import (
  Autoencoder,
  AutoencoderConfig,
  from_latents,
  to_images,
  to_latents,
)
from lmops_jax.models.diffusion.unet import UNet, UNetConfig, sinusoids
from lmops_jax.models.partitioning import unboxed
from lmops_jax.pretrained.families import clip, diffusion
from lmops_jax.pretrained.families.family import ConfigReader

SMALL = UNetConfig(
  in_channels=3, out_channels=3, sample_size=9, widths=(8, 16), with_attention=(False, True),
  num_heads=(3, 2), num_residuals=1, context_width=12, norm_groups=4, attention_chunk=8)
RNG = np.random.default_rng(0)
INPUTS = (
  RNG.normal(size=(2, 9, 6, 3)).astype(np.float32), np.array([3, 700]),
  RNG.normal(size=(2, 5, 12)).astype(np.float32))


@functools.cache
def _params():
  return nn.unbox(jax.jit(UNet(SMALL).init)(jax.random.key(0), *INPUTS)["params"])


def _apply(config, params, *inputs):
  return UNet(config).apply({"params": params}, *inputs)


_compiled = jax.jit(_apply, static_argnums=0)


@functools.cache
def _output():
  return np.asarray(_compiled(SMALL, _params(), *INPUTS))


def _counts(family, config, parts=None, num_layers=0):
  """Numbers and tensors of a model of the family, or of some parts of it."""
  shapes = unboxed(jax.eval_shape(
    family.module(config).init, jax.random.key(0), *family.inputs(config))["params"])
  shapes = shapes if parts is None else {part: shapes[part] for part in parts}
  rules = [rule for rule in family.rules(config)
           if parts is None or rule.ours[0].split("/")[0] in parts]
  tensors = sum(len(rule.names(num_layers)) for rule in rules)
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)), tensors


def test_published_sizes():
  text = clip.TEXT.read_config(ConfigReader(
    dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12), "config.json"))
  assert _counts(diffusion.UNET, UNetConfig()) == (859_520_964, 686)
  assert _counts(diffusion.AUTOENCODER, AutoencoderConfig(), ("latents", "decoder")) == (
    49_490_199, 140)
  assert _counts(diffusion.AUTOENCODER, AutoencoderConfig())[0] == 83_653_863
  assert _counts(clip.TEXT, text, num_layers=12) == (123_060_480, 196)


def test_a_picture_of_any_size_goes_in_and_a_float32_comes_out():
  out = _output()
  assert out.shape == (2, 9, 6, 3) and out.dtype == np.float32 and np.isfinite(out).all()


def test_rows_of_a_batch_do_not_see_each_other():
  swapped = _compiled(SMALL, _params(), *(x[::-1] for x in INPUTS))
  np.testing.assert_allclose(swapped[::-1], _output(), rtol=0, atol=1e-5)


def test_time_and_text_are_seen():
  latents, times, context = INPUTS
  for changed in ((latents, times + 1, context), (latents, times, context + 0.5)):
    difference = np.abs(_compiled(SMALL, _params(), *changed) - _output()).max(axis=(1, 2, 3))
    assert (difference > 1e-4).all()


@pytest.mark.slow
def test_the_mean_of_the_text_may_stand_beside_the_time():
  """As a bias of the last product that tells the time, for a picture alone."""
  told = dataclasses.replace(SMALL, tells_mean=True)
  alone = tuple(x[:1] for x in INPUTS)
  own = nn.unbox(UNet(told).init(jax.random.key(0), *alone)["params"]["mean_in"])
  product = jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), own)
  shift = INPUTS[2][0].mean(axis=0) @ product["kernel"] + product["bias"]
  time = {**_params()["time_out"], "bias": _params()["time_out"]["bias"] + shift}
  want = _compiled(SMALL, {**_params(), "time_out": time}, *alone)
  found = _compiled(told, {**_params(), "mean_in": product}, *alone)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
  assert np.abs(found - _output()[:1]).max() > 1e-3


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialised_gradients_are_the_same(remat):
  def loss(config, params):
    return jnp.mean(jnp.square(_apply(config, params, *INPUTS)))

  gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
  want, got = gradient(SMALL, _params()), gradient(
    dataclasses.replace(SMALL, remat=remat), _params())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_attention_in_chunks_and_half_precision():
  whole = dataclasses.replace(SMALL, attention="xla")
  np.testing.assert_allclose(_compiled(whole, _params(), *INPUTS), _output(), rtol=0, atol=1e-5)
  half = _compiled(dataclasses.replace(SMALL, dtype="bfloat16"), _params(), *INPUTS)
  assert half.dtype == np.float32
  assert 0 < np.abs(half - _output()).max() < 0.05 * np.abs(_output()).max()


def test_a_mesh_gives_the_same():
  mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
  with mesh.activate():
    boxed = jax.eval_shape(UNet(SMALL).init, jax.random.key(0), *INPUTS)["params"]
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    assert all(map(is_box, jax.tree.leaves(boxed, is_leaf=is_box)))
    params = jax.device_put(_params(), mesh.shardings(boxed, uneven="whole"))
    got = _compiled(SMALL, params, *INPUTS)
  split = [x for x in jax.tree.leaves(params) if not x.sharding.is_fully_replicated]
  assert len(split) > 20
  np.testing.assert_allclose(got, _output(), rtol=0, atol=1e-5)


def test_sinusoids_begin_with_cosines():
  times = np.array([0, 1, 999], np.int32)
  frequencies = 1e4 ** (-np.arange(160) / 160)
  angles = times[:, None] * frequencies
  want = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
  np.testing.assert_allclose(sinusoids(times, 320), want, rtol=0, atol=2e-4)
  np.testing.assert_array_equal(sinusoids(times.astype(np.float32), 320), sinusoids(times, 320))


def test_latents_and_pixels():
  config = AutoencoderConfig(scaling_factor=0.25)
  mean, noise = np.float32([[1.0, -2.0]]), np.float32([[1.0, 0.5]])
  log_variance = np.log(np.float32([[4.0, 16.0]]))
  np.testing.assert_allclose(to_latents(config, mean), mean / 4)
  np.testing.assert_allclose(to_latents(config, mean, log_variance, noise), [[0.75, 0.0]])
  np.testing.assert_allclose(from_latents(config, mean / 4), mean)
  pixels = to_images(jnp.array([-3.0, -1, 0, 1 / 255, 0.999, 1, 2]))
  assert pixels.dtype == jnp.uint8 and pixels.tolist() == [0, 0, 128, 128, 255, 255, 255]


def test_encoder_and_decoder_need_only_their_own_parameters():
  config = AutoencoderConfig(widths=(8, 16), norm_groups=4, num_residuals=1)
  model = Autoencoder(config)
  images = np.tanh(RNG.normal(size=(1, 6, 4, 3))).astype(np.float32)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), images)["params"])
  take = lambda *names: {"params": {name: params[name] for name in names}}  # noqa: E731
  mean, log_variance = jax.jit(functools.partial(model.apply, method="encode"))(
    take("encoder", "moments"), images)
  assert mean.shape == log_variance.shape == (1, 3, 2, 4)
  pixels = jax.jit(functools.partial(model.apply, method="decode"))(
    take("latents", "decoder"), mean)
  assert pixels.shape == images.shape and pixels.dtype == jnp.float32


@pytest.mark.parametrize("kind, fields, said", [
  (UNetConfig, {"num_heads": (8, 8)}, "num_heads has 2 values for the 4 levels"),
  (UNetConfig, {"norm_groups": 48}, "widths has 320, which is not a multiple of norm_groups=48"),
  (UNetConfig, {"num_heads": (7, 8, 8, 8)}, r"widths\[0\]=320 is not a multiple"),
  (UNetConfig, {"num_heads": (8, 8, 8, 7)}, r"widths\[3\]=1280 is not a multiple"),
  (UNetConfig, {"widths": (5,), "with_attention": (True,), "num_heads": (1,), "norm_groups": 5},
   "even number"),
  (UNetConfig, {"widths": ()}, "widths"),
  (UNetConfig, {"attention": "flash"}, "attention"),
  (AutoencoderConfig, {"widths": (128, 100)}, "widths has 100"),
  (AutoencoderConfig, {"scaling_factor": 0.0}, "scaling_factor"),
])
def test_wrong_settings_are_named(kind, fields, said):
  with pytest.raises(ValueError, match=said):
    kind(**fields)


@pytest.mark.parametrize("index, value, said", [
  (0, np.zeros((2, 9, 6, 4), np.float32), "latents"), (1, np.zeros(3, np.int32), "timesteps"),
  (2, np.zeros((2, 5, 13), np.float32), "context"),
  (2, np.zeros((1, 5, 12), np.float32), "context"),
])
def test_wrong_inputs_are_named(index, value, said):
  inputs = [value if i == index else x for i, x in enumerate(INPUTS)]
  with pytest.raises(ValueError, match=f"The {said}"):
    _apply(SMALL, _params(), *inputs)


def test_pictures_of_wrong_sides_are_refused():
  model = Autoencoder(AutoencoderConfig(widths=(8, 16), norm_groups=4))
  for shape in ((1, 5, 4, 3), (1, 4, 4, 1), (4, 4, 3)):
    with pytest.raises(ValueError, match="The images are"):
      model.apply({"params": {}}, np.zeros(shape, np.float32), method="encode")
  with pytest.raises(ValueError, match="The latents are"):
    model.apply({"params": {}}, np.zeros((1, 2, 2, 3), np.float32), method="decode")
