"""Tasks with pictures, of three papers' evaluations.

Kosmos-1's (arXiv:2302.14045), Kosmos-2's (2306.14824) and MetaLM's (2206.06336).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lmops_jax.config.refusals import nearest
from lmops_jax.data.multimodal import IMAGE
from lmops_jax.data.tasks import picture_prompts as prompts
from lmops_jax.data.tasks.pictures import (
  captions_and_questions,
  entities,
  items,
  labelled,
  referring,
  seed_bench,
  web_pages,
)
from lmops_jax.data.tasks.pictures.source import Source
from lmops_jax.data.tasks.task import Example

_OF_CLASSES = [f"{{{field}{i}}}" for field in ("name", "text", "short") for i in (1, 2)]


class Way(NamedTuple):
  """How a paper evaluated a task, where the user says nothing.

  Attributes:
    num_beams: for open answers.
    no_repeat_ngram: for open answers, see `decoding.GenerationOptions`.
    normalisation: of options, see `evaluation.in_context.evaluate`.
  """

  num_beams: int = 1
  no_repeat_ngram: int = 0
  normalisation: str = "sum"


_LOCATE = Way(no_repeat_ngram=3)  # of the scripts that Kosmos-2's authors published


class PictureEntry(NamedTuple):
  """A named task with pictures.

  Attributes:
    read: makes the rows from a folder.
    metric: see `Task`.
    source: what the folder holds, for people.
    dataset: what `tfds.builder` takes, which is read without a folder; None: tfds has none.
    files: patterns of all files in the folder that decide the rows; of pictures only the names.
    templates: prompts by index, the first one the paper's.
    rows, train: splits to evaluate on and to draw from; train "": draw from the other rows.
    words: the labels' words, if all rows share them.
    names: makes a mapping whose values name all classes, if an open answer is one of these.
    way: the paper's.
  """

  read: Callable[[Source], Iterator[Example | None]]
  metric: str
  source: str
  files: tuple[str, ...]
  templates: tuple[str, ...]
  rows: str = ""
  train: str = ""
  words: tuple[str, ...] = ()
  names: Callable[[Source], dict[str, str]] | None = None
  way: Way = Way()
  dataset: str | None = None


_KARPATHY = {
  "read": captions_and_questions.karpathy, "metric": "cider", "files": ("dataset*.json",),
  "templates": (
    prompts.CAPTION, prompts.GROUNDED_CAPTION, prompts.SUMMARIZE, prompts.CAPTION_OF),
  "rows": "test", "train": "train", "way": Way(num_beams=5),
}


def _expression_files(data: str) -> tuple[str, ...]:
  return (f"*{data}_*.json", f"{data}/refs(*).p", f"{data}/instances.json")


def _refcoco(data: str, dataset: str) -> PictureEntry:
  return PictureEntry(
    functools.partial(referring.comprehension, data=data), "referring",
    "MDETR's JSON or refs, COCO pictures", _expression_files(data), (prompts.EXPRESSION,), "val",
    way=_LOCATE, dataset=dataset,
  )


PICTURE_ENTRIES: dict[str, PictureEntry] = {
  "coco": PictureEntry(source="COCO, Karpathy's JSON", **_KARPATHY),
  "flickr30k": PictureEntry(source="Flickr30k, Karpathy's JSON", **_KARPATHY),
  "vqav2": PictureEntry(
    captions_and_questions.vqav2, "vqa", "VQAv2 JSON, COCO pictures", ("*mscoco*.json",),
    (prompts.QUESTION, prompts.GROUNDED_QUESTION, prompts.ASKED), "val2014", "train2014",
  ),
  "vqa-karpathy": PictureEntry(
    captions_and_questions.vqa_karpathy, "vqa", "VQAv2 JSON, Karpathy's JSON, COCO pictures",
    ("*mscoco*.json", "dataset*.json"), (prompts.QUESTION, prompts.ASKED), "test", "train",
  ),
  "vizwiz": PictureEntry(
    captions_and_questions.vizwiz, "vqa", "VizWiz JSON", ("*.json", "Annotations/*.json"),
    (prompts.QUESTION, prompts.GROUNDED_QUESTION), "val", "train",
  ),
  "rendered-sst2": PictureEntry(
    labelled.rendered_sst2, "accuracy", "folders by class", ("*/*/*",), (prompts.SENTIMENT,),
    "test", "train", labelled.SENTIMENTS,
  ),
  "hateful-memes": PictureEntry(
    labelled.hateful_memes, "roc_auc", "JSON lines", ("*.jsonl",), (prompts.HATE,), "dev", "train",
    labelled.NO_YES,
  ),
  "websrc": PictureEntry(
    web_pages.websrc, "f1", "CSV by site, HTML, screenshots",
    ("dataset_split*.json", "*/*/dataset.csv"), (
      f"{IMAGE} {prompts.WEB_PAGE}",  # picture and text; then text alone, picture alone
      prompts.WEB_PAGE, f"{IMAGE} {prompts.WEB_PAGE.replace('Context: {text} ', '')}",
    ), "dev", "train",
  ),
  "raven": PictureEntry(
    items.raven, "accuracy", "JSON lines", ("*.jsonl",), ("",), "test", "train",
  ),
  "imagenet": PictureEntry(
    labelled.imagenet, "exact_match", "folders by class", ("LOC_synset_mapping.txt", "*/*/*"),
    (prompts.PHOTO,), "val", names=labelled.class_names, way=Way(num_beams=2),
  ),
  "look-alikes": PictureEntry(
    labelled.look_alikes, "exact_match", "folders by animal", ("*/*",), (
      prompts.described_prompt("{category}", _OF_CLASSES[:2], _OF_CLASSES[2:4]),
      prompts.described_prompt("{category}", _OF_CLASSES[4:]),
    ),
  ),
  "flickr30k-entities": PictureEntry(
    entities.phrase_grounding, "phrase_grounding", "Flickr30k Entities XML",
    ("*.txt", "Annotations/*.xml", "Sentences/*.txt"), (prompts.PHRASE,), "test",
    way=_LOCATE,
  ),
  "refcoco": _refcoco("refcoco", "ref_coco/refcoco_unc"),
  "refcoco-plus": _refcoco("refcoco+", "ref_coco/refcocoplus_unc"),
  "refcocog": _refcoco("refcocog", "ref_coco/refcocog_umd"),
  "refcocog-expressions": PictureEntry(
    functools.partial(referring.description, data="refcocog"), "meteor",
    "MDETR's JSON or refs, COCO pictures", _expression_files("refcocog"), (prompts.DESCRIBE,),
    "val", "train", dataset="ref_coco/refcocog_umd",
  ),
  "ok-vqa": PictureEntry(
    captions_and_questions.vqav2, "vqa", "OK-VQA JSON, COCO pictures", ("*mscoco*.json",),
    (prompts.ASKED, prompts.QUESTION), "val2014", "train2014",
  ),
  "nocaps": PictureEntry(
    captions_and_questions.nocaps, "cider", "NoCaps JSON", ("nocaps_*.json",),
    (prompts.SUMMARIZE, prompts.CAPTION, prompts.CAPTION_OF), "val",
  ),
  "nlvr2": PictureEntry(
    labelled.nlvr2, "accuracy", "JSON lines of pairs", ("*.json",), (prompts.OF_PAIR,), "test1",
    "train", labelled.FALSE_TRUE,
  ),
  "e-snli-ve": PictureEntry(
    labelled.esnli_ve, "explained", "e-SNLI-VE CSV, Flickr30k pictures", ("esnlive_*.csv",),
    (prompts.ENTAILED,), "test", "train",
  ),
  "seed-bench": PictureEntry(
    seed_bench.seed_bench, "accuracy", "SEED-Bench JSON", ("SEED-Bench.json",),
    (prompts.QUESTION,), way=Way(normalisation="token"),
  ),
}


def picture_entry(name: str) -> PictureEntry:
  """The named task with pictures.

  Raises:
    ValueError: if there is none; it names the nearest and all.
  """
  if name not in PICTURE_ENTRIES:
    raise ValueError(
      f"there is no task with pictures {name!r}{nearest(name, PICTURE_ENTRIES)} It is one of "
      f"{', '.join(PICTURE_ENTRIES)}, or a file of JSON lines with images."
    )
  return PICTURE_ENTRIES[name]
