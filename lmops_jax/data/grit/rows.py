"""What becomes of a caption whose phrases were looked for: GrIT's rules, as pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lmops_jax.data.grit.detection import Detection, selected
from lmops_jax.data.grit.phrases import Phrase
from lmops_jax.data.grit.records import GritRow, Region
from lmops_jax.data.grit.spans import outermost
from lmops_jax.data.multimodal import LeftOut


def grounded_row(
  row: GritRow, phrases: Sequence[Phrase], detections: Iterable[Detection], *, min_score: float,
  max_overlap: float, where: str, left_out: LeftOut,
) -> GritRow | None:
  """A caption with the boxes that count.

  Args:
    row: the caption. phrases: what was asked. detections: what was found.
    min_score, max_overlap, where, left_out: see `detection.selected`; expressions that lie in
      another one are counted as "inside".

  Returns:
    The row with noun chunks, surest first, and with the referring expressions that lie in no other
    one and have the boxes of their chunks; None if no box counts.

  Raises:
    ValueError: for a detection of a phrase that was not asked for.
  """
  detections = list(detections)
  for detection in detections:
    if not 0 <= detection.phrase < len(phrases):
      raise ValueError(
        f"the detector gave {where} a box of phrase {detection.phrase}, and it was asked for "
        f"{len(phrases)} phrases; a phrase is given by its index, from 0."
      )
  found = selected(
    detections, min_score=min_score, max_overlap=max_overlap, where=where, left_out=left_out)
  chunks, expressions = [], []
  for detection in found:
    phrase = phrases[detection.phrase]
    chunks.append(Region(phrase.start, phrase.end, detection.box, detection.score))
    expressions.append(Region(
      phrase.expression_start, phrase.expression_end, detection.box, detection.score))
  outer = outermost(expressions)
  if len(outer) < len(expressions):
    left_out.counts["inside"] += len(expressions) - len(outer)
  return row._replace(noun_chunks=tuple(chunks), ref_exps=tuple(outer)) if chunks else None


def sizes(row: GritRow) -> dict[str, int]:
  """Numbers of a row's noun chunks, expressions, and their boxes, for sums over rows."""
  expressions = {(region.start, region.end) for region in row.ref_exps}
  return {
    "rows": 1, "chunks": len({(r.start, r.end) for r in row.noun_chunks}),
    "chunk_boxes": len(row.noun_chunks), "expressions": len(expressions),
    "expression_boxes": len(row.ref_exps),
    "expression_words": sum(len(row.caption[a:b].split()) for a, b in expressions)}
