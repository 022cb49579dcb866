"""The language tasks of MetaLM (arXiv:2206.06336, section 3, appendix) and how they are asked.

Flavours:
  ask: an instruction with the row's text, in words of this library (but for SST-2, whose words the
    paper shows), for the ten clusters that are finetuned on together. `data.listing_options` lists
    the options behind it, as the first kind of FLAN's templates does.
  gpt3: the formats of GPT-3 (arXiv:2005.14165, appendix G), for the nine tasks in context with 0, 1
    and 4 demonstrations. Of Winograd and Winogrande what follows the blank is scored.

Summaries and sentences from data are measured by ROUGE-L; papers also tell ROUGE-1 and ROUGE-2.
"""

from __future__ import annotations

from collections.abc import Mapping

from lmops_jax.data.tasks.entries import Entry, Wording, one

# The ten clusters. Of the tasks' names "sq" is SQuAD.
CLUSTERS: dict[str, tuple[str, ...]] = {
  "nli": ("anli-r1", "anli-r2", "anli-r3", "cb", "mnli", "qnli", "rte", "snli", "wnli"),
  "sentiment": ("imdb", "sst2", "sentiment140", "yelp"),
  "paraphrase": ("qqp", "mrpc", "paws"),
  "coreference": ("dpr", "winogrande", "wsc"),
  "commonsense": ("hellaswag", "piqa", "copa"),
  "reading": ("drop", "sq", "sq2", "obqa", "boolq"),
  "misc": ("cola", "wic", "trec"),
  "closed-book": ("arce", "nq"),
  "struct-to-text": ("common-gen", "e2e-nlg"),
  "summarisation": ("aeslc", "samsum", "xsum"),
}
# The tasks in context, each with the normalisation of its options (GPT-3, section 2.4).
IN_CONTEXT: dict[str, str] = {
  "storycloze": "token", "hellaswag": "token", "winograd": "token", "winogrande": "token",
  "arce": "answer", "arcc": "answer", "piqa": "token", "boolq": "token", "copa": "token",
}

_NO_YES = ("No", "Yes")
_YES_MAYBE_NO = ("Yes", "It is not certain", "No")
_FOLLOWS = "Premise: {premise}\nHypothesis: {hypothesis}\nIs the hypothesis true if the premise is?"
_PAIR = "First: {sentence1}\nSecond: {sentence2}\n"
_BLANK = Wording("{before}", option="{after}", prompts="{before}{choice}")
_ASKED: dict[str, Wording] = {  # of tasks that papers before it had
  "cb": Wording(_FOLLOWS, ("Yes", "No", "It is not certain")),
  "rte": Wording(
    _PAIR + "Is what stands second true if what stands first is?", ("Yes", "No")),
  "imdb": Wording("Is this film review positive or negative?\n{text}", ("negative", "positive")),
  "sst2": Wording(
    "Would the following phrase be considered positive or negative?\n{text}",
    ("negative", "positive")),
  "yelp": Wording(
    "Is this review of a business positive or negative?\n{text}", ("negative", "positive")),
  "winogrande": Wording("{sentence}\nWho or what belongs in the place of _?"),
  "wsc": Wording("{text}\nDoes \"{span2}\" stand for {span1} here?", _NO_YES),
  "hellaswag": Wording("How does this go on?\n{context}"),
  "piqa": Wording("How is this done?\n{goal}"),
  "copa": Wording("{premise}\nWhat is the {question} of this?"),
  "sq": Wording("{context}\nAnswer from the text: {question}"),
  "sq2": Wording("{context}\nAnswer from the text, or \"none\" if it does not tell: {question}"),
  "obqa": Wording("What completes this, or answers it?\n{question}"),
  "boolq": Wording("{passage}\nAnswer from the text: {question}?", _NO_YES),
  "cola": Wording("Is this sentence good English?\n{text}", _NO_YES),
  "wic": Wording(
    _PAIR + "Does the word \"{word}\" mean the same in both sentences?", _NO_YES),
  "trec": Wording(
    "What does this question ask for?\n{text}",
    ("description", "entity", "abbreviation", "human", "number", "location")),
  "arce": Wording("Answer this question: {question}"),
  "nq": Wording("Answer this question: {question}?"),
}
_GPT3: dict[str, Wording] = {
  "storycloze": Wording("{context}"), "hellaswag": Wording("{told}"), "winograd": _BLANK,
  "winogrande": _BLANK, "piqa": Wording("{goal}"),
  "arce": Wording("Question: {question}\nAnswer:"),
  "arcc": Wording("Question: {question}\nAnswer:"),
  "boolq": Wording("{passage}\nquestion: {question}?\nanswer:", ("no", "yes")),
  "copa": Wording("{stem} {joint}", lower=True),
}


def with_wordings(entries: Mapping[str, Entry]) -> dict[str, Entry]:
  """Named tasks of other papers with the flavours "gpt3" and "ask" behind their own."""
  found = {}
  for name, entry in entries.items():
    more = {"gpt3": _GPT3.get(name), "ask": _ASKED.get(name)}
    flavours = {flavour: {0: wording} for flavour, wording in more.items() if wording is not None}
    found[name] = entry._replace(flavours={**entry.flavours, **flavours})
  return found


def _inference(dataset: str, rows: str = "validation", train: str = "train", **more) -> Entry:
  """A task of natural language inference with three labels."""
  return Entry(
    dataset, train, rows, {"ask": one(_FOLLOWS, *_YES_MAYBE_NO)},
    {"premise": "premise|context", "hypothesis": "hypothesis"},
    classes=("entailment/e", "neutral/n", "contradiction/c"), **more)


def _multi_nli(rows: str) -> Entry:
  """MultiNLI; "paper" is what MetaLM was finetuned with on this task alone."""
  entry = _inference("glue/mnli", rows)
  of_paper = one(
    "Premise: {premise}\nHypothesis: {hypothesis}\nLabel:", "entailment", "neutral",
    "contradiction")
  return entry._replace(flavours={"paper": of_paper, **entry.flavours})


def _same(dataset: str, question: str, fields: tuple[str, str], classes=()) -> Entry:
  """Whether two texts say the same."""
  return Entry(
    dataset, "train", "validation", {"ask": one(_PAIR + question, *_NO_YES)},
    dict(zip(("sentence1", "sentence2"), fields)), classes=classes)


def _written(
  dataset: str, prompt: str, field: str, label: str, reader: str = "as_is"
) -> Entry:
  """A text to be written from the field `{given}`."""
  return Entry(
    dataset, "train", "validation", {"ask": one(prompt)}, {"given": field}, label, reader=reader,
    metric="rouge_l")


ENTRIES: dict[str, Entry] = {
  **{f"anli-r{n}": _inference(f"anli/r{n}") for n in (1, 2, 3)},
  "mnli": _multi_nli("validation_matched"),
  "mnli-mm": _multi_nli("validation_mismatched"),
  "snli": _inference("snli", reader="labelled"),
  "qnli": Entry(
    "glue/qnli", "train", "validation", {"ask": one(
      "Question: {question}\nSentence: {sentence}\nDoes the sentence answer the question?",
      "Yes", "No")},
    {"question": "question", "sentence": "sentence"}, classes=("entailment", "not_entailment"),
  ),
  "wnli": Entry(
    "glue/wnli", "train", "validation",
    {"ask": one(_PAIR + "Is what stands second true if what stands first is?", *_NO_YES)},
    {"sentence1": "sentence1", "sentence2": "sentence2"}, classes=("not_entailment", "entailment"),
  ),
  "sentiment140": Entry(
    "sentiment140", "train", "test",
    {"ask": one("Is the mood of this message positive or negative?\n{text}", "negative",
                "positive")},
    {"text": "text"}, reader="polarity",
  ),
  "qqp": _same(
    "glue/qqp", "Do the two questions ask the same?", ("question1", "question2"),
    ("not_duplicate", "duplicate")),
  "mrpc": _same(
    "glue/mrpc", "Do the two sentences say the same?", ("sentence1", "sentence2"),
    ("not_equivalent", "equivalent")),
  "paws": _same(
    "paws_wiki/labeled_final_raw", "Do the two sentences say the same?",
    ("sentence1", "sentence2")),
  "dpr": Entry(
    "definite_pronoun_resolution", "train", "test",
    {"ask": one("{sentence}\nWho or what is meant by \"{pronoun}\"?")},
    {"sentence": "sentence", "pronoun": "pronoun"}, choices="candidates", num_choices=2,
  ),
  "drop": Entry(
    "drop", "train", "dev", {"ask": one("{passage}\nAnswer from the text: {question}")},
    {"passage": "passage", "question": "question"}, "answers", reader="drop", metric="f1",
  ),
  "common-gen": _written(
    "gem/common_gen", "Write a sentence with these words: {given}", "concepts",
    "references|target", "concepts"),
  "e2e-nlg": _written(
    "gem/e2e_nlg", "Tell this in words: {given}", "meaning_representation", "references|target"),
  "aeslc": _written(
    "aeslc", "What is the subject of this mail?\n{given}", "email_body", "subject_line"),
  "samsum": _written("samsum", "Sum this conversation up:\n{given}", "dialogue", "summary"),
  "xsum": _written("xsum", "Sum this article up in a sentence:\n{given}", "document", "summary"),
}
