"""METEOR's stages against examples worked by hand, Porter's own, and nltk."""

import itertools

import numpy as np
import pytest

from lmops_jax.evaluation import explained, meteor, wordnet
from tests import wordnet_files

# From the examples of Porter's paper, step by step.
STEMS = """
  caresses caress  ponies poni  ties ti  caress caress  cats cat  feed feed  agreed agre
  plastered plaster  bled bled  motoring motor  sing sing  conflated conflat  troubled troubl
  sized size  hopping hop  tanned tan  falling fall  hissing hiss  fizzed fizz  failing fail
  filing file  happy happi  sky sky  relational relat  conditional condit  rational ration
  digitizer digit  conformabli conform  radicalli radic  differentli differ  vileli vile
  vietnamization vietnam  predication predic  operator oper  feudalism feudal  decisiveness decis
  hopefulness hope  callousness callous  sensitiviti sensit  sensibiliti sensibl  triplicate triplic
  formative form  formalize formal  electrical electr  hopeful hope  goodness good  revival reviv
  allowance allow  airliner airlin  adjustable adjust  irritant irrit  replacement replac
  adjustment adjust  dependent depend  adoption adopt  communism commun  activate activ
  effective effect  bowdlerize bowdler  probate probat  rate rate  cease ceas  controll control
  roll roll  is is  oscillators oscil  generalizations gener
""".split()


def test_stems_are_those_of_porters_paper():
  assert [meteor.stem(word) for word in STEMS[::2]] == STEMS[1::2]


def test_scores_by_hand():
  same = "a dog runs fast".split()
  assert meteor.of_words(same, same) == pytest.approx(1 - 0.5 / 4**3)  # one piece of four words
  # three of four words, in two pieces; one by its stem
  got = meteor.of_words("a dog running".split(), "a fast dog runs".split())
  precision, recall = 1, 3 / 4
  mean = precision * recall / (0.9 * precision + 0.1 * recall)
  assert got == pytest.approx(mean * (1 - 0.5 * (2 / 3) ** 3))
  assert meteor.of_words("cats".split(), same) == 0 == meteor.of_words([], same)


def test_equal_words_come_before_equal_stems():
  assert meteor.aligned(["run", "runs"], ["runs", "run"]) == [(0, 1), (1, 0)]
  assert meteor.aligned(["runs"], ["running", "run"]) == [(0, 1)]


def test_the_best_reference_counts_as_people_wrote_it():
  assert meteor.meteor("A dog runs.", ["two cats", "a DOG, runs!"]) == pytest.approx(1 - 0.5 / 27)
  assert meteor.meteor("...", ["a dog"]) == 0


@pytest.fixture(scope="module")
def synonyms(tmp_path_factory):
  return wordnet.read(wordnet_files.write(tmp_path_factory.mktemp("wordnet")))


def test_synonyms_come_last_and_count_less(synonyms):
  assert meteor.aligned("large autos ran".split(), "run big automobile".split(), synonyms) == [
    (0, 1), (1, 2), (2, 0)]
  assert meteor.aligned(["goose"], ["gooses", "twit"], synonyms) == [(0, 0)]  # by their stems
  assert meteor.aligned(["geese"], ["goose", "twit"], synonyms) == [(0, 1)]
  assert meteor.aligned(["auto", "auto"], ["tip", "automobile"], synonyms) == [(1, 1)]
  # 1 and a synonym of 3 and 2 words, in one piece
  precision, recall = 1.8 / 3, 1.8 / 2
  want = precision * recall / (0.9 * precision + 0.1 * recall) * (1 - 0.5 / 8)
  assert meteor.of_words("a big auto".split(), "big automobile".split(), synonyms) == pytest.approx(
    want)
  assert meteor.meteor("An auto.", ["two cats", "AUTOMOBILE!"], synonyms) == pytest.approx(
    0.4 * 0.8 / (0.9 * 0.4 + 0.1 * 0.8) * 0.5)
  assert meteor.meteor("An auto.", ["AUTOMOBILE!"]) == 0


def test_explanations_are_compared_by_synonyms(synonyms):
  found, golds = ["yes because autos"], [["no because automobiles run"]]
  assert explained.explanation_scores(found, golds)["METEOR"].corpus == 0
  got = explained.explanation_scores(found, golds, synonyms)["METEOR"].corpus
  assert got == meteor.of_words(["auto"], ["automobile", "run"], synonyms) > 0


@pytest.mark.parity
def test_scores_are_nltks_without_synonyms():
  score = pytest.importorskip("nltk.translate.meteor_score", reason="needs nltk")
  porter = pytest.importorskip("nltk.stem.porter").PorterStemmer

  class NoWordNet:
    def synsets(self, word):
      return []

  stemmer = porter(mode=porter.ORIGINAL_ALGORITHM)
  pool = "a the dog dogs running runs jumped jumping grass green happily happy".split()
  rng = np.random.default_rng(0)
  for length, other in itertools.product(range(8), range(1, 8)):
    for _ in range(4):
      found, gold = (rng.choice(pool, n).tolist() for n in (length, other))
      want = score.single_meteor_score(gold, found, stemmer=stemmer, wordnet=NoWordNet())
      assert meteor.of_words(found, gold) == pytest.approx(want, abs=1e-12)
