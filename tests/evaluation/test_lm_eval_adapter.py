"""The harness drives our model: the numbers are those of a naive forward pass."""

import jax
import numpy as np
import pytest
from PIL import Image

lm_eval = pytest.importorskip("lm_eval", reason="needs pip install -e '.[lm-eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from lmops_jax import pretrained  # noqa: E402
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
    ids = lm._tokenizer.encode(context + continuation)[-65:]  # the last one is not read
    count = len(lm._tokenizer.encode(continuation, False)) + (context.endswith(" "))
    rows = _log_probs(lm, ids[:-1])
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
  ids = [lm.prefix_token_id, *lm._tokenizer.encode(text, False)]
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


def test_a_long_context_keeps_bos_and_its_end(lm, capfd):
  options = {"max_gen_toks": 10, "until": []}
  text = "abcdefghij" * 7
  long, short = lm.generate_until(
    _requests("generate_until", (text, options), (text[-53:], options)), disable_tqdm=True)
  assert long == short and "1 contexts exceed the model's 64 positions" in capfd.readouterr().err


def test_generation_options_by_the_names_that_tasks_use(lm):
  def options(**kwargs):
    return lm._options(kwargs)[0]

  assert [options(**{name: 7}).max_new_tokens for name in (
    "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")] == [7] * 4
  assert options(max_tokens=3, max_gen_toks=9).max_new_tokens == 9
  found = options(max_gen_toks=9, do_sample=True, top_p=0.9, top_k=None, no_repeat_ngram_size=2)
  assert (found.temperature, found.top_p, found.no_repeat_ngram) == (1, 0.9, 2)
  found = options(max_gen_toks=9, do_sample=False, temperature=0.7, repetition_penalty=1.5,
                  num_beams=3)
  assert (found.temperature, found.repetition_penalty, found.num_beams) == (0, 1.5, 3)
  assert options(max_gen_toks=9, temperature=0.7).temperature == 0.7


def test_a_special_token_in_until_ends_an_answer(lm):
  options, stop = lm._options({"max_gen_toks": 9, "until": ["<s>\n", "x", ""]})
  assert options.eos_ids == (1, 0) and stop == ("<s>\n", "x", "</s>")
  assert lm._options({"max_gen_toks": 9, "until": "x"})[0].eos_ids == (1,)


@pytest.mark.parametrize("kwargs,message", [
  ({"max_gen_toks": 4, "max_length": 9, "cut": 1}, "hold cut, max_length, which lmops does not kn"),
  ({"max_gen_toks": 4, "do_sample": True, "temperature": 0.0}, "do_sample=True and temperature=0"),
  ({}, "max_gen_toks=256 leaves no room for a context in the 64 positions"),
  ({"max_gen_toks": 4, "until": 5}, "until=5 in generation_kwargs is no text"),
  ({"max_gen_toks": 4, "until": ["x", 5]}, "stop string 5 must be"),
])
def test_generation_options_that_make_no_sense(lm, kwargs, message):
  with pytest.raises(ValueError, match=message):
    lm.generate_until(_requests("generate_until", ("abc", kwargs)))


def test_what_cannot_be_asked_is_refused(lm, tmp_path):
  with pytest.raises(ValueError, match="request 1 has an empty continuation"):
    lm.loglikelihood(_requests("loglikelihood", ("a", " "), ("a", "")))
  with pytest.raises(ValueError, match="request 0 has a continuation of 65 tokens, beyond the 64"):
    lm.loglikelihood(_requests("loglikelihood", ("a", "x" * 65)))
  with pytest.raises(ValueError, match="'tool_use' is asked for"):
    lm.chat_template("tool_use")
  with pytest.raises(ValueError, match="no argument add_bos_token, trust_remote_code; leave"):
    LmopsLM("DIR", device="cpu", batch_size=1, trust_remote_code=True, add_bos_token=True)
  folder = str(model_folders.write(tmp_path / "model", max_length=64))
  with pytest.raises(ValueError, match="max_length=65 is not between 1 and the 64 positions"):
    LmopsLM(folder, max_length=65)
  assert LmopsLM(folder, max_length="32").max_length == 32


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


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
  return LmopsLM(str(model_folders.write_docked(tmp_path_factory.mktemp("docked"))))


def test_a_model_that_sees_reads_texts_as_its_language_model(seeing):
  pairs = [("abc", " def"), ("", "x")]
  found = seeing.loglikelihood(_requests("loglikelihood", *pairs))
  for (context, continuation), (value, _) in zip(pairs, found):
    ids = seeing._tokenizer.encode(context + continuation)
    rows = _log_probs(seeing, ids[:-1])
    count = len(seeing._tokenizer.encode(continuation, False))
    want = sum(rows[i - 1, ids[i]] for i in range(len(ids) - count, len(ids)))
    assert value == pytest.approx(want, abs=1e-3)


def test_pictures_of_requests_are_those_of_the_model(seeing, lm, tmp_path):
  """Scores and answers behind pictures as a full pass over the whole model has them."""
  rng = np.random.default_rng(0)
  pictures = [Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)) for _ in range(2)]
  context = "<image>ab<image>c"
  source = pretrained.load(str(model_folders.write_docked(tmp_path / "docked")))
  params, tokenizer = source.params(), source.tokenizer()
  pixels = np.stack([
    np.asarray(p.resize((8, 8), Image.Resampling.BICUBIC)) for p in pictures])[None]
  image, end = (tokenizer.token_id(word) for word in ("<image>", "</image>"))
  ids, index = [0], [-1]
  for i, text in enumerate(("ab", "c")):
    words = tokenizer.encode(text, False)
    ids += [image] * 5 + [end, *words]
    index += [-1, *range(4 * i, 4 * i + 4), -1, *[-1] * len(words)]

  @jax.jit
  def log_probs(tokens, index):
    bound = source.model.bind({"params": params})
    return jax.nn.log_softmax(
      bound.logits(tokens, vectors=bound.row_vectors(pixels), vector_index=index)[0])

  def rows(more):
    tokens, places = np.zeros((1, 32), np.int32), np.full((1, 32), -1, np.int32)
    tokens[0, : len(ids) + len(more)], places[0, : len(index)] = [*ids, *more], index
    return np.asarray(log_probs(tokens, places))[len(ids) - 1 :]

  seen = {"visual": pictures}
  (value, _), = seeing.loglikelihood(_requests("loglikelihood", (context, " de", seen)))
  more = tokenizer.encode(" de", False)
  assert value == pytest.approx(sum(rows(more)[i, t] for i, t in enumerate(more)), abs=1e-3)
  options = {"max_gen_toks": 3, "until": []}
  answer, = seeing.generate_until(_requests("generate_until", (context, options, seen)))
  made = []
  while len(made) < 3 and made[-1:] != [tokenizer.eos_id]:
    made.append(int(rows(made)[len(made)].argmax()))
  assert answer == tokenizer.decode(made)

  assert seeing.MULTIMODAL and not lm.MULTIMODAL  # else the harness refuses the task
  for model, arguments, message in [
    (seeing, ("<image>", options, seen), "has 2 pictures and its text 1 places"),
    (seeing, ("<image>" * 2 + "x" * 60, options, seen), "request 0 has 73 tokens with its 2 pict"),
    (seeing, ("<image>", options, seen | {"audio": []}), "has visual, audio beside its text"),
    (lm, ("<image>", options, seen), "has visual beside its text, and this model reads texts alo"),
  ]:
    with pytest.raises(ValueError, match=message):
      model.generate_until(_requests("generate_until", arguments))


def test_a_model_that_does_not_continue_texts_is_refused(tmp_path, monkeypatch):
  folder = str(model_folders.write(tmp_path / "model"))
  monkeypatch.setattr(pretrained.PretrainedModel, "decoder", None)
  with pytest.raises(ValueError, match="family llama that does not continue a text; the harness"):
    LmopsLM(folder)
