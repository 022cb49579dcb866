import dataclasses

import gin
import pytest

from lmops_jax.decoding import GenerationOptions


@pytest.mark.parametrize(("changes", "message"), [
  (dict(max_new_tokens=0), "max_new_tokens=0 must be an integer of at least 1"),
  (dict(top_k=-1, temperature=1.0), "top_k=-1 must be an integer of at least 0"),
  (dict(seed=2**32), "below 2"),
  (dict(temperature=-0.5), "temperature=-0.5 must be a number of at least 0"),
  (dict(temperature=float("nan")), "temperature=nan"),
  (dict(top_p=1.5, temperature=1.0), "top_p=1.5 must be a number above 0 and at most 1"),
  (dict(top_p=0.0, temperature=1.0), "top_p=0.0 must be a number above 0"),
  (dict(repetition_penalty=0.0), "repetition_penalty=0.0 must be a number above 0"),
  (dict(top_p=0.9), "temperature=0 samples nothing"),
  (dict(num_beams=4, temperature=1.0), "beam search takes the most probable"),
  (dict(num_beams=4, num_beam_groups=3), "not a multiple of num_beam_groups"),
  (dict(num_beams=4, diversity_penalty=1.0), "between groups"),
  (dict(num_return_sequences=2), "greedy search has one answer"),
  (dict(num_return_sequences=3, num_beams=2), "more than num_beams"),
  (dict(early_stopping="always"), "early_stopping='always' must be True or False, or 'never'"),
  (dict(min_new_tokens=9, max_new_tokens=8), "more than max_new_tokens"),
  (dict(eos_ids=("</s>",)), r"eos_ids\[0\]='</s>' must be an integer"),
  (dict(num_beams=10**12), "num_beams=1000000000000 must be .* at most 1048576"),
  (dict(num_return_sequences=10**12, temperature=1.0), "num_return_sequences=.* at most 1048576"),
  (dict(no_repeat_ngram=10**12), "no_repeat_ngram=1000000000000 must be .* at most 1048576"),
  (dict(temperature=1e-300), "temperature=1e-300 is no number in float32"),
  (dict(num_beams=2, length_penalty=-1e300), "length_penalty=-1e.300 is no number in float32"),
])
def test_a_bad_option_is_named(changes, message):
  with pytest.raises(ValueError, match=message) as error:
    GenerationOptions(**changes)
  assert str(error.value).startswith("decoding.GenerationOptions") and "\n" not in str(error.value)


def test_gin_makes_options():
  with gin.unlock_config():
    gin.parse_config("""
      OPTIONS = @decoding.GenerationOptions()
      decoding.GenerationOptions.max_new_tokens = 5
      decoding.GenerationOptions.eos_ids = [3, 4]
    """)
    options = gin.query_parameter("%OPTIONS").scoped_configurable_fn()
    gin.clear_config()
  assert options == dataclasses.replace(GenerationOptions(), max_new_tokens=5, eos_ids=(3, 4))
