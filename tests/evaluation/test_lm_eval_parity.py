"""The harness's own Hugging Face model and ours answer the same requests alike."""

import copy
import random

import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
pytest.importorskip("lm_eval", reason="needs pip install -e '.[lm-eval]'")
huggingface = pytest.importorskip("lm_eval.models.huggingface")
torch.set_num_threads(1)  # more of them get into the way of XLA's

from lm_eval.api.instance import Instance  # noqa: E402
from tokenizers import processors  # noqa: E402

from lmops_jax.evaluation.lm_eval_adapter import LmopsLM  # noqa: E402
from tests.text import tiny_tokenizers  # noqa: E402

LENGTH = 48
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}\n"
  "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [{"role": "user", "content": "the quick brown fox?"}, {"role": "assistant", "content": "A:"}]
WORDS = "the quick brown fox jumps Hello world! naïve 漢字 🙂 def x; : \\".split()
WHITE = (" ", " ", " ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u2003", "\r\n", "\x1f", "")


class Pair:
  """One tiny model behind both, and what their tokenizer puts in front of a text."""

  def __init__(self, folder, kind):
    front = 0 if kind == "bytes without BOS" else 1
    tokenizer = tiny_tokenizers.llama() if kind == "blanks" else tiny_tokenizers.byte_level(
      ["<unk>", "<s>", "</s>"])
    if front:
      tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"eos_token": "</s>", "pad_token": "</s>", **({"bos_token": "<s>"} if front else {})}
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    peer.chat_template = TEMPLATE
    peer.save_pretrained(folder)
    common = dict(vocab_size=len(peer), eos_token_id=2, bos_token_id=1, initializer_range=0.25)
    torch.manual_seed(0)
    if front:
      model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=LENGTH, pad_token_id=2, **common))
    else:  # learned positions: one beyond the last would be an error
      model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH, **common))
    model.float().eval().save_pretrained(folder)
    self.front = front
    # Its cache mixes up continuations of several lengths that make the same text.
    self.theirs = huggingface.HFLM(
      str(folder), device="cpu", dtype="float32", batch_size=4, logits_cache=False)
    self.ours = LmopsLM(str(folder))

  def size(self, text):
    return len(self.ours._encoder.encode(text))

  def grown(self, length):
    """A context of so many tokens, what stands in front of it included."""
    return "%" * (length - self.size("%") + 1)


@pytest.fixture(scope="module", params=[
  "bytes", "bytes without BOS", pytest.param("blanks", marks=pytest.mark.slow)])
def pair(request, tmp_path_factory):
  return Pair(tmp_path_factory.mktemp("model"), request.param)


def _requests(kind, arguments):
  return [Instance(request_type=kind, doc={}, arguments=args, idx=i)
          for i, args in enumerate(copy.deepcopy(arguments))]


def _both(pair, kind, arguments):
  return [getattr(lm, kind)(_requests(kind, arguments), disable_tqdm=True)
          for lm in (pair.theirs, pair.ours)]


def _texts(rng, number):
  return "".join(rng.choice(WORDS) + rng.choice(WHITE) for _ in range(number))


def _same_likelihoods(pair, arguments):
  for args, (want, greedy), (got, best) in zip(
    arguments, *_both(pair, "loglikelihood", arguments), strict=True
  ):
    assert got == pytest.approx(want, abs=2e-3) and best == greedy, args


def test_likelihoods_with_white_space_and_merges(pair):
  rng = random.Random(0)
  contexts = ["", "x", "the qui", "the quick ", "the\n", "the\n\n", "<s>the", "  the", "\u2003x\t"]
  contexts += [_texts(rng, rng.choice((1, 2, 5, 9))) for _ in range(12)]
  endings = ["ck brown", " brown", "brown", "\nfox", " fox\n\n", "x"]
  arguments = [("x", "</s>"), *((c, rng.choice(endings)) for c in contexts for _ in range(3))]
  # Where a merge leaves nothing of the continuation, theirs stops or gives 0.
  left = [not context or bool(pair.theirs._encode_pair(context, ending)[1])
          for context, ending in arguments]
  _same_likelihoods(pair, [args for args, some in zip(arguments, left) if some])
  arguments = [("\n ", " the fox"), ("", "<s>the fox")]
  if pair.front:  # else theirs has no context left
    _same_likelihoods(pair, arguments)
  # Without context, BOS (or the end token) is the context, and once.
  bos = pair.ours._tokenizer.decode([pair.ours.prefix_token_id], False)
  alone, with_bos = pair.ours.loglikelihood(
    _requests("loglikelihood", [("", "the fox"), ("", bos + "the fox")]), disable_tqdm=True)
  assert alone == pytest.approx(with_bos)


def test_likelihoods_of_what_fills_the_model(pair):
  arguments = []
  for ending in ("%", "%%%%%", "\nx"):
    for beyond in range(-2, 4):  # one more than the positions fits
      context = pair.grown(LENGTH + beyond)
      arguments.append((context[: -len(ending)], ending))
  arguments += [("%", "%" * LENGTH), (pair.grown(60), "%")]
  _same_likelihoods(pair, arguments)


def test_rolling_likelihoods(pair):
  rng = random.Random(1)
  texts = ["x", "", *(_texts(rng, n) for n in (2, 9, 20, 40))]
  texts += [pair.grown(LENGTH + pair.front + n) for n in (-1, 0, 1)]
  # By default theirs scores a second BOS behind the first.
  pair.theirs.add_bos_token = False
  want, got = _both(pair, "loglikelihood_rolling", [(text,) for text in texts])
  pair.theirs.add_bos_token = None
  assert got == pytest.approx(want, abs=2e-3)
  bos = pair.ours._tokenizer.decode([pair.ours.prefix_token_id], False)
  again = pair.ours.loglikelihood_rolling(
    _requests("loglikelihood_rolling", [(bos + "the fox",), ("the fox",)]), disable_tqdm=True)
  assert again[0] == pytest.approx(again[1])


def test_generated_texts(pair):
  contexts = ["the quick", "Hello world! def", "<s>the" if pair.front else "x; ", "漢字\n"]
  kinds = [
    {"max_gen_toks": 12, "until": ["\n"]}, {"max_new_tokens": 3}, {"max_tokens": 4, "until": []},
    {"max_completion_tokens": 5}, {"max_gen_toks": 9, "max_new_tokens": 2, "until": "e"},
    {"max_gen_toks": 12, "until": ["e", "the", "o"]}, {"max_gen_toks": 6, "until": ["</s>"]},
    {"max_gen_toks": 6, "do_sample": False, "temperature": 0.7, "top_p": 0.9},
    {"max_gen_toks": 6, "temperature": 0.0, "repetition_penalty": 1.5},
  ]
  arguments = [(context, options) for options in kinds for context in contexts]
  long = pair.grown(LENGTH - 8)
  arguments.append((long, {"max_gen_toks": 8}))
  if not pair.front:  # else theirs loses the BOS
    arguments.append((long + " fox jumps", {"max_gen_toks": 8}))
  pair.theirs.batch_size_per_gpu = 1  # of a batch theirs looks for a BOS in the first text only
  want, got = _both(pair, "generate_until", arguments)
  pair.theirs.batch_size_per_gpu = 4
  for args, theirs, ours in zip(arguments, want, got, strict=True):
    assert ours == theirs, args
  assert len(set(want)) > len(want) // 2  # else nothing could differ


def test_conversations(pair):
  for messages, begins in ((CHAT[:1], True), (CHAT, False)):
    ours, theirs = (
      lm.apply_chat_template(messages, add_generation_prompt=begins)
      for lm in (pair.ours, pair.theirs))
    assert ours == theirs
    _same_likelihoods(pair, [(ours, " the fox"), (ours, "\nx")])
    want, got = _both(pair, "generate_until", [(ours, {"max_gen_toks": 6, "until": ["\n"]})])
    assert want == got
  assert ours.endswith("A:") and pair.ours.chat_template(True) == pair.theirs.chat_template(True)


def test_identifiers(pair):
  for name in ("max_length", "eot_token_id", "prefix_token_id", "tokenizer_name"):
    assert getattr(pair.ours, name) == getattr(pair.theirs, name), name
