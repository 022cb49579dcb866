"""Pictures of tiny random models: from keys alone, on any mesh, in any batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.decoding.diffusion.imagine import DiffusionModels, Imaginer, image_keys
from lmops_jax.decoding.diffusion.samplers import Ddim, DpmSolver, Plms
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.diffusion.autoencoder import Autoencoder
from lmops_jax.models.diffusion.noise import NoiseSchedule
from lmops_jax.models.diffusion.unet import UNet
from tests.decoding.diffusion import tiny_models
from tests.decoding.diffusion.tiny_models import UNET, models, random_params

EMPTY = [0] * 7
TOKENS = np.random.default_rng(0).integers(1, 50, (5, 7))
PROMPTS = ["a", "b", "c", "d", "e"]


@pytest.fixture(scope="module")
def params():
  return tiny_models.params()


def imaginer(params, *args, dtype="float32", batch_size=8, **kwargs):
  args = args or (DpmSolver(4),)
  return Imaginer(models(dtype), params, *args, size=(8, 12), batch_size=batch_size, **kwargs)


@pytest.fixture(scope="module")
def drawn(params):
  """Five pictures in one batch, and what drew them."""
  draws = imaginer(params)
  return draws, draws(TOKENS, image_keys(PROMPTS, 1), EMPTY)


def assert_same(found, want, most=1):
  """Equal but for the last bit of float32 before rounding to bytes."""
  assert found.dtype == np.uint8 and found.shape == want.shape
  difference = np.abs(found.astype(int) - want.astype(int))
  assert difference.max() <= most and (difference > 0).mean() < 0.01


def test_pictures_are_bytes_that_differ_by_prompt(drawn):
  images = drawn[1].images
  assert images.shape == (5, 8, 12, 3) and images.dtype == np.uint8
  assert drawn[1].finite.all() and images.std() > 10
  assert all((images[i] != images[j]).any() for i in range(5) for j in range(i))


def test_a_bucket_has_one_program(drawn):
  draws, five = drawn
  for num in (6, 7, 8):  # the bucket of five
    more = np.resize(TOKENS, (num, 7))
    assert_same(draws(more, image_keys(list("abcdefgh")[:num], 1), EMPTY).images[:5], five.images)
  assert draws.num_programs == 1


@pytest.mark.slow  # several devices draw one picture each below
def test_a_batch_is_its_single_pictures(drawn, params):
  single = imaginer(params, batch_size=1)
  assert_same(single(TOKENS, image_keys(PROMPTS, 1), EMPTY).images, drawn[1].images)
  assert single.num_programs == 1


def test_eight_devices_draw_what_one_does(drawn, params):
  split = imaginer(params, partitioner=MeshConfig(data=4, fsdp=2).build(), batch_size=1)
  assert split.batch_size == 8
  found = split(TOKENS, image_keys(PROMPTS, 1), EMPTY)
  assert found.finite.shape == (5,)
  assert_same(found.images, drawn[1].images)


def test_the_same_call_gives_the_same_bits(drawn):
  draws, five = drawn
  np.testing.assert_array_equal(
    draws(TOKENS, image_keys(PROMPTS, 1), EMPTY).images, five.images)


def test_noise_is_that_of_the_key_and_decoding_that_of_the_autoencoder(drawn, params):
  """The same by hand: a picture alone, in unscanned steps of order 1 and 2."""
  text, unet, autoencoder, schedule = models()
  plan = DpmSolver(4).plan(schedule)
  key = image_keys(PROMPTS, 1)[2]
  x = jax.random.normal(key, (4, 6, 4))[None]
  states, empty = (text.apply({"params": params["text"]}, jnp.asarray(t)[None])
                   for t in (TOKENS[2], EMPTY))
  ask = jax.jit(lambda x, t, c: unet.apply({"params": params["unet"]}, x, t, c))
  before = None
  for i in range(4):
    time = jnp.asarray(plan.timesteps[i : i + 1])
    low, high = ask(x, time, empty), ask(x, time, states)
    clean = (x - plan.sigmas[i] * (low + 7.5 * (high - low))) / plan.alphas[i]
    x = plan.sample_weights[i] * x + plan.weights[i, 0] * clean + (
      0 if before is None else plan.weights[i, 1] * before)
    before = clean
  pixels = jax.jit(lambda z: autoencoder.apply(
    {"params": params["autoencoder"]}, z / 0.18215, method=Autoencoder.decode))(x)
  want = np.round(255 * np.clip(np.asarray(pixels) / 2 + 0.5, 0, 1)).astype(np.uint8)
  assert_same(drawn[1].images[2:3], want)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [Ddim(4), Plms(4), DpmSolver(4, final="zero")], ids=str)
def test_other_samplers_draw_too_and_without_guidance(params, sampler):
  draws = imaginer(params, sampler, 1.0)
  found = draws(TOKENS, image_keys(PROMPTS, 1))
  assert found.finite.all() and found.images.std() > 10
  # A guidance of 1 asks for no negative text and does not read one.
  np.testing.assert_array_equal(draws(TOKENS, image_keys(PROMPTS, 1), EMPTY).images, found.images)


@pytest.mark.slow
def test_bfloat16_draws_nearly_the_same(drawn, params):
  draws = imaginer(params, dtype="bfloat16")
  assert draws.params["unet"]["convolution_in"]["kernel"].dtype == jnp.bfloat16
  assert draws.params["unet"]["convolution_in"]["bias"].dtype == jnp.float32
  found = draws(TOKENS, image_keys(PROMPTS, 1), EMPTY)
  assert found.finite.all()
  difference = np.abs(found.images.astype(float) - drawn[1].images)
  assert difference.mean() < 0.15 * drawn[1].images.std()


def test_a_picture_that_is_not_finite_is_marked_alone(drawn, params):
  """A word whose vector is infinite spoils its own picture."""
  table = params["text"]["embedding"].at[49].set(jnp.inf)
  broken = {**params, "text": {**params["text"], "embedding": table}}
  draws, _ = drawn
  good = draws.params
  tokens = np.where(TOKENS == 49, 48, TOKENS)
  tokens[3, 2] = 49
  try:
    draws.params = imaginer(broken).params  # the same program
    found = draws(tokens, image_keys(PROMPTS, 1), EMPTY)
  finally:
    draws.params = good
  assert found.finite.tolist() == [True, True, True, False, True]
  assert draws.num_programs == 1


@pytest.mark.slow
def test_a_unet_over_pixels_needs_no_autoencoder(params):
  unet = UNet(dataclasses.replace(UNET, in_channels=3, out_channels=3))
  inputs = jnp.zeros((1, 4, 4, 3)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 7, 16))
  own = {"text": params["text"],
         "unet": random_params(unet, *inputs)}
  draws = Imaginer(
    DiffusionModels(models().text, unet, None, NoiseSchedule()), own, DpmSolver(2), 1.0, size=4)
  found = draws(TOKENS[:1], image_keys(["a"], 1))
  assert found.images.shape == (1, 4, 4, 3) and found.finite.all()


def test_keys_are_those_of_text_seed_and_number():
  data = lambda *args: jax.random.key_data(image_keys(*args)).tolist()  # noqa: E731
  pairs = data(["a cat", "a dog"], 2, 5)
  assert pairs[2:] == data(["a dog"], 2, 5) == data(["a dog"], 3, 5)[:2]
  everything = data(["a cat", "a dog", "A cat"], 2, 5) + data(["a cat"], 2, 6)
  assert len({tuple(key) for key in everything}) == 8
  # As documented, and for ever: pictures are named by prompt and seed.
  import hashlib

  h = int.from_bytes(hashlib.blake2b(b"a dog", digest_size=16).digest()[:8], "big")
  want = jax.random.fold_in(jax.random.key(5), h >> 32)
  want = jax.random.fold_in(jax.random.fold_in(want, h & 0xFFFFFFFF), 1)
  assert pairs[3] == jax.random.key_data(want).tolist()


@pytest.mark.parametrize("kwargs, message", [
  ({"size": 7}, "7 x 7 pixels cannot be drawn; take sides that are multiples of 2, such as 8"),
  ({"size": (8, 0)}, "8 x 0 pixels"),
  ({"guidance": -1.0}, "guidance=-1.0 must be a number above 0"),
  ({"batch_size": 0}, "batch_size=0, which must be at least 1"),
  ({"sampler": DpmSolver(1000)}, "num_steps=1000"),
])
def test_refuses_before_parameters_are_touched(kwargs, message):
  kwargs = {"sampler": DpmSolver(4), **kwargs}
  with pytest.raises(ValueError, match=message):
    Imaginer(models(), None, **kwargs)


@pytest.mark.parametrize("tokens, num_keys, negative, message", [
  (TOKENS[0], 5, EMPTY, r"tokens is int64 \[7\]"),
  (TOKENS[:0], 0, EMPTY, r"tokens is int64 \[0, 7\]"),
  (TOKENS.astype(float), 5, EMPTY, "tokens is float64"),
  (np.zeros((5, 8), int), 5, EMPTY, "rows of 8 tokens; the text encoder reads 7"),
  (TOKENS, 5, [0] * 6, "negative has rows of 6 tokens"),
  (TOKENS + 50, 5, EMPTY, "is not among the text encoder's 50"),
  (TOKENS, 5, [-1] * 7, "negative has the id -1"),
  (TOKENS, 4, EMPTY, r"5 rows of tokens have keys \[4\]"),
  (TOKENS, 5, None, "guidance=7.5 leans away from a text and there is none"),
])
def test_refuses_before_tracing(drawn, tokens, num_keys, negative, message):
  with pytest.raises(ValueError, match=message):
    drawn[0](tokens, image_keys(["x"], num_keys), negative)
