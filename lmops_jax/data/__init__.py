"""Corpora, vocabularies, packed instances and batches. Nothing here imports TensorFlow on import.

Importing this package registers everything that gin files name in the module `data`.
"""

from lmops_jax.data.distributed.engine import Engine
from lmops_jax.data.documents import Corpus, Document, split_documents
from lmops_jax.data.files import Jsonl, Parquet, TextFolder, TextLines
from lmops_jax.data.grit.detection import DetectorFunction, RecordedBoxes
from lmops_jax.data.grit.files import GritJsonl, GritShards
from lmops_jax.data.grit.pairs import GroundedPairs
from lmops_jax.data.grit.phrases import SpacyPhrases
from lmops_jax.data.grounded_instructions import GroundedInstructions
from lmops_jax.data.image_files import ImageJsonl, ImageParquet
from lmops_jax.data.image_rows import ImageRows, write_rows
from lmops_jax.data.image_tokens import ImageTokens
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.installed_text import InstalledText
from lmops_jax.data.instance_writing import write_instances
from lmops_jax.data.instances import Instances, open_instances
from lmops_jax.data.named_datasets import SeqioTask, Tfds
from lmops_jax.data.near_duplicates import Deduplicated, OverlapIndex, overlapping_documents
from lmops_jax.data.packing import Instance, one_per_document, pack
from lmops_jax.data.prefix_rows import PrefixRows, PromptPrefix, RandomPrefix
from lmops_jax.data.prompt_pairs import PairFiles, TfdsPairs
from lmops_jax.data.prompt_parts import EngineeredPrompts
from lmops_jax.data.python_reference import PythonReference
from lmops_jax.data.span_rows import SpanRows
from lmops_jax.data.spans import NoSpans, PrefixSpan, RandomSpans
from lmops_jax.data.synthetic_pictures import Matrices, RenderedTexts, Scenes, StyledPictures
from lmops_jax.data.tar_shards import TarShards
from lmops_jax.data.task_records import TaskClusters, TaskRecords
from lmops_jax.data.tfds_images import TfdsImages
from lmops_jax.data.web_pages import WebPages
from lmops_jax.text.seqio_bridge import as_seqio
from lmops_jax.text.vocabularies import Vocabulary, load_vocabulary
from lmops_jax.text.vocabulary_sources import (
  HuggingFaceTokenizer,
  ModelTokenizer,
  SentencePieceFile,
  TrainSentencePiece,
)

__all__ = [
  "Corpus",
  "Deduplicated",
  "DetectorFunction",
  "Document",
  "Engine",
  "EngineeredPrompts",
  "GritJsonl",
  "GritShards",
  "GroundedInstructions",
  "GroundedPairs",
  "HuggingFaceTokenizer",
  "ImageJsonl",
  "ImageParquet",
  "ImageRows",
  "ImageSettings",
  "ImageTokens",
  "InstalledText",
  "Instance",
  "Instances",
  "Jsonl",
  "Matrices",
  "ModelTokenizer",
  "NoSpans",
  "OverlapIndex",
  "PairFiles",
  "Parquet",
  "PrefixRows",
  "PrefixSpan",
  "PromptPrefix",
  "PythonReference",
  "RandomPrefix",
  "RandomSpans",
  "RecordedBoxes",
  "RenderedTexts",
  "Scenes",
  "StyledPictures",
  "SentencePieceFile",
  "SeqioTask",
  "SpacyPhrases",
  "SpanRows",
  "TarShards",
  "TaskClusters",
  "TaskRecords",
  "TextFolder",
  "TextLines",
  "Tfds",
  "TfdsImages",
  "TfdsPairs",
  "TrainSentencePiece",
  "Vocabulary",
  "WebPages",
  "as_seqio",
  "load_vocabulary",
  "one_per_document",
  "open_instances",
  "overlapping_documents",
  "pack",
  "split_documents",
  "write_instances",
  "write_rows",
]
