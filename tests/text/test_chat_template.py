"""Rendering of chat templates, against transformers where it is installed."""

import datetime
import json

import pytest

from lmops_jax.text import chat_template, template_meter
from lmops_jax.text.tokenizer import load_tokenizer
from tests.text import tiny_tokenizers as tiny

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
  "{% set ns = namespace(last=messages | length - 1) %}{% for m in messages[::-1] %}"
  "{% if m.role == 'user' and not m.content.startswith('<') %}{% set ns.last = loop.index0 %}"
  "{% endif %}{% endfor %}{{ ns.last }}{% for m in messages[1:] if m.role != 'system' %}"
  "{{- '<|' ~ m['role'] ~ '>\\n' + m.content.split('\"')[0].strip() }}{{ loop.cycle('a', 'b') }}"
  "{{ loop.length }}{{ loop.revindex0 }}{{ loop.last }}{{ loop.previtem is defined }}{% else %}no"
  "{% endfor %}",
  "{% macro show(a, b='-') %}{{ a }}{{ b * 3 }}{{ caller() if caller }}{{ kwargs }}{% endmacro %}"
  "{{ show(1) }}{{ show(2, b='+', c=3) }}"
  "{% call show(4) %}{% if 1 < 2 < 3 %}in{% endif %}{% endcall %}"
  "{% set text %}a {{ 'b' }}{% endset %}{{ text | upper }}{% filter title %}x y{% endfilter %}"
  "{% for i in [[1, [2, (3, 4)]]] recursive %}{% if i is iterable %}{{ loop(i) }}{% else %}{{ i }}"
  "{% endif %}{% endfor %}{% block b %}{{ 7 // 2 }}{{ 2 ** 3 % 5 }}{% endblock %}{{ self.b() }}",
  "{{ messages | map(attribute='role') | unique | join(', ') }}{{ [3, 1] + [2] | sort }}"
  "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'a\nb' | indent(4) }}"
  "{{ '%s=%05.1f' % ('a', 2.5) }}{{ '{:>5}|{x}'.format(1, x='y') }}{{ 'x' | center(9) }}"
  "{% for k, v in {'b': 1, 'a': [none, true]} | dictsort %}{{ k }}{{ v }}{% endfor %}"
  "{{ range(5) | batch(2) | list }}{{ [1, 2, 3] | slice(2) | list }}{{ 'abc' | replace('b', '<') }}"
  "{{ 'b' in {'b': 1} }}{{ 'bc' in 'abc' }}{{ '1.5' | float | round | int }}{{ [1, 2] | sum }}"
  "{{ cycler(1, 2).next() }}{{ nothing }}{{ nothing | default('d') }}{{ 'a b' | urlencode }}",
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
  with pytest.raises(ValueError, match=r"chat_template=5 should be a text or a"):
    template("g", 5)
  with pytest.raises(ValueError, match=r"chat_template\[0\]=\"x\" should be an object"):
    template("h", ["x"])


def _loop(body, times=40, start="1"):
  return (f"{{% set ns = namespace(x={start}) %}}{{% for i in range({times}) %}}"
          f"{{% set ns.x = {body} %}}{{% endfor %}}{{{{ ns.x }}}}")


HUGE = [
  "{{ '%0999999999d' | format(1) }}", "{{ '%0999999999d' % 1 }}", "{{ '%*d' % (999999999, 1) }}",
  "{{ '%.999999999f' % 1.5 }}", "{{ '%(a)999999999s' % {'a': 1} }}",
  "{{ ('%(a)s' * 9999) % {'a': 'a' * 9999} }}",
  "{{ '{:>999999999}'.format(1) }}", "{{ '{:>{}}'.format(1, 999999999) }}",
  "{{ '{:>{}}'.format(1, '999999999') }}", "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
  "{{ ('{0}' * 9999).format('a' * 9999) }}", "{{ ('{:>999999999}' | safe).format(1) }}",
  "{{ 'a' * 10**9 }}", "{{ 10**9 * 'a' }}", "{{ [0] * 10**9 }}", "{{ ('a' | safe) * 10**9 }}",
  "{{ 'a' | center(10**9) }}", "{{ 'a'.center(10**9) }}", "{{ 'a'.encode().zfill(10**9) }}",
  "{{ '\t'.expandtabs(10**9) }}", "{{ ('\n' * 99999) | indent(99999) }}",
  "{{ 1.5 | round(10**9) }}",
  "{{ [1] | batch(10**9, 'x') | list }}", "{{ [1] | slice(10**9) | list }}",
  "{{ ['a'] | map('center', 10**9) | list }}", "{{ (1).to_bytes(10**9, 'big') }}",
  "{{ messages | tojson(indent=10**9) }}", "{{ range(99999) | join('x' * 999999) }}",
  "{{ ('x' * 999999).join(range(99) | map('string')) }}",
  "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
  "{{ ('a' * 9999) | replace('', 'b' * 9999) }}", "{{ ('a' * 99999).translate({97: 'b' * 9999}) }}",
  "{{ ([[0] * 999] * 999) | sum(start=[]) }}", "{% filter center(10**9) %}a{% endfilter %}",
  "{% set x = 'a' * 9999999 %}{{ x ~ x }}", "{% set x | center(10**9) %}a{% endset %}",
  _loop("ns.x ~ ns.x"), _loop("ns.x + ns.x", start="'ab'"),
  _loop("ns.x + ns.x", start="['ab' * 9999]"),
  _loop("[ns.x, ns.x]"), _loop("{'a': ns.x, 'b': ns.x}"), _loop("dict(a=ns.x, b=ns.x)"),
  _loop("(ns.x, ns.x)"), _loop("{'a': ns.x, 'b': ns.x}.items()"),
]


@pytest.mark.parametrize("template", HUGE)
def test_what_would_be_huge_is_refused_before_it_is_made(template):
  with pytest.raises(ValueError, match="chat template of MODEL makes a value of more than 16,777"):
    _render(template)


@pytest.mark.parametrize("template,reason", [
  ("{{ 10 ** (10 ** 8) }}", "number of more than 65,536 bits"),
  (_loop("ns.x * ns.x", start="3"), "number of more than 65,536 bits"),
  (_loop("[ns.x]", 999), "nests lists more than 500 deep"),
  ("{{ [namespace(x='a')] }}", "puts a namespace or a loop into a list"),
  ("{% for i in [1] %}{{ [loop] }}{% endfor %}", "puts a namespace or a loop into a list"),
  ("{{ '{0.x}'.format(namespace(x='a')) }}", "formats attributes"),
  ("{% set x = 'a' * 999999 %}{% for i in range(99) %}{{ x }}{% endfor %}", "writes more than 16"),
  ("{{ lipsum() }}", "'lipsum' is undefined"), ("{{ 'a' | urlize }}", "No filter named 'urlize'"),
  ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
])
def test_further_limits(template, reason):
  with pytest.raises(ValueError, match=f"the chat template of MODEL .*{reason}"):
    _render(template)


@pytest.mark.parametrize("template", [
  "{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}",
  "{% for i in range(99999) if false %}{% endfor %}",
  "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
  "{% for i in range(99) recursive %}{% if loop.depth < 9 %}{{ loop(range(99)) }}{% endif %}"
  "{% endfor %}",
  "{{ range(99999) | list }}", "{{ range(99999) | sum }}", "{{ range(99999) | select('none') }}",
  "{{ range(99999) | map('string') | join }}", "{% set x = 'a' * 999999 %}{{ x | upper }}",
  "{% set x = 'a' * 99999 %}{% for i in range(99) %}{% set y = x[::-1] %}{% endfor %}",
  "{% set x = 'a' * 99999 %}{% for i in range(99) %}{% set y = x.split('b') %}{% endfor %}",
  "{% set x = 'a' * 99999 %}{% for i in range(999) %}{% if x == x %}{% endif %}{% endfor %}",
  "{% set x = 'a' * 99999 %}{% for i in range(999) %}{% if x is in [x] %}{% endif %}{% endfor %}",
  "{% set x = 'a' * 99999 %}{% set y %}{% for i in range(99) %}{{ x }}{% endfor %}{% endset %}",
  "{% set y %}{% for i in range(99) %}" + "a" * 99999 + "{% endfor %}{% endset %}",
  "{% for i in range(999) %}{% set y = [i, [i], {'a': i}] %}{% endfor %}" * 9,
])
def test_steps_are_counted_wherever_they_are_taken(template, monkeypatch):
  monkeypatch.setattr(template_meter, "MAX_STEPS", 90_000)
  with pytest.raises(ValueError, match="the chat template of MODEL takes more than 90,000 steps"):
    _render(template)


def test_a_long_conversation_is_far_from_the_limits(monkeypatch):
  monkeypatch.setattr(template_meter, "MAX_STEPS", template_meter.MAX_STEPS // 10)
  turns = [{"role": "user", "content": "word " * 200}] * 1_000
  for template in TEMPLATES:
    assert len(_render(template, turns, bos_token="<s>")) > 10
  assert len(_render(TEMPLATES[0], [{"role": "user", "content": "word " * 200_000}])) > 10**6


def test_what_a_template_says_is_cut_to_a_sentence():
  with pytest.raises(ValueError, match="conversation: x{500}\\.$"):
    _render("{{ raise_exception('x' * 999999) }}")
