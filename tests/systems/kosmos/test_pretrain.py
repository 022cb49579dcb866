"""Kosmos-1 trained and tuned on files: rows, what is held out, where it starts, and its plan."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from lmops_jax.config import resolve
from lmops_jax.data import instances
from lmops_jax.data.image_files import ImageJsonl
from lmops_jax.data.image_rows import ImageRows
from lmops_jax.data.image_tokens import ImageTokens
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.multimodal import LeftOut, Picture, Record
from lmops_jax.mesh.checkpoints import load_params
from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.docked import DockedLM
from lmops_jax.shared_stages import corpora
from lmops_jax.shared_stages.row_sources import Form, Side, record_key, text_key
from lmops_jax.sizing.budget import Memory
from lmops_jax.systems.kosmos import InstructionJsonl, plan, starts, training
from lmops_jax.systems.kosmos.prepare import RowShape
from lmops_jax.systems.kosmos.sources import Instructions
from lmops_jax.training import loop
from lmops_jax.training.metrics import read_records

TINY = [
  "VOCABULARY = @data.TrainSentencePiece()", "data.TrainSentencePiece.vocab_size = 300",
  "STEPS = 3", "kosmos.Training.num_groups = 2", "HELD_OUT = 0.0",
  "optim.warmup_linear.warmup_steps = 1", "models.ResamplerConfig.num_latents = 4",
  "text/models.TransformerConfig.vocab_size = None",
  *(f"text/models.TransformerConfig.{name} = {value}" for name, value in {
    "num_layers": 2, "width": 16, "num_heads": 2, "mlp_width": 32, "max_length": 64,
    "dtype": "'float32'", "embedding_scale": 4.0}.items()),
  *(f"vision/models.TransformerConfig.{name} = {value}" for name, value in {
    "num_layers": 2, "width": 16, "num_heads": 2, "mlp_width": 32, "dtype": "'float32'"}.items()),
  "models.VisionConfig.image_size = 28", "data.ImageSettings.height = 28",
  "data.ImageSettings.width = 28", "text/kosmos.RowShape.length = 32",
  "pairs/kosmos.RowShape.length = 32", "pairs/kosmos.RowShape.rows = 2",
  "interleaved/kosmos.RowShape.length = 48", "interleaved/kosmos.RowShape.pictures = 2",
  "kosmos.Pretrain.images = @data.ImageSettings()", "kosmos.Pretrain.pictures_per_document = 2",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """Text, pairs and documents on disk, one picture of which cannot be read."""
  folder = tmp_path_factory.mktemp("data")
  draws = np.random.default_rng(0)
  for i in range(8):
    Image.fromarray(draws.integers(0, 256, (70, 80, 3), np.uint8)).save(folder / f"{i}.png")
  (folder / "broken.png").write_bytes(b"no picture")
  words = ("a red star", "two blue moons", "the green bird sings", "an orange cloud")
  (folder / "text.jsonl").write_text("\n".join(
    json.dumps({"text": f"{words[i % 4]} and {words[(i + 1) % 4]} number {i}\nmore of it"})
    for i in range(40)))
  pairs = [{"images": [f"{i % 8}.png"], "text": words[i % 4]} for i in range(12)]
  pairs.append({"images": ["broken.png"], "text": "lost"})
  (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
  (folder / "pages.jsonl").write_text("\n".join(
    json.dumps({"images": [f"{i}.png", f"{i + 1}.png"],
                "text": f"<image> {words[i % 4]} <image> {words[(i + 1) % 4]}"})
    for i in range(6)))
  own = folder / "tiny.gin"
  own.write_text("\n".join(["include 'kosmos/kosmos1_paper.gin'", *TINY, *[
    f"TEXT_PATH = '{folder}/text.jsonl'", f"DOCUMENTS_PATH = '{folder}/pages.jsonl'",
    "pairs/kosmos.Pictures.corpus = @p/data.ImageJsonl()",
    f"p/data.ImageJsonl.path = '{folder}/pairs.jsonl'",
  ]]))
  return str(own)


@pytest.fixture(scope="module")
def workdir(run_stages, tiny, tmp_path_factory):
  path = tmp_path_factory.mktemp("run")
  run_stages(tiny, path)
  return path


OUTPUTS = ("a red star", "two moons", "nothing", "an orange cloud")


@pytest.fixture(scope="module")
def tuning(tiny):
  """A gin file of instruction tuning on the same data."""
  folder = Path(tiny).parent
  rows = [{"instruction": f"Say what number {i} is.", "input": "the sky" if i % 2 else "",
           "output": OUTPUTS[i % 4]} for i in range(8)]
  rows.append({"instruction": "Name it.", "instances": [
    {"input": "a bird", "output": "green bird"}, {"input": "a void", "output": " "}]})
  (folder / "instructions.jsonl").write_text("\n".join(map(json.dumps, rows)))
  own = folder / "tuning.gin"
  own.write_text("\n".join([
    "include 'kosmos/kosmos1_instruct.gin'", Path(tiny).read_text().split("\n", 1)[1],
    f"INSTRUCTIONS_PATH = '{folder}/instructions.jsonl'", "HELD_OUT = 0.4", "STEPS = 2",
    "instructions/kosmos.RowShape.rows = 2", "instructions/kosmos.RowShape.length = 48"]))
  return str(own)


@pytest.fixture(scope="module")
def tuned(run_stages, tuning, workdir, tmp_path_factory):
  path = tmp_path_factory.mktemp("tuned")
  run_stages(tuning, path, f"START = '{workdir}/train'")
  return path


def test_a_run_counts_what_it_left_out_and_trains_the_top_of_the_tower(workdir, tiny):
  summary = json.loads((workdir / "report/summary.json").read_text())
  counts = summary["counts"]
  assert counts["pairs/pairs"]["examples"] == 12 and counts["pairs/pairs"]["unreadable"] == 1
  assert counts["interleaved/documents"]["pictures"] == 12
  system = resolve.load([tiny], []).build()
  assert "pairs/pairs" in system.table(summary)
  ids = ImageTokens(**json.loads((workdir / "rows/ids.json").read_text()))
  docked = training.docked_model(system.model, ids.vocab_size)
  start = nn.unbox(jax.jit(loop.initializer(docked))(jax.random.key(0)))
  after = load_params(workdir / "train/params/3")
  frozen = {"class_embedding", "patch_embedding", "position_embedding", "pre_norm", "trunk"}
  assert frozen | {"top", "post_norm"} == set(after["vision"])
  for name in frozen:
    jax.tree.map(np.testing.assert_array_equal, after["vision"][name], start["vision"][name])
  moved = lambda a, b: not np.array_equal(a, b)  # noqa: E731
  assert any(jax.tree.leaves(jax.tree.map(moved, after["vision"]["top"], start["vision"]["top"])))
  assert moved(after["connector"]["latents"], start["connector"]["latents"])


SOURCES = (
  "text/texts", "pairs/pairs", "interleaved/documents", "instructions/instructions")


def _ids(folder, source):
  """Ids of the records in the rows of a source, or of each row's first one."""
  if not source.startswith("text"):
    return set(ImageRows(folder / source, ImageSettings(28, 28)).ids.tolist())
  rows = instances.open_instances(folder / source)
  return {int(i) for row in range(len(rows)) for i in rows.documents(row)[0]}


@pytest.mark.slow
def test_held_out_records_are_counted_and_none_is_learned_from(tuned):
  summary = json.loads((tuned / "report/summary.json").read_text())
  counts, folder = summary["counts"], tuned / "rows"
  for source, total in zip(SOURCES, (40, 13, 6, 9)):
    assert 0 < counts[source]["held_out"] < total
    learned, held = _ids(folder, source), _ids(folder / "validation", source)
    assert learned and held and not learned & held
  assert len(_ids(folder, "text/texts")) == 40 - counts["text/texts"]["held_out"]
  assert counts["instructions/instructions"]["empty"] == 1
  assert set(summary["validation_loss"]) == set(SOURCES)
  # A picture with two captions is on one side with both.
  names = [{Path(rows.picture(i).path).name for i in range(counts_of["pictures"])}
           for rows, counts_of in (
             (ImageRows(folder / "pairs/pairs", ImageSettings(28, 28)), counts["pairs/pairs"]),
             (ImageRows(folder / "validation/pairs/pairs", ImageSettings(28, 28)),
              counts["validation/pairs/pairs"]))]
  assert not names[0] & names[1] and len(names[0] | names[1]) == 8


@pytest.mark.slow
def test_tuning_starts_from_the_model_and_follows_each_source(tuned, workdir, tuning):
  """The losses before the first step are those of the model it starts from, row by row."""
  system = resolve.load([tuning], ["START = '<START>'"]).build()
  ids = ImageTokens(**json.loads((tuned / "rows/ids.json").read_text()))
  docked = training.docked_model(system.model, ids.vocab_size)
  start = {"params": load_params(workdir / "train/params/3")}
  records = read_records(tuned / "train/metrics.jsonl")
  first = next(r for r in records if r["step"] == 0)
  for source in ("pairs/pairs", "instructions/instructions"):
    rows = ImageRows(tuned / "rows/validation" / source, system.images)
    batch = rows.batch(np.arange(len(rows)))
    given = {}
    if "images" in batch:
      given = dict(vector_index=batch["vector_index"], vectors=docked.apply(
        start, batch["images"], method="row_vectors"))
    logits = docked.apply(start, batch["tokens"], batch["positions"], batch["segment_ids"],
                          method="logits", **given)
    nats = -jax.nn.log_softmax(logits)
    nats = np.take_along_axis(np.asarray(nats), batch["targets"][..., None], -1)[..., 0]
    want = (nats * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    assert first[f"validation/{source}"] == pytest.approx(want, rel=1e-5)
  after, start = load_params(tuned / "train/params/2"), start["params"]
  jax.tree.map(
    np.testing.assert_array_equal, after["vision"]["trunk"], start["vision"]["trunk"])
  assert not np.array_equal(after["text"]["embedding"], start["text"]["embedding"])


@pytest.mark.slow
def test_of_an_instruction_the_output_alone_is_learned(tuned):
  vocabulary = corpora.open_vocabulary(tuned / "rows")
  found = []
  for side in ("rows", "rows/validation"):
    rows = ImageRows(tuned / side / "instructions/instructions", ImageSettings(28, 28))
    batch = rows.batch(np.arange(len(rows)))
    assert (batch["segment_ids"].max(axis=1) == 1).all() and "images" not in batch
    for targets, mask in zip(batch["targets"], batch["loss_mask"]):
      *answer, last = targets[mask == 1].tolist()
      assert last == vocabulary.eos_id
      found.append(vocabulary.decode(answer))
  assert sorted(found) == sorted([*OUTPUTS * 2, "green bird"])


def test_what_is_held_out_depends_on_the_record_alone():
  pictures = [Picture("", f"/data/{i}.png") for i in range(200)]
  moved = [Picture("", f"/mnt/other/{i}.png") for i in range(200)]
  records = [Record(i, (p, text), 0, "") for text in ("one", "two") for i, p in enumerate(pictures)]
  side = lambda held: Side("x", 0.3, held, Counter())  # noqa: E731
  held = [r.parts for r in side(True).of(records, record_key)]
  assert {p.path for p, text in held if text == "one"} == {p.path for p, _ in held}
  assert 30 < len(held) / 2 < 90
  again = side(True).of([Record(7, (p, "three"), 0, "") for p in moved], record_key)
  assert [r.parts[0].where or Path(r.parts[0].path).name for r in again] == [
    Path(p.path).name for p, text in held if text == "one"]
  assert len(list(side(False).of(records, record_key))) == 400 - len(held)


def test_the_text_baseline_needs_no_pictures(tiny):
  bindings = ["kosmos.Pretrain.pairs = []", "kosmos.Pretrain.documents = []",
              "text/models.TransformerConfig.vocab_size = 306"]
  system = resolve.load([tiny], bindings).build()
  assert list(system.shapes) == ["text"]
  whole = resolve.load([tiny], bindings[2:]).build()
  sizes = dict(platform="cpu")
  phase, = system.phases(MeshConfig(data=1).plan(1), Memory(), **sizes)
  all_parts, = whole.phases(MeshConfig(data=1).plan(1), Memory(), **sizes)
  assert phase.num_params == all_parts.num_params and phase.flops < all_parts.flops / 2
  real = MeshConfig(data=2, fsdp=1, tensor=4).build()
  program, = system.programs(real, Memory(), num_target=1)
  with real.activate():
    assert program.lower().out_info[1]["loss_sum"].shape == ()


def test_a_step_is_planned_and_compiled_from_shapes(tiny):
  system = resolve.load([tiny], ["text/models.TransformerConfig.vocab_size = 306"]).build()
  partitioner = MeshConfig(data=2, fsdp=1, tensor=1).plan(2)
  phase, = system.phases(partitioner, Memory(), platform="cpu", num_target=1, num_corpus=1)
  params = jax.eval_shape(loop.initializer(DockedLM(system.model)), jax.random.key(0))
  assert phase.num_params == sum(x.size for x in jax.tree.leaves(params))
  assert phase.parts["opt_state"] < 2 * phase.parts["params"]  # none of the frozen layers
  batch = plan.abstract_batch(system.training, system.shapes, system.model.vision, partitioner)
  assert batch["pairs/images"].shape == (2, 2, 1, 28, 28, 3)
  with pytest.raises(Exception, match="2 groups do not split over the mesh's 4 data shards"):
    system.phases(MeshConfig(data=4).plan(4), Memory(), platform="cpu")
  real = MeshConfig(data=2, fsdp=1, tensor=4).build()
  program, = system.programs(real, Memory(), num_target=1)
  assert program.flops == pytest.approx(phase.flops / 3)
  with real.activate():
    state, sums = program.lower().out_info
  sizes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]  # noqa: E731
  assert sizes(state.params) == sizes(nn.unbox(params)) and sums["loss_sum"].shape == ()


def test_the_published_model_has_its_size():
  system = resolve.load(["kosmos/kosmos1_paper.gin"], [
    f"{name} = '/data/none'" for name in (
      "TEXT_PATH", "PAIRS_PATH", "DOCUMENTS_PATH", "VOCABULARY_PATH")]).build()
  phase, = system.phases(MeshConfig(fsdp=8).plan(8), Memory(), platform="tpu")
  assert 1.6e9 < phase.num_params < 1.7e9  # "1.6B"
  assert 1.0e16 < phase.flops / phase.steps < 1.4e16
  shapes = system.training.shapes
  per_step = 128 * sum(shape.rows * shape.length for shape in shapes.values())
  assert 1.2e6 < per_step < 1.6e6  # 1.2M tokens, and what rows of pairs have to spare


@pytest.mark.parametrize("binding, message", [
  ("kosmos.Pretrain.clip = '<CLIP>'", "both clip and start"),
  ("kosmos.Pretrain.instruction_rows = None", "has 1 instructions and instruction_rows=None"),
  ("instructions/kosmos.RowShape.pictures = 1", "instruction_rows has pictures=1"),
  ("instructions/kosmos.RowShape.length = 99", "length=99 and .*max_length is 64"),
])
def test_settings_of_tuning_that_do_not_fit_are_refused(tuning, binding, message):
  with pytest.raises(ValueError, match=message):
    resolve.load([tuning], ["START = '<START>'", binding]).build()


@pytest.mark.parametrize("row, message", [
  ({"instruction": "Do it."}, ":2: field 'output' holds nothing"),
  ({"instruction": 3, "output": "x"}, ":2: field 'instruction' holds a int"),
  ({"instruction": "x", "instances": [7]}, ":2: field 'instances' is not a list of objects"),
  ({"instruction": "x", "input": [], "output": "x"}, ":2: field 'input' holds a list"),
])
def test_instructions_of_another_form_are_refused(tmp_path, row, message):
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(map(json.dumps, [{"instruction": "a", "output": "b"}, row])))
  with pytest.raises(ValueError, match=message):
    list(InstructionJsonl(str(path)).records())


def test_records_that_are_no_instructions_and_sides_without_one_are_refused(tmp_path):
  path = tmp_path / "rows.jsonl"
  (tmp_path / "a.png").touch()
  path.write_text('{"images": ["a.png"], "prompt": "<image>What?", "completion": "b"}')
  source = Instructions("own", ImageJsonl(str(path)))
  form = Form(RowShape(8, 0, 1), None, ImageTokens(), ImageSettings(28, 28), "cut", 5)

  def write():
    source.write(tmp_path / "out", form, Side("own", 0.0, False, Counter()), LeftOut())

  with pytest.raises(ValueError, match="instructions 'own' has 1 pictures; give prompts"):
    write()
  path.write_text('{"text": "no question"}')
  with pytest.raises(ValueError, match="instructions 'own' has no prompt"):
    write()
  for held, share, words in ((True, 0.0, "holds none out of the 3 rec"),
                             (False, 0.999999, "holds all out of the 3 rec")):
    with pytest.raises(ValueError, match=words):
      list(Side("own", share, held, Counter()).of("abc", text_key))


def test_a_model_that_does_not_fit_is_not_started_from(workdir, tiny, tmp_path):
  system = resolve.load([tiny], ["text/models.TransformerConfig.vocab_size = 306"]).build()
  starts.check_folder(workdir / "train", system.model)
  wider = dataclasses.replace(
    system.model, text=dataclasses.replace(system.model.text, mlp_width=48))
  with pytest.raises(ValueError, match=r"mlp/down/kernel is \(2, 32, 16\) in kosmos.Pretrain.st"):
    starts.check_folder(workdir / "train", wider)
  with pytest.raises(ValueError, match="of the family 'kosmos-2'; give a CLIP"):
    starts.check_clip(workdir / "train", system.model.vision)


@pytest.mark.parametrize("binding, message", [
  ("data.ImageSettings.height = 56", "28 x 28|56 x 28 and models.VisionConfig.image_size is 28"),
  ("text/kosmos.RowShape.length = 99", "length=99 and .*max_length is 64"),
  ("kosmos.Pretrain.texts = [@kosmos.Texts(), @kosmos.Texts()]", "2 sources of the part 'text'"),
])
def test_settings_that_do_not_fit_are_refused(tiny, binding, message):
  with pytest.raises(ValueError, match=message):
    resolve.load([tiny], [binding]).build()
