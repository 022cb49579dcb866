"""Structured prompting as a user runs it, with a tiny model on tasks of a few rows."""

import dataclasses
import json
import types

import numpy as np
import pytest

from lmops_jax import cli, pretrained
from lmops_jax.config import resolve
from lmops_jax.data.tasks import Example, Task, TaskChoice
from lmops_jax.decoding import prefixes
from lmops_jax.decoding.scoring import OptionScorer
from lmops_jax.evaluation import in_context
from lmops_jax.host.progress import Progress
from lmops_jax.models.transformer import TransformerConfig
from lmops_jax.systems import structured_prompting
from lmops_jax.systems.structured_prompting import prompting, report, system
from tests import model_folders

POSITIONS = 96
WORDS = "red blue stone river cloud tree bird fish house road".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A model folder, 40 rows of a task, and a gin file that prompts one on the other."""
  folder = tmp_path_factory.mktemp("prompting")
  model_folders.write(folder / "model", max_length=POSITIONS, spread=6.0)
  rng = np.random.default_rng(0)
  rows = [{"text": " ".join(rng.choice(WORDS, 2)), "label": int(rng.integers(2))}
          for _ in range(40)]
  (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  run = folder / "run.gin"
  run.write_text(f"""
include 'structured_prompting/default.gin'
MODEL = {str(folder / "model")!r}
MESH = None
TASK = {str(folder / "rows.jsonl")!r}
tasks.choose.template = "{{text}}:{{label}}"
LABELS = ("a", "b c")
ROWS = 12
COUNTS = [0, 3, "window", 12]
SEEDS = [0, 1]
SEPARATOR = "\\n"
GROUP_TOKENS = 64
""")
  return types.SimpleNamespace(folder=folder, run=run, rows=folder / "rows.jsonl")


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "run"
  assert cli.main(["run", str(files.run), "--workdir", str(workdir)]) == 0
  return workdir


def _records(workdir, seed):
  path = workdir / "prompt" / "rows" / f"seed{seed}" / "records.json"
  return {record["key"]: record for record in json.loads(path.read_text())}


def _task(files, **changes):
  return TaskChoice(**{**dict(task=str(files.rows), template="{text}:{label}", labels=("a", "b c"),
                              num_rows=12), **changes}).load()


@pytest.fixture(scope="module")
def source(files):
  return pretrained.load(str(files.folder / "model"))


def test_the_summary_is_complete(finished):
  summary = json.loads((finished / "report" / "summary.json").read_text())
  assert {stage["name"] for stage in summary["stages"]} == {
    "task/rows", "prompt/rows/seed0", "prompt/rows/seed1"}
  of = summary["tasks"]["rows"]
  assert summary["model"] == "model" and of["seeds"] == [0, 1] and of["words"] == ["a", "b c"]
  assert (of["metric"], of["num_rows"]) == ("accuracy", 12)
  assert 0.5 <= of["most_frequent_label"] <= 1
  assert len(of["counts"]) == 4 and {row["key"] for row in of["counts"]} == {0, 3, 12, "window"}
  counts = [row["count"] for row in of["counts"]]
  assert counts == sorted(counts)
  for row in of["counts"]:
    assert len(row["metric"]) == 2 and row["mean"] == pytest.approx(np.mean(row["metric"]))
    assert row["deviation"] == pytest.approx(np.std(row["metric"], ddof=1))
  first, last = of["counts"][0], of["counts"][-1]
  assert (first["num_groups"], first["num_tokens"], first["operations"]) == (0, 0, 0)
  assert last["num_groups"] >= 2 and last["used"] == 12 and last["operations"] > 0
  assert last["cache_bytes"] > 0 == first["cache_bytes"]
  assert last["row_operations"] > first["row_operations"] > 0
  page = (finished / "report" / "index.html").read_text()
  assert page.count("data:image/png;base64,") == 2
  for text in ("Task rows", "(window)", "most frequent label"):
    assert text in page


def test_a_second_run_is_free(finished, files, capsys):
  assert cli.main(["run", str(files.run), "--workdir", str(finished)]) == 0
  printed = "".join(capsys.readouterr())
  assert "running" not in printed and "prompt/rows/seed1: finished earlier" in printed
  assert "(window)" in printed


def test_the_window_holds_as_many_as_fit(finished, files, source):
  """By the text's bytes: this vocabulary has one token each."""
  task = _task(files)
  for seed in (0, 1):
    records = _records(finished, seed)
    drawn = system.demonstrations(task.train, len(task.train), seed)
    lengths = [len(row.demonstration) + 1 for row in drawn]
    want = int(np.sum(np.cumsum(lengths) <= 63))  # and BOS
    window = records["window"]
    assert {r["window_count"] for r in records.values()} == {want} == {window["count"]}
    assert (window["num_groups"], window["num_tokens"]) == (1, sum(lengths[:want]))
    whole = records[12]
    assert whole["num_tokens"] == sum(lengths[:12]) and whole["num_groups"] == -(
      -sum(lengths[:12]) // 63)
    assert max(record["window"] for record in records.values()) <= 63


def test_few_demonstrations_are_ordinary_prompting(finished, files, source):
  task, tokenizer = _task(files), source.tokenizer()
  scorer = OptionScorer(source.model, source.params())
  for seed in (0, 1):
    records = _records(finished, seed)
    for key in (0, 3, "window"):
      want = in_context.evaluate(
        scorer, tokenizer, task, shots=records[key]["count"], seed=seed, normalisation="auto",
        separator="\n")
      assert records[key]["predictions"] == [
        {"id": row_id, "prediction": prediction}
        for row_id, prediction in zip(want.row_ids.tolist(), want.predictions.tolist())]
      assert records[key]["metric"] == want.accuracy


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_stage_goes_on_after_the_counts_that_it_has(
    finished, files, tmp_path, monkeypatch, capsys, damaged):
  measure, seen = system.Pipeline._measure, []

  def killed(self, *args):
    *_, count, _ = args
    seen.append(count)
    if len(seen) == 3:
      raise KeyboardInterrupt
    return measure(self, *args)

  arguments = ["run", str(files.run), "--workdir", str(tmp_path / "w"), "--gin.SEEDS=[1]"]
  monkeypatch.setattr(system.Pipeline, "_measure", killed)
  try:
    assert cli.main(arguments) != 0
  except KeyboardInterrupt:
    pass
  partial, = (tmp_path / "w" / "prompt" / "rows").glob("seed1*")
  kept = json.loads((partial / "records.json").read_text())
  assert len(kept) == 2 and partial.name != "seed1"
  if damaged:
    text = (partial / "records.json").read_text()
    (partial / "records.json").write_text(text.replace('"metric": 0', '"metric": 1'))
    kept = []
  assert cli.main(arguments) == 0
  assert "seed1: resuming" in "".join(capsys.readouterr())
  whole = _records(finished, 1)
  assert seen[3:] == [whole[key]["count"] for key in sorted(
    whole, key=lambda key: whole[key]["count"])[len(kept):]]
  resumed = _records(tmp_path / "w", 1)
  assert set(resumed) == set(whole)
  for key, record in resumed.items():
    assert record["predictions"] == whole[key]["predictions"]
  assert [resumed[r["key"]] for r in kept] == kept


def test_equal_counts_are_measured_once(files, finished, tmp_path, monkeypatch):
  limit = _records(finished, 0)["window"]["count"]
  measure, seen = system.Pipeline._measure, []

  def counted(self, *args):
    *_, count, _ = args
    seen.append(count)
    return measure(self, *args)

  monkeypatch.setattr(system.Pipeline, "_measure", counted)
  assert cli.main(["run", str(files.run), "--workdir", str(tmp_path / "w"), "--gin.SEEDS=[0]",
                   f"--gin.COUNTS=[{limit}, 'window']"]) == 0
  records = _records(tmp_path / "w", 0)
  assert seen == [limit] and set(records) == {limit, "window"}
  assert records[limit]["metric"] == records["window"]["metric"]


def test_retrieved_demonstrations_serve_all_rows(files, finished, tmp_path):
  assert cli.main([
    "run", str(files.run), "--workdir", str(tmp_path / "w"), "--gin.SEEDS=[0]",
    "--gin.COUNTS=[0, 12]", "--gin.RETRIEVAL=@structured_prompting.Retrieval()",
    "--gin.structured_prompting.Retrieval.clusters=3"]) == 0
  records, random = _records(tmp_path / "w", 0), _records(finished, 0)
  assert records[0]["predictions"] == random[0]["predictions"]
  assert records[12]["num_prefixes"] == 3 and records[12]["num_groups"] >= 2
  ids = [p["id"] for p in records[12]["predictions"]]
  assert sorted(ids) == sorted(p["id"] for p in random[12]["predictions"])


def test_a_balanced_window_is_one_group_too(files, tmp_path):
  assert cli.main(["run", str(files.run), "--workdir", str(tmp_path / "w"),
                   "--gin.COUNTS=['window']", "--gin.SEEDS=[0, 1, 2]",
                   "--gin.structured_prompting.Prompting.balanced=True"]) == 0
  for seed in range(3):
    window = _records(tmp_path / "w", seed)["window"]
    assert window["num_groups"] == 1 and window["count"] == window["used"] > 0
    assert window["num_tokens"] <= 63


@pytest.mark.parametrize("bindings, message", [
  (["--gin.COUNTS=[0, 29]"],
   "stage task/rows: 29 demonstrations are asked for and the task rows has 28 rows"),
  (["--gin.ROWS=None", "--gin.COUNTS=[40]"], "has 40 rows, all of them demonstrations"),
  (["--gin.LABELS=['a', 'a']"], "labels=['a', 'a'] must be a list of 2 or more different"),
  (["--gin.tasks.choose.template='{text}{text}{text}{text}{text}{text}{text}{text}{text}{text}:{label}'",
    "--gin.COUNTS=[2]"], "leaves no room for a demonstration"),
  (["--gin.GROUP_TOKENS=8", "--gin.COUNTS=[2]"], "a group room for 7"),
  (["--gin.STRATEGY='blank'"], "'blank' must be 'even', 'truncate', 'mask' or 'space'"),
  (["--gin.GROUP_TOKENS=0"], "group_tokens=0 must be an integer of at least 1"),
  (["--gin.COUNTS=[-1]"], "counts[0]=-1 must be an integer"),
  (["--gin.COUNTS=['windows']"], "counts[0]='windows' must be an integer"),
  (["--gin.COUNTS=[True]"], "counts[0]=True must be an integer"),
  (["--gin.COUNTS=[2, 2]"], "counts=[2, 2] must be a list of one or more different"),
  (["--gin.SEEDS=[]"], "seeds=[] must be a list of one or more different"),
  (["--gin.SEPARATOR=''"], "separator='' must be a text that is not empty"),
  (["--gin.structured_prompting.Prompting.scale=0.0"], "scale=0.0 must be a number above 0"),
  (["--gin.structured_prompting.Prompting.normalisation='null'"], "='null' must be 'sum', 'token'"),
  (["--gin.structured_prompting.Pipeline.tasks=[@tasks.choose(), @tasks.choose()]"],
   "give each a tasks.choose.label"),
  (["--gin.structured_prompting.Pipeline.tasks=[]"], "tasks=[] must be a list of one or more"),
  (["--gin.MODEL='absent'"], "path='absent' must be an existing path"),
])
def test_bad_input_is_one_sentence(files, tmp_path, capsys, bindings, message):
  code = cli.main(["run", str(files.run), "--workdir", str(tmp_path / "w"), *bindings])
  printed = "".join(capsys.readouterr())
  assert code == 2 and message in printed and printed.count("lmops: error:") == 1


def test_an_empty_file_is_refused(files, tmp_path, capsys):
  (tmp_path / "none.jsonl").write_text("")
  code = cli.main(["run", str(files.run), "--workdir", str(tmp_path / "w"),
                   f"--gin.TASK='{tmp_path}/none.jsonl'"])
  assert code == 2 and "has no rows" in "".join(capsys.readouterr())


def test_encoders_are_refused():
  encoder = types.SimpleNamespace(
    config=TransformerConfig(vocab_size=9, width=8, num_layers=1, num_heads=1, mlp_width=8,
                             max_length=8, causal=False), label="tiny-bert", family="bert",
    stages=list, reads=tuple, opened=list)
  choice = TaskChoice("installed_kind")
  with pytest.raises(ValueError, match="tiny-bert is a bert model, whose tokens see later ones"):
    structured_prompting.Pipeline(encoder, [choice], prompting.Prompting(), report.Report())


class _Tokenizer:
  """Of bytes, as the folder's, with special tokens taken away or added."""

  def __init__(self, inner, bos_id=0, eos_id=1, front=(0,), same=None):
    self._inner, self.bos_id, self.eos_id, self.front = inner, bos_id, eos_id, list(front)
    self._same = same or {}

  def __getattr__(self, name):
    return getattr(self._inner, name)

  def encode(self, text, add_special=True):
    for old, new in self._same.items():
      text = text.replace(old, new)
    return (self.front if add_special else []) + self._inner.encode(text, False)


def _prompter(source, tokenizer=None, **changes):
  return prompting.Prompter(
    source.model, source.params(), tokenizer or source.tokenizer(),
    prompting.Prompting(**{"separator": "\n", **changes}))


def test_special_tokens_come_from_the_tokenizer(source):
  tokenizer = source.tokenizer()
  row = Example(1, "ab", ("c", "d"), 1)
  assert _prompter(source).bos_id == 0 and _prompter(source, bos=True).bos_id == 0
  assert _prompter(source, bos=False).bos_id is None
  bare = _Tokenizer(tokenizer, front=())
  assert _prompter(source, bare).bos_id is None
  assert _prompter(source, bare, bos=True).bos_id == 0
  text, end = _prompter(source), _prompter(source, separator="eos")
  assert text.demonstrations([row]) == [tokenizer.encode("abd\n", False)]
  assert end.demonstrations([row]) == [[*tokenizer.encode("abd", False), 1]]
  with pytest.raises(ValueError, match='separator is "eos" and this tokenizer has no end token'):
    _prompter(source, _Tokenizer(tokenizer, eos_id=None), separator="eos")
  with pytest.raises(ValueError, match="bos is True and this tokenizer has no BOS token"):
    _prompter(source, _Tokenizer(tokenizer, bos_id=None, front=()), bos=True)
  with pytest.raises(ValueError, match="puts 2 tokens in front of a text"):
    _prompter(source, _Tokenizer(tokenizer, front=(0, 0)))


def test_the_budget_leaves_room_for_the_longest_row(source):
  rows = [Example(7, "a" * 10, ("b", "cc"), 0), Example(8, "a" * 20, ("b", "cccc"), 0)]
  assert _prompter(source).budget(rows) == POSITIONS - 24
  assert _prompter(source, group_tokens=9).budget(rows) == 9
  assert _prompter(source, group_tokens=500).budget(rows) == POSITIONS - 24
  open_row = Example(9, "a" * 20, (), -1, ("x",))
  assert _prompter(source, max_new_tokens=7).budget([open_row]) == POSITIONS - 27
  long = Example(10, "a" * (POSITIONS - 2), ("b", "c"), 0)
  with pytest.raises(ValueError, match=f"row 10 has {POSITIONS - 1} tokens .* {POSITIONS} pos"):
    _prompter(source).budget([*rows, long])
  assert _prompter(source, bos=False).budget([long]) == 1


def test_groups_are_weighed_and_have_a_front(source):
  rows = tuple(Example(i, "ab" * (i + 1), ("c", "d"), 0) for i in range(3))
  task = Task("letters", rows, words=("c", "d"))

  def scores(**changes):
    prompter = _prompter(source, group_tokens=14, **changes)
    demos = prompter.demonstrations([Example(i, "xy" * i, ("c", "d"), i % 2) for i in range(1, 5)])
    groups = prompter.groups(demos, 14)
    assert groups.num_groups > 1 and groups.ids.shape[1] <= 14 - prompter.num_front
    prefix = prompter.read(groups)
    assert int(prefix.end) == groups.ids.shape[1] + prompter.num_front
    found = in_context.score_rows(
      prompter.scorer, in_context.Encoder(source.tokenizer(), start=()), task, rows,
      normalisation="none", prefix=prefix)
    return np.concatenate(found.values)

  windows = scores(scale=1.0)
  np.testing.assert_array_equal(windows, scores(scale=1.0, temperature=1.0, group_scale=1.0))
  changed = [scores(scale=1.0, **change) for change in (
    {"temperature": 0.5}, {"group_scale": 0.5}, {"front": ">>"},
    {"front": ">>", "temperature": 0.5})]
  for i, one in enumerate(changed):
    assert all(np.abs(one - other).max() > 1e-4 for other in (windows, *changed[:i]))
  assert _prompter(source, front=">>").num_front == 3 == 2 + _prompter(source).num_front
  with pytest.raises(ValueError, match="row 10 has .* leaves no room"):
    _prompter(source, front=">" * 8).budget([Example(10, "a" * (POSITIONS - 10), ("b", "c"), 0)])


def test_groups_in_a_store_are_not_read_again(source, tmp_path, monkeypatch):
  rows = tuple(Example(i, "ab" * (i + 1), ("c", "d"), 0) for i in range(3))
  task = Task("letters", rows, words=("c", "d"))

  def measured():
    prompter = _prompter(source, group_tokens=14, store=str(tmp_path / "groups"))
    demos = prompter.demonstrations([Example(i, "xy" * i, ("c", "d"), i % 2) for i in range(1, 5)])
    return prompter.evaluate(task, rows, demos, 14)

  first = measured()
  assert len(list((tmp_path / "groups").iterdir())) == first.num_groups > 1
  monkeypatch.setattr(prefixes, "_read", None)
  again = measured()
  assert (again.metric, again.predictions) == (first.metric, first.predictions)


def test_labels_with_equal_tokens_are_refused(source):
  tokenizer = _Tokenizer(source.tokenizer(), same={"Y": "X"})
  rows = tuple(Example(i, "ab", ("X", "Y"), 0) for i in range(2))
  task = Task("letters", rows, words=("X", "Y"))
  with pytest.raises(ValueError, match="the labels 'X' and 'Y' have the same tokens"):
    _prompter(source, tokenizer).evaluate(task, rows, [], None)
  with pytest.raises(ValueError, match="letters has no rows to evaluate on"):
    _prompter(source).evaluate(task, [], [], None)


def test_open_answers_are_generated_behind_groups(source):
  """Greedy answers of a batch are the model's own next bytes behind the same text."""
  prompter = _prompter(source, max_new_tokens=4, num_beams=1)
  rows = tuple(
    Example(i, prompt, (), -1, ("?",)) for i, prompt in enumerate(["red: ", "blue stone: ", "x:"]))
  task = Task("open", rows, metric="exact_match")
  train = [Example(9, "tree:", (), -1, ("bird", "fish")), Example(10, "a:", (), -1, ("b",))]
  demos = prompter.demonstrations(train)
  assert demos[0] == source.tokenizer().encode("tree: fish\n", False)
  for budget in (40, 12):  # one group, two groups
    bars = []

    def progress(total, unit, bars=bars):
      bars.append(Progress(total, unit, quiet=True))
      return bars[-1]

    measured = prompter.evaluate(task, rows, demos, budget, progress)
    assert measured.num_groups == (num_groups := 1 if budget == 40 else 2)
    assert [(bar.unit, bar.done, bar.total) for bar in bars] == [
      ("groups", num_groups, num_groups), ("rows", 3, 3)]
    prefix = prompter.read(prompter.groups(demos, budget))
    for row, answer in zip(rows, measured.predictions):
      ids, text = source.tokenizer().encode(row.prompt, False), []
      for _ in range(4):
        logits = structured_prompting.structured_logits(
          source.model, prompter.scorer.params, prefix, [ids + text])
        token = int(np.argmax(logits[0, -1]))
        if token in source.tokenizer().stop_ids:
          break
        text.append(token)
      want = source.tokenizer().decode(text).split("\n")[0].strip()
      assert answer == want
  right = tuple(
    row._replace(answers=(answer or "?",)) for row, answer in zip(rows, measured.predictions))
  again = prompter.evaluate(dataclasses.replace(task, rows=right), right, demos, 12)
  assert again.metric == pytest.approx(np.mean([
    bool(prompting.answers.METRICS["exact_match"](text, row.answers))
    for text, row in zip(again.predictions, right)]))


def test_demonstrations_come_from_the_rows_where_there_are_no_others():
  rows = tuple(Example(i, f"p{i}", ("a", "b"), i % 2) for i in range(10))
  task = Task("small", rows, words=("a", "b"))
  pool, left = system._parts(task, [0, 4], 3, False)
  assert len(pool) == 4 and {r.id for r in pool} | {r.id for r in left} == set(range(10))
  assert [r.id for r in left] == sorted(r.id for r in left) and len(left) == 6
  pool, left = system._parts(task, ["window", 2], 3, False)
  assert len(pool) == 5 == len(left)
  pool, left = system._parts(task, [4], 3, True)
  assert sorted(r.label for r in pool) == [0, 0, 1, 1]
  uneven = Task("uneven", tuple(row._replace(label=int(row.id == 0)) for row in rows),
                words=("a", "b"))
  pool, left = system._parts(uneven, ["window"], 3, True)
  assert len(pool) == 1 and len(left) == 9
  whole = dataclasses.replace(task, train=tuple(
    Example(100 + i, f"q{i}", ("a", "b"), int(i < 2)) for i in range(9)))
  pool, left = system._parts(whole, ["window"], 3, True)
  assert len(left) == 10 and sorted(r.label for r in pool) == [0, 0, 1, 1]


def test_the_published_setting():
  resolved = resolve.load(["structured_prompting/paper.gin"], ["MODEL = '/data/model'"])
  tree = resolved.tree.child("system")
  settings = tree.child("prompting").build()
  assert (settings.strategy, settings.group_tokens, settings.separator, settings.bos) == (
    "truncate", 2000, "eos", True)
  assert (settings.normalisation, settings.scale, settings.balanced) == ("auto", None, False)
  assert (settings.num_beams, settings.length_penalty, settings.max_new_tokens) == (3, 0.6, 30)
  task = tree.child("tasks")[0].build()
  assert (task.task, task.flavour, task.num_rows) == ("sst2", "fs", 4000)
  text = resolved.text()
  assert "[2, 4, 6, 8, 10, 12]" in text and "[0, 'window', 500, 1000]" in text
  with pytest.raises(resolve.ConfigError, match="MODEL"):
    resolve.load(["structured_prompting/paper.gin"])


def test_the_default_builds_with_a_small_model_where_there_is_no_other(tmp_path):
  built = resolve.load(
    ["structured_prompting/default.gin"], ["pretrained.choose.package = None"]).build()
  assert built.counts == [0, 16, 128] and built.model.label == "a small model trained here"
  assert built.model.config.max_length == 512 and built.prompting.strategy == "even"
