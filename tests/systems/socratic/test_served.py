"""The engine against `lmops serve`, over HTTP on this machine, with a tiny random model."""

import threading

import pytest

from lmops_jax.commands.serve import server
from lmops_jax.decoding.serving import Batcher
from lmops_jax.pretrained import model as model_lib
from lmops_jax.systems.socratic import Cast, Limits, runs
from lmops_jax.systems.socratic.backends import Place, Sampling, WindowExceeded
from lmops_jax.systems.socratic.in_process import InProcess
from lmops_jax.systems.socratic.journal import read
from tests import model_folders

http_lib = pytest.importorskip("lmops_jax.systems.socratic.http_backend")
pytest.importorskip("httpx2")
LENGTH = 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return model_folders.write(
    tmp_path_factory.mktemp("models") / "tiny", max_length=LENGTH)


@pytest.fixture(scope="module")
def endpoint(folder):
  source = model_lib.load(str(folder))
  tokenizer = source.tokenizer()
  batcher = Batcher(
    source.model, source.params(), tokenizer, num_slots=2, max_waiting=8, max_length=LENGTH)
  with server.ModelServer("127.0.0.1", 0) as found:
    thread = threading.Thread(target=found.serve, args=("tiny", tokenizer, batcher))
    thread.start()
    try:
      yield f"http://127.0.0.1:{found.server_address[1]}/v1"
    finally:
      found.shutdown()
      thread.join()


def test_a_greedy_reply_is_that_of_the_model_in_this_process(endpoint, folder):
  messages = (("system", "You are a careful chemist."), ("user", "Is 91 prime?"))
  sampling = Sampling(12, temperature=0.0)
  served = http_lib.Http(endpoint, "tiny").complete(messages, sampling, Place("0", "DED", 1))
  own = InProcess(str(folder)).complete(messages, sampling, Place("0", "DED", 1))
  assert (served.text, served.finish, served.usage) == (own.text, own.finish, own.usage)


def test_what_the_server_finds_too_long_is_the_engines_window_error(endpoint):
  with pytest.raises(WindowExceeded):
    http_lib.Http(endpoint, "tiny").complete(
      (("user", "x" * 3 * LENGTH),), Sampling(4), Place("0", "DED", 1))


def test_a_run_over_http_ends_and_is_resumed_without_the_server(endpoint, tmp_path):
  """A model that understands nothing: unreadable replies are asked for again, and the run ends."""
  plan = runs.Plan(
    "Is 91 prime?", Limits(max_turns=8, max_new_tokens=8, max_depth=1, rounds=1), Cast(),
    {"kind": "http", "endpoint": endpoint, "model": "tiny", "key_env": None, "window": LENGTH,
     "requests_per_minute": None})
  outcome = runs.run(tmp_path, plan, http_lib.Http(endpoint, "tiny"))
  root = outcome.tree.root
  assert root.conclusion is not None or root.reason
  assert 3 <= outcome.spent.turns <= 8 and not outcome.spent.estimated
  patterns = [line["place"]["pattern"] for line in read(tmp_path) if line["kind"] == "call"]
  assert patterns[:2] == ["ASSESS", "ASSESS"]  # unreadable, and once more
  gone = http_lib.Http("http://127.0.0.1:9/v1", "tiny")
  assert runs.run(tmp_path, plan, gone).digest == outcome.digest
