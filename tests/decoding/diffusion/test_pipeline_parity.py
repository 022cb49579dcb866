"""Whole pictures against diffusers' pipeline: tiny random models, the same first noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.decoding.diffusion.guidance import guided
from lmops_jax.decoding.diffusion.imagine import DiffusionModels, Imaginer, image_keys
from lmops_jax.decoding.diffusion.plans import trajectory
from lmops_jax.decoding.diffusion.samplers import Ddim, DpmSolver, Plms
from lmops_jax.pretrained.pipelines import load_pipeline
from lmops_jax.text.clip import clip_texts

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
tiny_diffusion = pytest.importorskip("tests.pretrained.tiny_diffusion")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

PROMPTS, NEGATIVE, GUIDANCE = ["the cat on the cat", "on"], "cat", 7.5
SETTINGS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SAMPLERS = [
  (DpmSolver(20), "DPMSolverMultistepScheduler", dict(final_sigmas_type="sigma_min")),
  (Ddim(20), "DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)),
  (Plms(20), "PNDMScheduler", dict(skip_prk_steps=True, steps_offset=1)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny_diffusion.save(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def loaded(folder):
  return load_pipeline(folder)


@pytest.fixture(scope="module")
def ours(loaded):
  return DiffusionModels.of(loaded.text, loaded.unet, loaded.autoencoder, loaded.schedule)


@pytest.fixture(scope="module")
def peer(folder):
  pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
  pipe.set_progress_bar_config(disable=True)
  return pipe


@pytest.fixture(scope="module")
def noise():
  keys = image_keys(PROMPTS, 1, seed=4)
  return jax.vmap(lambda key: jax.random.normal(key, (8, 8, 4)))(keys)


def theirs(peer, kind, settings, noise):
  """Latents after each step, `[N,B,h,w,C]`, and the pictures."""
  peer.scheduler = getattr(diffusers, kind)(**SETTINGS, **settings)
  path = []

  def keep(pipe, step, time, kwargs):
    path.append(kwargs["latents"].numpy().transpose(0, 2, 3, 1).copy())
    return kwargs

  latents = torch.from_numpy(np.asarray(noise).transpose(0, 3, 1, 2).copy())
  images = peer(
    PROMPTS, 16, 16, 20, guidance_scale=GUIDANCE, negative_prompt=[NEGATIVE] * len(PROMPTS),
    latents=latents, output_type="np", callback_on_step_end=keep).images
  return np.stack(path), images


@pytest.mark.parametrize("sampler, kind, settings", SAMPLERS, ids=lambda x: str(x)[:12])
def test_every_step_and_picture_is_theirs(sampler, kind, settings, ours, loaded, peer, noise):
  want, images = theirs(peer, kind, settings, noise)
  texts = clip_texts(loaded.tokenizer, [NEGATIVE, *PROMPTS]).tokens
  plan = sampler.plan(ours.schedule)

  @jax.jit
  def walk(params, noise):
    states = ours.states(params, texts)
    predict = lambda *inputs: ours.unet.apply({"params": params["unet"]}, *inputs)  # noqa: E731
    without = jnp.broadcast_to(states[:1], states[1:].shape)
    path = trajectory(plan, guided(predict, states[1:], without, GUIDANCE), noise)
    return path, ours.pixels(params, path[-1])

  with jax.default_matmul_precision("highest"):
    found, pixels = walk(loaded.params, noise)
  assert found.shape == want.shape
  for step, (a, b) in enumerate(zip(found, want)):
    assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max(), step
  np.testing.assert_allclose(np.clip(pixels / 2 + 0.5, 0, 1), images, atol=1e-4)


def test_imagined_pictures_are_theirs(ours, loaded, peer, noise):
  """The whole program: text, keys, sampler, guidance, decoding, bytes."""
  sampler, kind, settings = SAMPLERS[0]
  _, images = theirs(peer, kind, settings, noise)
  texts = clip_texts(loaded.tokenizer, [NEGATIVE, *PROMPTS]).tokens
  draws = Imaginer(ours, loaded.params, sampler, GUIDANCE, 16)
  found = draws(texts[1:], image_keys(PROMPTS, 1, seed=4), texts[0])
  want = np.round(255 * images).astype(int)
  assert found.finite.all() and want.std() > 10
  difference = np.abs(found.images.astype(int) - want)
  assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_a_network_that_says_v_draws_theirs(tmp_path):
  """Stable Diffusion 2's kind of UNet and prediction."""
  folder = tiny_diffusion.save(tmp_path / "model", second=True)
  loaded = load_pipeline(folder)
  parts = DiffusionModels.of(loaded.text, loaded.unet, loaded.autoencoder, loaded.schedule)
  assert loaded.schedule == dataclasses.replace(loaded.schedule, prediction="v_prediction")
  pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
  keys = image_keys(PROMPTS, 1)
  noise = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 4)))(keys)
  settings = dict(final_sigmas_type="sigma_min", prediction_type="v_prediction")
  _, images = theirs(pipe, "DPMSolverMultistepScheduler", settings, noise)
  texts = clip_texts(loaded.tokenizer, [NEGATIVE, *PROMPTS]).tokens
  found = Imaginer(parts, loaded.params, DpmSolver(20), GUIDANCE, 16)(texts[1:], keys, texts[0])
  difference = np.abs(found.images.astype(int) - np.round(255 * images).astype(int))
  assert difference.max() <= 1
