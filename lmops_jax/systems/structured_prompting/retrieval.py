"""Demonstrations by likeness to the rows asked, dealt to groups so that each has near ones.

This is not in the paper, whose demonstrations are random. Likeness is the cosine of TF-IDF vectors
of the prompts. The rows of a cluster share their demonstrations, so that a prefix is read once a
cluster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.data.tasks import Example


class Share(NamedTuple):
  """Rows that share demonstrations.

  Attributes:
    rows: indices of the rows.
    demonstrations: indices into the pool, the most alike first.
  """

  rows: np.ndarray
  demonstrations: np.ndarray


@component(module="structured_prompting")
@dataclasses.dataclass(frozen=True)
class Retrieval:
  """Nearest demonstrations instead of random ones.

  Attributes:
    clusters: number of clusters of rows; None gives every row demonstrations of its own.

  Raises:
    ValueError: for less than one cluster.
  """

  clusters: PositiveInt | None = 8

  def shares(self, rows: Sequence[Example], pool: Sequence[Example], count: int) -> list[Share]:
    """Each cluster's rows with their `count` most alike demonstrations; ties go by place."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+")
    of_pool = vectorizer.fit_transform([example.prompt for example in pool])
    of_rows = vectorizer.transform([row.prompt for row in rows])
    number = len(rows) if self.clusters is None else min(self.clusters, len(rows))
    labels = np.arange(len(rows))
    if number < len(rows):
      labels = KMeans(number, n_init=1, random_state=0).fit_predict(of_rows)
    found = []
    for label in np.unique(labels):
      members = np.flatnonzero(labels == label)
      centre = normalize(np.asarray(of_rows[members].mean(axis=0)))
      likeness = np.asarray(of_pool @ centre[0]).ravel()
      found.append(Share(members, np.argsort(-likeness, kind="stable")[:count]))
    return found


def dealt(ranked: Sequence[int], num_groups: int) -> list[int]:
  """Ranked demonstrations, ordered so that each of equal parts holds near ones, nearest last."""
  return [index for group in range(num_groups) for index in ranked[group::num_groups][::-1]]
