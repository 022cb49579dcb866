"""Meshes of devices that are not there, for programs that are traced and not run."""

from jax.sharding import AbstractDevice, AbstractMesh, AxisType


def abstract_mesh(platform: str, num_devices: int = 1, axis: str = "data") -> AbstractMesh:
  """A mesh of one axis on "cpu", "gpu", "cuda" or "tpu"."""
  device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
  return AbstractMesh(
    (num_devices,), (axis,), axis_types=(AxisType.Auto,), abstract_device=device)
