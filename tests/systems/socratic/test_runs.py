"""Runs in folders: kills anywhere, damage, locks, people, memory, exports."""

import html.parser
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

import lmops_jax
from lmops_jax.systems.socratic import Cast, Journal, Limits, Pin, Rules, export, runs
from lmops_jax.systems.socratic import journal as journal_lib
from lmops_jax.systems.socratic.calls import Paused
from tests.systems.socratic.rules import cooperative, engine

PLAN = runs.Plan("What is it?", Limits(max_depth=2, max_turns=60), Cast(), {"kind": "rules"},
                 (Pin("d", "Definition", "It is."),))


def rule(messages, place, random):
  """Objects now and then, so that all kinds of calls occur; depends on the call alone."""
  if place.pattern == "VER" and place.problem in ("0.1", "0") and place.attempt == 1:
    return "VERDICT: CHILD 1\nISSUE: look again"
  if place.pattern == "DED" and place.problem == "0.2.1" and place.attempt == 1:
    return "I'm sorry, I can't help with that."
  return cooperative(parts=3)(messages, place, random)


def exports(folder):
  with runs.looked_at(folder, Rules(rule)) as (outcome, journal):
    texts = runs.texts_of(journal)
    return [made(outcome, texts) for made in (export.as_html, export.as_markdown, export.as_json)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A finished run: its folder, outcome, exports and the lines of its log."""
  folder = tmp_path_factory.mktemp("runs") / "whole"
  outcome = runs.run(folder, PLAN, Rules(rule))
  lines = (folder / journal_lib.LOG).read_bytes().splitlines(keepends=True)
  return folder, outcome, exports(folder), lines


def test_killed_after_any_line_it_ends_the_same_and_pays_nothing_twice(
    whole, tmp_path, monkeypatch):
  _, outcome, wanted, lines = whole
  monkeypatch.setattr(os, "fsync", lambda descriptor: None)
  assert outcome.spent.turns >= 40
  cuts = [b"".join(lines[:n]) for n in range(len(lines))]
  cuts.append(cuts[20] + lines[20][:37])  # in the middle of a line
  for i, cut in enumerate(cuts):
    folder = tmp_path / str(i)
    folder.mkdir()
    (folder / journal_lib.LOG).write_bytes(cut)
    answered = cut.count(b'"kind": "reply"') - (i == len(cuts) - 1 and b"reply" in lines[20][:37])
    backend = Rules(rule)
    resumed = runs.run(folder, PLAN, backend)
    assert resumed.digest == outcome.digest
    assert backend.num_calls == outcome.spent.turns - answered
    assert sorted((folder / journal_lib.LOG).read_bytes().splitlines()) == sorted(
      line.rstrip() for line in lines)
    if i % 8 == 0:
      assert exports(folder) == wanted


def test_killed_for_real_at_any_moment(whole, tmp_path):
  """The process kills itself inside of a call to the model, again and again."""
  _, outcome, _, _ = whole
  script = tmp_path / "killed.py"
  script.write_text(
    "import os, signal, sys\n"
    "from lmops_jax.systems.socratic import Rules, runs\n"
    "from tests.systems.socratic.test_runs import PLAN, rule\n"
    "count = 0\n"
    "def deadly(messages, place, random):\n"
    "  global count\n"
    "  count += 1\n"
    "  if count > int(sys.argv[2]):\n"
    "    os.kill(os.getpid(), signal.SIGKILL)\n"
    "  return rule(messages, place, random)\n"
    "print(runs.run(sys.argv[1], PLAN, Rules(deadly)).digest)\n")
  root = Path(lmops_jax.__file__).parents[1]
  for calls in (7, 100):
    done = subprocess.run(
      [sys.executable, script, tmp_path / "run", str(calls)], cwd=root, capture_output=True,
      text=True, env={**os.environ, "PYTHONPATH": str(root)})
    if calls == 7:
      assert done.returncode == -signal.SIGKILL
  assert done.stdout.strip() == outcome.digest, done.stderr
  kinds = [line["kind"] for line in journal_lib.read(tmp_path / "run")]
  assert kinds.count("reply") == kinds.count("call") == outcome.spent.turns


def test_every_call_is_written_before_it_is_sent(tmp_path):
  def spying(messages, place, random):
    last = list(journal_lib.read(tmp_path))[-1]
    assert last["kind"] == "call" and last["place"]["pattern"] == place.pattern
    assert [tuple(m) for m in last["messages"]] == list(messages)
    return rule(messages, place, random)
  assert runs.run(tmp_path, PLAN, Rules(spying)).tree.root.conclusion is not None


def _copy(whole, folder, change=lambda lines: lines):
  folder.mkdir()
  (folder / journal_lib.LOG).write_bytes(b"".join(change(list(whole[3]))))
  return folder


@pytest.mark.parametrize("change, message", [
  (lambda lines: [*lines[:4], lines[4].replace(b"a", b"b", 1), *lines[5:]],
   r"log.jsonl:5 .*--salvage"),
  (lambda lines: [*lines[:4], b"garbage\n", *lines[5:]], "log.jsonl:5 is not valid JSON"),
  (lambda lines: [lines[0].replace(b'"v": 1', b'"v": 9'), *lines[1:]], ":1 has version 9"),
])
def test_damage_is_refused_by_line_and_can_be_salvaged(whole, tmp_path, change, message):
  folder = _copy(whole, tmp_path / "run", change)
  with pytest.raises(ValueError, match=message):
    runs.run(folder, PLAN, Rules(rule))
  kept = journal_lib.salvage(folder)
  assert kept in (0, 4) and (folder / "log.damaged").is_file()
  assert runs.run(folder, PLAN, Rules(rule)).digest == whole[1].digest


def test_another_plan_is_refused_unless_forked(whole, tmp_path):
  folder = _copy(whole, tmp_path / "run")
  other = runs.Plan("What is it?", Limits(max_depth=1, max_turns=60), Cast(), {"kind": "rules"},
                    PLAN.pins)
  with pytest.raises(ValueError, match="another limits.*--fork"):
    runs.run(folder, other, Rules(rule))
  backend = Rules(rule)
  forked = runs.run(folder, other, backend, fork=True)
  assert forked.tree.root.conclusion is not None
  assert 0 < backend.num_calls <= forked.spent.turns - 3  # the target's first calls are the same


def test_a_second_writer_is_kept_out_and_a_reader_is_not(tmp_path, whole):
  folder = _copy(whole, tmp_path / "run")
  with Journal(folder):
    with pytest.raises(ValueError, match="being written by another process"):
      Journal(folder)
    assert exports(folder) == whole[2]


def test_a_full_disk_stops_before_the_next_call(tmp_path, monkeypatch):
  backend, write = Rules(rule), Journal.write

  def full(self, kind, **fields):
    if backend.num_calls == 3 and kind == "call":
      raise OSError(28, "No space left on device")
    write(self, kind, **fields)
  monkeypatch.setattr(Journal, "write", full)
  with pytest.raises(OSError, match="No space"):
    runs.run(tmp_path, PLAN, backend)
  assert backend.num_calls == 3


def test_time_that_is_up_pauses_and_changes_nothing(whole, tmp_path):
  backend = Rules(rule)
  with pytest.raises(Paused):
    runs.run(tmp_path, PLAN, backend, is_over=lambda: backend.num_calls >= 5)
  assert backend.num_calls == 5
  with runs.looked_at(tmp_path, Rules(rule)) as (outcome, _):
    assert outcome.spent.turns == 5 and outcome.tree.root.state == "open"
  assert runs.run(tmp_path, PLAN, Rules(rule)).digest == whole[1].digest


class Person:
  """Edits, answers, rejects, selects, rewrites the parts, and concludes."""

  def __init__(self):
    self.asked = 0

  def before_call(self, problem, pattern, messages):
    self.asked += 1
    if pattern == "ASSESS":
      return {"do": "answer", "text": "SPLIT" if problem == "0" else "SOLVE"}
    if pattern == "DED" and problem == "0.1":
      return {"do": "edit", "prompt": "My own question", "persona": "P"}
    return {"do": "send"}

  def after_reply(self, problem, pattern, text):
    self.asked += 1
    if pattern == "DED" and "leaf" in text:
      return {"do": "reject", "critique": "Rather say more."}
    if pattern == "INT":
      return {"do": "edit", "text": "CONCLUSION: by hand [S1] [S2]"}
    return {"do": "accept"}

  def on_problem(self, problem, statements):
    self.asked += 1
    return {"do": "parts", "parts": [["first", []], ["second", [1]]]}

  def on_stuck(self, problem, reason):
    self.asked += 1
    return {"do": "conclude", "text": "mine", "answer": "42"}


def _asked(messages, place, random):
  if messages[-1][1] == "Rather say more.":
    return "CONCLUSION: more"
  if place.pattern == "VER" and place.problem == "0":
    return "VERDICT: ISSUE\nISSUE: no"
  return cooperative()(messages, place, random)


def test_what_people_decide_is_logged_and_repeated(tmp_path):
  person = Person()
  done = runs.run(tmp_path / "run", PLAN, Rules(_asked), person=person)
  tree = done.tree
  assert [p.statement for p in tree.problems.values()] == ["What is it?", "first", "second"]
  assert tree.problems["0.1"].conclusion.text == "more" and tree.problems["0.2"].needs == ("0.1",)
  assert tree.root.conclusion.text == "mine" and tree.root.conclusion.answer == "42"
  lines = list(journal_lib.read(tmp_path / "run"))
  assert sum(line["kind"] == "human" for line in lines) == person.asked
  sent = [line for line in lines if line["kind"] == "call"]
  assert ["system", "You are a mathematician skilled in probability theory."] in [
    line["messages"][0] for line in sent]
  backend = Rules(_asked)
  again = runs.run(tmp_path / "run", PLAN, backend)  # nobody is asked, nothing is paid
  assert again.digest == done.digest and backend.num_calls == 0
  with runs.looked_at(tmp_path / "run", Rules(_asked)) as (outcome, journal):
    assert "SPLIT" in export.as_html(outcome, runs.texts_of(journal))


class Tags(html.parser.HTMLParser):
  """Names of a page's tags, and the addresses in them."""

  def __init__(self, page):
    super().__init__()
    self.names, self.addresses = set(), []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.names.add(tag)
    self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]
    assert not any(name.startswith("on") for name, _ in attrs)


@pytest.mark.parametrize("hook, action, message", [
  ("before_call", {"do": "edit", "persona": "Q"}, "no persona 'Q'"),
  ("before_call", {"do": "edit", "prompt": "a\x07"}, "control character"),
  ("before_call", {"do": "fly"}, "must be one of send, edit, answer"),
  ("after_reply", {"do": "reject"}, "reject needs 'critique'"),
  ("on_problem", {"do": "parts", "parts": [["a", [1]]]}, "earlier parts only"),
  ("on_problem", {"do": "parts", "parts": [["a", []]] * 6}, "6 parts were given"),
])
def test_what_people_cannot_mean_is_not_logged(tmp_path, hook, action, message):
  """So that a resumed run asks again."""
  person = Person()
  setattr(person, hook, lambda *unused: action)
  with pytest.raises(ValueError, match=message):
    runs.run(tmp_path, PLAN, Rules(_asked), person=person)
  assert runs.run(tmp_path, PLAN, Rules(_asked), person=Person()).tree.root.conclusion is not None


def test_pages_escape_what_a_model_writes_and_ask_for_nothing(tmp_path):
  evil = ("<script>alert(1)</script><img src=http://evil.example/x onerror=x> </pre>```\n# no\n"
          + "x" * 1_000_000)
  changes = {"ASSESS": "SOLVE", "DED": f"CONCLUSION: {evil}\nANSWER: <b>7</b>",
             "VER": "VERDICT: OK"}
  backend = Rules(cooperative(changes), window=1 << 30)
  plan = runs.Plan("<script>x</script> & é", Limits(max_tokens=10**9),
                   Cast(), {"kind": "<i>"})
  runs.run(tmp_path, plan, backend)
  with runs.looked_at(tmp_path, backend) as (outcome, journal):
    texts = runs.texts_of(journal)
    for name in ("page.html", "page.md", "page.json"):
      export.write(tmp_path / name, outcome, texts)
    with pytest.raises(ValueError, match=r"must end in .html, .md or .json"):
      export.write(tmp_path / "page.pdf", outcome, texts)
  page = (tmp_path / "page.html").read_text()
  parsed = Tags(page)
  assert "script" not in parsed.names and "img" not in parsed.names
  assert all(value.startswith(("#", "data:")) for value in parsed.addresses)
  assert "&lt;script&gt;alert" in page and "x" * 1_000_000 in page
  assert "default-src 'none'" in page
  markdown = (tmp_path / "page.md").read_text()
  assert "\n````\n<script>" in markdown  # a fence longer than the reply's own
  assert json.loads((tmp_path / "page.json").read_text())["digest"] == outcome.digest


@pytest.mark.slow
def test_memory_does_not_grow_with_the_turns():
  """5,000 turns with replies of 6 kB: texts are not kept."""
  long = "reason " * 900
  seen, peaks = [0], []

  def talkative(messages, place, random):
    seen[0] += 1
    if seen[0] in (1000, 5000):
      peaks.append(tracemalloc.get_traced_memory()[0])
    return long + "\n\n" + cooperative(parts=5)(messages, place, random)

  made, backend = engine(talkative, max_depth=5, rounds=1, max_turns=5010)
  tracemalloc.start()
  try:
    made.run()
  finally:
    tracemalloc.stop()
  assert backend.num_calls >= 5000
  assert peaks[1] - peaks[0] < 4000 * len(long) / 5
