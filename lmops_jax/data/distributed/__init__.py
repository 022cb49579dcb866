"""Corpora beyond one machine: the same files as from one process, written by many.

`engine.Engine` runs functions over items on Apache Beam. All else here are such functions: they
read files that earlier ones have left in a common folder of all workers, and each leaves a file of
its own, whole or not at all. An item that is done again, elsewhere or twice at once, gives the same
bytes.
"""

from lmops_jax.data.distributed.engine import Engine

__all__ = ["Engine"]
