"""The named tasks: where their rows are, and how these read, word for word.

Flavours:
  fs: the fairseq script of structured prompting, which the meta-optimizer paper shares.
  hf: the Hugging Face script of structured prompting (used with BLOOM), its blanks kept: "Sentence:
    ... Sentiment: " has one at its end, and the answer one in front.
  paper: as printed in the papers if that differs from fs (CB without the full stop, BoolQ and NQ
    without a second "?", RTE without "Answer:", AGNews with "News: ... Type:"), otherwise as fs.
  plain: on several lines, for models of today.
  gpt3, ask: those of MetaLM's evaluation, see `asked`.

The tasks of sizes and colours are Kosmos-1's cross-modal transfer (arXiv:2302.14045), in its words.
Index 0 of a flavour is its default. Template 1 of COPA does not exist in the scripts either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmops_jax.config.refusals import nearest
from lmops_jax.data.tasks import asked
from lmops_jax.data.tasks.entries import FLAVOURS, Entry, Wording, one, wordings

__all__ = ["ENTRIES", "FLAVOURS", "Entry", "Wording", "entry", "worded", "wording"]

def _papers(prompt: str, *words: str, **more) -> dict[str, dict[int, Wording]]:
  """One wording for both scripts and the paper, which agree."""
  same = one(prompt, *words, **more)
  return {"fs": same, "hf": same, "paper": same}


def _script(prompt: str) -> dict[str, dict[int, Wording]]:
  """A wording that only one script has; the paper agrees with it."""
  return {"fs": one(prompt), "paper": one(prompt)}


_POLARITY = ("negative/neg/bad", "positive/pos/good")
_NEWS = ("World", "Sports", "Business", "Technology")
_CLASSIFY = ("Classify the news articles into the categories of World, Sports, Business, and "
             "Technology. ")
_YES_NO_MAYBE, _NO_YES, _FALSE_TRUE = ("Yes", "No", "Maybe"), ("No", "Yes"), ("False", "True")
_DBPEDIA = ("company", "school", "artist", "athlete", "politics", "transportation", "building",
            "nature", "village", "animal", "plant", "album", "film", "book")
_TREC = ("Description", "Entity", "Expression", "Person", "Number", "Location")
_NEITHER = ("True", "False", "Neither")

_READ_PARAGRAPH = ("Read the following paragraph and determine if the hypothesis is true: "
                   "{premise} Hypothesis: {hypothesis}.")
_CONCLUDE = ("{premise} Based on the paragraph above can we conclude that \"{hypothesis}\"? Yes, "
             "No, or Maybe?")
_INFER = "{premise} Can we infer the following? {hypothesis}."
_TRUE_FALSE_NEITHER = "{premise} Question: {hypothesis}. True, False, or Neither? Answer:"
_DRAW = ("Can we draw the following hypothesis from the context? Context: {premise} Hypothesis: "
         "{hypothesis}. Answer:")
_CB_FS = wordings(
  Wording(_TRUE_FALSE_NEITHER, _NEITHER),
  Wording(_CONCLUDE, _YES_NO_MAYBE, " Answer: {choice}."),
  Wording(_INFER, _YES_NO_MAYBE),
  Wording(_READ_PARAGRAPH, _YES_NO_MAYBE),
  Wording(_DRAW, _YES_NO_MAYBE),
)
_CB_HF = wordings(
  Wording(_READ_PARAGRAPH + " ", _YES_NO_MAYBE, "{choice}"),
  Wording(_CONCLUDE + " Answer: ", _YES_NO_MAYBE),
  Wording(_INFER + " ", _YES_NO_MAYBE, "{choice}"),
  Wording(_TRUE_FALSE_NEITHER + " ", _NEITHER, "{choice}"),
  Wording(_DRAW + " ", _YES_NO_MAYBE, "{choice}"),
)
_BOOLQ_HF = (
  Wording("Passage: {passage} After reading this passage, I have a question: {question}? True or "
          "False?", _FALSE_TRUE),
  Wording("Text: {passage} Question: {question}? Answer:", _NO_YES),
  Wording("{passage} Based on the above text, what's the best answer to this question: "
          "{question}?", _NO_YES),
  Wording("Based on the following passage, {question}? {passage} Please answer yes or no.",
          _NO_YES),
  Wording("Exercise: read the text and answer the question by True or False. Text: {passage} "
          "Question: {question}?", _FALSE_TRUE),
)
_COPA = {
  0: Wording("{stem} {joint}", lower=True),
  2: Wording("{premise} What is the {question}?"),
  3: Wording("{stem} {joint}"),
  4: Wording("{stem} {long_joint}", lower=True),
}
_MULTIRC = wordings(
  Wording("{paragraph} Question: \"{question}\" Response: \"{answer}\" Does the response correctly "
          "answer the question? Answer:", _NO_YES),
  Wording("{paragraph} Question: \"{question}\" Response: \"{answer}\" Based on the paragraph, is "
          "the response to the question is factually correct?", _NO_YES),
  Wording("{paragraph} Based on the paragraph, does the response \"{answer}\" correctly answer the "
          "question \"{question}\"?", _NO_YES),
  Wording("{paragraph} According to the above paragraph, the correct answer to the question "
          "\"{question}\" is \"{answer}\"? Answer:", _NO_YES),
  Wording("{paragraph} Question: \"{question}\" Answer: \"{answer}\" Is this answer to the "
          "question True or False?", _FALSE_TRUE),
)
_BLANK_FS = one("{before}", option="{after}", prompts="{before}{choice}")
_REVIEW = "Review: {text}\nSentiment:"
_PASSAGE = "Passage: {context} Question: {question} Answer:"
_ARC = {
  "fields": {"question": "question.stem|question"}, "label": "answerKey:key",
  "choices": "choices.text|question.choices.text|choices", "num_choices": 4,
}
_RACE = {
  "fields": {"article": "article", "question": "question"}, "label": "answer:key",
  "choices": "options", "reader": "race", "num_choices": 4,
}
_TEXT = {"text": "text|sentence"}
_COLOR = {  # Kosmos-1 and VaLM ask for the 11 basic colours
  "flavours": {"paper": one(
    "The color of {object} is?", "black", "blue", "brown", "green", "grey", "orange", "pink",
    "purple", "red", "white", "yellow")},
  "fields": {"object": "object|item|obj"}, "label": "label|color|colour",
  "classes": ("black", "blue", "brown", "green", "gray", "orange", "pink", "purple", "red", "white",
              "yellow"),
}

_ENTRIES: dict[str, Entry] = {
  "sst2": Entry(
    "glue/sst2", "train", "validation", {
      "fs": one("Sentence: {text} Label:", "Negative", "Positive"),
      "hf": one("Sentence: {text} Sentiment: ", "negative", "positive"),
      "paper": one("Sentence: {text} Label:", "Negative", "Positive"),
      "plain": one(_REVIEW, "negative", "positive"),
    }, {"text": "sentence|text"}, classes=_POLARITY,
  ),
  "sst5": Entry(
    None, "train", "validation", {
      "fs": one("Sentence: {text} Label:", "terrible", "bad", "neutral", "good", "great"),
      "hf": one("Sentence: {text} Sentiment:", "terrible", "negative", "neutral", "positive",
                 "great"),
      "paper": one("Sentence: {text} Label:", "terrible", "bad", "neutral", "good", "great"),
    }, _TEXT, classes=(
      "very negative", "negative", "neutral", "positive", "very positive"
    ),
  ),
  "mr": Entry(
    None, "train", "validation", {
      **_papers("Review: {text} Sentiment:", "Negative", "Positive"),
      "plain": one(_REVIEW, "negative", "positive"),
    }, _TEXT, classes=_POLARITY,
  ),
  "subj": Entry(
    None, "train", "test", {
      **_papers("Input: {text} Type:", "objective", "subjective"),
      "plain": one("Input: {text}\nType:", "objective", "subjective"),
    }, _TEXT,
  ),
  "agnews": Entry(
    "ag_news_subset", "train", "test", {
      "fs": wordings(Wording(_CLASSIFY + "Article: {text} Answer:", _NEWS),
                      Wording("News: {text} Type:", _NEWS)),
      "hf": one("Article: {text} Category:", *_NEWS),
      "paper": one(_CLASSIFY + "News: {text} Type:", *_NEWS),
      "plain": one("Article: {text}\nTopic:", "world", "sports", "business", "technology"),
    }, {"text": "text|title+description"}, classes=("World", "Sports", "Business", "Sci/Tech"),
  ),
  "dbpedia": Entry(
    None, "train", "test", {
      "fs": one("Input: {content} Type:", *_DBPEDIA),
      "hf": one("Input: {content} Type:", *(w if w != "athlete" else "sport" for w in _DBPEDIA)),
      "paper": one("Input: {content} Type:", *_DBPEDIA),
    }, {"content": "content|text"}, classes=(
      "Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder",
      "MeanOfTransportation", "Building", "NaturalPlace", "Village", "Animal", "Plant", "Album",
      "Film", "WrittenWork",
    ),
  ),
  "trec": Entry(
    "trec", "train", "test", {
      **_papers("Question: {text} Type:", *_TREC),
      "plain": one("Question: {text}\nType:", "description", "entity", "abbreviation", "human",
                    "number", "location"),
    }, _TEXT, "label-coarse|label_coarse|coarse_label|label", classes=(
      "DESC/description", "ENTY/entity", "ABBR/abbreviation", "HUM/human", "NUM/number/numeric",
      "LOC/location",
    ),
  ),
  "cb": Entry(
    "super_glue/cb", "train", "validation", {
      "fs": _CB_FS, "hf": _CB_HF,
      "paper": one(_TRUE_FALSE_NEITHER.replace("{hypothesis}.", "{hypothesis}"), *_NEITHER),
    }, {"premise": "premise", "hypothesis": "hypothesis"},
    classes=("entailment", "contradiction", "neutral"),
  ),
  "rte": Entry(
    "glue/rte", "train", "validation", {
      "fs": one("Passage: {sentence1} Question: {sentence2} Yes or No? Answer:", "Yes", "No"),
      "hf": one("{sentence1} Question: {sentence2} True or False? Answer:", "True", "False"),
      "paper": one("Passage: {sentence1} Question: {sentence2} Yes or No?", "Yes", "No"),
      "plain": one("{sentence1}\nQuestion: {sentence2} True or false?\nAnswer:", "true", "false"),
    }, {"sentence1": "sentence1|premise", "sentence2": "sentence2|hypothesis"},
    classes=("entailment", "not_entailment"),
  ),
  "boolq": Entry(
    "super_glue/boolq", "train", "validation", {
      "fs": wordings(Wording("Passage: {passage} Question: {question}? Answer:", _NO_YES),
                      *_BOOLQ_HF),
      "hf": wordings(*_BOOLQ_HF),
      "paper": one("Passage: {passage} Question: {question} Answer:", *_NO_YES),
      "plain": one("{passage}\nQuestion: {question}?\nAnswer:", "no", "yes"),
    }, {"passage": "passage", "question": "question"}, "label|answer", classes=_FALSE_TRUE,
  ),
  "copa": Entry(
    "super_glue/copa", "train", "validation", dict.fromkeys(("fs", "hf", "paper"), _COPA),
    {name: name for name in ("premise", "question", "stem", "joint", "long_joint")},
    choices="choice1,choice2", reader="copa", num_choices=2,
  ),
  "hellaswag": Entry(
    "hellaswag", "train", "validation", _papers("{context}"),
    {"context": "ctx|context", "told": "told|ctx|context"}, choices="endings", reader="hellaswag",
    num_choices=4,
  ),
  "storycloze": Entry(
    "story_cloze/2016", "validation", "test", _papers("{context}"),
    {"context": "context|input_sentence_1+input_sentence_2+input_sentence_3+input_sentence_4"},
    "label:one|answer_right_ending:one", "endings|sentence_quiz1,sentence_quiz2",
    num_choices=2,
  ),
  "piqa": Entry(
    "piqa", "train", "validation", _papers("{goal}"), {"goal": "goal"}, choices="sol1,sol2",
    num_choices=2,
  ),
  "obqa": Entry(
    "openbookqa", "train", "validation", _papers("{question}"),
    {"question": "question_stem|question.stem"}, "answerKey:key",
    "choices.text|question.choices.text|question.choice_A,question.choice_B,question.choice_C,"
    "question.choice_D", num_choices=4,
  ),
  "arce": Entry("ai2_arc/ARC-Easy", "train", "validation", _papers("{question}"), **_ARC),
  "arcc": Entry("ai2_arc/ARC-Challenge", "train", "validation", _papers("{question}"), **_ARC),
  "winogrande": Entry(
    "winogrande", "train_xs", "validation", {
      "fs": _BLANK_FS, "hf": one("{before}", option=" {choice}{after}"), "paper": _BLANK_FS,
    }, {name: name for name in ("before", "after", "sentence")}, "answer:one|label",
    "option1,option2", reader="winogrande", num_choices=2,
  ),
  "wic": Entry(
    "super_glue/wic", "train", "validation", _papers(
      "{sentence1} {sentence2} Question: Is the word \"{word}\" used in the same way in the two "
      "sentences above? Answer:", *_NO_YES,
    ), {name: name for name in ("sentence1", "sentence2", "word")}, classes=_FALSE_TRUE,
  ),
  "wsc": Entry(
    "super_glue/wsc", "train", "validation", _papers(
      "{text} In the previous sentence, does the pronoun \"{span2}\" refer to {span1}?", *_NO_YES,
    ), {"text": "text", "span1": "span1_text|target.span1_text",
        "span2": "span2_text|target.span2_text"}, classes=_FALSE_TRUE,
  ),
  "multirc": Entry(
    "super_glue/multirc", "train", "validation", dict.fromkeys(("fs", "hf", "paper"), _MULTIRC),
    {name: name for name in ("paragraph", "question", "answer")}, classes=_FALSE_TRUE,
  ),
  "imdb": Entry(
    "imdb_reviews", "train", "test", {
      "fs": one("Review: {text} Is the review positive or negative?", "Negative", "Positive"),
      "paper": one("Review: {text} Is the review positive or negative?", "Negative", "Positive"),
      "plain": one(_REVIEW, "negative", "positive"),
    }, _TEXT, classes=_POLARITY,
  ),
  "winograd": Entry(
    None, "", "test", {"fs": _BLANK_FS, "paper": _BLANK_FS},
    {"before": "before", "after": "after"}, choices="options", reader="winograd", num_choices=2,
  ),
  "race-m": Entry(
    "race/middle", "train", "dev",
    _script("Passage: {article} Question: {question} Answer:"), **_RACE,
  ),
  "race-h": Entry(
    "race/high", "train", "dev",
    _script("Passage: {article} Question: {question} Answer:"), **_RACE,
  ),
  "nq": Entry(
    "natural_questions_open", "train", "validation", {
      "fs": one("Question: {question}? Answer:"), "paper": one("Question: {question} Answer:"),
    }, {"question": "question"}, "answer", metric="exact_match",
  ),
  "webqs": Entry(
    "web_questions", "train", "test", _script("Question: {question} Answer:"),
    {"question": "question"}, "answers", metric="exact_match",
  ),
  "triviaqa": Entry(
    "trivia_qa/rc.nocontext", "train", "validation", _script("Question: {question} Answer:"),
    {"question": "question"}, "answer.aliases|answer.value|answers", metric="exact_match",
  ),
  "sq": Entry(
    "squad/v1.1", "train", "validation", _script(_PASSAGE),
    {"context": "context", "question": "question"}, "answers.text|answers", metric="f1",
  ),
  "sq2": Entry(
    "squad/v2.0", "train", "validation", _script(_PASSAGE),
    {"context": "context", "question": "question"}, "answers.text|answers", reader="unanswerable",
    metric="f1",
  ),
  "coqa": Entry(
    "coqa", "train", "test", _script("Passage: {story} Question: {question} Answer:"),
    {"story": "story", "question": "question"}, "answer.input_text|answer", reader="coqa",
    metric="f1",
  ),
  "yelp": Entry(
    "yelp_polarity_reviews", "train", "test", {"plain": one(_REVIEW, "negative", "positive")},
    _TEXT, classes=_POLARITY,
  ),
  "relative-size": Entry(
    None, "", "test", {"paper": one("Is {item1} larger than {item2}?", *_NO_YES)},
    {"item1": "item1|object1|obj1", "item2": "item2|object2|obj2"}, classes=_FALSE_TRUE,
  ),
  "memory-color": Entry(None, "", "test", **_COLOR),
  "color-terms": Entry(None, "", "test", **_COLOR),
  "cola": Entry(
    "glue/cola", "train", "validation",
    {"plain": one("Sentence: {text}\nGrammar:", "unacceptable", "acceptable")},
    {"text": "sentence|text"},
  ),
}


ENTRIES: dict[str, Entry] = asked.with_wordings(_ENTRIES) | asked.ENTRIES


def entry(name: str) -> Entry:
  """The named task.

  Raises:
    ValueError: if there is none; it names the nearest and all.
  """
  if name not in ENTRIES:
    raise ValueError(
      f"there is no task {name!r}{nearest(name, ENTRIES)} A task is one of {', '.join(ENTRIES)}, "
      "installed_kind, or a file of JSON lines with a template and labels."
    )
  return ENTRIES[name]


def wording(name: str, flavour: str | None, template: int) -> Wording:
  """The wording of a named task.

  Args:
    name: the task's.
    flavour: one of `FLAVOURS`; None: the first that the task has, fs if it has that.
    template: index within the flavour.

  Raises:
    ValueError: if there is no such task, flavour or index; it names the valid ones.
  """
  return worded(name, entry(name).flavours, flavour, template)


def worded(name: str, flavours: Mapping[str, Any], flavour: str | None, template: int) -> Any:
  """`flavours[flavour][template]`, as `wording` chooses it."""
  flavour = next(iter(flavours)) if flavour is None else flavour
  if flavour not in flavours:
    raise ValueError(
      f"the task {name} has no flavour {flavour!r}{nearest(flavour, flavours)} It has "
      f"{', '.join(flavours)}."
    )
  if template not in flavours[flavour]:
    raise ValueError(
      f"the task {name} has no template {template} in flavour {flavour}; its indices are "
      f"{', '.join(map(str, flavours[flavour]))}."
    )
  return flavours[flavour][template]
