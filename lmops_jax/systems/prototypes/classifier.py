"""A classifier to keep: prototypes and what they need of an encoder, in one folder.

The folder holds the trained layers, prototypes and table as arrays (`params/`), and
`classifier.json` with names of classes, the encoder's settings and where the encoder is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmops_jax.mesh.checkpoints import load_params, save_params
from lmops_jax.systems.prototypes import mixture
from lmops_jax.systems.prototypes.growth import Table
from lmops_jax.systems.prototypes.mixture import Prototypes


class Behind(NamedTuple):
  """A prototype behind a prediction.

  Attributes:
    prototype: its slot.
    weight: its importance for the input, in (0, 1].
    label: the class that it was born for.
    nearest: index of the training row that lies nearest to it.
  """

  prototype: int
  weight: float
  label: int
  nearest: int


def save(folder: Path, params: Mapping[str, Any]) -> None:
  """Writes what `methods.Prototypical` has trained, for `load`."""
  tree = {"prototypes": params["prototypes"]._asdict(), "table": params["table"]._asdict()}
  save_params(folder, {**tree, **({"encoder": params["encoder"]} if params["encoder"] else {})})


def load(folder: Path) -> dict[str, Any]:
  """What `save` wrote: `encoder`, {} if none of it was trained, `prototypes` and `table`."""
  found = load_params(folder)
  return {"encoder": found.get("encoder", {}), "prototypes": Prototypes(**found["prototypes"]),
          "table": Table(**found["table"])}


def behind(
  params: Mapping[str, Any], vectors: np.ndarray, train_vectors: np.ndarray, num: int = 3
) -> list[list[Behind]]:
  """The prototypes that weigh most for each of some vectors `[B,D]`, the heaviest first."""
  prototypes, table = params["prototypes"], params["table"]
  weights = np.exp(np.asarray(mixture.log_importance(prototypes, table.active, vectors)))
  nearest = nearest_rows(params, train_vectors, 1)
  order = np.argsort(-weights, axis=1, kind="stable")[:, :num]
  return [
    [Behind(int(k), float(w[k]), int(table.label[k]), nearest[int(k)][0])
     for k in row if table.active[k]]
    for w, row in zip(weights, order)]


def nearest_rows(
  params: Mapping[str, Any], train_vectors: np.ndarray, num: int
) -> dict[int, list[int]]:
  """By slot in use the indices of the training rows nearest to its prototype, nearest first."""
  centers = np.asarray(params["prototypes"].centers)
  return {
    int(k): np.argsort(
      np.square(train_vectors - centers[k]).sum(axis=1), kind="stable")[:num].tolist()
    for k in np.flatnonzero(params["table"].active)}


def purity(of_rows: Mapping[int, list[int]], targets: np.ndarray, table: Table) -> dict[int, float]:
  """By slot the share of its nearest rows that are of the prototype's own class."""
  return {k: float(np.mean(targets[rows] == int(table.label[k]))) for k, rows in of_rows.items()}
