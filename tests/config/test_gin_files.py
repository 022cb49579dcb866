"""Every packaged gin file resolves, and the published runs resolve to the texts in golden/.

A change of any default shows here. To accept it, run the test with LMOPS_UPDATE_GOLDEN=1.
"""

import os
from pathlib import Path

import pytest

from lmops_jax.config import gin_files, resolve

GOLDEN = Path(__file__).parent / "golden"
OWED = {
  "kosmos/grit.gin": ["CAPTIONS = '/data/captions.jsonl'", "PARSER = '/data/spacy'"],
  "kosmos/grit_shards.gin": ["CAPTIONS = '/data/shards'", "PARSER = '/data/spacy'"],
  "kosmos/kosmos1_paper.gin": [
    "TEXT_PATH = '/data/text'", "PAIRS_PATH = '/data/pairs'", "DOCUMENTS_PATH = '/data/pages'",
    "VOCABULARY_PATH = '/data/sentencepiece.bpe.model'",
  ],
  "kosmos/finetune.gin": [
    "START = '/data/kosmos2'", "PAIRS_PATH = '/data/pairs.jsonl'",
    "VOCABULARY_PATH = '/data/sentencepiece.bpe.model'",
  ],
  "kosmos/kosmos2_instruct.gin": [
    "START = '/data/kosmos2'", "TEXT_PATH = '/data/text'", "QUESTIONS_PATH = '/data/llava.jsonl'",
    "INSTRUCTIONS_PATH = '/data/instructions'", "GRIT_PATH = '/data/grit'",
    "DOCUMENTS_PATH = '/data/pages'", "VOCABULARY_PATH = '/data/sentencepiece.bpe.model'",
  ],
  "kosmos/kosmos2_paper.gin": [
    "TEXT_PATH = '/data/text'", "PAIRS_PATH = '/data/pairs'", "GRIT_PATH = '/data/grit'",
    "DOCUMENTS_PATH = '/data/pages'", "VOCABULARY_PATH = '/data/sentencepiece.bpe.model'",
  ],
  "learning_law/evaluate.gin": ["POLICY = '/data/policy'"],
  "learning_law/transformer_paper.gin": [
    "CORPUS_PATH = '/data/stories'", "VOCABULARY_PATH = '/data/tokenizer.json'",
  ],
  "meta_optimizer/momentum_paper.gin": [
    "ETA = 0.5", "CORPUS_PATH = '/data/corpus'", "VOCABULARY_PATH = '/data/tokenizer.json'",
  ],
  "meta_optimizer/paper.gin": ["MODEL = '/data/model'"],
  "metalm/finetune.gin": ["START = '/data/metalm'"],
  "metalm/finetune_pictures.gin": ["START = '/data/metalm'", "DATA = '/data'"],
  "metalm/language_paper.gin": [
    "CORPUS_PATH = '/data/corpus'", "VOCABULARY_PATH = '/data/sentencepiece.bpe.model'"],
  "metalm/vision_language.gin": [
    "PAIRS_PATH = '/data/pairs'", "TEXT_PATH = '/data/text'",
    "VOCABULARY_PATH = '/data/tokenizer.json'"],
  "pds/paper.gin": [
    "CORPUS_PATH = '/data/corpus'", "TARGET_PATH = '/data/target.jsonl'",
    "TARGET_TEST_PATH = '/data/test.jsonl'", "VOCABULARY_PATH = '/data/tokenizer.model'",
  ],
  "promptist/ppo.gin": [
    "MODEL = '/data/gpt2'", "PROMPTS = '/data/prompts.jsonl'", "IMAGES = '/data/sd'",
    "CLIP = '/data/clip'", "AESTHETIC = '/data/aesthetic.pth'",
  ],
  "promptist/sft.gin": ["MODEL = '/data/gpt2'", "PAIRS = '/data/pairs.jsonl'"],
  "structured_prompting/paper.gin": ["MODEL = '/data/model'"],
}
PAPER_SIZES = [f"pds/paper_{size}.gin" for size in ("1.7b", "160m", "1b", "470m")]
OWED["kosmos/kosmos1_instruct.gin"] = [
  *OWED["kosmos/kosmos1_paper.gin"], "START = '<START>'", "INSTRUCTIONS_PATH = '/data/core.jsonl'"]
OWED |= dict.fromkeys(PAPER_SIZES, OWED["pds/paper.gin"])
RUNS = [
  "kosmos/default.gin", "kosmos/finetune.gin", "kosmos/grit.gin", "kosmos/grit_shards.gin",
  "kosmos/grounding.gin",
  "kosmos/grounding_smoke.gin", "kosmos/kosmos1_instruct.gin",
  "kosmos/kosmos1_paper.gin", "kosmos/kosmos2_instruct.gin", "kosmos/kosmos2_paper.gin",
  "kosmos/smoke.gin",
  "learning_law/default.gin", "learning_law/evaluate.gin", "learning_law/perceptron_paper.gin",
  "learning_law/transformer.gin", "learning_law/transformer_paper.gin",
  "meta_optimizer/default.gin", "meta_optimizer/momentum.gin", "meta_optimizer/momentum_paper.gin",
  "meta_optimizer/paper.gin", "metalm/default.gin", "metalm/finetune.gin",
  "metalm/finetune_pictures.gin", "metalm/language_paper.gin", "metalm/pictures.gin",
  "metalm/smoke.gin",
  "metalm/vision_language.gin",
  "pds/baselines.gin",
  "pds/default.gin", "pds/paper.gin",
  *PAPER_SIZES, "pds/smoke.gin",
  "promptist/default.gin", "promptist/ppo.gin", "promptist/sft.gin", "promptist/smoke.gin",
  "prototypes/default.gin", "prototypes/smoke.gin", "prototypes/tuned.gin",
  "socratic/default.gin", "socratic/smoke.gin",
  "structured_prompting/adaptive.gin", "structured_prompting/default.gin",
  "structured_prompting/paper.gin",
]
PARTS = ("pipeline", "sizes", "model", "vocabulary")  # of a run, named by what they are


@pytest.mark.parametrize("name", RUNS)
def test_published_runs_resolve_to_their_golden_text(name):
  text = resolve.load([name], OWED.get(name, [])).text()
  path = GOLDEN / f"{name.replace('/', '_')}.txt"
  if os.environ.get("LMOPS_UPDATE_GOLDEN"):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
  assert text == path.read_text()


def test_every_file_that_describes_a_run_is_covered():
  described = [
    name for name in gin_files.packaged()
    if name.split("/")[0] not in gin_files.PARTS
    and not Path(name).stem.endswith(PARTS)
  ]
  assert sorted(described) == RUNS


@pytest.mark.parametrize("name", [n for n in gin_files.packaged() if n.startswith("models/pds_")])
def test_a_final_model_of_another_size_keeps_the_proxy(name, tmp_path):
  size = Path(name).stem
  own = tmp_path / "own.gin"
  own.write_text(f"include 'pds/paper.gin'\ninclude '{name}'\ninclude 'optim/{size}.gin'\n")
  system = resolve.load([str(own)], OWED["pds/paper.gin"]).build()
  proxy = system.proxy.model
  assert (proxy.num_layers, proxy.width, proxy.num_heads, proxy.mlp_width) == (12, 768, 12, 3072)
  assert system.pretrain.model.width >= 768
