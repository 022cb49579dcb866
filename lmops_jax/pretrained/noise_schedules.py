"""The noise schedule of a published diffusion model, out of diffusers' `scheduler_config.json`.

The file also says which sampler its publishers ran. Samplers are chosen here instead
(`decoding.diffusion.samplers`), so of that nothing is taken; but what would change pictures
whatever the sampler is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmops_jax.host import foreign_files
from lmops_jax.models.diffusion.noise import BETA_KINDS, PREDICTIONS, NoiseSchedule

# Fields of diffusers' schedulers, and what they are if a file leaves them out.
_TAKEN = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
          "num_train_timesteps": 1000, "prediction_type": "epsilon"}
_OFF = ("trained_betas", "thresholding", "clip_sample", "rescale_betas_zero_snr",
        "use_flow_sigmas", "variance_type", "lambda_min_clipped")
# A variance that is not learned is that of steps which add noise; lambda above -inf is not bounded.
_NOTHING = (None, False, float("-inf"), "-inf", "fixed_small", "fixed_small_log", "fixed_large",
            "fixed_large_log")
_OF_SAMPLERS = frozenset((
  "algorithm_type", "clip_sample_range", "disable_corrector", "dynamic_thresholding_ratio",
  "euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type", "lower_order_final",
  "predict_x0", "sample_max_value", "set_alpha_to_one", "shift_terminal", "sigma_max", "sigma_min",
  "skip_prk_steps", "solver_order", "solver_p", "solver_type", "steps_offset", "time_shift_type",
  "timestep_spacing", "timestep_type", "use_beta_sigmas", "use_dynamic_shifting",
  "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas",
))


def read_noise_schedule(path: Path) -> NoiseSchedule:
  """The schedule of a file; see `noise_schedule`."""
  fields = foreign_files.read_json(path)
  if not isinstance(fields, dict):
    raise ValueError(f"{path} holds no JSON object; give the scheduler_config.json of a model.")
  return noise_schedule(fields, str(path))


def noise_schedule(fields: Mapping[str, Any], where: str) -> NoiseSchedule:
  """The schedule that a scheduler's configuration describes.

  Args:
    fields: of `scheduler_config.json`.
    where: names the file in errors.

  Raises:
    ValueError: naming a field that is not known, or a value that is not done here.
  """
  known = {*_TAKEN, *_OFF, *_OF_SAMPLERS}
  unknown = sorted(name for name in fields if name not in known and not name.startswith("_"))
  if unknown:
    raise ValueError(
      f"{where} has the field {unknown[0]!r}, which is not known here; leave it out if it has no "
      "effect on the model."
    )
  for name in _OFF:
    if fields.get(name) not in _NOTHING:
      raise ValueError(
        f"{where} has {name}={foreign_files.shown(fields[name])}, which is not done here; only "
        "models without it can be used."
      )
  found = {name: fields.get(name, default) for name, default in _TAKEN.items()}
  for name, choices in (("beta_schedule", BETA_KINDS), ("prediction_type", PREDICTIONS)):
    if found[name] not in choices:
      raise ValueError(
        f"{where} has {name}={foreign_files.shown(found[name])}, which is not done here; it may be "
        f"{' or '.join(choices)}."
      )
  try:
    return NoiseSchedule(
      found["beta_start"], found["beta_end"], found["beta_schedule"],
      found["num_train_timesteps"], found["prediction_type"])
  except ValueError as error:
    raise ValueError(f"{where} describes no noise schedule: {error}") from error
