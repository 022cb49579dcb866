"""Kosmos-1's prompts with pictures, word for word."""

import pytest

from lmops_jax.data.tasks import picture_prompts as prompts


def test_prompts_as_the_paper_prints_them():
  assert prompts.CAPTION == "<image> An image of"
  assert prompts.PHOTO == "<image> The photo of the"
  assert prompts.QUESTION.format(question="Is it red?") == (
    "<image> Question: Is it red? Answer:")
  assert prompts.WEB_PAGE.format(text="Some words", question="Who?") == (
    "Given the context below from web page, extract the answer from the given text like this: "
    "Qusestion: Who is the publisher of this book? Answer: Penguin Books Ltd. Context: Some words "
    "Q: Who? A:")


@pytest.mark.parametrize("num,word", [(3, "three"), (4, "four"), (8, "eight")])
def test_matrices(num, word):
  assert prompts.matrix_prompt(num) == (
    f"Here are {word} images:{' <image>' * num} The following image is: <image> Is it correct?")


def test_a_matrix_of_another_size_is_refused():
  with pytest.raises(ValueError, match="a matrix has 5 pictures of context; it has 3"):
    prompts.matrix_prompt(5)


def test_the_second_stage_of_a_chain_of_thought():
  question = "Question: what is the sentiment of the opinion? Answer:"
  assert prompts.after_rationale(" It reads well. ") == f"<image> It reads well. {question}"
  assert prompts.after_rationale(" \n") == prompts.SENTIMENT == f"<image> {question}"


def test_descriptions_come_before_the_picture():
  names, texts = ("three toed", "downy"), ("It has stripes.", "It has spots.")
  assert prompts.described_prompt("woodpecker", names, texts) == (
    "Description of three toed: It has stripes. Description of downy: It has spots. <image> "
    "Question:what is the name of the woodpecker in the picture? Answer:")
  assert prompts.described_prompt("woodpecker", names) == (
    "<image> Question:what is the name of the woodpecker in the picture, three toed or downy? "
    "Answer:")
