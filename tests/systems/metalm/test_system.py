"""MetaLM as a run: its stages, what they leave, and what is refused."""

import json

import jax
import numpy as np
import pytest

from lmops_jax.data.tasks import demonstrations
from lmops_jax.mesh import meshes
from lmops_jax.mesh.checkpoints import load_params
from lmops_jax.systems.metalm import evaluate, prompts, tasks, texts
from lmops_jax.systems.metalm.arms import SEMI
from lmops_jax.training import loop
from tests.systems.metalm.conftest import ARMS, load, run


def _summary(workdir):
  return json.loads((workdir / "report" / "summary.json").read_text())


def _params(workdir, system, stage, config):
  return load_params(workdir / stage / "params" / str(config.num_steps))


def test_the_summary_holds_every_figure(workdir, system):
  summary = _summary(workdir)
  assert summary["arms"] == list(ARMS) and summary["seeds"] == [0]
  for arm in ARMS:
    results = json.loads((workdir / f"evaluate/{arm}/seed0/results.json").read_text())
    for view in ("own", "common", "plain"):
      assert summary["perplexity"][arm][view]["mean"] == pytest.approx(
        np.exp(results["losses"][view]))
    figures = summary["figures"][arm]
    modes = ("all",) if arm == "causal" else ("encoder", "all")
    assert set(figures) == {
      "next_passage/trained", "file_kind/trained/0", "file_kind/trained/2", *(
        f"{name}/{mode}{shots}" for mode in modes for name, shots in (
          ("same_document", ""), ("same_document, other words", "/0"),
          ("same_document, other words", "/2"), ("file_kind", "/0"), ("file_kind", "/2")))}
    of_kinds = results["answers"]["trained"]["file_kind"][1]
    assert figures["file_kind/trained/2"]["values"] == [of_kinds["right"] / of_kinds["num"]]
  assert summary["chance"]["next_passage"] == 0.25
  semi = summary["spans"]["semi_causal"]
  assert semi["encoded_tokens"] > 0 and summary["spans"]["causal"]["encoded_tokens"] == 0
  assert "perplexity, common" in system.table(summary)


def test_the_page_draws_spans_and_curves(workdir):
  page = (workdir / "report" / "index.html").read_text()
  assert page.count("<mark>") >= 2
  for name in ("losses", "few_shot", "finetuned"):
    assert (workdir / "report" / f"{name}.png").is_file()


def test_arms_start_alike_and_only_what_is_trained_moves(workdir, system):
  prepared = texts.Prepared(workdir / "texts")
  made = system.models.arm(SEMI, prepared.vocabulary.vocab_size)
  start = system.reader.load(
    workdir / "encoder", made.config.reader.encoder, prepared.vocabulary, meshes.single_device())
  trained = _params(workdir, system, "train/semi_causal/seed0", system.training)
  jax.tree.map(np.testing.assert_array_equal, trained["reader"]["trunk"], start["trunk"])
  assert _differ(trained["reader"]["top"], start["top"])
  tuned = {
    mode: _params(workdir, system, f"finetune/semi_causal/{mode}/seed0", system.finetune)
    for mode in ("encoder", "all")}
  jax.tree.map(np.testing.assert_array_equal, tuned["encoder"]["text"], trained["text"])
  for part in ("reader", "reader_connector"):
    assert _differ(tuned["encoder"][part], trained[part])
  assert _differ(tuned["all"]["text"], trained["text"])


def _differ(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), a, b)))


def test_choices_are_those_of_full_passes(workdir, system):
  """What `Asking` finds, from logits of whole rows without cache, shared prefix or packing."""
  prepared = texts.Prepared(workdir / "texts")
  vocabulary, task = prepared.vocabulary, tasks.read(workdir / "tasks", tasks.FILE_KIND)
  made = system.models.arm(SEMI, vocabulary.vocab_size)
  params = _params(workdir, system, "train/semi_causal/seed0", system.training)
  shown = demonstrations(task.train, 2, 0)
  values, dropped = evaluate.Asking(made, params, vocabulary, None).values(task.rows[:3], shown)
  assert dropped == 0

  @jax.jit
  def log_probs(tokens, vectors, index):
    logits = made.model.apply(
      {"params": params}, tokens, vectors=vectors, vector_index=index, method="logits")
    return jax.nn.log_softmax(logits)[0]

  @jax.jit
  def encoded(span):  # alone in its row
    features = made.model.apply(
      {"params": params}, span, np.arange(span.shape[1])[None], np.ones(span.shape, np.int32),
      method="row_vectors")
    return features[0, 1:]

  def score(row, option):
    tokens, index, vectors = [vocabulary.bos_id], [-1], []
    for one in (*shown, row):
      given = vocabulary.encode(one.prompt)
      vectors.append(np.asarray(encoded(np.array([[vocabulary.bos_id, *given]], np.int32))))
      of_all = np.concatenate(vectors)
      index += range(len(of_all) - len(given), len(of_all))
      tokens += given
      if one is not row:
        answer = [*vocabulary.encode(one.options[one.label]), vocabulary.eos_id]
        tokens, index = tokens + answer, index + [-1] * len(answer)
    start, answer = len(tokens), vocabulary.encode(option)
    tokens, index = tokens + answer, index + [-1] * len(answer)
    width = 128
    row_tokens, row_index = np.zeros((1, width), np.int32), np.full((1, width), -1, np.int32)
    row_tokens[0, : len(tokens)], row_index[0, : len(index)] = tokens, index
    padded = np.zeros((1, width, vectors[0].shape[1]), np.float32)
    padded[0, : len(of_all)] = of_all
    found = np.asarray(log_probs(row_tokens, padded, row_index))
    return sum(found[start - 1 + i, token] for i, token in enumerate(answer))

  for row, pick in zip(task.rows[:3], values.argmax(axis=1)):
    assert pick == int(np.argmax([score(row, option) for option in row.options]))


def test_perplexity_of_common_tokens_is_that_of_full_rows(workdir, system):
  prepared = texts.Prepared(workdir / "texts")
  results = json.loads((workdir / "evaluate/causal/seed0/results.json").read_text())["losses"]
  made = system.models.arm("causal", prepared.vocabulary.vocab_size)
  params = _params(workdir, system, "train/causal/seed0", system.training)
  index = np.arange(min(system.evaluation.num_rows, len(prepared.validation)))
  batch = prepared.validation.batch(index)
  logits = jax.nn.log_softmax(made.model.apply(
    {"params": params}, batch["tokens"], method="logits"))
  nats = -np.take_along_axis(np.asarray(logits), batch["targets"][..., None], axis=-1)[..., 0]
  common = evaluate.common_mask(system.models, prepared.validation, index, 400)
  assert 0 < common.sum() < batch["loss_mask"].sum()
  assert not (common * (1 - batch["loss_mask"])).any()
  assert results["common"] == pytest.approx((nats * common).sum() / common.sum(), rel=1e-5)
  assert results["plain"] == pytest.approx(results["common"], rel=1e-6)  # no spans
  own = batch["loss_mask"]
  assert results["own"] == pytest.approx((nats * own).sum() / own.sum(), rel=1e-5)


def test_only_what_reads_a_changed_setting_runs_again(workdir, bindings):
  found = run(workdir, bindings, "metalm.Evaluate.num_rows = 7")
  assert {name for name, status in found.items() if status == "ran"} == {
    "evaluate/causal/seed0", "evaluate/semi_causal/seed0", "report"}
  assert set(run(workdir, bindings, "metalm.Evaluate.num_rows = 7").values()) == {"cached"}


def test_demonstrations_without_room_are_left_out(workdir):
  prepared = texts.Prepared(workdir / "texts")
  vocabulary, task = prepared.vocabulary, tasks.read(workdir / "tasks", tasks.FILE_KIND)
  shown = prompts.answered(task.train[:3], vocabulary)
  row, = prompts.asked(task.rows[:1], vocabulary)
  options = vocabulary.encode_batch(task.rows[0].options)
  whole, dropped = prompts.fitted(shown, row, options, vocabulary, 1000)
  assert dropped == 0 and len(whole.spans) == 4
  limit = len(whole.tokens) + max(map(len, options)) - 1
  assert prompts.fitted(shown, row, options, vocabulary, limit)[1] == 0
  cut, dropped = prompts.fitted(shown, row, options, vocabulary, limit - 1)
  assert dropped == 1 and cut.tokens.tolist() == [
    vocabulary.bos_id, *whole.tokens[len(shown[0].tokens):].tolist()]
  with pytest.raises(ValueError, match="row .* of a task has .* and the model 4 positions"):
    prompts.fitted(shown, row, options, vocabulary, 4)


@pytest.mark.parametrize("binding, message", [
  ("LENGTH = 400", "length=400 are longer than"),
  ("metalm.Training.accumulate = 3", "batch_size=4 is not a multiple of accumulate=3"),
  ("models.UniversalConfig.reader = None", "must have a reader and no vision"),
  ("ARMS = ('causal', 'causal')", "arms"),
])
def test_settings_that_do_not_fit_are_refused(bindings, binding, message):
  with pytest.raises(ValueError, match=message):
    load(bindings, binding).build()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bits(workdir, system, bindings, tmp_path, monkeypatch):
  """What the generator of replaced tokens draws depends on the step alone.

  The run is cut in the third step of detection, behind those as a causal language model.
  """
  real, calls = loop._Run.take_step, []

  def cut(self, *args):
    if len(calls) == system.reader.causal.num_steps + 2:
      calls.append("cut")
      raise InterruptedError
    calls.append(self.done)
    return real(self, *args)

  more = ["metalm.ReaderTraining.checkpoint_every = 1", "metalm.Training.checkpoint_every = 1"]
  with monkeypatch.context() as patch:
    patch.setattr(loop._Run, "take_step", cut)
    with pytest.raises(InterruptedError):
      run(tmp_path, bindings, *more, only=["texts", "encoder"])
  found = run(tmp_path, bindings, *more, only=["texts", "encoder", "train/semi_causal"])
  assert found["encoder"] == "resumed"
  for stage, config in (
      ("encoder", system.reader), ("train/semi_causal/seed0", system.training)):
    jax.tree.map(
      np.testing.assert_array_equal, _params(tmp_path, system, stage, config),
      _params(workdir, system, stage, config))
