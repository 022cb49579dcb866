"""Greedy and beam search behind pictures choose the tokens that the port of Kosmos-2 chooses.

First row by row without padding: with padding on the left and a cache the port counts it into the
positions of new tokens, which the last test repeats. A generated token with the padding's id
would get another position, too, so the test makes sure that there is none. The port repeats
pictures for beams one by one, so those of a row are given to it as one. Slots are words to the
port's filter of n-grams and not to ours; their ids count up, as in its processor, so that no answer
repeats them.
"""

import copy

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from lmops_jax.decoding import GenerationOptions, Generator  # noqa: E402
from lmops_jax.decoding.prompts import Prompt  # noqa: E402
from lmops_jax.models.docked import DockedLM  # noqa: E402
from lmops_jax.models.transformer import Transformer  # noqa: E402
from tests.models.test_kosmos2_parity import CONFIG, PAD, params  # noqa: E402, F401
from tests.pretrained import tiny_models  # noqa: E402

NUM_NEW, EOS = 8, 2
ROWS = ".I...I..", "..II.", "....", ".I......"  # `I` is an image, `.` a word
IMAGES = np.random.default_rng(2).normal(size=(5, 20, 20, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def peer():
  """The tiny model with other weights: words of its answers depend on what is in front of them."""
  model = copy.deepcopy(tiny_models.kosmos2())
  torch.manual_seed(1)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      is_vector = parameter.ndim == 1
      deviation = 0.1 if is_vector else parameter.shape[-1] ** -0.5
      mean = float(is_vector and name.endswith("weight"))
      parameter.copy_(mean + deviation * torch.randn_like(parameter))
  return model


def _rows():
  """Ids of each row, and which of all images' vectors stands where, -1 for words."""
  rng, size, used = np.random.default_rng(3), CONFIG.vectors_per_image, 0
  for row in ROWS:
    ids, index = [], []
    for mark in row:
      ids += range(4, 4 + size) if mark == "I" else [int(rng.integers(10, 71))]
      index += range(used, used + size) if mark == "I" else [-1]
      used += size * (mark == "I")
    yield np.array(ids), np.array(index)


def _theirs(peer, ids, index, **options):
  row = {"attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
  if (index >= 0).any():
    with torch.no_grad():
      embeds = peer.get_image_features(
        torch.tensor(IMAGES.transpose(0, 3, 1, 2)), return_dict=True).pooler_output
    row["image_embeds"] = embeds.flatten(0, 1)[index[index >= 0]][None]
    row["image_embeds_position_mask"] = torch.tensor(index >= 0)[None]
  out = peer.text_model.generate(
    input_ids=torch.tensor(ids)[None], max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=PAD,
    eos_token_id=EOS, return_dict_in_generate=False, **row, **options)
  answers = []
  for made in out[:, len(ids) :].tolist():
    answers.append(made[: made.index(EOS) + 1] if EOS in made else made)
    assert PAD not in answers[-1]
  return answers


@pytest.fixture(scope="module")
def table(params):  # noqa: F811
  """The vectors of all images, one behind the other."""
  vectors = jax.jit(lambda images: DockedLM(CONFIG).apply(
    {"params": params}, images, method="image_vectors"))(IMAGES)
  return vectors.reshape(-1, vectors.shape[-1])


@pytest.mark.parametrize("options", [
  {}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.7},
  *(pytest.param(options, marks=pytest.mark.slow) for options in (
    {"num_beams": 3, "no_repeat_ngram": 3, "early_stopping": True}, {"no_repeat_ngram": 2})),
])
def test_ids_are_equal(peer, params, table, options):  # noqa: F811
  want = []
  theirs = {k.replace("ngram", "ngram_size"): v for k, v in options.items()}
  for ids, index in _rows():
    want += _theirs(peer, ids, index, **theirs)
  assert len({*map(tuple, want)}) > 2  # else the test could not tell
  generator = Generator(Transformer(CONFIG.text), params["text"])
  got = generator.generate_ids(
    [Prompt(ids, table, index) for ids, index in _rows()],
    GenerationOptions(max_new_tokens=NUM_NEW, eos_ids=(EOS,), **options))
  assert [g.ids for g in got] == want


@pytest.mark.parametrize("count_padding", [True, False])
def test_batches_padded_on_the_left_are_equal_by_either_rule(
  peer, params, table, count_padding  # noqa: F811
):
  """With a cache the port counts padding; without one it sees it, and counts real tokens."""
  rows = [*_rows()]
  width = max(len(ids) for ids, _ in rows)
  tokens, index = np.full((len(rows), width), PAD), np.full((len(rows), width), -1)
  for i, (ids, own) in enumerate(rows):
    tokens[i, width - len(ids) :], index[i, width - len(ids) :] = ids, own
  images = {"image_embeds": torch.tensor(np.asarray(table)[index[index >= 0]]),
            "image_embeds_position_mask": torch.tensor(index >= 0)}

  def theirs(use_cache):
    out = peer.text_model.generate(
      input_ids=torch.tensor(tokens), attention_mask=torch.tensor((tokens != PAD).astype(int)),
      max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=PAD, eos_token_id=EOS,
      use_cache=use_cache, **images)
    made = out[:, width:].tolist()
    return [ids[: ids.index(EOS) + 1] if EOS in ids else ids for ids in made]

  want = theirs(use_cache=count_padding)
  assert not any(PAD in made for made in want)
  assert want != theirs(use_cache=not count_padding)  # else the test could not tell
  generator = Generator(
    Transformer(CONFIG.text), params["text"], batch_size=2, count_padding=count_padding)
  got = generator.generate_ids(
    [Prompt(ids, table, own) for ids, own in rows],
    GenerationOptions(max_new_tokens=NUM_NEW, eos_ids=(EOS,)))
  assert [g.ids for g in got] == want
