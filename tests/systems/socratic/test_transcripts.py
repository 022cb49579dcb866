"""The 97 recorded turns: import finds where every text comes from, strict replay gives them back.
"""

import collections
import dataclasses
import json

import pytest

from lmops_jax.systems.socratic import Recorded, Scripted, ScriptMismatch, export, transcripts
from lmops_jax.systems.socratic.backends import Place, Sampling
from tests.systems.socratic import study


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("study") / "transcript.jsonl"
  path.write_text("\n".join(study.transcript_lines()) + "\n")
  return path


@pytest.fixture(scope="module")
def transcript(path):
  return transcripts.load(path)


def test_the_table_is_as_the_study_says():
  rows = study.rows()
  assert [row.turn for row in rows] == list(range(1, 98))
  assert collections.Counter(row.pattern for row in rows) == {
    "DED": 40, "DEC": 20, "VER": 18, "TRA": 13, "INT": 6}
  assert collections.Counter(row.persona for row in rows) == {
    "W": 2, "C": 45, "T": 28, "P": 3, "N": 19}
  assert all(row.num_messages == 2 + 2 * len(row.replies) for row in rows)
  modes = collections.Counter(mode for row in rows for mode, _ in row.replies)
  assert modes == {"whole": 95, "excerpt": 61, "edited": 1, "external": 9}
  for row in rows:
    assert all(n < row.turn for _, n in row.replies)
    assert all(int(pin.rstrip("*")) < row.turn + pin.endswith("*") for pin in row.pins)


def test_import_gives_back_all_seven_fields(transcript):
  got = [study.found(turn) for turn in transcript.turns]
  assert got == [study.expected(row) for row in study.rows()] and len(got) == 97


def test_replay_builds_every_request_again(transcript):
  assert transcripts.replay(transcript) == []
  for turn, recorded in zip(transcript.turns, transcript.recorded):
    assert len(turn.messages) == len(recorded.messages)
    kept = sum(len(p.text) for _, pieces in turn.messages for p in pieces if p.mode != "external")
    assert kept == 0 or "edited" in {p.mode for p in turn.replayed}  # texts come from the graph


@pytest.mark.parametrize("turn", [1, 14, 22, 46, 61, 89, 97])
def test_a_changed_character_fails_at_that_turn_and_only_there(transcript, turn):
  for place in (0, len(transcript.recorded[turn - 1].messages) - 1):
    old = transcript.recorded[turn - 1]
    role, content = old.messages[place]
    changed = (*old.messages[:place], (role, content[:-1] + "!"), *old.messages[place + 1 :])
    recorded = list(transcript.recorded)
    recorded[turn - 1] = dataclasses.replace(old, messages=changed)
    (number, message), = transcripts.replay(transcript, recorded)
    assert number == turn and f"turn {turn}: message {place} ({role}) differs" in message


def test_the_page_of_the_study(transcript):
  page = export.transcript_html(transcript)
  assert page.count("One idea of turn 3:") == 1 + sum(
    n == 3 for row in study.rows() for _, n in row.replies)
  assert "<script" not in page and page == export.transcript_html(transcript)


@pytest.mark.parametrize("line, message", [
  ("[1]", ":2 holds list"), ('{"messages": []}', "messages"), ("{", ":2 is not valid JSON"),
  ('{"messages": [{"role": "user", "content": 3}], "reply": ""}', "content"),
  ('{"turn": 5, "messages": [{"role": "user", "content": "a"}], "reply": ""}', "turn 2 should"),
])
def test_other_files_are_refused_by_line(tmp_path, line, message):
  good = json.dumps({"messages": [{"role": "user", "content": "a"}], "reply": "b"})
  (tmp_path / "t.jsonl").write_text(f"{good}\n{line}\n")
  with pytest.raises(ValueError, match=message):
    transcripts.load(tmp_path / "t.jsonl")


def test_scripts_by_place_and_in_order():
  records = [Recorded("a", (("user", "q"),), "one", Place("0", "DED", 1)),
             Recorded("b", (("user", "q"),), "two", Place("0", "VER", 1))]

  def ask(backend, pattern, attempt=1):
    return backend.complete((("user", "other"),), Sampling(), Place("0", pattern, attempt)).text

  keyed = Scripted(records, "keyed")
  assert [ask(keyed, "VER"), ask(keyed, "DED")] == ["two", "one"]
  with pytest.raises(ScriptMismatch, match="no reply for problem 0, pattern DED, attempt 2"):
    ask(keyed, "DED", 2)
  ordered = Scripted(records, "ordered")
  assert [ask(ordered, "TRA"), ask(ordered, "TRA")] == ["one", "two"]
  with pytest.raises(ScriptMismatch, match="no reply"):
    ask(ordered, "TRA")
  with pytest.raises(ScriptMismatch, match="differs from character 0 on: recorded 'q'"):
    ask(Scripted(records), "DED")
