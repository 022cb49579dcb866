"""How fast a run learns: area under the desired loss, compression ratio, acceleration ratio.

"Towards Optimal Learning of Language Models", arXiv 2402.17759, sections 2 and 4. A loss curve is
`[T + 1]`: before the first step, after step 1, ..., after step T.
"""

import numpy as np

UNITS = ("nats", "bits")


def loss_auc(losses) -> float:
  """Mean of the losses after steps 1 to T, the paper's objective over T."""
  return float(np.mean(_curve(losses)[1:]))


def compression_ratio(losses, vocab_size: int, unit: str = "nats") -> float:
  """`T log|V| / sum_{t=1..T} L_t`: how much shorter the desired data get than at |V| equal odds.

  Args:
    losses: `[T + 1]`, in `unit` per token (per label for a classifier).
    vocab_size: |V| >= 2; 2 for a perceptron.
    unit: that of the losses; the logarithm is taken in it too, so that the ratio has no unit.
  """
  if unit not in UNITS:
    raise ValueError(f"unit={unit!r} is not one of {', '.join(UNITS)}.")
  if vocab_size < 2:
    raise ValueError(f"vocab_size={vocab_size} must be at least 2.")
  uniform = np.log(vocab_size) if unit == "nats" else np.log2(vocab_size)
  area = loss_auc(losses)
  return float(uniform / area) if area > 0 else float("inf")


def acceleration_ratio(base_losses, new_losses) -> float | None:
  """`T / t` with t >= 1 the first step after which the new run is at or below the base run's end.

  Returns:
    None if the new run never gets there.
  """
  base, new = _curve(base_losses), _curve(new_losses)
  reached = np.flatnonzero(new[1:] <= base[-1])
  return (len(base) - 1) / (int(reached[0]) + 1) if reached.size else None


def _curve(losses) -> np.ndarray:
  losses = np.asarray(losses, np.float64)
  if losses.ndim != 1 or len(losses) < 2:
    raise ValueError(
      f"a loss curve has shape {losses.shape}; expected [T + 1], T >= 1, with the loss before the "
      "first step in front."
    )
  if not np.isfinite(losses).all():
    raise ValueError(f"the loss after step {int(np.argmin(np.isfinite(losses)))} is not finite.")
  return losses
