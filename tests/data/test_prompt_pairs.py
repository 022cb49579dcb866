"""Prompts and pairs from files: what is read, refused, left out and held out."""

import gzip
import json
import types
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from lmops_jax.data import Jsonl, PairFiles, TextLines, Tfds, TfdsPairs
from lmops_jax.data import prompt_pairs as pp

ROWS = [{"prompt": " a cat ", "completion": "a cat, by Monet"},
        {"prompt": "a dog", "completion": "a dog, 4k"},
        {"prompt": "a dog", "completion": "a dog, 4k"},
        {"prompt": "same", "completion": "same "}]
WANT = {("a cat", "a cat, by Monet"), ("a dog", "a dog, 4k")}


def jsonl(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def texts(pairs):
  return {(pair.prompt, pair.completion) for pair in pairs}


def test_the_anchor_ends_what_is_asked():
  assert pp.asked(" a cat\n") == "a cat Rephrase:"
  pair = pp.Pair(0, "a cat", "a cat, 4k", "MC", "here")
  assert pp.as_row(pair) == {"prompt": "a cat Rephrase:", "completion": " a cat, 4k"}


@pytest.mark.parametrize("text, why", [
  (3, "is a int, not a text"), (" \n", "is empty"), ("a\0b", "NUL"), ("a\ud800", "half a"),
  ("a cat Rephrase: b", "'Rephrase:'"), ("Rephrase: b", "'Rephrase:'")])
def test_what_no_prompt_can_be(text, why):
  with pytest.raises(ValueError, match=f"prompt 3 .*{why}"):
    pp.checked_prompt(text, "prompt 3")
  assert pp.checked_prompt(" Rephrase this: ", "prompt 3") == "Rephrase this:"


def check_source(source):
  counts = Counter()
  assert texts(pp.read_pairs([source], counts)) == WANT
  assert (counts["same"], counts["duplicate"], counts["unusable"]) == (1, 1, 0)
  assert source.fingerprint() == source.fingerprint()


def test_pairs_of_jsonl_and_parquet_are_the_same(tmp_path):
  table = pyarrow.table({name: [row[name] for row in ROWS] for name in ("prompt", "completion")})
  pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
  (tmp_path / "rows.jsonl.gz").write_bytes(
    gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)))
  check_source(PairFiles(f"{tmp_path}/rows.jsonl.gz"))
  check_source(PairFiles(f"{tmp_path}/*.parquet"))
  with pytest.raises(ValueError, match=r"rows\.parquet:1 has no field .*PairFiles.prompt_field"):
    pp.read_pairs([PairFiles(f"{tmp_path}/*.parquet", prompt_field="x")])


@pytest.mark.slow
def test_pairs_of_tfds_are_the_same(tmp_path):
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict(
    {"nested": {"x": tfds.features.Text()}, "completion": tfds.features.Text()})
  tfds.dataset_builders.store_as_tfds_dataset(
    name="stored", version="1.0.0", features=features, data_dir=tmp_path / "tfds",
    split_datasets={"train": [(i, {"nested": {"x": row["prompt"]}, "completion": row["completion"]})
                              for i, row in enumerate(ROWS)]})
  dataset = Tfds(str(next((tmp_path / "tfds").rglob("dataset_info.json")).parent))
  check_source(TfdsPairs(dataset, prompt_field="nested/x"))


def test_rows_of_tfds_with_nested_fields_and_bytes(monkeypatch):
  rows = [{"nested": {"x": row["prompt"].encode()}, "completion": row["completion"]}
          for row in ROWS]
  info = types.SimpleNamespace(full_name="stored/1.0.0")
  monkeypatch.setattr(Tfds, "builder", types.SimpleNamespace(info=info))
  monkeypatch.setattr(Tfds, "examples", lambda self: rows)
  monkeypatch.setattr(Tfds, "fingerprint", lambda self: "stored")
  check_source(TfdsPairs(Tfds("stored"), prompt_field="nested/x"))
  rows[1]["completion"] = b"\xff"
  with pytest.raises(ValueError, match=r"stored/1.0.0\[train\]:1.*NoneType"):
    pp.read_pairs([TfdsPairs(Tfds("stored"), prompt_field="nested/x")])


@pytest.mark.parametrize("bad, why", [
  ({"prompt": "a"}, "has no field 'completion'"), ({"prompt": " ", "completion": "b"}, "is empty"),
  ({"prompt": "a", "completion": 3}, "is a int"), ("text", "holds a str, not an object"),
  ({"prompt": "a", "completion": "b Rephrase: c"}, "'Rephrase:'")])
def test_a_bad_row_is_named_by_its_line_or_counted(tmp_path, bad, why):
  path = jsonl(tmp_path / "rows.jsonl", [ROWS[0], bad, ROWS[1]])
  with pytest.raises(ValueError, match=rf"rows\.jsonl:2.*{why}"):
    pp.read_pairs([PairFiles(path)])
  counts = Counter()
  assert texts(pp.read_pairs([PairFiles(path, strict=False)], counts)) == WANT
  assert counts["unusable"] == 1


def test_lines_that_are_no_text_or_no_json(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"prompt"\n\xff\xfa{}\n')
  with pytest.raises(ValueError, match=r"rows\.jsonl:2 is not valid JSON"):
    pp.read_pairs([PairFiles(str(path))])
  counts = Counter()
  assert len(pp.read_pairs([PairFiles(str(path), strict=False)], counts)) == 1
  assert counts["unusable"] == 1 and counts["undecodable"] == 1
  path.write_bytes(b'{"prompt"\n')
  with pytest.raises(ValueError, match="no usable pair; 1 unusable"):
    pp.read_pairs([PairFiles(str(path), strict=False)])


def test_prompts_come_from_any_corpus_once(tmp_path):
  (tmp_path / "a.txt").write_text("a cat\n\n  a dog \na cat\n\u2028x\n")
  corpus = TextLines(str(tmp_path))
  counts = Counter()
  found = pp.read_prompts(corpus, counts)
  assert {p.text for p in found} == {"a cat", "a dog", "x"} and counts["duplicate"] == 1
  assert {p.where for p in found} <= {"a.txt:1", "a.txt:3", "a.txt:4", "a.txt:5"}
  other = jsonl(tmp_path / "b.jsonl", [{"text": "a cat"}, {"text": "b Rephrase:"}])
  with pytest.raises(ValueError, match=r"b\.jsonl:2 holds the words"):
    pp.read_prompts(Jsonl(other))
  assert [p.text for p in pp.read_prompts(Jsonl(other), counts, strict=False)] == ["a cat"]
  assert counts["unusable"] == 1
  with pytest.raises(ValueError, match=r"a\.txt:2 is not UTF-8"):
    (tmp_path / "a.txt").write_bytes(b"a\n\xff\n")
    list(pp.text_lines(tmp_path / "a.txt"))


def test_held_out_pairs_share_no_text_with_those_learned():
  pairs = [pp.Pair(i, f"p{i % 40}", f"c{i // 2}", "", str(i)) for i in range(200)]
  counts = Counter()
  learned, held = pp.split_pairs(pairs, 0.3, seed=1, counts=counts)
  again, _ = pp.split_pairs(pairs[::-1], 0.3, seed=1)
  assert set(learned) == set(again) and len(learned) + len(held) + counts["shared"] == 200
  assert 100 < len(learned) < 180
  assert not {p.completion for p in learned} & {p.completion for p in held}
  assert not {p.prompt for p in learned} & {p.prompt for p in held}
  assert counts["shared"]  # 40 prompts for 100 completions recur
  pp.refuse_leakage(learned, held, "validation")
  assert pp.split_pairs(pairs, 0, seed=1) == (pairs, [])
  assert pp.split_pairs(pairs, 0.3, seed=2)[0] != learned


def test_leakage_is_refused_with_both_places():
  learned = [pp.Pair(0, "a cat", "a cat, 4k", "", "train.jsonl:7")]
  held = [pp.Prompt(1, "a dog", "coco.txt:1"), pp.Prompt(2, "A  CAT", "coco.txt:2")]
  with pytest.raises(ValueError, match=r"COCO holds 'A  CAT' \(coco.txt:2\).*\(train.jsonl:7\)"):
    pp.refuse_leakage(learned, held, "COCO")
  pp.refuse_leakage(learned, held[:1], "COCO")
