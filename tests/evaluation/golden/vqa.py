"""Writes vqa.json, beside this script: what the official evaluation of VQA makes of some answers.

`python tests/evaluation/golden/vqa.py FOLDER`, where FOLDER is PythonEvaluationTools of
github.com/GT-Vision-Lab/VQA at a4f1afd, turned to Python 3 by `2to3 -w`.
"""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

ANSWERS = [
  "A red ball.", "the Two dogs!", "1,000 people, maybe", "it's 5:30 p.m.", "don't", "dont",
  "Dont know", "3.5", "no. 5", "U.S.A.", "black-and-white", "cat/dog", "yes , it is", "yes,it is",
  "none", "Ten", "an apple a day", "wont", "couldntve", "couldn'tve", "couldnt've", "Im", "im",
  "shes", "its",
  "who'dve", "yall'd've", "'ow'sat", "somebody'd", "let's", "they re", "what ?", "what?", "(left)",
  "left (side)", "a\nb\tc", "50%", "$3", "#1", "@home", "one-two", "3,4 and - 5", "1,2-3", "....",
  "a.b.c.d", "." * 40 + "x", "", "the", "t-shirt", "t shirt", "skate_board", "100,", "hed've",
  "twas", "nine nine", "weve", "ill", "well", "were", "oclock", "5 oclock", "stop!go",
  "stop! go", "maam",
]


def main(folder: str) -> None:
  sys.path.insert(0, folder)
  from vqaEvaluation.vqaEval import VQAEval

  draw = random.Random(0)
  rows = []
  for answer in ANSWERS * 2:
    near = [answer.lower(), answer.lower().strip(".!?"), "red ball", "2 dogs", "yes", "don't", "0"]
    golds = draw.choices(near, k=10) if draw.random() < 0.9 else [draw.choice(near)] * 10
    rows.append([answer, golds])

  def evaluator():
    truth = {
      i: {"answers": [{"answer": g, "answer_id": j} for j, g in enumerate(golds)],
          "question_type": "", "answer_type": ""} for i, (_, golds) in enumerate(rows)}
    said = {i: {"answer": answer} for i, (answer, _) in enumerate(rows)}
    return VQAEval(
      SimpleNamespace(qa=truth, getQuesIds=lambda: list(truth)), SimpleNamespace(qa=said), n=12)

  official = evaluator()
  official.updateProgress = lambda progress: None
  official.evaluate()
  normal = []
  for answer in ANSWERS:
    flat = answer.replace("\n", " ").replace("\t", " ").strip()
    normal.append([answer, official.processDigitArticle(official.processPunctuation(flat))])
  words = {k: v for k, v in official.contractions.items() if k == k.lower()}
  accuracies = [[answer, golds, official.evalQA[i] / 100] for i, (answer, golds) in enumerate(rows)]
  found = {"normalised": normal, "contractions": words, "accuracies": accuracies}
  text = json.dumps(found, ensure_ascii=False)
  Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
  main(sys.argv[1])
