"""A classification task without any download: the kind of an excerpt of the embedded corpus.

The kinds are those of `data.installed_text`: code, documentation, headers, licences, and so on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lmops_jax.data.documents import Document
from lmops_jax.data.tasks.registry import worded
from lmops_jax.data.tasks.task import Example, Task
from lmops_jax.host.hashing import order_key

NAME = "installed_kind"
WORDS = {  # for kinds whose name is not the word: short words, one token in most vocabularies
  "docstring": "text", "header": "C", "licence": "license", "markup": "tag", "table": "data",
}
TEMPLATES = {  # by flavour
  "fs": {0: "Text: {text} Type:"},
  "plain": {0: "Text: {text}\nType:"},
}


def kind_task(
  documents: Iterable[Document],
  *,
  num_kinds: int = 5,
  num_rows: int = 500,
  num_train: int = 500,
  seed: int = 0,
  num_chars: int = 240,
  template: str = TEMPLATES["fs"][0],
  words: dict[str, str] | None = None,
) -> Task:
  """Excerpts of documents, to be classified by the document's kind.

  Args:
    documents: documents with kinds; one excerpt of each is taken.
    num_kinds: how many of the most frequent kinds are kept (by documents, then by name), >= 2.
    num_rows, num_train: the most rows to evaluate on and to draw demonstrations from; each kind has
      equally many, the kinds in turn. Both are fewer if the rarest kind has too few.
    seed: decides which documents these are, by (seed, id).
    num_chars: the most characters of an excerpt; it starts at a line a third into the document, has
      white space collapsed to blanks, and ends at a blank.
    template: a text with `{text}`; the word follows after a blank.
    words: the words of kinds that are not said by their own name; None: `WORDS`.

  Raises:
    ValueError: for fewer than two kinds, or if a kind has no row to evaluate on.
  """
  if num_kinds < 2 or min(num_rows, num_chars) < 1 or num_train < 0:
    raise ValueError(
      f"num_kinds={num_kinds} must be at least 2, num_rows={num_rows} and num_chars={num_chars} at "
      f"least 1, num_train={num_train} at least 0."
    )
  held = list(documents)
  counts = Counter(document.kind for document in held)
  kinds = sorted(sorted(counts, key=lambda kind: (-counts[kind], kind))[:num_kinds])
  if len(kinds) < 2:
    raise ValueError(
      f"the documents have {len(kinds)} kinds ({', '.join(kinds) or 'no documents'}); a task needs "
      "two."
    )
  names = tuple((WORDS if words is None else words).get(kind, kind) for kind in kinds)
  held.sort(key=lambda document: (order_key(document.id, seed), document.id))
  each = {kind: [] for kind in kinds}
  wanted = -(-num_rows // len(kinds)) + -(-num_train // len(kinds))
  seen = set()
  for document in held:
    if document.kind not in each or len(each[document.kind]) == wanted:
      continue
    text = excerpt(document.text, num_chars)
    if text and text not in seen:  # licences repeat each other
      seen.add(text)
      label = kinds.index(document.kind)
      prompt = template.format(text=text)
      options = tuple(f" {name}" for name in names)
      each[document.kind].append(Example(document.id, prompt, options, label))
  num_each = min(map(len, each.values()))
  if num_each < wanted:  # both parts shrink alike
    share = num_each * len(kinds) / (num_rows + num_train)
    num_rows, num_train = int(share * num_rows), int(share * num_train)
  if num_rows < len(kinds):
    raise ValueError(
      f"there are {num_each} different excerpts of the rarest of the kinds {', '.join(kinds)}, too "
      "few for rows of each; give more documents or ask for fewer kinds."
    )
  in_turn = [each[kind][i] for i in range(num_each) for kind in kinds]
  return Task(
    NAME, tuple(in_turn[:num_rows]), tuple(in_turn[-num_train:] if num_train else ()), names,
    template.format(text="N/A"),
  )


def excerpt(text: str, num_chars: int) -> str:
  """At most `num_chars` characters in one line, from a third into the text on, up to a blank."""
  start = text.find("\n", len(text) // 3) + 1 if len(text) > num_chars else 0
  if len(text) - start < num_chars:
    start = 0
  words = text[start : start + 20 * num_chars].split()
  line = " ".join(words)
  if len(line) <= num_chars:
    return line
  cut = line[: num_chars + 1]
  return cut[: cut.rindex(" ")] if " " in cut.strip() else line[:num_chars]


def installed_kind(
  *, flavour: str | None = None, template: int = 0, limit: int | None = None
) -> Task:
  """`kind_task` of this interpreter's site-packages; reads the whole corpus, which took 9 to 26 s.

  Raises:
    ValueError: if there is no such flavour or template.
  """
  from lmops_jax.data.installed_text import InstalledText

  text = worded(NAME, TEMPLATES, flavour, template)
  return kind_task(
    InstalledText().documents(), num_rows=500 if limit is None else limit, template=text)
