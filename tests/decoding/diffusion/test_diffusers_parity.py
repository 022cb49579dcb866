"""Samplers against diffusers' schedulers, with a network that is a formula."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.decoding.diffusion.plans import trajectory
from lmops_jax.decoding.diffusion.samplers import Ddim, DpmSolver, Plms
from lmops_jax.models.diffusion.noise import PREDICTIONS, NoiseSchedule

pytestmark = pytest.mark.parity

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SPACED = dict(steps_offset=1, **BETAS)


def _network(xp):
  """A formula that bends in sample and time, in NumPy's or jax's functions."""
  return lambda x, t: xp.sin(1.7 * x) * (0.5 + t / 900) + 0.4 * x


def _theirs(kind, num_steps, x, prediction, **settings):
  """The samples after each step of a scheduler of diffusers."""
  diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
  scheduler = getattr(diffusers, kind)(prediction_type=prediction, **settings)
  scheduler.set_timesteps(num_steps)
  network, sample, path = _network(np), torch.from_numpy(x), []
  for t in scheduler.timesteps:
    output = torch.from_numpy(network(sample.numpy(), np.float32(t)).astype(np.float32))
    sample = scheduler.step(output, t, sample).prev_sample
    path.append(sample.numpy())
  return scheduler.timesteps.tolist(), np.stack(path)


CASES = [
  (DpmSolver(20), "DPMSolverMultistepScheduler", dict(final_sigmas_type="sigma_min", **BETAS)),
  (DpmSolver(20, final="zero"), "DPMSolverMultistepScheduler", BETAS),
  (DpmSolver(9), "DPMSolverMultistepScheduler", dict(final_sigmas_type="sigma_min", **BETAS)),
  (DpmSolver(12, order=1), "DPMSolverMultistepScheduler",
   dict(solver_order=1, final_sigmas_type="sigma_min", **BETAS)),
  (Ddim(20), "DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=False, **SPACED)),
  (Plms(20), "PNDMScheduler", dict(skip_prk_steps=True, **SPACED)),
  (Plms(2), "PNDMScheduler", dict(skip_prk_steps=True, **SPACED)),
]


# PLMS of diffusers adds up several v before it reads them as noise.
PREDICTING = [(*case, p) for case in CASES for p in PREDICTIONS
              if p == "epsilon" or not isinstance(case[0], Plms)]


@pytest.mark.parametrize("sampler, kind, settings, prediction", PREDICTING)
def test_each_step_is_diffusers(sampler, kind, settings, prediction):
  x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
  times, want = _theirs(kind, sampler.num_steps, x, prediction, **settings)
  plan = sampler.plan(dataclasses.replace(NoiseSchedule(), prediction=prediction))
  assert plan.timesteps.tolist() == times
  network = _network(jnp)
  found = trajectory(
    plan, lambda x, t: network(x, t.astype(jnp.float32)[:, None, None, None]), jnp.asarray(x))
  for ours, theirs in zip(found, want):
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
