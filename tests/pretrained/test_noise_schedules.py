"""Noise schedules out of published files of schedulers."""

import json

import pytest

from lmops_jax.models.diffusion.noise import NoiseSchedule
from lmops_jax.pretrained.noise_schedules import noise_schedule, read_noise_schedule

# As Stable Diffusion 1.4 has them.
PUBLISHED = {
  "_class_name": "PNDMScheduler", "_diffusers_version": "0.2.2", "beta_end": 0.012,
  "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
  "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
  "steps_offset": 1, "trained_betas": None,
}


def test_the_published_file_is_the_default(tmp_path):
  path = tmp_path / "scheduler_config.json"
  path.write_text(json.dumps(PUBLISHED))
  assert read_noise_schedule(path) == NoiseSchedule()


@pytest.mark.parity
@pytest.mark.parametrize("kind", [
  "PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler",
  "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_the_files_of_many_schedulers_say_the_same_noise(kind):
  diffusers = pytest.importorskip("diffusers")
  settings = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
  fields = getattr(diffusers, kind)(**settings).config
  if "clip_sample" in fields:
    fields = {**fields, "clip_sample": False}  # as latents want it
  assert noise_schedule(json.loads(json.dumps(dict(fields), default=list)), "f") == NoiseSchedule()


def test_what_a_file_leaves_out_is_what_diffusers_takes():
  assert noise_schedule({"prediction_type": "v_prediction"}, "f") == NoiseSchedule(
    1e-4, 0.02, "linear", 1000, "v_prediction")


@pytest.mark.parametrize("fields, message", [
  ({"prediction_type": "sample"}, 'f has prediction_type="sample", which is not done here'),
  ({"beta_schedule": "squaredcos_cap_v2"}, 'beta_schedule="squaredcos_cap_v2"'),
  ({"trained_betas": [0.1, 0.2]}, "f has trained_betas="),
  ({"thresholding": True}, "f has thresholding=true"),
  ({"rescale_betas_zero_snr": True}, "f has rescale_betas_zero_snr=true"),
  ({"clip_sample": True}, "f has clip_sample=true"),
  ({"variance_type": "learned_range"}, 'f has variance_type="learned_range"'),
  ({"lambda_min_clipped": -5.1}, "f has lambda_min_clipped=-5.1"),
  ({"shift": 3.0}, "f has the field 'shift', which is not known here"),
  ({"num_train_timesteps": 0}, "f describes no noise schedule: .*num_times=0"),
  ({"beta_start": "0.1"}, "f describes no noise schedule: .*beta_start='0.1'"),
])
def test_refuses_by_name(fields, message):
  with pytest.raises(ValueError, match=message):
    noise_schedule({**PUBLISHED, **fields}, "f")


def test_refuses_a_file_that_is_no_object(tmp_path):
  path = tmp_path / "scheduler_config.json"
  path.write_text("[]")
  with pytest.raises(ValueError, match="scheduler_config.json holds no JSON object"):
    read_noise_schedule(path)
