"""Named tasks: the exact text of every template, folders of JSON lines, and what is refused."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from lmops_jax.data import tasks
from lmops_jax.data.tasks import table
from tests.data.tasks import asked_rows

ROWS = {  # a row of each task, as its dataset has it; the label is not the first, where it can be
  "sst2": {"sentence": "fine", "label": 1},
  "sst5": {"text": "fine", "label": 3},
  "mr": {"text": "fine", "label": 1},
  "subj": {"text": "a film", "label": 1},
  "agnews": {"title": "Win", "description": "They won.", "label": 1},
  "dbpedia": {"title": "T", "content": "A runner.", "label": 3},
  "trec": {"text": "Who ?", "label-coarse": 3},
  "cb": {"premise": "It is wet.", "hypothesis": "it rains", "label": 1},
  "rte": {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 1},
  "boolq": {"passage": "Ice is cold.", "question": "is ice cold", "label": 1},
  "copa": {"premise": "It fell.", "choice1": "I let go.", "choice2": "Mary slept.",
           "question": "cause", "label": 0},
  "hellaswag": {"ctx": "A man", "endings": ["a", "b", "c", "d"], "label": "2"},
  "storycloze": {"input_sentence_1": "A.", "input_sentence_2": "B.", "input_sentence_3": "C.",
                 "input_sentence_4": "D.", "sentence_quiz1": "E.", "sentence_quiz2": "F.",
                 "answer_right_ending": 2},
  "piqa": {"goal": "Boil water", "sol1": "heat it", "sol2": "cool it", "label": 0},
  "obqa": {"question_stem": "Stars are", "answerKey": "D",
           "choices": {"text": ["a", "b", "c", "hot"], "label": ["A", "B", "C", "D"]}},
  "arce": {"question": "Which?", "choices": {"text": ["a", "b", "c", "d"]}, "answerKey": "3"},
  "arcc": {"question": {"stem": "Which?", "choices": [
    {"text": t, "label": k} for t, k in zip("abcd", "ABCD")]}, "answerKey": "B"},
  "winogrande": {"sentence": "Ann thanked Bo as _ was kind.", "option1": "Ann", "option2": "Bo",
                 "answer": "2"},
  "wic": {"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "label": 1},
  "wsc": {"text": "Mark saw Pete and he ran.", "span1_text": "Mark", "span2_text": "he",
          "label": 0},
  "multirc": {"paragraph": "P.", "question": "Q?", "answer": "R", "label": 1},
  "imdb": {"text": "fine", "label": 1},
  "winograd": {"text": "Ann met Bo. She ran.", "pronoun": "She", "pronoun_loc": 12,
               "options": ["Ann", "Bo"], "label": 0},
  "race-m": {"article": "A.", "question": "Q?", "options": ["a", "b", "c", "d"], "answer": "C"},
  "race-h": {"article": "A.", "question": "Q?", "options": ["a", "b", "c", "d"], "answer": "C"},
  "nq": {"question": "who", "answer": ["x", "y"]},
  "webqs": {"question": "who?", "answers": ["x", "y"]},
  "triviaqa": {"question": "Who?", "answer": {"value": "x", "aliases": ["x", "y"]}},
  "sq": {"context": "C.", "question": "Q?", "answers": {"text": ["x", "y"], "answer_start": [0]}},
  "sq2": {"context": "C.", "question": "Q?", "answers": {"text": [], "answer_start": []}},
  "coqa": {"story": "S.", "questions": ["Q?", "R?"], "answers": {"input_text": ["x", "y"]}},
  "yelp": {"text": "fine", "label": 1},
  "cola": {"sentence": "fine", "label": 0},
  "relative-size": {"item1": "an ant", "item2": "a bird", "label": 0},
  "memory-color": {"object": "a lemon", "label": "yellow"},
  "color-terms": {"item": "ash", "color": "gray"},
  **asked_rows.ROWS,
}
CLASSIFY = ("Classify the news articles into the categories of World, Sports, Business, and "
            "Technology.")
TRUTH = ("Read the following paragraph and determine if the hypothesis is true: It is wet. "
         "Hypothesis: ")
CONCLUDE = ('It is wet. Based on the paragraph above can we conclude that "it rains"? Yes, No, or '
            "Maybe?")
DRAW = ("Can we draw the following hypothesis from the context? Context: It is wet. Hypothesis: it "
        "rains. Answer:")
BOOLQ = (
  "Passage: Ice is cold. After reading this passage, I have a question: is ice cold? True or "
  "False? True",
  "Text: Ice is cold. Question: is ice cold? Answer: Yes",
  "Ice is cold. Based on the above text, what's the best answer to this question: is ice cold? Yes",
  "Based on the following passage, is ice cold? Ice is cold. Please answer yes or no. Yes",
  "Exercise: read the text and answer the question by True or False. Text: Ice is cold. Question: "
  "is ice cold? True",
)
COPA = {0: "It fell because i let go.", 2: "It fell. What is the cause? I let go.",
        3: "It fell because I let go.", 4: "It fell This happened because i let go."}
MULTIRC = (
  'P. Question: "Q?" Response: "R" Does the response correctly answer the question? Answer: Yes',
  'P. Question: "Q?" Response: "R" Based on the paragraph, is the response to the question is '
  "factually correct? Yes",
  'P. Based on the paragraph, does the response "R" correctly answer the question "Q?"? Yes',
  'P. According to the above paragraph, the correct answer to the question "Q?" is "R"? Answer: '
  "Yes",
  'P. Question: "Q?" Answer: "R" Is this answer to the question True or False? True',
)
SAME = {  # fs, hf and paper
  "mr": "Review: fine Sentiment: Positive",
  "subj": "Input: a film Type: subjective",
  "trec": "Question: Who ? Type: Person",
  "hellaswag": "A man c",
  "storycloze": "A. B. C. D. F.",
  "piqa": "Boil water heat it",
  "obqa": "Stars are hot",
  "arce": "Which? c",
  "arcc": "Which? b",
  "wic": 'A bank. The bank. Question: Is the word "bank" used in the same way in the two sentences '
         "above? Answer: Yes",
  "wsc": "Mark saw Pete and he ran. In the previous sentence, does the pronoun \"he\" refer to "
         "Mark? No",
}
SCRIPT = {  # fs and paper
  "sst2": "Sentence: fine Label: Positive",
  "sst5": "Sentence: fine Label: good",
  "dbpedia": "Input: A runner. Type: athlete",
  "winogrande": "Ann thanked Bo as Bo was kind.",
  "imdb": "Review: fine Is the review positive or negative? Positive",
  "winograd": "Ann met Bo. Ann ran.",
  "race-m": "Passage: A. Question: Q? Answer: c",
  "race-h": "Passage: A. Question: Q? Answer: c",
  "webqs": "Question: who? Answer: y",
  "triviaqa": "Question: Who? Answer: y",
  "sq": "Passage: C. Question: Q? Answer: y",
  "sq2": "Passage: C. Question: Q? Answer: none",
  "coqa": "Passage: S. Question: Q? Answer: x",
}
TEXTS = {
  **{(name, flavour, 0): text for name, text in SAME.items() for flavour in ("fs", "hf", "paper")},
  **{(name, flavour, 0): text for name, text in SCRIPT.items() for flavour in ("fs", "paper")},
  **{("copa", f, i): text for i, text in COPA.items() for f in ("fs", "hf", "paper")},
  **{("multirc", f, i): text for i, text in enumerate(MULTIRC) for f in ("fs", "hf", "paper")},
  **{("boolq", "hf", i): text for i, text in enumerate(BOOLQ)},
  **{("boolq", "fs", i): text for i, text in enumerate(BOOLQ, 1)},
  ("boolq", "fs", 0): "Passage: Ice is cold. Question: is ice cold? Answer: Yes",
  ("boolq", "paper", 0): "Passage: Ice is cold. Question: is ice cold Answer: Yes",
  ("boolq", "plain", 0): "Ice is cold.\nQuestion: is ice cold?\nAnswer: yes",
  ("sst2", "hf", 0): "Sentence: fine Sentiment:  positive",
  ("sst2", "plain", 0): "Review: fine\nSentiment: positive",
  ("sst5", "hf", 0): "Sentence: fine Sentiment: positive",
  ("mr", "plain", 0): "Review: fine\nSentiment: positive",
  ("subj", "plain", 0): "Input: a film\nType: subjective",
  ("agnews", "fs", 0): f"{CLASSIFY} Article: Win They won. Answer: Sports",
  ("agnews", "fs", 1): "News: Win They won. Type: Sports",
  ("agnews", "hf", 0): "Article: Win They won. Category: Sports",
  ("agnews", "paper", 0): f"{CLASSIFY} News: Win They won. Type: Sports",
  ("agnews", "plain", 0): "Article: Win They won.\nTopic: sports",
  ("dbpedia", "hf", 0): "Input: A runner. Type: sport",
  ("trec", "plain", 0): "Question: Who ?\nType: human",
  ("cb", "fs", 0): "It is wet. Question: it rains. True, False, or Neither? Answer: False",
  ("cb", "fs", 1): CONCLUDE + " Answer: No.",
  ("cb", "fs", 2): "It is wet. Can we infer the following? it rains. No",
  ("cb", "fs", 3): TRUTH + "it rains. No",
  ("cb", "fs", 4): DRAW + " No",
  ("cb", "hf", 0): TRUTH + "it rains. No",
  ("cb", "hf", 1): CONCLUDE + " Answer:  No",
  ("cb", "hf", 2): "It is wet. Can we infer the following? it rains. No",
  ("cb", "hf", 3): "It is wet. Question: it rains. True, False, or Neither? Answer: False",
  ("cb", "hf", 4): DRAW + " No",
  ("cb", "paper", 0): "It is wet. Question: it rains True, False, or Neither? Answer: False",
  ("rte", "fs", 0): "Passage: It rains. Question: It is wet. Yes or No? Answer: No",
  ("rte", "hf", 0): "It rains. Question: It is wet. True or False? Answer: False",
  ("rte", "paper", 0): "Passage: It rains. Question: It is wet. Yes or No? No",
  ("rte", "plain", 0): "It rains.\nQuestion: It is wet. True or false?\nAnswer: false",
  ("winogrande", "hf", 0): "Ann thanked Bo as  Bo was kind.",
  ("imdb", "plain", 0): "Review: fine\nSentiment: positive",
  ("nq", "fs", 0): "Question: who? Answer: y",
  ("nq", "paper", 0): "Question: who Answer: y",
  ("yelp", "plain", 0): "Review: fine\nSentiment: positive",
  ("cola", "plain", 0): "Sentence: fine\nGrammar: unacceptable",
  ("relative-size", "paper", 0): "Is an ant larger than a bird? No",
  ("memory-color", "paper", 0): "The color of a lemon is? yellow",
  ("color-terms", "paper", 0): "The color of ash is? grey",
  **asked_rows.TEXTS,
}


def _folder(path, *rows, name="test.jsonl"):
  path.mkdir(exist_ok=True)
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
  return path


def test_every_template_reads_word_for_word(tmp_path):
  found = {}
  for name, entry in tasks.ENTRIES.items():
    data = _folder(tmp_path / name, ROWS[name])
    for flavour, wordings in entry.flavours.items():
      for index in wordings:
        task = tasks.named_task(name, flavour=flavour, template=index, data=data)
        found[name, flavour, index] = task.rows[0].demonstration
        assert task.words == wordings[index].words and task.metric == entry.metric
        assert (task.null_prompt is None) == (not task.words)
  assert found == TEXTS


def test_prompts_options_and_answers_are_parted_as_the_scripts_do(tmp_path):
  def first(name, **more):
    return tasks.named_task(name, data=_folder(tmp_path / name, ROWS[name]), **more).rows[0]

  cb = first("cb", flavour="hf")
  assert cb.prompt.endswith("it rains. ") and cb.options == ("Yes", "No", "Maybe")
  cb = first("cb", flavour="hf", template=1)
  assert cb.prompt.endswith("Answer: ") and cb.options == (" Yes", " No", " Maybe")
  own = first("winogrande")
  assert own.prompts == ("Ann thanked Bo as Ann", "Ann thanked Bo as Bo") and own.label == 1
  assert own.options == (" was kind.",) * 2
  hf = first("winogrande", flavour="hf")
  assert hf.options == (" Ann was kind.", " Bo was kind.") and not hf.prompts
  assert first("nq").answers == ("x", "y") and first("nq").label == -1
  stories = tasks.named_task("coqa", data=tmp_path / "coqa") if first("coqa") else None
  assert [row.answers for row in stories.rows] == [("x",), ("y",)]
  assert len({row.id for row in stories.rows}) == 2


def test_folders_hold_train_and_test_or_one_file(tmp_path):
  rows = [{"text": f"t{i}", "label": i % 2} for i in range(6)]
  both = _folder(tmp_path / "both", *rows[:4])
  _folder(both, *rows[4:], name="train.jsonl.gz")
  task = tasks.named_task("sst2", data=both, limit=3)
  assert [row.prompt for row in task.rows] == [f"Sentence: t{i} Label:" for i in range(3)]
  assert len(task.train) == 2 and not {r.id for r in task.rows} & {r.id for r in task.train}
  assert tasks.named_task("sst2", data=both, split="train").train == ()
  one = tasks.named_task("mr", data=_folder(tmp_path / "one", *rows, name="all.jsonl"))
  assert len(one.rows) == 6 and one.train == ()
  valid = _folder(tmp_path / "valid", *rows, name="validation.jsonl")
  assert len(tasks.named_task("mr", data=valid).rows) == 6
  with pytest.raises(ValueError, match=r"has no dev.jsonl for the task mr \(it has valid"):
    tasks.named_task("mr", data=valid, split="dev")
  with pytest.raises(ValueError, match="is no folder"):
    tasks.named_task("mr", data=tmp_path / "nowhere")


def test_numbers_in_another_order_are_told_by_labels(tmp_path):
  """The order that TREC and Subj have in the files of sentence classification benchmarks."""
  trec = _folder(
    tmp_path / "trec", {"text": "What does CNN stand for ?", "label": 2},
    {"text": "What is the highest waterfall ?", "label": 4},
    {"text": "When was Ozzy born ?", "label": 5}, {"text": "Who ?", "label": "human"},
    {"text": "Who ?", "label": "Person"}, {"text": "How many ?", "label": "NUM"},
  )
  order = "description entity abbreviation human location number".split()
  task = tasks.named_task("trec", data=trec, labels=order)
  said = [task.words[row.label] for row in task.rows]
  assert said == ["Expression", "Location", "Number", "Person", "Person", "Number"]
  assert tasks.named_task("trec", data=trec).rows[1].demonstration.endswith("Number")
  subj = _folder(tmp_path / "subj", {"text": "smart and alert", "label": 0})
  task = tasks.named_task("subj", data=subj, labels=["subjective", "objective"])
  assert task.rows[0].demonstration == "Input: smart and alert Type: subjective"
  with pytest.raises(ValueError, match="does not hold each of the labels objective, subjective"):
    tasks.named_task("subj", data=subj, labels=["subjective", "subjective"])
  with pytest.raises(ValueError, match="labels= has the label 'both'"):
    tasks.named_task("subj", data=subj, labels=["subjective", "both"])


def test_rows_of_another_shape_are_skipped_and_counted(tmp_path):
  def row(*texts, key="A"):
    return {"question": "Which?", "choices": {"text": list(texts)}, "answerKey": key}

  data = _folder(
    tmp_path / "arc", row("a", "b", "c"), row("a", "b", "c", "d", "e", key="E"),
    row("a", "b", "c", "d"), row("a", "b", "b", "d"),
  )
  task = tasks.named_task("arce", data=data)
  assert len(task.rows) == 1 and task.skipped == 3
  with pytest.raises(ValueError, match=r"arcc has no rows \(1 were left out\)"):
    tasks.named_task("arcc", data=_folder(tmp_path / "none", row("a", "b", "c")))


@pytest.mark.parametrize("name,change,message", [
  ("sst2", {"label": -1}, "test.jsonl:1 has the label -1; the labels are Negative, Positive"),
  ("sst2", {"label": 2}, "has the label 2"),
  ("sst2", {"label": "so-so"}, "has the label 'so-so'; the labels are Negative, Positive, neg"),
  ("piqa", {"label": -1}, "test.jsonl:1 has the label -1; it has 2 options"),
  ("winogrande", {"answer": ""}, "has the label ''"),
  ("winogrande", {"sentence": "No blank."}, "test.jsonl:1 has no _ in its sentence"),
  ("winograd", {"pronoun_loc": 1}, "has no 'She' at pronoun_loc=1"),
  ("arce", {"answerKey": "E"}, "has the label 'E'"),
  ("cb", {"premise": None}, "has None in its field premise"),
])
def test_bad_rows_are_named(tmp_path, name, change, message):
  with pytest.raises(ValueError, match=message):
    tasks.named_task(name, data=_folder(tmp_path / "data", {**ROWS[name], **change}))


def test_missing_fields_are_named(tmp_path):
  data = _folder(tmp_path / "data", {"txt": "a", "label": 0})
  with pytest.raises(ValueError, match=r"test.jsonl:1 has no field sentence or text \(it has lab"):
    tasks.named_task("sst2", data=data)
  with pytest.raises(ValueError, match="test.jsonl:1 has no options in sol1,sol2"):
    tasks.named_task("piqa", data=_folder(data, {"goal": "g", "label": 0}))


@pytest.mark.parametrize("arguments,message", [
  ({"name": "sst"}, "no task 'sst'; the nearest valid name is 'sst.'. A task is one of sst2, "),
  ({"name": "cb", "flavour": "fa"}, "no flavour 'fa'; the nearest .* It has fs, hf, paper."),
  ({"name": "yelp", "flavour": "fs"}, "the task yelp has no flavour 'fs'.* It has plain."),
  ({"name": "copa", "template": 1}, "no template 1 in flavour fs; its indices are 0, 2, 3, 4."),
  ({"name": "sst5"}, "tfds has no dataset for the task sst5; give a folder"),
  ({"name": "sst2", "limit": 0}, "limit=0 must be at least 1"),
  ({"name": "sst2", "labels": ["a"]}, "give it with data="),
  ({"name": "installed_kind", "data": "x"}, "comes from the installed packages"),
  ({"name": "installed_kind", "flavour": "hf"}, "no flavour 'hf'.* It has fs, plain."),
])
def test_what_there_is_not_is_told_with_what_there_is(arguments, message):
  with pytest.raises(ValueError, match=message):
    tasks.named_task(**arguments)


def test_the_table_has_a_line_for_each_task_and_loads_nothing_heavy():
  lines = table.table().splitlines()
  names = [line.split()[0] for line in lines]
  assert names == ["task", *tasks.ENTRIES, "installed_kind", *tasks.PICTURE_ENTRIES]
  assert "fs 0,2,3,4" in lines[names.index("copa")] and "2 options a row" in lines[
    names.index("copa")]
  heavy = {"jax", "tensorflow", "seqio", "tensorflow_datasets"}
  program = ("import sys; from lmops_jax import cli; cli.main(['list', 'tasks']); "
             f"print(sorted({heavy} & set(sys.modules)))")
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert done.stdout.splitlines() == [*lines, "[]"], done


@pytest.mark.parametrize("stem", ["train", "test"])
def test_a_file_that_is_a_link_to_nothing_is_not_passed_over(tmp_path, stem):
  for name in ("train", "test", "validation"):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROWS["sst2"]))
  (tmp_path / f"{stem}.jsonl").unlink()
  (tmp_path / f"{stem}.jsonl").symlink_to("/nowhere/x")
  with pytest.raises(ValueError, match=f"{stem}.jsonl cannot be read"):
    tasks.named_task("sst2", data=tmp_path)


def test_a_fifo_is_refused(tmp_path):
  os.mkfifo(tmp_path / "test.jsonl")
  with pytest.raises(ValueError, match="test.jsonl is a FIFO"):
    tasks.named_task("sst2", data=tmp_path)
