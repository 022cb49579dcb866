"""A model in this process: the same call gives the same reply, choices go by likelihood."""

import jax
import numpy as np
import pytest

from lmops_jax.pretrained import model as model_lib
from lmops_jax.systems.socratic import Calls, Engine, Limits, NoLog, default_patterns
from lmops_jax.systems.socratic.backends import Place, Sampling, WindowExceeded
from lmops_jax.systems.socratic.in_process import InProcess
from tests import model_folders

MESSAGES = (("system", "You are."), ("user", "Hm?"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return model_folders.write(
    tmp_path_factory.mktemp("models") / "model", max_length=2048)


@pytest.fixture(scope="module")
def model(folder):
  return InProcess(str(folder))


def test_replies_repeat_and_depend_on_the_seed(model):
  def text(seed):
    return model.complete(MESSAGES, Sampling(8, 1.0, 0.95, seed), Place("0", "DED", 1))
  first = text(1)
  assert first == text(1) and first.text != text(2).text
  assert first.usage.reply <= 8 and first.usage.prompt == model.count_tokens(MESSAGES)


def test_likelihoods_are_those_of_the_model(model, folder):
  """Against a plain forward pass over the chat and each choice."""
  source = model_lib.load(str(folder))
  params, tokenizer = source.of_decoder(source.params(None)), source.tokenizer()
  chat = tokenizer.encode(tokenizer.apply_chat_template(
    [{"role": r, "content": c} for r, c in MESSAGES]), add_special=False)
  want = []
  for choice in ("SOLVE", "NO"):
    ids = chat + tokenizer.encode(choice, add_special=False)
    logits = source.decoder.apply({"params": params}, np.array([ids]), method="logits")
    log_probs = jax.nn.log_softmax(np.asarray(logits[0], np.float32))
    want.append(sum(float(log_probs[i - 1, ids[i]]) for i in range(len(chat), len(ids))))
  np.testing.assert_allclose(model.score(MESSAGES, ("SOLVE", "NO")), want, rtol=1e-4)


@pytest.mark.slow
def test_a_run_with_a_model_that_understands_nothing_ends(model):
  limits = Limits(max_new_tokens=8, max_turns=6, max_depth=1, attempts=1, rounds=1)
  root = Engine("Hm?", Calls(model, NoLog(), limits, default_patterns())).run()
  assert root.conclusion is not None or root.reason
  assert root.attempts["ASSESS"] == 1  # chosen by likelihood: always readable


def test_what_does_not_fit_is_said(model):
  with pytest.raises(WindowExceeded, match="window of 2048 tokens"):
    model.complete(MESSAGES, Sampling(2048), Place("0", "DED", 1))
