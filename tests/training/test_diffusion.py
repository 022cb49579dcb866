"""Losses of diffusion models against expectations in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmops_jax.mesh.meshes import MeshConfig, single_device
from lmops_jax.models.diffusion.noise import NoiseSchedule
from lmops_jax.training.diffusion import AutoencoderLosses, DenoisingLosses
from lmops_jax.training.learner import supervised

SCHEDULE = NoiseSchedule()
V_SCHEDULE = NoiseSchedule(prediction="v_prediction")
MANY = 40_000


def linear(params, noised, times, condition):
  """A network that says a multiple of what it sees, and adds its condition."""
  del times
  return params["w"] * noised + condition[:, None]


def batch_of(num, clean=0.8, condition=0.0, width=3):
  return {"clean": np.full((num, width), clean, np.float32),
          "condition": np.full(num, condition, np.float32),
          "key": jax.random.split(jax.random.key(3), num)}


def expected(schedule, w, m):
  """E of the loss and its derivative in w, for data at m, over noise and all times."""
  a, s = schedule.alphas, schedule.sigmas
  if schedule.prediction == "epsilon":  # noise - w (a m + s noise)
    of_noise, of_data, d_noise, d_data = 1 - w * s, -w * a, -s, -a
  else:  # a noise - s m - w (a m + s noise)
    of_noise, of_data, d_noise, d_data = a - w * s, -s - w * a, -s, -a
  loss = of_noise**2 + (of_data * m) ** 2
  return loss.mean(), (2 * of_noise * d_noise + 2 * of_data * d_data * m * m).mean()


@pytest.mark.parametrize("schedule", [SCHEDULE, V_SCHEDULE], ids=lambda s: s.prediction)
def test_loss_and_gradient_are_those_of_a_linear_network(schedule):
  losses = DenoisingLosses(linear, schedule)
  w, batch = 0.6, batch_of(MANY)
  each = jax.jit(losses)({"w": jnp.float32(w)}, batch)
  slopes = jax.jit(jax.jacfwd(lambda w: losses({"w": w}, batch)))(jnp.float32(w))
  for found, want in zip((each, slopes), expected(schedule, w, 0.8)):
    assert found.shape == (MANY,)
    assert abs(found.mean() - want) < 4 * found.std() / MANY**0.5


def test_conditions_are_dropped_in_their_share():
  """With w = 0 the loss is E (noise - condition)^2 = 1 + condition^2."""
  losses = DenoisingLosses(linear, SCHEDULE, drop=0.3, empty=np.float32(-2.0))
  each = jax.jit(losses)({"w": jnp.float32(0)}, batch_of(MANY, condition=5.0))
  want = 0.3 * (1 + 4) + 0.7 * (1 + 25)
  assert abs(each.mean() - want) < 4 * each.std() / MANY**0.5


def test_an_example_draws_from_its_own_key():
  losses = jax.jit(DenoisingLosses(linear, SCHEDULE, drop=0.5, empty=np.float32(3.0)))
  params, batch = {"w": jnp.float32(0.4)}, batch_of(8)
  each = losses(params, batch)
  assert len(set(each.tolist())) == 8
  turned = losses(params, jax.tree.map(lambda x: x[::-1], batch))
  np.testing.assert_allclose(turned[::-1], each, rtol=1e-6)


def test_eight_devices_learn_what_one_does():
  losses = DenoisingLosses(linear, SCHEDULE, drop=0.2, empty=np.float32(1.0))
  batch = {name: value for name, value in batch_of(16, condition=0.5).items() if name != "key"}
  found = []
  for partitioner in (single_device(), MeshConfig().build()):
    learner = supervised(
      lambda key: {"w": jnp.float32(0.4)}, losses, optax.sgd(0.1), keyed=True, accumulate=2,
      partitioner=partitioner)
    with partitioner.activate():
      state = learner.init(jax.random.key(0))
      found.append(jax.jit(learner.step)(state, partitioner.place_batch(batch), jax.random.key(1)))
  (one, sums), (eight, of_eight) = found
  np.testing.assert_allclose(eight.params["w"], one.params["w"], rtol=1e-6)
  for name in ("loss_sum", "grad_norm"):
    np.testing.assert_allclose(of_eight[name], sums[name], rtol=1e-5)


def encode(params, images):
  mean = params["e"] * images[:, ::2, ::2, :2]
  return mean, jnp.full_like(mean, params["v"])


def decode(params, latents):
  return jnp.full((len(latents), 4, 4, 3), params["d"]) * latents.mean(axis=(1, 2, 3))[
    :, None, None, None]


def test_the_autoencoders_loss_is_its_closed_form():
  """One grey picture: 8 latents with mean e g and variance exp(v), whose mean is decoded."""
  e, v, d, grey, weight = 0.7, -1.0, 1.3, 200, 0.5
  losses = AutoencoderLosses(encode, decode, weight)
  params = {"e": jnp.float32(e), "v": jnp.float32(v), "d": jnp.float32(d)}
  batch = {"images": np.full((MANY // 8, 4, 4, 3), grey, np.uint8),
           "key": jax.random.split(jax.random.key(0), MANY // 8)}
  each = jax.jit(losses)(params, batch)
  g = grey / 127.5 - 1
  error = (d * e * g - g) ** 2 + d * d * np.exp(v) / 8
  divergence = 8 * 0.5 * ((e * g) ** 2 + np.exp(v) - 1 - v) / 48
  want = error + weight * divergence
  assert abs(each.mean() - want) < 4 * each.std() / len(each) ** 0.5


@pytest.mark.parametrize("make, message", [
  (lambda: DenoisingLosses(linear, SCHEDULE, drop=1.0), "drop=1.0 is the share"),
  (lambda: DenoisingLosses(linear, SCHEDULE, drop=0.1), "drop=0.1 takes the condition"),
  (lambda: AutoencoderLosses(encode, decode, -1.0), "kl_weight=-1.0 must be 0 or more"),
  (lambda: AutoencoderLosses(encode, decode)({}, {"images": np.zeros((1, 4, 4, 3))}),
   "The images are float64; give pixels as uint8"),
])
def test_refuses(make, message):
  with pytest.raises(ValueError, match=message):
    make()
