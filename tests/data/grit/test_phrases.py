"""Noun chunks and referring expressions of captions that are parsed by hand (needs spaCy)."""

import json

import pytest

from lmops_jax.data.grit import phrases as phrases_lib
from lmops_jax.data.grit.phrases import Phrase, PhraseFinder, SpacyPhrases, phrases_of


def test_without_spacy_its_extra_is_named(monkeypatch):
  monkeypatch.setattr(phrases_lib.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"needs spaCy.*pip install 'lmops_jax\[grit\]'"):
    SpacyPhrases("/data/model")


@pytest.fixture(scope="module")
def parsed():
  """`(words with tag, dependency and head) -> Doc`, as "dog/NOUN/ROOT/1"; punctuation joins."""
  spacy = pytest.importorskip("spacy", reason="needs the extra grit")
  from spacy.tokens import Doc

  vocab = spacy.blank("en").vocab

  def made(text, lemmas=None):
    words, pos, deps, heads = zip(*(word.split("/") for word in text.split()))
    return Doc(
      vocab, words=words, pos=pos, deps=deps, heads=list(map(int, heads)), lemmas=lemmas,
      spaces=[following not in ".,'s" for following in (*words[1:], ".")])
  return made


def _shown(doc):
  found = phrases_of(doc)
  return [(doc.text[p.start : p.end], doc.text[p.expression_start : p.expression_end])
          for p in found.found]


def test_the_papers_example(parsed):
  doc = parsed("a/DET/det/1 dog/NOUN/ROOT/1 in/ADP/prep/1 a/DET/det/4 field/NOUN/pobj/2 "
               "of/ADP/prep/4 flowers/NOUN/pobj/5")
  whole = "a dog in a field of flowers"
  assert _shown(doc) == [
    ("a dog", whole), ("a field", "a field of flowers"), ("flowers", "flowers")]
  assert phrases_of(doc).found[0] == Phrase(0, 5, 0, 27)


def test_what_stands_in_front_and_behind_depends_too(parsed):
  doc = parsed("the/DET/det/2 big/ADJ/amod/2 boat/NOUN/nsubj/7 that/PRON/nsubj/4 "
               "sailed/VERB/relcl/2 off/ADP/prt/4 ,/PUNCT/punct/2 sank/VERB/ROOT/7 ./PUNCT/punct/7")
  shown = dict(_shown(doc))
  assert shown["the big boat"] == "the big boat that sailed off,"


def test_joined_chunks_stay_as_they_are(parsed):
  doc = parsed("a/DET/det/1 cat/NOUN/ROOT/1 and/CCONJ/cc/1 a/DET/det/4 dog/NOUN/conj/1 "
               "on/ADP/prep/4 grass/NOUN/pobj/5")
  assert _shown(doc) == [("a cat", "a cat"), ("a dog", "a dog"), ("grass", "grass")]


def test_abstract_chunks_are_left_out_by_their_root(parsed):
  doc = parsed("the/DET/det/1 Love/NOUN/ROOT/1 of/ADP/prep/1 a/DET/det/5 life/NOUN/compound/5 "
               "jacket/NOUN/pobj/2")
  assert [chunk for chunk, _ in _shown(doc)] == ["a life jacket"]
  assert phrases_of(doc).num_abstract == 1
  doc = parsed("hard/ADJ/amod/1 times/NOUN/ROOT/1", ["hard", "time"])
  assert phrases_of(doc).num_abstract == 1 and phrases_of(doc, ()).num_abstract == 0


def test_a_caption_without_nouns_has_none(parsed):
  assert phrases_of(parsed("running/VERB/ROOT/0 fast/ADV/advmod/0")) == ((), 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A folder with a parser that has learned nothing: what it finds means nothing."""
  spacy = pytest.importorskip("spacy", reason="needs the extra grit")
  nlp = spacy.blank("en")
  parser = nlp.add_pipe("parser", config={"min_action_freq": 1})
  tagger = nlp.add_pipe("tagger")
  for label in ("det", "ROOT", "nsubj"):
    parser.add_label(label)
  tagger.add_label("NN")
  nlp.initialize()
  folder = tmp_path_factory.mktemp("spacy")
  nlp.to_disk(folder / "parser")
  spacy.blank("en").to_disk(folder / "blank")
  return folder


def test_a_model_is_loaded_by_its_folder(model):
  finder = SpacyPhrases(str(model / "parser"))
  assert isinstance(finder, PhraseFinder)
  found = finder.phrases(["a dog", "", "two cats"])
  assert len(found) == 3 and found[1] == ((), 0)
  assert finder.fingerprint() != SpacyPhrases(str(model / "blank")).fingerprint()
  other = SpacyPhrases(str(model / "parser"), abstract_words=("dog",))
  assert finder.fingerprint() != other.fingerprint()


def test_models_that_do_not_parse_are_refused(model, tmp_path):
  with pytest.raises(ValueError, match="parses no dependencies .its parts are none"):
    SpacyPhrases(str(model / "blank")).phrases(["a dog"])
  with pytest.raises(ValueError, match="is no folder of a spaCy model, which has a config.cfg"):
    SpacyPhrases(str(tmp_path))
  (tmp_path / "config.cfg").write_text("[nlp]\nlang = \"xx-unknown\"\n")
  (tmp_path / "meta.json").write_text(json.dumps({"lang": "xx-unknown"}))
  with pytest.raises(ValueError, match="cannot be loaded by spaCy"):
    SpacyPhrases(str(tmp_path)).phrases(["a dog"])
