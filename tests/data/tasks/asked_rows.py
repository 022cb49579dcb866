"""Rows of MetaLM's language tasks as their data sets have them, and how they are asked."""

ROWS = {  # the label is not the first one, where it can be
  **{f"anli-r{n}": {"context": "It is wet.", "hypothesis": "It rains.", "label": 1, "uid": "a"}
     for n in (1, 2, 3)},
  **{name: {"premise": "It is wet.", "hypothesis": "It rains.", "label": 2, "idx": 3}
     for name in ("mnli", "mnli-mm", "snli")},
  "qnli": {"question": "Who?", "sentence": "Ann ran.", "label": 1},
  "wnli": {"sentence1": "Ann met Bo as she ran.", "sentence2": "Ann ran.", "label": 1},
  "sentiment140": {"text": "so good", "polarity": 4, "user": "x"},
  "qqp": {"question1": "Who ran?", "question2": "Who did run?", "label": 1},
  "mrpc": {"sentence1": "Ann ran.", "sentence2": "Bo ran.", "label": 0},
  "paws": {"sentence1": "A to B", "sentence2": "B to A", "label": 0},
  "dpr": {"sentence": "Ann met Bo. She ran.", "pronoun": "She", "candidates": ["Bo", "Ann"],
          "label": 1},
  "drop": {"passage": "They won 3 to 1.", "question": "Goals?", "answer": "4",
           "validated_answers": ["four"]},
  "common-gen": {"concepts": ["dog", "run"], "target": "",
                 "references": ["A dog runs.", "Dogs run."]},
  "e2e-nlg": {"meaning_representation": "name[Elm], area[north]", "target": "Elm is north.",
              "references": []},
  "aeslc": {"email_body": "Can we meet?", "subject_line": "Meeting"},
  "samsum": {"dialogue": "A: Hi\nB: Hi", "summary": "They greet."},
  "xsum": {"document": "It rained.", "summary": "Rain."},
}
_FOLLOWS = "Premise: It is wet.\nHypothesis: It rains.\nIs the hypothesis true if the premise is? "
_SECOND = "Is what stands second true if what stands first is? "
ASKED = {  # by task, the flavour "ask"
  **{f"anli-r{n}": f"{_FOLLOWS}It is not certain" for n in (1, 2, 3)},
  **{name: f"{_FOLLOWS}No" for name in ("mnli", "mnli-mm", "snli")},
  "cb": _FOLLOWS.replace("It rains.", "it rains") + "No",
  "qnli": "Question: Who?\nSentence: Ann ran.\nDoes the sentence answer the question? No",
  "rte": f"First: It rains.\nSecond: It is wet.\n{_SECOND}No",
  "wnli": f"First: Ann met Bo as she ran.\nSecond: Ann ran.\n{_SECOND}Yes",
  "imdb": "Is this film review positive or negative?\nfine positive",
  "sst2": "Would the following phrase be considered positive or negative?\nfine positive",
  "sentiment140": "Is the mood of this message positive or negative?\nso good positive",
  "yelp": "Is this review of a business positive or negative?\nfine positive",
  "qqp": "First: Who ran?\nSecond: Who did run?\nDo the two questions ask the same? Yes",
  "mrpc": "First: Ann ran.\nSecond: Bo ran.\nDo the two sentences say the same? No",
  "paws": "First: A to B\nSecond: B to A\nDo the two sentences say the same? No",
  "dpr": "Ann met Bo. She ran.\nWho or what is meant by \"She\"? Ann",
  "winogrande": "Ann thanked Bo as _ was kind.\nWho or what belongs in the place of _? Bo",
  "wsc": "Mark saw Pete and he ran.\nDoes \"he\" stand for Mark here? No",
  "hellaswag": "How does this go on?\nA man c",
  "piqa": "How is this done?\nBoil water heat it",
  "copa": "It fell.\nWhat is the cause of this? I let go.",
  "drop": "They won 3 to 1.\nAnswer from the text: Goals? 4",
  "sq": "C.\nAnswer from the text: Q? y",
  "sq2": "C.\nAnswer from the text, or \"none\" if it does not tell: Q? none",
  "obqa": "What completes this, or answers it?\nStars are hot",
  "boolq": "Ice is cold.\nAnswer from the text: is ice cold? Yes",
  "cola": "Is this sentence good English?\nfine No",
  "wic": "First: A bank.\nSecond: The bank.\nDoes the word \"bank\" mean the same in both "
         "sentences? Yes",
  "trec": "What does this question ask for?\nWho ? human",
  "arce": "Answer this question: Which? c",
  "nq": "Answer this question: who? y",
  "common-gen": "Write a sentence with these words: dog, run Dogs run.",
  "e2e-nlg": "Tell this in words: name[Elm], area[north] Elm is north.",
  "aeslc": "What is the subject of this mail?\nCan we meet? Meeting",
  "samsum": "Sum this conversation up:\nA: Hi\nB: Hi They greet.",
  "xsum": "Sum this article up in a sentence:\nIt rained. Rain.",
}
GPT3 = {
  "storycloze": "A. B. C. D. F.", "hellaswag": "A man c", "winograd": "Ann met Bo. Ann ran.",
  "winogrande": "Ann thanked Bo as Bo was kind.", "piqa": "Boil water heat it",
  "arce": "Question: Which?\nAnswer: c", "arcc": "Question: Which?\nAnswer: b",
  "boolq": "Ice is cold.\nquestion: is ice cold?\nanswer: yes", "copa": "It fell because i let go.",
}
OTHER = {  # MetaLM's own words for MultiNLI alone
  name: "Premise: It is wet.\nHypothesis: It rains.\nLabel: contradiction"
  for name in ("mnli", "mnli-mm")}
TEXTS = {
  **{(name, "ask", 0): text for name, text in ASKED.items()},
  **{(name, "gpt3", 0): text for name, text in GPT3.items()},
  **{(name, "paper", 0): text for name, text in OTHER.items()},
}
