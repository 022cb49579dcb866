"""Kosmos-2 from a model without words for boxes: its numbers stay, the new rows are drawn."""

import dataclasses

import jax
import numpy as np
import pytest

from lmops_jax.models.docked import DockedLM
from lmops_jax.pretrained import model as model_lib
from lmops_jax.systems.kosmos import starts
from tests import model_folders


def _with_words(config, num):
  return dataclasses.replace(
    config, text=dataclasses.replace(config.text, vocab_size=config.text.vocab_size + num))


@pytest.mark.slow
def test_words_for_boxes_are_added_to_a_model_without(tmp_path):
  folder = model_folders.write_docked(tmp_path / "model")
  own = model_lib.load(folder)
  grown = _with_words(own.config, 22)
  starts.check_folder(folder, own.config, 22)  # it may have them
  starts.check_folder(folder, grown, 22)
  for num_added in (0, 21):
    with pytest.raises(ValueError, match="text/embedding is .* in kosmos.Pretrain.start=.* and"):
      starts.check_folder(folder, grown, num_added)
  model, theirs = DockedLM(grown), own.params(None)
  found = starts.folder_params(folder, model, seed=3)
  num = own.config.text.vocab_size
  embedding = found["text"].pop("embedding")
  np.testing.assert_array_equal(embedding[:num], theirs["text"].pop("embedding"))
  assert embedding.shape == (num + 22, 16) and (np.std(embedding[num:], axis=1) > 0).all()
  jax.tree.map(np.testing.assert_array_equal, found, theirs)
