"""`lmops promptist rewrite` on a tiny policy."""

import json

import pytest

from lmops_jax import cli
from tests.systems.promptist import tiny_gpt2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return str(tiny_gpt2.write(tmp_path_factory.mktemp("model") / "gpt2"))


@pytest.fixture
def lmops(capsys):
  def run(*arguments, fails=False):
    code = cli.main(["promptist", "rewrite", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code != 0) == fails, err
    return err if fails else out

  return run


def test_prompts_are_rewritten_as_text_and_as_json(lmops, folder, tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_text("a dog\n")
  base = ("--model", folder, "--prompt", "a cat", "--prompts", file, "--beams", 4,
          "--max-new-tokens", 6, "--return", 2)
  plain = lmops(*base)
  rows = [json.loads(line) for line in lmops(*base, "--json").splitlines()]
  assert [row["prompt"] for row in rows] == ["a cat", "a cat", "a dog", "a dog"]
  assert plain.startswith(f"[0] {rows[0]['text']}\n[0] ") and "\n[1] " in plain
  assert rows[0]["score"] >= rows[1]["score"] and rows[0]["text"] != rows[1]["text"]
  assert {"is_unchanged", "finish_reason", "num_tokens"} <= rows[0].keys()


@pytest.mark.parametrize("arguments, why", [
  ((), "there is nothing to continue"), (("--prompt", " "), "prompt 0 is empty"),
  (("--prompt", "a", "--beams", "8", "--groups", "3"), "not a multiple"),
  (("--prompt", "a", "--groups", "2", "--diversity", "0"), "diversity=0.0"),
  (("--prompt", "a", "--length-basis", "padded"), "length_basis='padded'"),
  (("--prompt", "a", "--colour", "red"), "unrecognized arguments: --colour red"),
  (("--prompt", "a", "--gin.X=1"), "takes no bindings")])
def test_what_makes_no_sense_is_refused(lmops, folder, arguments, why):
  error = lmops("--model", folder, *arguments, fails=True)
  assert why in error and "Traceback" not in error and error.count("\n") == 1


def test_help_tells_the_recipe(lmops, capsys):
  with pytest.raises(SystemExit):
    lmops("--help")
  assert "length penalty -1" in capsys.readouterr().out
