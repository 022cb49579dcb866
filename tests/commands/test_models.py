"""`lmops generate`, `score`, `convert` and `export` on a tiny model folder."""

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lmops_jax import cli
from lmops_jax.commands import prompts
from lmops_jax.pretrained import sources
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.pretrained.safetensors_files import map_safetensors, write_safetensors
from tests import model_folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return str(model_folders.write(tmp_path_factory.mktemp("model")))


@pytest.fixture
def lmops(capsys):
  def run(*arguments, fails=False):
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert (code != 0) == fails, err
    return err if fails else out

  return run


def test_a_prompt_is_continued_and_streamed_as_it_is_returned(lmops, folder):
  base = ("generate", "--model", folder, "--prompt", "abc", "--max-new-tokens", 12)
  streamed = lmops(*base)
  answer = json.loads(lmops(*base, "--json"))
  assert streamed == answer["text"] + "\n"
  assert answer["prompt"] == "abc" and len(answer["ids"]) <= 12
  assert len(answer["logprobs"]) == len(answer["ids"])


def test_many_prompts_and_answers_are_numbered(lmops, folder, tmp_path):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
  out = lmops(
    "generate", "--model", folder, "--prompt", "zero", "--prompts", prompts, "--temperature", 1,
    "--num-return", 2, "--max-new-tokens", 4, "--json",
  )
  rows = [json.loads(line) for line in out.splitlines()]
  assert [row["prompt"] for row in rows] == ["zero", "zero", "one", "one", "two", "two"]
  again = lmops(
    "generate", "--model", folder, "--prompt", "zero", "--temperature", 1, "--num-return", 2,
    "--max-new-tokens", 4, "--json",
  )
  again = [json.loads(line) for line in again.splitlines()]
  assert [row["ids"] for row in again] == [row["ids"] for row in rows[:2]]


def test_prompts_as_other_systems_write_them(tmp_path):
  """With a byte-order mark, compressed, with a line separator inside of a text."""
  rows = '\ufeff{"prompt": "one\u2028two"}\r\n\r\n{"prompt": "three"}\r\n'.encode()
  (tmp_path / "a.jsonl").write_bytes(rows)
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows))
  (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\u2028three".encode())

  def read(path):
    return [row.text for row in prompts.rows_of(path)]

  assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.jsonl.gz") == ["one\u2028two", "three"]
  assert read(tmp_path / "a.txt") == ["one", "two\u2028three"]
  (tmp_path / "b.jsonl").write_text('{"prompt": "one"}\n{"prompt": 5}\n')
  with pytest.raises(ValueError, match='b.jsonl:2 should be a JSON object with a text'):
    read(tmp_path / "b.jsonl")
  with pytest.raises(ValueError, match="/dev/zero is a device"):
    read(Path("/dev/zero"))


def test_chat_goes_through_the_template(lmops, folder):
  chat = lmops(
    "generate", "--model", folder, "--chat", "--system", "Be brief.", "--prompt", "Hi",
    "--max-new-tokens", 6,
  )
  text = "[system] Be brief.\n[user] Hi\n[assistant] "
  plain = lmops("generate", "--model", folder, "--prompt", text, "--max-new-tokens", 6)
  # A template writes its own BOS; this one has none, and plain text gets one.
  assert isinstance(chat, str) and isinstance(plain, str) and chat != plain


def test_convert_export_and_generate_agree(lmops, folder, tmp_path):
  assert "llama" in lmops("convert", "--model", folder, "--to", tmp_path / "converted")
  lmops("export", "--checkpoint", tmp_path / "converted", "--to", tmp_path / "exported")
  base = ("--prompt", "abc", "--max-new-tokens", 8, "--beams", 3, "--json")
  answers = [
    lmops("generate", "--model", path, *base)
    for path in (folder, tmp_path / "converted", tmp_path / "exported")
  ]
  assert answers[0] == answers[1] == answers[2]
  with (
    sources.open_source(tmp_path / "exported") as ours, sources.open_source(folder) as theirs
  ):
    assert set(ours.names()) == set(theirs.names())
    for name in ours.names():
      np.testing.assert_array_equal(ours.read(name), theirs.read(name))
  half = tmp_path / "half"
  lmops("export", "--checkpoint", tmp_path / "converted", "--to", half, "--dtype", "bfloat16")
  with sources.open_source(half) as source:
    assert {str(source.dtype(name)) for name in source.names()} == {"bfloat16"}


def test_a_mesh_of_eight_devices_gives_the_same_text(lmops, folder):
  base = ("generate", "--model", folder, "--prompt", "abc", "--max-new-tokens", 12)
  assert lmops(*base, "--mesh", "data=2,fsdp=2,tensor=2") == lmops(*base)


@pytest.mark.parametrize(
  "arguments,message",
  [
    (("--model", "absent", "--prompt", "x"), "neither a folder nor a .gguf file"),
    (("--model", "/dev/zero", "--prompt", "x"), "/dev/zero is a device, not a regular file"),
    (("--model", "FOLDER", "--prompts", "/dev/zero"), "/dev/zero is a device, not a regular file"),
    (("--model", "FOLDER", "--prompts", "PROMPTS"), "jsonl:2 should be a JSON object with a text"),
    (("--model", "FOLDER", "--prompt", "x", "--system", "y"), "add --chat"),
    (("--model", "FOLDER"), "nothing to continue; give --prompt"),
    (("--model", "FOLDER", "--prompts", "absent.txt"), "absent.txt cannot be read"),
    (("--model", "FOLDER", "--prompt", "x", "--top-p", "0.9"), "temperature=0 samples nothing"),
    (("--model", "FOLDER", "--prompt", "x", "--mesh", "rows=2"), "'rows=2' is not AXIS=N"),
    (("--model", "FOLDER", "--prompt", "x", "--attention", "flash"), "attention='flash' must be"),
    (("--model", "FOLDER", "--prompt", "x" * 300), "300|301"),
    (("--model", "FOLDER", "--prompt", "x", "--max-new-tokens", "300"), "256"),
    (("--model", "FOLDER", "--prompt", "x", "--gin.X=1"), "takes no bindings"),
    (("--prompt", "x"), "--model"),
  ],
)
def test_bad_input_is_one_sentence(lmops, folder, arguments, message, tmp_path):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text('{"prompt": "one"}\n{"prompt": ["two"]}\n')
  given = {"FOLDER": folder, "PROMPTS": prompts}
  arguments = [given.get(a, a) for a in arguments]
  error = lmops("generate", *arguments, fails=True)
  assert error.startswith("lmops: error: ") and error.count("\n") == 1
  assert re.search(message, error), error


def test_special_files_of_a_model_are_named_and_not_waited_for(lmops, folder, tmp_path):
  for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
    broken = tmp_path / name
    shutil.copytree(folder, broken)
    (broken / name).unlink()
    os.mkfifo(broken / name)
    error = lmops("generate", "--model", broken, "--prompt", "x", fails=True)
    assert f"{broken / name} is a FIFO, not a regular file" in error
  os.mkfifo(tmp_path / "model.gguf")
  error = lmops("generate", "--model", tmp_path / "model.gguf", "--prompt", "x", fails=True)
  assert "model.gguf is a FIFO, not a regular file" in error


@pytest.fixture
def unread(monkeypatch):
  """Fails where the weights of a model are read."""
  def params(*_):
    raise AssertionError("the model is read")

  monkeypatch.setattr(PretrainedModel, "params", params)


@pytest.mark.parametrize("arguments,message", [
  (("--temperature", "-1"), "temperature=-1.0 must be a number of at least 0"),
  (("--temperature", "1", "--top-p", "2"), "top_p=2.0 must be a number above 0 and at most 1"),
  (("--beams", "0"), "num_beams=0 must be an integer of at least 1"),
  (("--max-new-tokens", "-1"), "max_new_tokens=-1 must be an integer"),
  (("--max-new-tokens", "256"), "prompt 0 has 2 tokens and .*max_new_tokens=256 more"),
  (("--max-new-tokens", 10**30), "max_new_tokens=10+ must be an integer of at least 1 and at most"),
  (("--prompt", "y" * 300), "prompt 1 has 301 tokens, and the model's context is 256"),
  (("--prompt", "caf\udce9"), r"prompt 1 holds '\\udce9', half a character"),
  (("--stop", ""), "the stop string '' must be"),
])
def test_what_cannot_be_generated_is_refused_before_a_model_is_read(
  lmops, folder, unread, arguments, message
):
  error = lmops("generate", "--model", folder, "--prompt", "x", *arguments, fails=True)
  assert error.startswith("lmops: error: ") and error.count("\n") == 1
  assert re.search(message, error), error


@pytest.mark.parametrize("arguments,message", [
  (("--shots", 10), "10 demonstrations are asked for and there are 9 rows"),
  (("--shots", 9), "9 rows, all of them demonstrations"),
  (("--shots", -1), "-1 demonstrations are asked for; ask for 0 or more"),
  (("--shots", 8, "--limit", 9, "--balanced", "--train", "TASK"), None),
  (("--batch-tokens", 0), "--batch-tokens 0 must be at least 1"),
  (("--output", "FOLDER"), "--output .* cannot be written \\(Is a directory"),
  (("--template", "{} {label}"), "has {}, which is no name of a field"),
  (("--template", "{text.x} {label}"), "has {text.x}, which is no name of a field"),
  (("--template", "{0}: {label}"), r"has \{0\}, which is no name of a field"),
  (("--labels", "no,no"), "the labels 'no', 'no' must be at least two different words"),
  (("--labels", "no,"), "hold an empty word"),
])
def test_what_cannot_be_scored_is_refused_before_a_model_is_read(
  lmops, folder, unread, tmp_path, arguments, message
):
  task = tmp_path / "task.jsonl"
  task.write_text("".join(
    json.dumps({"text": "ab" * (i % 4 + 1), "label": i % 2}) + "\n" for i in range(9)))
  arguments = [{"TASK": task, "FOLDER": folder}.get(a, a) for a in arguments]
  base = ("score", "--model", folder, "--task", task, "--labels", "no,yes", "--template",
          "{text}: {label}")
  error = lmops(*base, *arguments, fails=True)
  assert error.startswith("lmops: error: ") and error.count("\n") == 1
  assert re.search(message or "the model is read", error), error


def test_nothing_is_left_of_a_conversion_that_fails(lmops, folder, tmp_path):
  broken = tmp_path / "broken"
  shutil.copytree(folder, broken)
  data = (broken / "model.safetensors").read_bytes()
  (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
  error = lmops("convert", "--model", broken, "--to", tmp_path / "out", fails=True)
  assert "truncated" in error
  assert [p.name for p in tmp_path.iterdir()] == ["broken"]


_HEAD = "lm_head.weight"


def _with_tensors(folder, copy, change):
  """A copy of a model folder with other tensors."""
  shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
  tensors = map_safetensors(Path(folder) / "model.safetensors")
  change(tensors)
  write_safetensors(copy / "model.safetensors", [
    (name, value.shape, value.dtype, lambda value=value: value) for name, value in tensors.items()])
  return copy


def test_a_head_that_is_missing_is_not_made_up(lmops, folder, tmp_path):
  broken = _with_tensors(folder, tmp_path / "broken", lambda tensors: tensors.pop(_HEAD))
  config = json.loads((broken / "config.json").read_text())
  error = lmops("generate", "--model", broken, "--prompt", "x", fails=True)
  assert "it lacks lm_head.weight" in error
  config["architectures"] = ["LlamaModel"]  # a bare body: its embedding serves as the head
  (broken / "config.json").write_text(json.dumps(config))
  lmops("convert", "--model", broken, "--to", tmp_path / "out")


def test_integers_are_no_weights(lmops, folder, tmp_path):
  def change(tensors):
    tensors[_HEAD] = tensors[_HEAD].astype(np.int32)

  broken = _with_tensors(folder, tmp_path / "broken", change)
  error = lmops("convert", "--model", broken, "--to", tmp_path / "out", fails=True)
  assert "lm_head.weight holds int32 and should hold floating-point numbers" in error
  assert not (tmp_path / "out").exists()


def test_score_prints_accuracy_and_writes_every_row(lmops, folder, tmp_path):
  task = tmp_path / "task.jsonl"
  task.write_text("".join(
    json.dumps({"text": "ab" * (i % 4 + 1), "label": i % 2}) + "\n" for i in range(9)
  ))
  base = ("score", "--model", folder, "--task", task, "--labels", "no, yes")
  out = lmops(
    *base, "--template", r"{text}\nAnswer: {label}", "--shots", 2, "--output", tmp_path / "o.jsonl"
  )
  assert re.search(r"accuracy 0\.\d+ \(standard error 0\.\d+\), 7 rows, 2 shots, by sum", out)
  rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
  assert len(rows) == 7 and set(rows[0]["scores"]) == {"no", "yes"}
  accuracy = np.mean([row["label"] == row["prediction"] for row in rows])
  assert f"accuracy {accuracy:.4f}" in out
  error = lmops(*base, "--template", "{body} {label}", fails=True)
  assert "task.jsonl:1 has no field 'body'" in error
  error = lmops("score", "--model", folder, "--task", task, fails=True)
  assert "needs --template and --labels" in error
  error = lmops("score", "--model", folder, "--task", "sst", fails=True)
  assert "no task 'sst'" in error and "sst2" in error


def test_score_takes_named_tasks_from_a_folder(lmops, folder, tmp_path):
  rows = [{"goal": f"g{i}", "sol1": "a", "sol2": "b" * i, "label": i % 2} for i in range(4)]
  (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  base = ("score", "--model", folder, "--task", "piqa", "--data", tmp_path)
  out = lmops(*base, "--flavour", "hf", "--normalise", "auto", "--output", tmp_path / "o.jsonl")
  assert re.search(r"3 rows, 0 shots, by auto", out)  # the first has an empty option
  rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
  assert [len(row["scores"]) for row in rows] == [2, 2, 2]
  assert "3 rows, 0 shots, by token" in lmops(*base, "--flavour", "gpt3")  # as GPT-3 does
  error = lmops(*base, "--template-index", 1, fails=True)
  assert "no template 1 in flavour fs" in error
  error = lmops(*base, "--train", tmp_path / "test.jsonl", fails=True)
  assert "--train is for a --task that is a file" in error
