"""Devices and processes: the mesh, sums over rows, checkpoints, agreement between processes."""
