"""WordNet's database files against what is known of a small one, and against nltk's reader."""

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from lmops_jax.evaluation import meteor, wordnet
from tests import wordnet_files

WHOLE = Path(os.environ.get("WNSEARCHDIR", "/usr/share/wordnet"))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  return wordnet.read(wordnet_files.write(tmp_path_factory.mktemp("wordnet")))


@pytest.mark.parametrize("word,sets", [
  ("auto", "noun00000010"), ("bank", "noun00000020 noun00000030 verb00000010"),
  ("dog", ""), ("", ""),
  ("geese", "noun00000060"), ("went", "verb00000040"), ("best", "adv00000010"),  # exceptions
  ("runs", "noun00000070 verb00000040"), ("churches", "noun00000050"), ("women", "noun00000080"),
  ("banking", "noun00000020 noun00000030 verb00000010"), ("largest", "adj00000010"),
  ("larger", "adj00000010"), ("going", "verb00000040"),
  ("running", ""),  # the double letter is no rule of WordNet's
  ("gooses", "noun00000060"), ("twitss", ""),
])
def test_sets_of_words_and_of_their_base_forms(words, word, sets):
  assert words.synonyms(word) == frozenset(sets.split())


@pytest.mark.parametrize("name,text,message", [
  ("noun.exc", None, "has no noun.exc; give the folder of WordNet's database files, such as dict"),
  ("index.adv", "well r 2 0 1 1 00000010\n", "index.adv:1: 'well r 2 0 1 1 00000010' is not a"),
  ("index.adv", "well r one 0 1 1 00000010\n", "index.adv:1: 'well r one 0 1 1 00000010' is not"),
  ("index.adv", "  licence\n\n", "index.adv:2: '' is not a word with the offsets of its sets"),
  ("adj.exc", "bigger big\nolder\n", "adj.exc:2: 'older' is not a form with its base forms"),
])
def test_a_wrong_folder_is_named(tmp_path, name, text, message):
  folder = wordnet_files.write(tmp_path)
  (folder / name).unlink() if text is None else (folder / name).write_text(text)
  with pytest.raises(ValueError, match=message):
    wordnet.read(folder)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
  """Ours and nltk's reader of WordNet's own files."""
  nltk = pytest.importorskip("nltk", reason="needs nltk")
  if not (WHOLE / "index.noun").is_file():
    pytest.skip(f"needs WordNet's database files in {WHOLE}, as Debian's wordnet-base has them, or "
                "in the folder that WNSEARCHDIR names")
  folder = tmp_path_factory.mktemp("whole")
  for path in WHOLE.iterdir():
    shutil.copyfile(path, folder / path.name)
  if not (folder / "lexnames").exists():  # Debian leaves it out; nltk wants it and asks for none
    (folder / "lexnames").write_text("".join(f"{i:02} part.{i} 1\n" for i in range(45)))

  class Reader(nltk.corpus.reader.WordNetCorpusReader):
    def map_wn(self, version="wordnet"):  # is for other languages, and in files of nltk's
      return {}

  nltk.data.path.append(str(folder))  # it reads nothing elsewhere
  with warnings.catch_warnings(action="ignore"):  # of other languages
    yield wordnet.read(WHOLE), Reader(str(folder), None)
  nltk.data.path.remove(str(folder))


def _sets(reader, word):
  """nltk's sets of a word and of its base forms, by our names."""
  parts = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
  return {f"{parts[of.pos()]}{of.offset():08}": of for of in reader.synsets(word)}


@pytest.mark.parity
def test_sets_are_those_of_nltk(readers):
  """Of words as they stand all of them. Base forms differ: METEOR 1.5 takes those of the
  exceptions, or the first regular one, over all parts of speech, and nltk each one in its own
  part of speech: "advertiser" has the sets of "advertise" for METEOR alone, and "analyses" those
  of the verb for nltk alone.
  """
  ours, theirs = readers
  assert set(ours.sets) == set(theirs.all_lemma_names())
  some, num_equal = list(ours.sets)[::50], 0
  for word in some:
    want = _sets(theirs, word)
    own = {key for key, of in want.items() if word in map(str.lower, of.lemma_names())}
    assert ours.sets[word] == own, word
    num_equal += ours.synonyms(word) == set(want)
  assert num_equal > 0.95 * len(some)


@pytest.mark.parity
def test_pairs_and_scores_are_nltks_where_words_are_their_own_base_forms(readers, monkeypatch):
  """nltk asks for base forms in answers alone, and asks WordNet for what the stemmer has left."""
  score = pytest.importorskip("nltk.translate.meteor_score", reason="needs nltk")
  porter = pytest.importorskip("nltk.stem.porter").PorterStemmer
  ours, theirs = readers

  def plain(word):
    found = _sets(theirs, word)
    names = [name for of in found.values() for name in of.lemma_names()]
    return (meteor.stem(word) == word and set(found) == ours.synonyms(word) == ours.sets[word]
            and all(name == name.lower() for name in names))

  some = "car auto buy purchase big large shut close seat kid child woman dog".split()
  near = {name for word in some for of in theirs.synsets(word) for name in of.lemma_names()}
  pool = sorted(word for word in near if word.isalpha() and word == word.lower() and plain(word))
  assert len(pool) > 40
  rng, stemmer = np.random.default_rng(0), porter(mode=porter.ORIGINAL_ALGORITHM)
  monkeypatch.setattr(meteor, "_SYNONYM", 1.0)  # nltk has no weights
  num_synonyms = 0
  for _ in range(300):
    found, gold = (rng.choice(pool, rng.integers(1, 15)).tolist() for _ in range(2))
    pairs = meteor.aligned(found, gold, ours)
    num_synonyms += sum(found[i] != gold[j] for i, j in pairs)
    assert pairs == score.align_words(found, gold, stemmer=stemmer, wordnet=theirs)[0]
    want = score.single_meteor_score(gold, found, stemmer=stemmer, wordnet=theirs)
    assert meteor.of_words(found, gold, ours) == pytest.approx(want, abs=1e-12)
  assert num_synonyms > 300
