from lmops_jax.host.words import listed, shortened


def test_only_long_texts_are_cut():
  assert shortened("four", 4) == "four"
  assert shortened("fives", 4) == "five..."


def test_items_beyond_the_first_are_counted():
  assert listed(["a", "b"], 2) == "a, b"
  assert listed(["a", "b", "c", "d"], 2) == "a, b and 2 more"
