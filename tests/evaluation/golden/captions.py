"""Writes captions.json, beside this script: what pycocoevalcap 1.2 makes of some captions.

Run it in an environment of its own with pycocoevalcap, where java is found (its tokeniser is
Stanford's): `python tests/evaluation/golden/captions.py`.
"""

import json
import random
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

SENTENCES = """\
A man riding a wave on top of a surfboard.
Two dogs aren't sleeping; they're playing!
A girl's hat (red) and the boys' shoes.
He can't, won't & shouldn't go.
The bus, no. 5, costs $3.50 -- or 20%?
"Stop" sign at 5:30 p.m. in the U.S.
A black-and-white cat/dog picture.
I'm sure it's 1,000 miles away...
They cannot see; she'll say gonna, gotta and wanna.
A man's t-shirt reads 'Hello World'.
A photo of food : rice, beans , etc.
Mr. Smith and Dr. Jones vs. the bear.
A cell-phone w/ a #1 case @ home
two people on a bench  with   spaces
It's a 3/4 view of the 1990's car
A kite [blue] {green} <red>
We've been here, haven't we? I'd say so
e.g. this one, i.e. that
rock 'n' roll
'tis a cat
New York's 5th Ave.
over 100°F
naïve café
y'all ain't
a * b + c = d
A red_blue ball at 9 o'clock
A cat. A dog. A bird
mom&dad and AT&T
http://www.x.com is
Jr. and Inc. in St. Louis, MO.
5" pipe and 6' man
a–b and c—d
“quoted” ‘words’ it’s … wow
A woman with long, curly hair is sitting on the subway; she's reading a book.
Three men (one in a hat) stand next to a 12-foot tall statue.
A little boy in a T-shirt who's eating an ice-cream cone...
A sign that says "No Parking 8AM-6PM".
The Yankees' player hits the ball!
A boat, a car and a bus - all red.
A plate with eggs/bacon & toast.
A 2-story house w/ a garage.
A street sign reads: "Main St. & 1st Ave."
Two planes fly over Washington D.C. on a sunny day.
Cows graze in the field,eating grass.
Snowboarder in mid-air -- doing a trick.
A person's hand holding a cell phone that won't turn on.
""".splitlines()
WORDS = "a the red blue dog cat man sits runs on under table with and two small".split()


def main() -> None:
  raw = {i: [{"caption": sentence}] for i, sentence in enumerate(SENTENCES)}
  words = PTBTokenizer().tokenize(raw)
  draw = random.Random(0)

  def sentence(least):
    return " ".join(draw.choices(WORDS, k=draw.randint(least, 14)))

  references = {i: [sentence(1) for _ in range(draw.randint(1, 5))] for i in range(60)}
  candidates = {i: [sentence(1)] for i in references}
  for i in range(0, 60, 4):  # some that agree in part or wholly, some that are short
    candidates[i] = [draw.choice(references[i])]
    candidates[i + 1] = [" ".join(draw.choice(references[i + 1]).split()[:3])]
  scores = {}
  for name, scorer in (("CIDEr", Cider()), ("ROUGE-L", Rouge())):
    corpus, rows = scorer.compute_score(references, candidates)
    scores[name] = [float(corpus), list(map(float, rows))]
  corpus, rows = Bleu(4).compute_score(references, candidates, verbose=0)
  scores |= {f"BLEU-{n + 1}": [corpus[n], rows[n]] for n in range(4)}
  found = {
    "tokens": [[s, words[i][0]] for i, s in enumerate(SENTENCES)],
    "candidates": [candidates[i][0] for i in candidates], "references": list(references.values()),
    "scores": scores,
  }
  text = json.dumps(found, ensure_ascii=False)
  Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
