"""Documents and episodes: pictures fit their marks, and names mean what the pictures show."""

import re
from collections import Counter

import numpy as np
import pytest

from lmops_jax.data.synthetic_pictures import Scenes, scene_texts, sequences
from tests.data.synthetic_pictures.recognition import recognised

WORLD = Scenes()
LARGE = Scenes(side=240, least_side=70, largest_side=130)


def test_a_document_tells_of_both_pictures():
  for i in range(30):
    text, pictures = sequences.interleaved(WORLD, 0, i)
    assert text.count("<image>") == len(pictures) == 2 and text.startswith("<image>")
    first, second = text.split("<image>")[1:]
    nums = []
    for said, j in ((first, 0), (second, 1)):
      scene = WORLD.scene(0, 2 * i + j)
      np.testing.assert_array_equal(pictures[j], scene.picture)
      assert all(f"{p.color} {p.shape}" in said for p in scene.pictographs)
      nums.append(len(scene.pictographs))
    last = "Both" if nums[0] == nums[1] else "The first" if nums[0] > nums[1] else "The second"
    assert second.rsplit(". ", 1)[1].startswith(last)


def test_an_introduction_is_the_first_stage_of_a_chain_of_thought():
  scene = WORLD.scene(0, 3)
  text, pictures = sequences.introduction(scene)
  said = scene_texts.description(scene)
  assert text == f"<image> Introduce this picture in detail: {said}"
  np.testing.assert_array_equal(pictures[0], scene.picture)


@pytest.mark.parametrize(
  "attribute,held_out", [("color", False), ("shape", True)])
def test_the_context_of_an_episode_tells_the_name(attribute, held_out):
  place = ("shape", "color").index(attribute)
  for i in range(6):
    episode = sequences.episode(LARGE, 0, i, 2, attribute=attribute, held_out=held_out)
    told = re.findall(r"This is a (\w+)\.", episode.prompt)
    assert episode.prompt.count("<image>") == len(episode.pictures) == 5
    assert Counter(told) == {option.strip(): 2 for option in episode.options}
    values = []
    for picture in episode.pictures:
      (found,) = recognised(picture)
      values.append(found[place])
      assert (found[:2] in LARGE.held_out_pairs) == held_out
    meaning = dict(zip(told, values))
    assert [meaning[name] for name in told] == values[:-1]  # consistent, and one value a name
    assert len(set(meaning.values())) == 2
    assert meaning[episode.options[episode.label].strip()] == values[-1]


def test_names_are_bound_anew_each_time():
  found = [sequences.episode(WORLD, 0, i, 1) for i in range(60)]
  names = {option for episode in found for option in episode.options}
  assert len(names) > 110
  assert {episode.label for episode in found} == {0, 1}
  same = sequences.episode(Scenes(), 0, 7, 1)
  assert same.prompt == found[7].prompt and same.label == found[7].label
  assert all(np.array_equal(a, b) for a, b in zip(same.pictures, found[7].pictures))


def test_no_shots_leave_the_question_alone():
  episode = sequences.episode(WORLD, 0, 0, 0)
  assert episode.prompt == "<image> This is a" and len(episode.pictures) == 1


def test_descriptions_tell_the_name():
  for i in range(10):
    told, plain = (sequences.described(LARGE, 0, i, told=told) for told in (True, False))
    meaning = dict(re.findall(r"Description of (\w+): It is an? (\w+)\.", told.prompt))
    ((shape, _, _),) = recognised(told.pictures[0])
    assert meaning[told.options[told.label].strip()] == shape and len(set(meaning.values())) == 2
    assert told.prompt.endswith("<image> Question:what is the name of the thing in the picture? "
                                "Answer:")
    one, other = (option.strip() for option in plain.options)
    assert plain.prompt == ("<image> Question:what is the name of the thing in the picture, "
                            f"{one} or {other}? Answer:")


@pytest.mark.parametrize("change,message", [
  ({"shots": -1}, "shots=-1 must be 0 or more"),
  ({"attribute": "size"}, "attribute='size' is not what a name can stand for.*shape, color"),
  ({"num_names": 9}, "num_names=9 is not between 2 and 8, the number of shapes"),
  ({"num_names": 7, "held_out": True}, "between 2 and 6, the number of held-out shapes"),
])
def test_bad_episodes(change, message):
  with pytest.raises(ValueError, match=message):
    sequences.episode(WORLD, 0, 0, **{"shots": 1, **change})
