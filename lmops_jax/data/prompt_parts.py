"""Plain prompts made from engineered ones: main content, with and without modifiers.

An engineered prompt is its main content and modifiers behind commas, artists and words of style
(Promptist, arXiv 2212.09611, section 2.1). From it come pairs of two kinds, MC, the main content
alone, and MCM, the main content with modifiers that were partly left out and shuffled. The paper's
rules are not published; those here are ours. Rewordings by another model, RMC and RTP, come from
files (`prompt_pairs.PairFiles`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from lmops_jax.config.setting_types import Distinct, ExistingPath, NonEmpty, Seed, component
from lmops_jax.data.documents import Corpus, document_id
from lmops_jax.data.grit.pairs import draw
from lmops_jax.data.lines import text_lines
from lmops_jax.data.prompt_pairs import Pair, checked_prompt
from lmops_jax.host.hashing import digest
from lmops_jax.host.manifests import hash_file

KINDS = ("MC", "MCM")
# Words that prompts for diffusion models often end in; a file of one's own takes their place.
MODIFIERS = frozenset((
  "4k", "8k", "8k resolution", "artstation", "award winning", "beautiful", "bokeh", "cgsociety",
  "cinematic", "cinematic lighting", "concept art", "depth of field", "detailed", "deviantart",
  "digital art", "digital painting", "dramatic lighting", "elegant", "epic", "fantasy", "hd",
  "high detail", "high quality", "highly detailed", "hyper realistic", "hyperrealistic",
  "illustration", "intricate", "intricate details", "masterpiece", "matte", "matte painting",
  "octane render", "oil painting", "photorealistic", "realistic", "render", "sharp focus", "smooth",
  "soft lighting", "studio lighting", "trending on artstation", "ultra detailed", "ultra realistic",
  "unreal engine", "unreal engine 5", "vivid colors", "volumetric lighting", "watercolor",
))
_SHUFFLED = 0.5  # share of MCM prompts whose modifiers are in another order


class Parts(NamedTuple):
  """An engineered prompt taken apart.

  Attributes:
    main: its main content.
    modifiers: what stands behind, in order.
  """

  main: str
  modifiers: tuple[str, ...]

  def joined(self) -> str:
    """The parts with commas between them."""
    return ", ".join((self.main, *self.modifiers))


def parts_of(prompt: str, lexicon: Collection[str] = MODIFIERS) -> Parts:
  """Takes a prompt apart at its commas.

  The main content are the segments in front of the first one that is in the lexicon, or that names
  who made it ("by ..."); without any, the first segment alone. Empty segments are left out.

  Args:
    lexicon: modifiers in lower case, white space collapsed.
  """
  segments = [part for part in (" ".join(s.split()) for s in prompt.split(",")) if part]
  if not segments:
    return Parts(prompt.strip(), ())
  number = next(
    (i for i, part in enumerate(segments) if _is_modifier(part, lexicon)), 1)
  number = max(number, 1)  # a prompt of modifiers alone is about its first one
  return Parts(", ".join(segments[:number]), tuple(segments[number:]))


def _is_modifier(segment: str, lexicon: Collection[str]) -> bool:
  lowered = segment.lower()
  return lowered in lexicon or lowered.startswith(("by ", "art by "))


def some_modifiers(parts: Parts, identifier: int, seed: int) -> Parts:
  """The main content with some of its modifiers: a function of (seed, id).

  Each modifier stays with a probability that is itself drawn uniformly for this prompt; half of the
  prompts have the rest shuffled.
  """
  share = draw(identifier, "share of modifiers", seed)
  kept = [
    (draw(identifier, f"place of modifier {i}", seed), modifier)
    for i, modifier in enumerate(parts.modifiers)
    if draw(identifier, f"modifier {i}", seed) < share]
  if draw(identifier, "order of modifiers", seed) < _SHUFFLED:
    kept.sort()
  return Parts(parts.main, tuple(modifier for _, modifier in kept))


@component(module="data")
@dataclasses.dataclass(frozen=True)
class EngineeredPrompts:
  """Pairs that are made from engineered prompts.

  Attributes:
    corpus: the engineered prompts, the completions of the pairs.
    kinds: which pairs to make of each: "MC", "MCM" or both.
    lexicon: a file of modifiers, one a line; None takes `MODIFIERS`.
    seed: of what is drawn.
    strict: refuse an unusable prompt; False leaves it out and counts it.
  """

  corpus: Corpus
  kinds: Annotated[Sequence[Literal[KINDS]], NonEmpty, Distinct] = KINDS
  lexicon: ExistingPath | None = None
  seed: Seed = 0
  strict: bool = True

  def fingerprint(self) -> str:
    file = "" if self.lexicon is None else hash_file(Path(self.lexicon).expanduser())
    own = dataclasses.replace(self, lexicon=None)
    return digest([repr(own), self.corpus.fingerprint(), file])

  def pairs(self, counts: Counter[str]) -> Iterator[Pair]:
    """See `prompt_pairs.PairSource`; "same" are prompts that no part was taken from.

    Raises:
      ValueError: if strict, for an unusable prompt, by file and line.
    """
    lexicon = self._lexicon()
    for document in self.corpus.documents(counts):
      try:
        target = checked_prompt(document.text, document.source)
      except ValueError:
        if self.strict:
          raise
        counts["unusable"] += 1
        continue
      whole = parts_of(target, lexicon)
      made = {"MC": Parts(whole.main, ()), "MCM": some_modifiers(whole, document.id, self.seed)}
      for kind in self.kinds:
        prompt = made[kind].joined()
        if prompt in (target, whole.joined()):
          counts["same"] += 1
          continue
        yield Pair(document_id(f"{kind}:{document.id}"), prompt, target, kind, document.source)

  def _lexicon(self) -> Collection[str]:
    if self.lexicon is None:
      return MODIFIERS
    return {" ".join(line.lower().split()) for _, line in text_lines(self.lexicon)}
