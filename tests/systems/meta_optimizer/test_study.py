"""A tiny study from end to end, and its limiting cases."""

import dataclasses

import jax
import numpy as np
import pytest

from lmops_jax.systems.meta_optimizer import metrics, settings, study
from lmops_jax.systems.meta_optimizer.finetune import kv_finetune
from lmops_jax.systems.meta_optimizer.record import predict
from lmops_jax.systems.meta_optimizer.settings import Study
from lmops_jax.systems.meta_optimizer.study import Results, run_study
from tests.systems.meta_optimizer.examples import WordTokenizer, make_task

SETTINGS = Study(
  demonstrations=3, rates=(0.01, 0.1, 1.0), validation_rows=6, evaluation_rows=None,
  kendall_rows=5, batch_rows=4, rates_at_once=2, controls=settings.CONTROLS)
QUICK = dataclasses.replace(SETTINGS, rates=(0.1,), controls=())
TASK = make_task()


@pytest.fixture(scope="module")
def found():
  from tests.systems.meta_optimizer.conftest import make

  lines, rows = [], []
  model, params = make("gpt2")
  results = run_study(
    model, params, WordTokenizer(), TASK, SETTINGS, 1, lines.append, rows.append)
  return results, lines, rows


def test_a_study_reports_every_metric_of_every_network(found):
  results, lines, rows = found
  assert set(results.summary["networks"]) == {"trained", *settings.CONTROLS}
  for name, of in results.summary["networks"].items():
    for metric in study.METRICS:
      values = results.arrays[f"{name}/{metric}"]
      assert values.shape == (2,) and np.all((values >= -1) & (values <= 1)), metric
      assert of[metric] == pytest.approx(values.mean())
    for setting in study.SETTINGS:
      predictions = results.arrays[f"{name}/pred_{setting}"]
      right = predictions == results.arrays["gold"]
      assert of["accuracy"][setting] == pytest.approx(right.mean())
  assert results.arrays["picture/icl"].shape == results.arrays["picture/ft"].shape == (
    2, results.summary["num_training_tokens"])
  assert len(results.summary["picture_tokens"]) == results.summary["num_training_tokens"]
  assert sum(rows) == study.num_rows(TASK, SETTINGS) == 27
  assert lines[0].startswith("learning rate") and len(lines) == 4


def test_results_are_kept(found, tmp_path):
  results = found[0]
  results.save(tmp_path)
  again = Results.load(tmp_path)
  assert again.summary == results.summary and set(again.arrays) == set(results.arrays)
  np.testing.assert_array_equal(again.arrays["gold"], results.arrays["gold"])


def test_the_rate_is_chosen_on_rows_that_are_not_reported(found, tiny):
  results = found[0]
  model, params = tiny("gpt2")
  made = study.Prompts(WordTokenizer(), TASK)
  chosen, others = study.draw(len(TASK.train), 3, 1)
  assert results.summary["demonstration_ids"] == [TASK.train[i].id for i in chosen]
  rows = [TASK.train[i] for i in others[:6]]
  assert not {row.id for row in rows} & set(results.arrays["row_ids"])
  demos = made.demonstrations([TASK.train[i] for i in chosen], 64, 6)
  made.queries(TASK.rows)
  queries = made.queries(rows)
  want = []
  for rate in SETTINGS.rates:
    tuned = kv_finetune(model, params, demos.ids, demos.mask, rate)
    ids = np.concatenate([np.ones((6, 1), np.int32), queries.ids], 1)
    mask = np.concatenate([np.ones((6, 1), bool), queries.mask], 1)
    got = predict(model, tuned.params, ids, mask, made.label_ids)
    want.append(np.mean(got == queries.gold))
  np.testing.assert_allclose(results.arrays["rate_accuracy"], want)
  assert results.summary["rate"] == SETTINGS.rates[int(np.argmax(want))]


def test_batches_and_unstacked_layers_change_nothing(tiny):
  model, params = tiny("llama")
  a, b = (run_study(model, params, WordTokenizer(), TASK, dataclasses.replace(
    QUICK, batch_rows=size, kendall_rows=9)) for size in (2, 9))
  assert np.isnan(a.arrays["trained/sim_am_delta"]).tolist() == [True, False]
  for name in study.METRICS:
    np.testing.assert_allclose(
      a.arrays[f"trained/{name}"], b.arrays[f"trained/{name}"], rtol=1e-4, atol=1e-6)
  for name in study.SETTINGS:
    name = f"trained/pred_{name}"
    np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


def test_without_rate_finetuning_is_zero_shot(tiny):
  model, params = tiny("gpt2")
  found = run_study(
    model, params, WordTokenizer(), TASK, dataclasses.replace(QUICK, rates=(0.0,)))
  of = found.summary["networks"]["trained"]
  assert of["accuracy"]["ft"] == of["accuracy"]["zsl"] and of["rec2ftp"] is None
  assert of["sim_am"] == pytest.approx(of["sim_am_before"], abs=1e-6)
  assert of["sim_aou"] == of["sim_aou_raw"] == of["sim_am_delta"] == 0


@pytest.mark.parametrize("bos", [True, False])
def test_without_demonstrations_in_context_is_zero_shot(tiny, bos):
  model, params = tiny("gpt2")
  found = run_study(model, params, WordTokenizer(bos=bos), TASK,
                    dataclasses.replace(QUICK, demonstrations=0))
  of = found.summary["networks"]["trained"]
  assert of["accuracy"]["icl"] == of["accuracy"]["zsl"] == of["accuracy"]["ft"]
  assert of["sim_am"] == pytest.approx(1, abs=1e-5) and of["sim_aou"] == 0
  assert of["kendall"] is None and of["num_undefined_kendall"] == 10


@pytest.mark.parametrize("changes", [
  dict(readout="first_label"), dict(tune_on="evaluation", rates=(0.1, 0.2)), dict(newline="eos"),
  dict(objective="layer_causal")])
def test_variants_run(tiny, changes):
  model, params = tiny("llama")
  found = run_study(
    model, params, WordTokenizer(), TASK, dataclasses.replace(QUICK, **changes))
  assert found.summary["networks"]["trained"]["sim_am"] is not None
  assert len(found.arrays["rate_accuracy"]) == len(changes.get("rates", (0.1,)))


def test_a_control_keeps_tables_if_told(tiny):
  model, params = tiny("gpt2")
  run = study._Run(model, params, WordTokenizer(), TASK, QUICK, 0, print, print)
  for name in settings.CONTROLS:
    changed = jax.tree_util.tree_map_with_path(
      lambda path, a, b: not np.array_equal(a, b), run.params, run.control(name))
    moved = {jax.tree_util.keystr(path) for path, of in
             jax.tree_util.tree_leaves_with_path(changed) if of}
    tables = {path for path in moved if "norm" in path or "embedding" in path}
    assert bool(tables) == (name == "untrained") and len(moved) > len(tables)


def test_divergence_and_bad_tasks_are_refused(tiny):
  model, params = tiny("llama")

  def run(task=TASK, **changes):
    return run_study(
      model, params, WordTokenizer(), task, dataclasses.replace(QUICK, **changes))

  with pytest.raises(FloatingPointError, match=r"lr=1e\+38 is .* in step 1 of 3"):
    run(rates=(1e38,))
  with pytest.raises(FloatingPointError, match="in step 1 of 3"):
    run(rates=(1e38, 2e38))
  with pytest.raises(ValueError, match="at most 14"):
    run(demonstrations=15)
  with pytest.raises(ValueError, match="fit into the model's 64 positions"):
    run(demonstrations=14)
  short = dataclasses.replace(TASK, train=TASK.train[:3])
  with pytest.raises(ValueError, match="all of them demonstrations, and none to choose"):
    run(short, rates=(0.1, 0.2))
  assert run(short).summary["num_demonstrations"] == 3


@pytest.mark.parametrize("changes, match", [
  (dict(demonstrations=-1), "demonstrations=-1 must be an integer of at least 0"),
  (dict(rates=()), "rates=\\(\\) must be"), (
    dict(rates=(0.1, -1.0)), r"rates\[1\]=-1.0 must be a number of at least 0"),
  (dict(rates=(float("nan"),)), r"rates\[0\]=nan must be a number"),
  (dict(tune_on="test"), "tune_on='test'"),
  (dict(readout="end"), "readout='end'"), (dict(newline=""), "newline=''"),
  (dict(objective="l2"), "objective='l2'"),
  (dict(kendall="tau"), "kendall='tau'"), (dict(controls=("random",)), "controls\\[0\\]='random'"),
  (dict(batch_rows=0), "batch_rows=0"), (dict(evaluation_rows=0), "evaluation_rows=0"),
])
def test_bad_settings_are_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    Study(**changes)


def test_the_grid_is_the_papers():
  assert len(settings.GRID) == 36 and min(settings.GRID) == 1e-4 and max(settings.GRID) == 0.9
  assert set(metrics.KENDALL_VARIANTS) == {"tau_a", "tau_b"}
