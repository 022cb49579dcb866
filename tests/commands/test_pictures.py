"""`lmops generate` with pictures in its prompts, on a tiny model that sees."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from lmops_jax import cli
from lmops_jax.decoding import image_prompts
from lmops_jax.pretrained import model as model_lib
from tests import model_folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return str(model_folders.write_docked(tmp_path_factory.mktemp("docked")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """Paths of three pictures of several kinds and sizes."""
  path = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  paths = [path / name for name in ("a.png", "b.jpg", "c.webp")]
  for file, size in zip(paths, ((9, 13, 3), (30, 20, 3), (8, 8, 3))):
    Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(file)
  return [str(file) for file in paths]


@pytest.fixture
def lmops(capsys):
  def run(*arguments, fails=False):
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert (code != 0) == fails, err
    return err if fails else [json.loads(line) for line in out.splitlines()]

  return run


@pytest.fixture(scope="module")
def greedy(folder):
  """`(parts, number) -> ids` of a loop over full passes, with pixels read by Pillow alone."""
  source = model_lib.load(folder)
  params, tokenizer = source.params(), source.tokenizer()
  slots = source.config.vectors_per_image
  model = source.model

  @jax.jit
  def logits(tokens, index, pixels):
    bound = model.bind({"params": params})
    return bound.logits(tokens, vectors=bound.row_vectors(pixels), vector_index=index)

  def run(parts, num_new):
    ids, index, pixels = [tokenizer.bos_id], [-1], np.zeros((1, 2, 8, 8, 3), np.uint8)
    seen = 0
    for part in parts:
      if part.endswith((".png", ".jpg", ".webp")):
        pixels[0, seen] = Image.open(part).convert("RGB").resize((8, 8), Image.Resampling.BICUBIC)
        ids += [tokenizer.token_id("<image>")] * (slots + 1) + [tokenizer.token_id("</image>")]
        index += [-1, *range(seen * slots, (seen + 1) * slots), -1]
        seen += 1
      else:
        own = tokenizer.encode(part, False)
        ids += own
        index += [-1] * len(own)
    for _ in range(num_new):
      tokens, places = np.zeros((1, 32), np.int32), np.full((1, 32), -1, np.int32)
      tokens[0, : len(ids)], places[0, : len(index)] = ids, index
      ids.append(int(logits(tokens, places, pixels)[0, len(ids) - 1].argmax()))
    return ids[-num_new:]

  return run


def test_pictures_stand_where_the_prompt_has_their_places(
  lmops, folder, pictures, greedy, tmp_path
):
  """In front, between words, several, none, from a file of rows: each as full passes have it."""
  a, b, c = pictures
  rows = tmp_path / "rows.jsonl"
  relative = tmp_path / "copy.png"
  relative.write_bytes(open(a, "rb").read())
  rows.write_text("\n".join(json.dumps(row) for row in [
    {"prompt": "no picture"}, {"prompt": "<image>one<image> two", "images": [b, "copy.png"]},
    {"prompt": "", "images": c}, {"prompt": "x", "images": [{"path": b}]},
  ]))
  got = lmops(
    "generate", "--model", folder, "--image", a, "--prompt", "An image", "--prompt", "of<image>",
    "--prompts", rows, "--max-new-tokens", 3, "--json")
  layouts = [[a, "An image"], ["of", a], ["no picture"], [b, "one", a, "two"], [c], [b, "x"]]
  want = [greedy(parts, 3) for parts in layouts]
  ends = [ids.index(1) if 1 in ids else 3 for ids in want]
  assert [row["ids"] for row in got] == [ids[:end] for ids, end in zip(want, ends)]
  assert len(set(map(tuple, want))) > 2  # else the test could not tell
  assert [row.get("images") for row in got] == [
    [a], [a], None, [b, str(relative)], [c], [b]]
  assert got[3]["prompt"] == "<image>one<image> two"


def test_vectors_are_made_once_for_prompts_beams_and_answers(
  lmops, folder, pictures, tmp_path, monkeypatch
):
  made = []
  encode = image_prompts.PictureEncoder._encode

  def counted(self, pixels):
    made.append(len(pixels))
    return encode(self, pixels)

  monkeypatch.setattr(image_prompts.PictureEncoder, "_encode", counted)
  copy = tmp_path / "copy.png"
  copy.write_bytes(open(pictures[0], "rb").read())
  options = ("--beams", 2, "--num-return", 2, "--max-new-tokens", 4, "--json")
  base = ("generate", "--model", folder, "--image", pictures[0], "--image")
  got = lmops(*base, copy, "--prompt", "<image>a<image>", "--prompt", "<image><image>b", *options)
  assert made == [1] and len(got) == 4
  alone = lmops(*base, copy, "--prompt", "<image><image>b", *options)
  for one, other in zip(alone, got[2:], strict=True):
    assert one["ids"] == other["ids"]
    np.testing.assert_allclose(one["logprobs"], other["logprobs"], rtol=1e-5, atol=1e-5)


def test_a_single_prompt_is_streamed_as_it_is_returned(lmops, folder, pictures, capsys):
  base = ("generate", "--model", folder, "--image", pictures[1], "--prompt", "a",
          "--max-new-tokens", 4)
  answer, = lmops(*base, "--json")
  assert cli.main([str(a) for a in base]) == 0
  assert capsys.readouterr().out == answer["text"] + "\n"


@pytest.mark.slow
def test_a_mesh_of_eight_devices_says_the_same(lmops, folder, pictures):
  base = ("generate", "--model", folder, "--image", pictures[1], "--image", pictures[0], "--prompt",
          "<image>a<image>", "--max-new-tokens", 4, "--json")
  (alone,), (meshed,) = lmops(*base), lmops(*base, "--mesh", "data=4,tensor=2")
  assert alone["ids"] == meshed["ids"]
  np.testing.assert_allclose(alone["logprobs"], meshed["logprobs"], rtol=1e-4, atol=1e-4)


def test_a_converted_and_an_exported_model_see_the_same(lmops, folder, pictures, tmp_path, capsys):
  base = ("--image", pictures[0], "--prompt", "a", "--max-new-tokens", 4, "--json")
  want = lmops("generate", "--model", folder, *base)
  for command in (
    ("convert", "--model", folder, "--to", tmp_path / "ours"),
    ("export", "--checkpoint", tmp_path / "ours", "--to", tmp_path / "theirs"),
  ):
    assert cli.main([str(a) for a in command]) == 0
    assert capsys.readouterr().out.startswith("kosmos-2, ")
    assert lmops("generate", "--model", command[-1], *base) == want


@pytest.fixture
def unread(monkeypatch):
  """Fails where the weights of a model are read."""
  def params(*_):
    raise AssertionError("the model is read")

  monkeypatch.setattr(model_lib.PretrainedModel, "params", params)


@pytest.mark.parametrize("arguments, message", [
  (("--prompt", "<image>a<image>"), "prompt 0 has 1 pictures and its text 2 places <image>; give"),
  (("--prompt", "a", "--image", "A"), "prompt 0 has 2 pictures and its text 0 places"),
  (("--prompt", "a", "--image", "absent.png"), "--image names the picture absent.png, and there"),
  (("--prompt", "a", "--image", "http://x/a.png"), "an address and no file"),
  (("--prompts", "ROWS"), "--image belongs to --prompt TEXT"),
  (("--prompt", "a", "--max-new-tokens", 58), "prompt 0 has 8 tokens and decoding.*=58 more"),
  (("--prompt", "<image>" * 11, *("--image", "A") * 10),
   "prompt 0 has 11 pictures of 6 tokens each, and the model's context is 64 tokens; give at most "
   "10"),
  (("--prompt", "a", "--chat"), "--chat formats texts only"),
])
def test_bad_prompts_are_refused_before_a_model_is_read(
  lmops, folder, pictures, unread, tmp_path, arguments, message
):
  rows = tmp_path / "rows.jsonl"
  rows.write_text('{"prompt": "a"}\n')
  arguments = [{"A": pictures[0], "ROWS": rows}.get(a, a) for a in arguments]
  error = lmops("generate", "--model", folder, "--image", pictures[0], *arguments, fails=True)
  assert error.startswith("lmops: error: ") and error.count("\n") == 1
  assert all(part in error for part in message.split(".*")), error


@pytest.mark.parametrize("content, message", [
  (b"", "is empty, not a picture"), (b"no picture", "is not a picture in a format that Pillow"),
  ("half", "is cut off or damaged"),
])
def test_bad_pictures_are_refused_before_a_model_is_read(
  lmops, folder, pictures, unread, tmp_path, content, message
):
  bad = tmp_path / "bad.png"
  whole = open(pictures[0], "rb").read()
  bad.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
  base = ("generate", "--model", folder, "--image", pictures[1])
  error = lmops(
    *base, "--image", bad, "--prompt", "<image><image>", "--max-new-tokens", 4, fails=True)
  assert str(bad) in error and message in error and error.count("\n") == 1


@pytest.mark.parametrize("row, message", [
  ({"prompt": "a", "images": [5]}, "rows.jsonl:1 is 5; a picture is a path, or an object"),
  ({"prompt": "a", "images": ["absent.png"]}, "rows.jsonl:1 names the picture absent.png"),
  ({"prompt": "<image>"}, "prompt 0 has 0 pictures and its text 1 places"),
])
def test_bad_rows_are_refused_before_a_model_is_read(
  lmops, folder, unread, tmp_path, row, message
):
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(row))
  error = lmops("generate", "--model", folder, "--prompts", path, fails=True)
  assert message in error and error.count("\n") == 1


def test_a_picture_with_a_model_of_texts_is_refused_and_its_tag_is_a_text(
  lmops, pictures, tmp_path, monkeypatch
):
  folder = str(model_folders.write(tmp_path / "texts"))
  base = ("generate", "--model", folder, "--max-new-tokens", 2, "--json")
  assert len(lmops(*base, "--prompt", "<image>")) == 1
  monkeypatch.setattr(model_lib.PretrainedModel, "params", None)
  error = lmops(*base, "--prompt", "a", "--image", pictures[0], fails=True)
  assert f"prompt 0 has the picture {pictures[0]}, and {folder} is a language model" in error


@pytest.mark.parametrize("change, message", [
  ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean=[0.5, 0.5, 0.5] differs from the [0.481454"),
  ({"image_std": [0.5, 0.5]}, "image_std"),
])
def test_pixels_that_a_folder_normalises_otherwise_are_refused(
  lmops, folder, pictures, tmp_path, unread, change, message
):
  changed = shutil.copytree(folder, tmp_path / "changed")
  (changed / "preprocessor_config.json").write_text(json.dumps(change))
  error = lmops(
    "generate", "--model", changed, "--image", pictures[0], "--prompt", "a", fails=True)
  assert "preprocessor_config.json" in error and message in error


def test_a_tokenizer_without_the_words_of_pictures_is_refused(
  lmops, folder, pictures, tmp_path, unread
):
  changed = shutil.copytree(folder, tmp_path / "changed")
  model_folders.byte_tokenizer().save(str(changed / "tokenizer.json"))
  error = lmops(
    "generate", "--model", changed, "--image", pictures[0], "--prompt", "a", fails=True)
  assert "has no token <image>, which texts with pictures need" in error


@pytest.fixture(scope="module")
def likelihood(folder):
  """`(parts, option) -> nats` of a full pass, as `greedy` reads pictures."""
  source = model_lib.load(folder)
  params, tokenizer = source.params(), source.tokenizer()
  slots, model = source.config.vectors_per_image, source.model

  @jax.jit
  def log_probs(tokens, index, pixels):
    bound = model.bind({"params": params})
    logits = bound.logits(tokens, vectors=bound.row_vectors(pixels), vector_index=index)
    return jax.nn.log_softmax(logits[0])

  def run(parts, option):
    tokens, index = np.zeros((1, 64), np.int32), np.full((1, 64), -1, np.int32)
    pixels, seen, end = np.zeros((1, 2, 8, 8, 3), np.uint8), 0, 1
    for part in parts:
      if part.endswith((".png", ".jpg", ".webp")):
        pixels[0, seen] = Image.open(part).convert("RGB").resize((8, 8), Image.Resampling.BICUBIC)
        tokens[0, end] = tokenizer.token_id("<image>")
        index[0, end + 1 : end + 1 + slots] = np.arange(slots) + seen * slots
        tokens[0, end + 1 + slots] = tokenizer.token_id("</image>")
        seen, end = seen + 1, end + slots + 2
      else:
        own = tokenizer.encode(part, False)
        tokens[0, end : end + len(own)] = own
        end += len(own)
    own = tokenizer.encode(option, False)
    tokens[0, end : end + len(own)] = own
    rows = np.asarray(log_probs(tokens, index, pixels))
    return sum(float(rows[end - 1 + i, token]) for i, token in enumerate(own))

  return run


def _rows(path, *rows):
  path.write_text("\n".join(json.dumps(row) for row in rows))
  return path


def _scored(capsys, folder, task, output, *options):
  code = cli.main(["score", "--model", folder, "--task", str(task), "--output", str(output),
                   *map(str, options)])
  out, err = capsys.readouterr()
  assert code == 0, err
  return [json.loads(line) for line in output.read_text().splitlines()], out


def test_options_behind_pictures_score_as_full_passes(
  capsys, folder, pictures, likelihood, tmp_path, monkeypatch
):
  """No demonstration and one, shared and own pictures; each picture is encoded once."""
  made = []
  encode = image_prompts.PictureEncoder._encode

  def counted(self, pixels):
    made.append(len(pixels))
    return encode(self, pixels)

  monkeypatch.setattr(image_prompts.PictureEncoder, "_encode", counted)
  a, b, c = pictures
  task = _rows(
    tmp_path / "vqa.jsonl",
    {"images": a, "prompt": "Is it", "options": ["a cat", "dogs"], "label": 0},
    {"images": [a], "prompt": "one<image> it", "options": ["x", "y", "zz"], "label": "zz"},
    {"images": [b], "prompt": "two<image>", "options": ["x", "y"], "label": 1},
    {"images": [], "prompt": "none", "options": ["x", "y"], "label": 1})
  layouts = [[a, "Is it"], ["one", a, "it"], ["two", b], ["none"]]
  options = [["a cat", "dogs"], ["x", "y", "zz"], ["x", "y"], ["x", "y"]]
  got, out = _scored(capsys, folder, task, tmp_path / "scores.jsonl")
  assert made == [2] and "4 rows, 0 shots" in out
  for row, parts, words in zip(got, layouts, options, strict=True):
    want = [likelihood(parts, f" {word}") for word in words]
    np.testing.assert_allclose(row["scores"], want, rtol=1e-4, atol=1e-4)
    assert row["prediction"] == int(np.argmax(want))

  train = _rows(
    tmp_path / "train.jsonl", {"images": c, "prompt": "It", "options": ["q", "r"], "label": 1})
  got, out = _scored(
    capsys, folder, task, tmp_path / "scores.jsonl", "--shots", 1, "--train", train)
  assert made == [2, 3] and "4 rows, 1 shots" in out
  fronts = [[c, "It r", a, "Is it"], [c, "It r\n\none", a, "it"], [c, "It r\n\ntwo", b],
            [c, "It r\n\nnone"]]
  for row, parts, words in zip(got, fronts, options, strict=True):
    want = [likelihood(parts, f" {word}") for word in words]
    np.testing.assert_allclose(row["scores"], want, rtol=1e-4, atol=1e-4)


_ROW = {"images": "A", "prompt": "Is it", "options": ["x", "y"], "label": 0}


@pytest.mark.parametrize("change, arguments, message", [
  ({"images": ["A", "A"]}, (), "vqa.jsonl:1 has 0 <image> in its prompt and 2 images"),
  ({"images": "absent.png"}, (), "absent.png, which is not there"),
  ({"images": "BAD"}, (), "is not a picture in a format that Pillow"),
  ({"label": 5}, (), "vqa.jsonl:1 has the label 5"),
  ({}, ("--template", "{prompt}: {label}", "--labels", "x,y"), "leave --template and --labels out"),
  ({}, ("--normalise", "null"), "needs a prompt without content"),
  ({}, ("--shots", 3), "3 demonstrations are asked for and there are 1 rows"),
])
def test_what_cannot_be_scored_is_refused_before_a_model_is_read(
  lmops, folder, pictures, unread, tmp_path, change, arguments, message
):
  (tmp_path / "bad.png").write_bytes(b"no picture")
  row = json.dumps({**_ROW, **change}).replace('"A"', json.dumps(pictures[0]))
  (tmp_path / "vqa.jsonl").write_text(row.replace("BAD", "bad.png"))
  error = lmops(
    "score", "--model", folder, "--task", tmp_path / "vqa.jsonl", *arguments, fails=True)
  assert error.startswith("lmops: error: ") and error.count("\n") == 1 and message in error, error


def test_ravens_matrices_are_a_named_task_and_permuted_candidates_permute_scores(
  capsys, pictures, tmp_path
):
  a, b, c = pictures
  folder = str(model_folders.write_docked(tmp_path / "long", max_length=256))
  found = []
  for candidates in ([b, c], [c, b]):
    _rows(tmp_path / "test.jsonl", {"context": [a, b, a], "candidates": candidates, "answer": 1})
    (row,), out = _scored(
      capsys, folder, "raven", tmp_path / "scores.jsonl", "--data", tmp_path)
    found.append(row["scores"])
    assert "1 rows, 0 shots" in out
  np.testing.assert_allclose(found[0], found[1][::-1], rtol=1e-5, atol=1e-5)
  assert abs(found[0][0] - found[0][1]) > 1e-3  # else the test could not tell


@pytest.mark.parametrize("arguments, message", [
  ((), "reads its data set's own folder; give it with --data"),
  (("--data", "."), "raven"), (("--data", ".", "--template-index", 3), "has no template 3"),
  (("--data", ".", "--labels", "x,y"), "leave --flavour and --labels out"),
])
def test_a_named_task_with_pictures_needs_its_folder(
  lmops, folder, unread, tmp_path, monkeypatch, arguments, message
):
  monkeypatch.chdir(tmp_path)
  error = lmops("score", "--model", folder, "--task", "raven", *arguments, fails=True)
  assert error.startswith("lmops: error: ") and error.count("\n") == 1 and message in error, error


def test_rows_with_pictures_and_a_model_of_texts_are_refused(
  lmops, pictures, tmp_path, monkeypatch
):
  folder = model_folders.write(tmp_path / "texts")
  monkeypatch.setattr(model_lib.PretrainedModel, "params", None)
  task = _rows(tmp_path / "vqa.jsonl", {**_ROW, "images": pictures[0]})
  error = lmops("score", "--model", folder, "--task", task, fails=True)
  assert "the task vqa has pictures, and" in error and "which reads texts only; take a" in error
