"""Rendering of chat templates, against transformers where it is installed."""

import datetime
import json

import pytest

from lmops_jax.pretrained import chat_template
from lmops_jax.pretrained.tokenizer import load_tokenizer
from tests.pretrained import tiny_tokenizers as tiny

MESSAGES = [
  {"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": "漢字? \"x\""},
  {"role": "assistant", "content": "yes"},
]
TEMPLATES = [
  "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
  "{{ bos_token }}\n  {% for m in messages %}\n    {% if loop.index == 2 %}\n    {% continue %}\n"
  "    {% endif %}\n{{ m.content | tojson }}{{ m | tojson(indent=2) }}\n  {% endfor %}\n",
  "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
  "{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}{{ ns.n }}{{ eos_token }}",
  "{% if tools is none and documents is none %}none{% endif %}{{ messages | length }}"
  "{% if pad_token is defined %}{{ pad_token }}{% endif %}{{ dict(a=1) | tojson }}",
]


def _folder(tmp_path, template, **files):
  return tiny.write(tmp_path, {
    **tiny.vocab_and_merges(tiny.byte_level(["<|endoftext|>"])),
    "config.json": {"model_type": "gpt2"}, "tokenizer_config.json": {
      "tokenizer_class": "GPT2Tokenizer", "chat_template": template}, **files})


@pytest.mark.parity
@pytest.mark.parametrize("template", TEMPLATES)
def test_same_text_as_transformers(template, tmp_path):
  transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  ours = load_tokenizer(_folder(tmp_path, template))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for prompt in (True, False):
    assert ours.apply_chat_template(MESSAGES, prompt) == theirs.apply_chat_template(
      MESSAGES, tokenize=False, add_generation_prompt=prompt)


OPEN = [
  "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}",
  "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}",
  "{% for m in messages %}{{ m.content | trim + ' ' + eos_token }}{% endfor %}",
]


@pytest.mark.parity
@pytest.mark.parametrize("template", OPEN)
def test_the_last_message_is_left_open_as_by_transformers(template, tmp_path):
  transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
  ours = load_tokenizer(_folder(tmp_path, template))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for content in ("yes", "yes, ", " The answer is:\n"):
    messages = [*MESSAGES, {"role": "user", "content": content}, MESSAGES[0] | {"content": content}]
    want = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert ours.apply_chat_template(messages, False, True) == want


def test_what_cannot_be_left_open(tmp_path):
  tokenizer = load_tokenizer(_folder(tmp_path, "{{ messages[0].content }}"))
  assert tokenizer.apply_chat_template(MESSAGES[:1], False, True) == MESSAGES[0]["content"]
  with pytest.raises(ValueError, match="leaves out the content of the last message"):
    tokenizer.apply_chat_template(MESSAGES, False, True)
  with pytest.raises(ValueError, match="the last message of the chat has no text to go on with"):
    tokenizer.apply_chat_template([{"role": "assistant"}], False, True)
  with pytest.raises(ValueError, match="add_generation_prompt begins a turn"):
    tokenizer.apply_chat_template(MESSAGES, True, True)


def _render(template, messages=None, **variables):
  messages = MESSAGES if messages is None else messages
  return chat_template.render(template, messages, where="MODEL", **variables)


def test_further_variables_and_the_date():
  assert _render("{{ style }}", style="terse") == "terse"
  assert _render("{{ strftime_now('%Y') }}") == str(datetime.date.today().year)


@pytest.mark.parametrize("template,message", [
  ("{{ raise_exception('roles must alternate.') }}", "refuses this conversation: roles must alter"),
  ("{% for %}", "MODEL is no Jinja template"),
  ("{{ messages[0].content.x.y }}", "refuses this conversation"),
  ("{{ ''.__class__.__mro__ }}", "refuses this conversation: .*unsafe"),
  ("{{ messages.append(1) }}", "refuses this conversation"),
  ("{{ 1 // 0 }}", "refuses this conversation"),
])
def test_templates_that_fail(template, message):
  with pytest.raises(ValueError, match=message):
    _render(template)


@pytest.mark.parametrize("messages,message", [
  ([], "at least one message"), (["hi"], "message 0 of the chat is 'hi'"),
  ([{"content": "x"}], "must be a mapping with a role"),
])
def test_bad_messages(messages, message):
  with pytest.raises(ValueError, match=message):
    _render("x", messages)


def test_where_templates_are_found(tmp_path):
  def template(name, value, **files):
    return load_tokenizer(_folder(tmp_path / name, value, **files)).chat_template

  named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
  assert template("a", named) == "D"
  assert template("b", named[:1]) == "T"
  assert template("c", "config", **{"chat_template.jinja": "file"}) == "file"
  assert template("d", None, **{"chat_template.json": json.dumps({"chat_template": "J"})}) == "J"
  assert template("e", None) is None
  with pytest.raises(ValueError, match="the chat templates a, b and no default"):
    template("f", [{"name": n, "template": n} for n in "ab"])
  with pytest.raises(ValueError, match="holds a int as chat template"):
    template("g", 5)
  with pytest.raises(ValueError, match="chat templates without name"):
    template("h", ["x"])
