"""ELECTRA's discriminators, and bodies of encoders without a head, equal PyTorch and go back."""

import dataclasses
import json

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from safetensors.numpy import load_file, save_file  # noqa: E402

from lmops_jax.pretrained import exporting  # noqa: E402
from lmops_jax.pretrained import model as model_lib  # noqa: E402
from tests.pretrained.tiny_models import randomise  # noqa: E402

_SIZES = dict(
  vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
  max_position_embeddings=40,
)
PEERS = {  # class and what its configuration has beside the sizes
  "discriminator": ("ElectraForPreTraining", {"embedding_size": 10}),
  "discriminator, wide": ("ElectraForPreTraining", {"embedding_size": 24, "hidden_act": "relu"}),
  "electra": ("ElectraModel", {"embedding_size": 10}),
  "roberta": ("RobertaModel", {"type_vocab_size": 1}),
  "roberta, typed": ("RobertaModel", {"type_vocab_size": 2}),
}
LENGTHS = (9, 5, 1)


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
  """`name -> (model of transformers, its folder)`."""
  made = {}

  def peer(name):
    if name not in made:
      kind, fields = PEERS[name]
      made_of = getattr(transformers, kind)
      torch.manual_seed(0)
      model = randomise(made_of(made_of.config_class(**_SIZES, pad_token_id=1, **fields)))
      folder = tmp_path_factory.mktemp("peer")
      model.save_pretrained(folder)
      made[name] = model, folder
    return made[name]

  return peer


def _rows():
  """Rows of three lengths, padded with the id that RoBERTa's positions go by."""
  tokens = np.random.default_rng(0).integers(3, 61, (3, 9)).astype(np.int32)
  mask = (np.arange(9) < np.array(LENGTHS)[:, None]).astype(np.int32)
  return np.where(mask, tokens, 1), mask


def _theirs(model, tokens, mask, **options):
  with torch.no_grad():
    return model(
      torch.tensor(tokens.astype(np.int64)), attention_mask=torch.tensor(mask.astype(np.int64)),
      **options)


@pytest.mark.parametrize("name", PEERS)
def test_states_of_ragged_rows_equal_torch(peers, name):
  peer, folder = peers(name)
  source = model_lib.load(folder)
  params, (tokens, mask) = source.params(), _rows()
  want = _theirs(peer, tokens, mask, output_hidden_states=True).hidden_states
  got = jax.jit(
    lambda p: source.model.apply({"params": p}, tokens, None, mask, method="all_hidden")
  )(params)
  for layer, states in enumerate(want):
    if layer or not source.config.narrow_embeddings:  # before the product that leads to D
      assert states.shape[-1] == source.config.width
    for row, length in enumerate(LENGTHS):
      np.testing.assert_allclose(
        got[layer][row, :length], states[row, :length].numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in PEERS if name.startswith("discriminator")])
def test_a_discriminators_logits_and_gradients_equal_torch(peers, name):
  peer, folder = peers(name)
  source = model_lib.load(folder)
  (tokens, mask), params = _rows(), source.params()
  labels = np.random.default_rng(1).integers(0, 2, tokens.shape)
  peer.zero_grad()
  theirs = peer(
    torch.tensor(tokens.astype(np.int64)), attention_mask=torch.tensor(mask.astype(np.int64)),
    labels=torch.tensor(labels))
  theirs.loss.backward()

  def loss(params):
    hidden = source.model.apply({"params": params}, tokens, None, mask)
    logits = source.model.apply({"params": params}, hidden, method="detected")
    losses = jax.nn.softplus(logits) - labels * logits
    return (losses * mask).sum() / mask.sum(), logits

  (got, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  assert logits.dtype == np.float32
  np.testing.assert_allclose(
    np.where(mask, logits, 0), np.where(mask, theirs.logits.detach(), 0), rtol=0, atol=1e-5)
  assert float(got) == pytest.approx(float(theirs.loss.detach()), rel=1e-5)
  gradients = {
    name: p.grad.numpy() for name, p in peer.named_parameters() if p.grad is not None}
  checked = set()
  family = exporting.families.by_name("electra")
  for tensor, _, _, make in exporting.tensors(family, source.config, grads, np.float32):
    scale = max(1e-3, np.abs(gradients[tensor]).max())
    np.testing.assert_allclose(make() / scale, gradients[tensor] / scale, atol=1e-4)
    checked.add(tensor)
  assert checked == gradients.keys()


@pytest.mark.parametrize("name", ["discriminator", "electra", "roberta"])
@pytest.mark.parametrize("published", [True, False])
def test_export_gives_the_same_bits_and_class(peers, name, published, tmp_path):
  peer, folder = peers(name)
  source = model_lib.load(folder)
  if not published:
    source = dataclasses.replace(source, original={})
  exporting.export(tmp_path / "out", source)
  before, after = load_file(folder / "model.safetensors"), load_file(
    tmp_path / "out" / "model.safetensors")
  prefix = {"electra": "electra.", "roberta": "roberta."}.get(name, "")
  assert {prefix + tensor for tensor in before} == after.keys()
  for tensor, numbers in before.items():
    np.testing.assert_array_equal(numbers, after[prefix + tensor])
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  if published or "lectra" in PEERS[name][0]:
    assert written["architectures"] == [PEERS[name][0]]
  again = type(peer).from_pretrained(tmp_path / "out", attn_implementation="eager")
  tokens, mask = _rows()
  want, got = (_theirs(model, tokens, mask)[0].numpy() for model in (peer, again))
  np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-6)


def test_without_architectures_the_stored_head_counts(peers, tmp_path):
  for name, detector in (("discriminator", True), ("electra", False)):
    folder = tmp_path / name
    folder.mkdir()
    fields = json.loads((peers(name)[1] / "config.json").read_text())
    del fields["architectures"]
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "model.safetensors").write_bytes((peers(name)[1] / "model.safetensors").read_bytes())
    found = model_lib.load(folder)
    assert found.config == model_lib.load(peers(name)[1]).config
    assert found.config.detector == detector and not found.config.head_transform
    exporting.export(tmp_path / f"{name}_out", found)
    written = json.loads((tmp_path / f"{name}_out" / "config.json").read_text())
    assert written["architectures"] == [PEERS[name][0]]


_PROJECT = "electra.embeddings_project.weight"
_OUT = "discriminator_predictions.dense_prediction.weight"


@pytest.mark.parametrize("change,sentence", [
  (lambda x: x.pop(_OUT), f"it lacks {_OUT} [1, 24]. Give it the configuration"),
  (lambda x: x.pop("electra.embeddings_project.bias"),
   "it lacks electra.embeddings_project.bias [24]. Give"),
  (lambda x: x.update({_PROJECT: np.ascontiguousarray(x[_PROJECT].T)}),
   f"{_PROJECT} is [10, 24] and should be [24, 10]. Give"),
  (lambda x: x.update({"generator_lm_head.bias": np.zeros(61, np.float32)}),
   "the model has no place for its generator_lm_head.bias [61]. Give"),
])
def test_a_missing_an_extra_and_a_transposed_tensor_are_named(peers, tmp_path, change, sentence):
  _, folder = peers("discriminator")
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError) as error:
    model_lib.load(tmp_path).params()
  assert sentence in str(error.value), error.value
