"""The parts of a transformer: one frozen configuration for every family of language model.

The defaults are Mistral's and Llama's parts. `lmops_jax.pretrained` fills the fields from a
published `config.json`; a gin file sets them one by one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge

from lmops_jax.config.setting_types import (
  Count,
  Decay,
  Positive,
  PositiveInt,
  Size,
  component,
)
from lmops_jax.models import attention as attention_lib

NORMS = ("rms", "layer", "rms_outside")
INITIALIZATIONS = ("normal", "fan_in", "xavier")
SCALINGS = ("magneto", "deepnorm")  # scalings of branches by the number of layers
NORM_PLACEMENTS = ("pre", "post", "parallel")
POSITIONS = ("rotary", "learned", "sinusoidal", "alibi", "none")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu")
REMAT_POLICIES = ("none", "dots", "full")  # the one that recomputes least first
DTYPES = ("float32", "bfloat16", "float16", "float64")
ROPE_SCALINGS = ("linear", "dynamic", "llama3", "yarn", "factors")


@component(module="models")
@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched to contexts longer than those of the first training.

  Attributes:
    kind: "linear" divides every frequency by `factor` (arXiv:2306.15595); "llama3" divides those
      whose wavelength exceeds `original_max_length / low_freq_factor`, keeps those below
      `original_max_length / high_freq_factor`, and goes smoothly between (Llama 3.1); "yarn" keeps
      frequencies with more than `beta_fast` turns in `original_max_length`, divides those with
      fewer than `beta_slow`, and goes in a line between, by the frequency's number
      (arXiv:2309.00071); "dynamic" changes nothing up to `original_max_length`, beyond which its
      frequencies would depend on the length, so that no model may be longer; "factors" divides each
      frequency by its own of `factors`.
    factor: how far frequencies are stretched.
    low_freq_factor, high_freq_factor: for "llama3".
    original_max_length: for "llama3", "yarn" and "dynamic".
    beta_fast, beta_slow: for "yarn".
    truncate: whether "yarn" rounds the ends of its line outwards to whole numbers.
    attention_factor: cosines and sines are multiplied by it; None is `0.1 ln(factor) + 1` for
      "yarn" and 1 for the others.
    factors: for "factors", one for each pair of dimensions that turns.
  """

  kind: Literal[ROPE_SCALINGS] = "linear"
  factor: Annotated[float, Ge(1)] = 1.0
  low_freq_factor: Positive = 1.0
  high_freq_factor: Positive = 4.0
  original_max_length: PositiveInt = 8192
  beta_fast: Positive = 32.0
  beta_slow: Positive = 1.0
  truncate: bool = True
  attention_factor: Positive | None = None
  factors: Sequence[Positive] = ()

  def __post_init__(self):
    object.__setattr__(self, "factors", tuple(self.factors))  # JSON gives a list
    name = "models.RopeScaling"
    if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
      raise ValueError(
        f"{name} has low_freq_factor={self.low_freq_factor} and high_freq_factor="
        f"{self.high_freq_factor}; the first must be below the second."
      )
    if self.kind == "yarn" and not self.beta_slow <= self.beta_fast:
      raise ValueError(
        f"{name} has beta_slow={self.beta_slow} and beta_fast={self.beta_fast}; the first must not "
        "be above the second."
      )
    if (self.kind == "factors") != bool(self.factors):
      raise ValueError(f"{name}.factors belong to kind='factors', and only to it.")

  @property
  def amplitude(self) -> float:
    """The factor of cosines and sines."""
    if self.attention_factor is not None:
      return self.attention_factor
    return 0.1 * math.log(self.factor) + 1 if self.kind == "yarn" else 1.0


@component(module="models")
@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Shape, parts and execution choices of a `Transformer`.

  Attributes:
    vocab_size: V; None until a system fills it from its vocabulary with `dataclasses.replace`.
    num_layers: L.
    width: D.
    num_heads: H query heads.
    num_kv_heads: K key/value heads, a divisor of H; None is H.
    head_dim: E; None is D / H.
    mlp_width: F.
    max_length: longest sequence accepted, and the number of learned positions.
    tied_embeddings: the output matrix is the embedding.
    rope_base: base of the rotary frequencies.
    norm_eps: added to the mean square (or variance) in a norm.
    norm: "rms" (scale), "layer" (mean removed, scale and bias) or "rms_outside" (scale and bias,
      `norm_eps` outside the root).
    norm_placement: "pre", before each part; "post", after each part's residual sum (BERT);
      "parallel", one norm that feeds attention and MLP, whose outputs are added together (GPT-J).
    final_norm: whether there is a norm after the last block.
    sub_norm: one more norm in each part (Magneto, arXiv:2210.06423), in front of its last product:
      that of the merged heads, and that of the hidden MLP after its activation.
    residual_scale: factor of the residual stream before a part is added to it; "deepnorm" is
      `(2L)^(1/4)` (arXiv:2203.00555, decoder or encoder alone).
    positions: "rotary"; "learned" table; "sinusoidal" table, fixed (fairseq's order: all sines,
      then all cosines; a negative position is padding and has the zero vector); "alibi" biases;
      "none".
    xpos: queries and keys turn as with "rotary" positions and also decay with their distance
      (arXiv:2212.10554), beside a table of `positions` or with "none". Its authors use
      `rotary_interleaved` pairs.
    position_offset: rows of a position table in front of position 0 (OPT, XGLM and RoBERTa: 2).
    relative_buckets: rows of a table of biases of scores, one for each head, that all layers share
      (T5, arXiv:1910.10683, section 2.1), beside any `positions` but "alibi"; 0 for none, T5 has
      32. See `positions.relative_buckets`. It needs `causal=False`, and a kind of `attention` that
      is not fused.
    relative_distance: the last row of a half is for distances from about here on (T5: 128).
    rotary_dim: leading dimensions of a head that turn; None is all.
    rotary_interleaved: pairs are neighbours `(2i, 2i+1)` (GPT-J) instead of halves `(i, i + E/2)`.
    rope_scaling: `RopeScaling` or None.
    activation: the MLP's, one of `ACTIVATIONS`; "gelu" is exact, "gelu_tanh" its approximation.
    gated_mlp: `down(act(gate(x)) * up(x))`; False is `down(act(up(x)))`.
    qkv_bias, out_bias, mlp_bias: biases of the attention's and the MLP's products.
    embedding_norm: a norm right after the embeddings (BLOOM, BERT).
    embedding_scale: factor of token embeddings (XGLM: sqrt(D)).
    embedding_width: width of the token embeddings if it is not D; products without bias lead to D
      and back (OPT-350m).
    narrow_embeddings: positions, token types and the embedding norm have the width of the token
      embeddings as well; a product with a bias leads from there to D, and only `head_transform`
      leads back (ELECTRA).
    num_token_types: rows of the token-type table (BERT); 0 for none.
    causal: a position sees itself and earlier ones; False sees all.
    sliding_window: a position sees this many latest positions, itself included; None is all.
    momentum: decay in [0, 1) of momentum attention (`models.momentum`), which adds the decayed sum
      of earlier values to every head; None or 0 is ordinary attention. It needs `causal`, and no
      window, since the sum reaches back to the first token.
    unembedding_bias: bias of the logits.
    head_transform: product, activation and norm in front of the output matrix (BERT's masked LM).
    pooler: product and tanh on the first position (BERT), `Transformer.pooled`.
    detector: product, activation and product to one number at each position (ELECTRA's
      discriminator), `Transformer.detected`.
    attention_scale: factor of the products of queries and keys; None is E^-0.5.
    embedding_dropout: share of the embeddings' numbers that are dropped, in [0, 1). Nothing is
      dropped if the model is called without keys.
    residual_dropout: the same for each part's output, before it is added to the stream.
    attention_dropout: the same for attention's probabilities; not every kind of `attention` has it.
    initialization: "normal" with deviation 0.02 everywhere; or "fan_in", tables standard normal and
      products uniform up to 1 / sqrt(inputs); or "xavier", tables with deviation width^-0.5 and
      products with sqrt(2 / (inputs + outputs)).
    branch_gain: factor of the initial matrices of the MLP and of attention's value and output;
      "magneto" is `sqrt(ln(2L))`, "deepnorm" `(8L)^(-1/4)` (decoder or encoder alone).
    attention: one of `attention.ATTENTION_KINDS`.
    attention_chunk: queries in a block, for "chunked"; a CPU may take more of one head at a time.
    scan_layers: run the blocks under `lax.scan` (compiles once) or unrolled (more to compile,
      fewer copies). Parameters and results are the same.
    remat: what the backward pass recomputes in each block: "none", "full" (all of it), "dots" (all
      but the products with weights).
    dtype: type of activations and products. Norms, softmax and logits are float32.
    param_dtype: type of parameters.

  Raises:
    ValueError: for values that do not make a model; it names the field.
  """

  vocab_size: Size | None = None
  num_layers: Size = 2
  width: Size = 64
  num_heads: Size = 2
  num_kv_heads: Size | None = None
  head_dim: Size | None = None
  mlp_width: Size = 192
  max_length: Size = 1024
  tied_embeddings: bool = False
  rope_base: Positive = 1e4
  norm_eps: Positive = 1e-5
  norm: Literal[NORMS] = "rms"
  norm_placement: Literal[NORM_PLACEMENTS] = "pre"
  final_norm: bool = True
  sub_norm: bool = False
  residual_scale: Positive | Literal["deepnorm"] = 1.0
  positions: Literal[POSITIONS] = "rotary"
  position_offset: Count = 0
  xpos: bool = False
  relative_buckets: Count = 0
  relative_distance: Size = 128
  rotary_dim: Size | None = None
  rotary_interleaved: bool = False
  rope_scaling: RopeScaling | None = None
  activation: Literal[ACTIVATIONS] = "silu"
  gated_mlp: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  embedding_norm: bool = False
  embedding_scale: float = 1.0
  embedding_width: Size | None = None
  narrow_embeddings: bool = False
  num_token_types: Count = 0
  causal: bool = True
  sliding_window: Size | None = None
  momentum: Decay | None = None
  unembedding_bias: bool = False
  head_transform: bool = False
  pooler: bool = False
  detector: bool = False
  attention_scale: Positive | None = None
  embedding_dropout: Decay = 0.0
  residual_dropout: Decay = 0.0
  attention_dropout: Decay = 0.0
  initialization: Literal[INITIALIZATIONS] = "normal"
  branch_gain: Positive | Literal[SCALINGS] = 1.0
  attention: Literal[attention_lib.ATTENTION_KINDS] = "xla"
  attention_chunk: Size = 128
  scan_layers: bool = True
  remat: Literal[REMAT_POLICIES] = "none"
  dtype: Literal[DTYPES] = "float32"
  param_dtype: Literal[DTYPES] = "float32"

  def __post_init__(self):
    name = "models.TransformerConfig"
    if self.head_dim is None and self.width % self.num_heads:
      raise ValueError(
        f"{name}.width={self.width} is not a multiple of num_heads={self.num_heads}; "
        "change one of them or set head_dim."
      )
    if self.key_heads > self.num_heads or self.num_heads % self.key_heads:
      raise ValueError(
        f"{name}.num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}."
      )
    if self.xpos and self.positions in ("rotary", "alibi"):
      raise ValueError(
        f"{name}.xpos=True turns queries and keys itself, beside positions='sinusoidal', 'learned' "
        f"or 'none', and positions={self.positions!r}; choose one of those."
      )
    if self.turns:
      field = "head_dim" if self.rotary_dim is None else "rotary_dim"
      if self.rotary_width % 2:
        raise ValueError(
          f"{name}.{field}={self.rotary_width} must be even, rotary positions turn pairs of "
          "numbers."
        )
      if self.rotary_width > self.head_width:
        raise ValueError(
          f"{name}.rotary_dim={self.rotary_dim} must not exceed head_dim={self.head_width}."
        )
      self._check_rope_scaling(name)
    if self.relative_buckets:
      self._check_relative(name)
    attention_lib.check_dropout(self.attention, self.attention_dropout)
    if self.momentum is not None:
      if not self.causal:
        raise ValueError(
          f"{name}.momentum={self.momentum} needs causal=True: its sum runs over earlier values."
        )
      if self.sliding_window is not None:
        raise ValueError(
          f"{name}.momentum={self.momentum} sums over all earlier values and sliding_window="
          f"{self.sliding_window} hides them; set one of the two to None."
        )

  def _check_relative(self, name: str) -> None:
    num, far = self.relative_buckets, self.relative_distance
    if num % 4 or far <= num // 4:
      raise ValueError(
        f"{name} has relative_buckets={num} and relative_distance={far}; the first must be a "
        "multiple of 4, and the second more than a quarter of it."
      )
    if self.causal:
      raise ValueError(
        f"{name}.relative_buckets={num} needs causal=False: half of the biases are for later "
        "positions, and cached decoding has none."
      )
    if self.positions == "alibi":
      raise ValueError(
        f"{name}.relative_buckets={num} and positions='alibi' both add to the scores; choose one."
      )
    attention_lib.check_bias(self.attention)

  def _check_rope_scaling(self, name: str) -> None:
    scaling = self.rope_scaling
    if scaling is None:
      return
    if scaling.kind == "factors" and len(scaling.factors) != self.rotary_width // 2:
      raise ValueError(
        f"{name}.rope_scaling has {len(scaling.factors)} factors for the {self.rotary_width // 2} "
        "pairs of dimensions that turn; give one for each."
      )
    if scaling.kind == "dynamic" and self.max_length > scaling.original_max_length:
      raise ValueError(
        f"{name}.max_length={self.max_length} exceeds rope_scaling.original_max_length="
        f"{scaling.original_max_length}, beyond which frequencies of kind 'dynamic' would change "
        "with the length, which is not modelled; lower it."
      )
    if scaling.kind == "yarn" and not self.rope_base > 1:
      raise ValueError(f"{name}.rope_base={self.rope_base} must exceed 1 for kind 'yarn'.")

  @property
  def head_width(self) -> int:
    """E."""
    return self.head_dim or self.width // self.num_heads

  @property
  def key_heads(self) -> int:
    """K."""
    return self.num_kv_heads or self.num_heads

  @property
  def rotary_width(self) -> int:
    """Dimensions of a head that turn."""
    return self.rotary_dim or self.head_width

  @property
  def turns(self) -> bool:
    """Whether queries and keys are turned by their positions."""
    return self.positions == "rotary" or self.xpos

  @property
  def residual_factor(self) -> float:
    """`residual_scale` as a number."""
    is_deep = self.residual_scale == "deepnorm"
    return (2 * self.num_layers) ** 0.25 if is_deep else self.residual_scale

  @property
  def branch_factor(self) -> float:
    """`branch_gain` as a number."""
    if self.branch_gain == "magneto":
      return math.sqrt(math.log(2 * self.num_layers))
    return (8 * self.num_layers) ** -0.25 if self.branch_gain == "deepnorm" else self.branch_gain

  @property
  def token_width(self) -> int:
    """Width of the token embeddings."""
    return self.embedding_width or self.width

  @property
  def table_width(self) -> int:
    """Width of positions, token types and the embedding norm."""
    return self.token_width if self.narrow_embeddings else self.width
