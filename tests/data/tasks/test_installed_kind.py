"""Excerpts by kind, balanced, from made-up documents."""

import collections

import pytest

from lmops_jax.data import tasks
from lmops_jax.data.documents import Document
from lmops_jax.data.tasks import installed_kind


def _documents(counts):
  return [
    Document(len(kind) * 1000 + i, f"{kind} {i}\n" + f"word{i} of {kind}\n" * 40, kind, kind)
    for kind, n in counts.items() for i in range(n)
  ]


def test_rows_are_balanced_over_the_most_frequent_kinds():
  documents = _documents({"code": 12, "licence": 10, "docstring": 9, "table": 3})
  task = tasks.kind_task(documents, num_kinds=3, num_rows=9, num_train=6)
  assert task.words == ("code", "text", "license") and not task.skipped
  assert collections.Counter(row.label for row in task.rows) == {0: 3, 1: 3, 2: 3}
  assert collections.Counter(row.label for row in task.train) == {0: 2, 1: 2, 2: 2}
  assert not {row.id for row in task.rows} & {row.id for row in task.train}
  assert task == tasks.kind_task(documents[::-1], num_kinds=3, num_rows=9, num_train=6)
  other = tasks.kind_task(documents, num_kinds=3, num_rows=9, num_train=6, seed=1)
  assert other.rows != task.rows
  row = task.rows[0]
  assert row.demonstration.startswith("Text: word") and row.demonstration.endswith(" Type: code")
  assert "\n" not in row.prompt and task.null_prompt == "Text: N/A Type:"
  assert len(tasks.kind_task(documents, num_kinds=3, num_rows=7, num_train=0).rows) == 7


def test_an_excerpt_starts_at_a_line_and_ends_at_a_blank():
  text = "\n".join(f"line {i}   has\tfive words" for i in range(30))
  found = installed_kind.excerpt(text, 60)
  assert found.startswith("line ") and len(found) <= 60 and "  " not in found
  assert " ".join(text.split()).find(found + " ") > 0
  assert installed_kind.excerpt("  short\ntext ", 60) == "short text"
  assert installed_kind.excerpt("x" * 100, 60) == "x" * 60


def test_too_few_documents_are_told():
  with pytest.raises(ValueError, match=r"have 1 kinds \(code\)"):
    tasks.kind_task(_documents({"code": 3}))
  task = tasks.kind_task(_documents({"code": 9, "table": 2}), num_rows=4, num_train=4)
  assert len(task.rows) == len(task.train) == 2
  with pytest.raises(ValueError, match="there are 1 different excerpts of the rarest of the kinds"):
    tasks.kind_task(_documents({"code": 9, "table": 1}), num_rows=4, num_train=4)
  with pytest.raises(ValueError, match="num_kinds=1 must be at least 2"):
    tasks.kind_task([], num_kinds=1)
