"""Per-example gradient norms against the rows of the Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.control.gradient_norms import gradient_norms


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_norms_are_those_of_the_jacobian(x64, toy, batch_size):
  problem = toy.regression()
  params = jax.tree.map(jnp.asarray, problem.params)
  rows = jax.jacobian(problem.example_losses)(params, problem.proxy)
  want = np.sqrt(sum(np.square(r).reshape(7, -1).sum(1) for r in jax.tree.leaves(rows)))
  got = gradient_norms(problem.example_losses, params, problem.proxy, batch_size)
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_bad_arguments(toy):
  problem = toy.regression()
  with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
    gradient_norms(problem.example_losses, problem.params, problem.proxy, 0)
  with pytest.raises(ValueError, match="data has leading axes"):
    gradient_norms(
      problem.example_losses, problem.params, jax.tree.map(lambda x: x[:0], problem.proxy))
