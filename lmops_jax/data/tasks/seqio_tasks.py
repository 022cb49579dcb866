"""The tasks as seqio tasks, with the prompt as `inputs` and the right answer as `targets`.

Features are texts that pass through, since the user's mixture chooses the vocabulary. If the answer
starts with a blank, so does the target. Calling these functions imports TensorFlow and seqio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from lmops_jax.data.tasks import named, rows
from lmops_jax.data.tasks.registry import ENTRIES
from lmops_jax.data.tasks.task import Example
from lmops_jax.data.tasks.templates import jsonl_task


def register_seqio_tasks(data_dir: str | None = None) -> list[str]:
  """Registers each named task that tfds has, in each of its flavours, with seqio.

  Splits are "train" (if the task has one) and "test", the split that the papers evaluate on. A task
  that is registered already stays.

  Args:
    data_dir: where tfds keeps datasets; None is its own default.

  Returns:
    The names: `lmops_sst2` for the flavour fs, `lmops_hf_sst2` and so on for the others; `-` in a
    task's name becomes `_`.
  """
  added = []
  for name, entry in ENTRIES.items():
    if entry.dataset is None:
      continue
    for flavour, wordings in entry.flavours.items():
      middle = "" if flavour == "fs" else f"{flavour}_"
      task = f"lmops_{middle}{name.replace('-', '_')}"
      added.append(task)

      def read(split, name=name, entry=entry, wording=wordings[0]):
        builder = named.tfds_builder(name, entry.dataset, data_dir)
        part = entry.train if split == "train" else entry.rows
        return rows.examples(named.tfds_rows(builder, entry, part), entry, wording)

      _register(task, read, ("train", "test") if entry.train else ("test",))
  return added


def register_jsonl_seqio_task(
  name: str, files: Mapping[str, Path | str], template: str, words: Sequence[str]
) -> str:
  """Registers a task from JSON lines with seqio, as `jsonl_task` reads them.

  Args:
    name: the seqio task's.
    files: a file for each split.
    template, words: see `jsonl_task`.

  Returns:
    The name.

  Raises:
    ValueError: if there is no file, if seqio has another task of that name, or, while a split is
      read, for what `jsonl_task` refuses.
  """
  import seqio

  if not files:
    raise ValueError(f"the seqio task {name} has no files; give for example {{'train': PATH}}.")
  if name in seqio.TaskRegistry.names():
    raise ValueError(f"seqio has a task {name!r} already; choose another name.")
  _register(name, lambda split: jsonl_task(files[split], template, words).rows, tuple(files))
  return name


def _register(
  task: str, read: Callable[[str], Iterable[Example | None]], splits: Sequence[str]
) -> None:
  import seqio
  import tensorflow as tf

  if task in seqio.TaskRegistry.names():
    return

  def dataset(split, shuffle_files, seed=None):
    del shuffle_files, seed  # one stream; seqio shuffles examples in its buffer

    def generate():
      for example in read(split):
        if example is not None:
          yield _texts(example)

    signature = dict.fromkeys(("inputs", "targets"), tf.TensorSpec((), tf.string))
    return tf.data.Dataset.from_generator(generate, output_signature=signature)

  seqio.TaskRegistry.add(
    task,
    source=seqio.FunctionDataSource(dataset, splits=splits),
    preprocessors=[],
    output_features={
      feature: seqio.Feature(
        seqio.PassThroughVocabulary(size=1), add_eos=False, rank=0, dtype=tf.string
      )
      for feature in ("inputs", "targets")
    },
  )


def _texts(example: Example) -> dict[str, str]:
  prompt = example.prompts[example.label] if example.prompts else example.prompt
  return {"inputs": prompt, "targets": example.demonstration[len(prompt) :]}
