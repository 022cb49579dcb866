"""The harness drives our model: the numbers are those of a naive forward pass."""

import jax
import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs pip install -e '.[lm-eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from lmops_jax.evaluation.lm_eval_adapter import LmopsLM  # noqa: E402
from tests import model_folders  # noqa: E402


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
  return LmopsLM(str(model_folders.write(tmp_path_factory.mktemp("model"), max_length=64)))


def _requests(kind, *arguments):
  return [
    Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)
  ]


def _log_probs(lm, ids):
  logits = lm._model.apply(
    {"params": lm._scorer.params | {"layers": _stacked(lm)}}, np.array([ids], np.int32),
    method="logits",
  )
  return np.asarray(jax.nn.log_softmax(logits[0]))


def _stacked(lm):
  return jax.tree.map(lambda *leaves: np.stack(leaves), *lm._scorer.params["layers"])


def test_loglikelihood_and_greediness(lm):
  pairs = [("abc", " def"), ("", "x"), ("abc ", "y"), ("q" * 80, "zz")]
  found = lm.loglikelihood(_requests("loglikelihood", *pairs))
  for (context, continuation), (value, _) in zip(pairs, found):
    ids = lm._tokenizer.encode(context + continuation)[-64:]
    count = len(lm._tokenizer.encode(continuation, False)) + (context.endswith(" "))
    rows = _log_probs(lm, ids)
    want = sum(rows[i - 1, ids[i]] for i in range(len(ids) - count, len(ids)))
    assert value == pytest.approx(want, abs=2e-3)
  best = lm._tokenizer.encode("abc")
  best = int(_log_probs(lm, best)[-1].argmax())
  text = lm._tokenizer.decode([best], skip_special=False)
  if lm._tokenizer.encode(text, False) == [best]:
    (_, greedy), = lm.loglikelihood(_requests("loglikelihood", ("abc", text)))
    assert greedy
  assert not all(greedy for _, greedy in found)


def test_rolling_scores_every_token(lm):
  text = "some text that is longer than one window of the model, which has sixty-four positions"
  value, = lm.loglikelihood_rolling(_requests("loglikelihood_rolling", (text,)))
  ids = [lm._first(), *lm._tokenizer.encode(text, False)]
  rows = _log_probs(lm, ids[:64])
  first = sum(rows[i - 1, ids[i]] for i in range(1, 64))
  assert value < first < 0
  short, = lm.loglikelihood_rolling(_requests("loglikelihood_rolling", (text[:20],)))
  rows = _log_probs(lm, ids[:21])
  assert short == pytest.approx(sum(rows[i - 1, ids[i]] for i in range(1, 21)), abs=2e-3)


def test_generate_until_stops(lm):
  plain, = lm.generate_until(_requests("generate_until", ("abc", {"max_gen_toks": 12})))
  assert plain
  stop = plain[len(plain) // 2]
  cut, = lm.generate_until(
    _requests("generate_until", ("abc", {"max_gen_toks": 12, "until": [stop]}))
  )
  assert cut == plain[: plain.index(stop)]


def test_the_harness_runs_a_task_with_it(lm, tmp_path):
  (tmp_path / "rows.jsonl").write_text("".join(
    f'{{"text": "{"ab" * (i % 3 + 1)}", "label": {i % 2}}}\n' for i in range(8)
  ))
  task = {
    "task": "toy", "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
    "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{text}} is",
    "doc_to_target": "label", "doc_to_choice": ["no", "yes"],
    "metric_list": [{"metric": "acc"}],
  }
  results = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0)
  assert 0 <= results["results"]["toy"]["acc,none"] <= 1
  assert get_model("lmops") is LmopsLM
