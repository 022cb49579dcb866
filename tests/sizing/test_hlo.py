"""Counting what a compiled program does from the text of its HLO."""
# ruff: noqa: E501  HLO has long lines

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.sizing import hlo

TEXT = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[8,16], q: bf16[16,4]) -> f32[8,4] {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[16,4]{1,0} parameter(1)
  ROOT %product = f32[8,4]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], f32[8,4], bf16[8,16], bf16[16,4])) -> (s32[], f32[8,4], bf16[8,16], bf16[16,4]) {
  %state = (s32[], f32[8,4]{1,0}, bf16[8,16]{1,0}, bf16[16,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[] add(%i, %two)
  %x = bf16[8,16]{1,0} get-tuple-element(%state), index=2
  %w = bf16[16,4]{1,0} get-tuple-element(%state), index=3
  %y = f32[8,4]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/while/dot"}
  %start = (bf16[4,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%w), dimensions={0}, replica_groups=[1,4]<=[4]
  %done = bf16[16,4]{1,0} all-gather-done(%start)
  ROOT %out = (s32[], f32[8,4]{1,0}, bf16[8,16]{1,0}, bf16[16,4]{1,0}) tuple(%next, %y, %x, %w)
}

%condition (state: (s32[], f32[8,4], bf16[8,16], bf16[16,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(11)
  %state.1 = (s32[], f32[8,4]{1,0}, bf16[8,16]{1,0}, bf16[16,4]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

%costly (p.1: bf16[8,16]) -> f32[8,8] {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  ROOT %square = f32[8,8]{1,0} dot(%p.1, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%cheap (p.2: bf16[8,16]) -> f32[8,8] {
  %p.2 = bf16[8,16]{1,0} parameter(0)
  ROOT %zeros = f32[8,8]{1,0} constant({...})
}

ENTRY %main (x: bf16[8,16], w: bf16[16,4], flag: pred[]) -> f32[8,8] {
  %x.2 = bf16[8,16]{1,0} parameter(0)
  %w.2 = bf16[16,4]{1,0} parameter(1)
  %flag = pred[] parameter(2)
  %one = s32[] constant(1)
  %y.2 = f32[8,4]{1,0} constant({...})
  %first = (s32[], f32[8,4]{1,0}, bf16[8,16]{1,0}, bf16[16,4]{1,0}) tuple(%one, %y.2, %x.2, %w.2)
  %loop = (s32[], f32[8,4]{1,0}, bf16[8,16]{1,0}, bf16[16,4]{1,0}) while(%first), condition=%condition, body=%body
  %kernel = f32[8,8]{1,0} custom-call(%x.2), custom_call_target="tpu_custom_call"
  %all = (f32[8,4]{1,0}, f32[2]{0}) all-reduce(%y.2, %w.2), replica_groups={}, to_apply=%add
  ROOT %chosen = f32[8,8]{1,0} conditional(%flag, %x.2, %x.2), true_computation=%costly, false_computation=%cheap, metadata={op_name="jit(step)/rare/cond"}
}
"""


def test_a_text_by_hand():
  counts = hlo.count(TEXT)
  # The counter goes 1, 3, 5, 7, 9: five trips of an [8,16] by [16,4] product; then one product of
  # [8,16] by [16,8].
  assert counts.product_flops == 5 * 2 * 8 * 4 * 16 + 2 * 8 * 8 * 16
  gather, reduce = counts.collectives["all-gather"], counts.collectives["all-reduce"]
  assert (gather.count, gather.num_bytes) == (5, 5 * 16 * 4 * 2)
  assert (reduce.count, reduce.num_bytes) == (1, 8 * 4 * 4 + 2 * 4)
  assert counts.num_kernels == 1 and counts.unknown_loops == 0


def test_a_branch_that_runs_at_a_share_of_the_times():
  whole, rare = hlo.count(TEXT), hlo.count(TEXT, {"rare": 0.25})
  assert whole.product_flops - rare.product_flops == 0.75 * 2 * 8 * 8 * 16
  assert hlo.count(TEXT, {"other": 0.25}).product_flops == whole.product_flops


def test_a_loop_of_unknown_length_is_said_to_be_one():
  text = TEXT.replace("direction=LT", "direction=NE")
  counts = hlo.count(text)
  assert counts.unknown_loops == 1
  assert counts.product_flops == 2 * 8 * 4 * 16 + 2 * 8 * 8 * 16
  stated = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
  assert hlo.count(stated).product_flops == 7 * 2 * 8 * 4 * 16 + 2 * 8 * 8 * 16


@pytest.mark.parametrize("length, window, output, reads", [
  # Several products with one left side: each output position meets it once, all else is padding.
  (1, "size=3 pad=2_2 rhs_reversal=1", 3, 3),
  (3, "size=3 pad=2_2", 5, 9),
  (3, "size=2", 2, 4),
  (3, "size=2 stride=2", 1, 2),
  (3, "size=2 pad=1_1 lhs_dilate=2", 6, 6),
])
def test_products_written_as_convolutions(length, window, output, reads):
  """`reads`: pairs of output and window position that meet an element, counted by hand."""
  size = window[5]
  text = f"""\
ENTRY %main (x: f32[{length},8,7], w: f32[{size},7,5]) -> f32[{output},8,5] {{
  %x = f32[{length},8,7]{{2,1,0}} parameter(0)
  %w = f32[{size},7,5]{{2,1,0}} parameter(1)
  ROOT %y = f32[{output},8,5]{{2,1,0}} convolution(%x, %w), window={{{window}}}, dim_labels=0bf_0io->0bf
}}
"""
  assert hlo.count(text).product_flops == 2 * 8 * 5 * 7 * reads


def test_a_collective_spread_over_a_chain_of_fusions_counts_once():
  """As TPUs run one beside products: each fusion of the chain repeats it, the first starts it."""
  gather = ("%g = f32[32,8]{1,0} all-gather(%p), dimensions={0}, "
            'frontend_attributes={chain_id="0"}')
  text = f"""\
%start (p: f32[8,8]) -> (f32[8,8], f32[32,8]) {{
  %p = f32[8,8]{{1,0}} parameter(0)
  {gather}
  ROOT %s = (f32[8,8]{{1,0}}, f32[32,8]{{1,0}}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%beside (p: f32[8,8]) -> f32[32,8] {{
  %p = f32[8,8]{{1,0}} parameter(0)
  {gather}
  ROOT %t = f32[32,8]{{1,0}} add(%g, %g)
}}

%done (p: f32[8,8]) -> f32[32,8] {{
  %p = f32[8,8]{{1,0}} parameter(0)
  {gather}
  ROOT %t = f32[32,8]{{1,0}} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (x: f32[8,8]) -> f32[32,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %plain = f32[16,8]{{1,0}} all-gather(%x), dimensions={{0}}
  %a = (f32[8,8]{{1,0}}, f32[32,8]{{1,0}}) fusion(%x), kind=kLoop, calls=%start
  %b = f32[32,8]{{1,0}} fusion(%x), kind=kLoop, calls=%beside
  ROOT %c = f32[32,8]{{1,0}} fusion(%x), kind=kLoop, calls=%done
}}
"""
  gathered = hlo.count(text).collectives["all-gather"]
  assert (gathered.count, gathered.num_bytes) == (2, (16 + 32) * 8 * 4)


def test_no_module():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.count("nothing")


def test_a_scanned_program_on_eight_devices():
  """A stack of layers, the batch and the weights split: counts of the compiler's own output."""
  partitioner = MeshConfig(data=1, fsdp=8).build()
  layers, width, rows = 5, 64, 16

  def program(weights, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
    return jnp.sum(x)

  weights = jax.ShapeDtypeStruct(
    (layers, width, width), jnp.float32,
    sharding=NamedSharding(partitioner.mesh, PartitionSpec(None, "fsdp", None)))
  x = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=partitioner.batch_sharding(2))
  with partitioner.activate():
    compiled = jax.jit(jax.grad(program)).lower(weights, x).compile()
  counts = hlo.count(compiled.as_text())
  # Forward, and of each layer the gradients of weights and inputs, the first layer's inputs too.
  assert counts.product_flops == 3 * layers * 2 * rows * width * width / 8
  assert counts.unknown_loops == 0
  gathered = counts.collectives["all-gather"]
  assert gathered.count >= layers  # every layer's weights, at least on the way forward
  assert gathered.num_bytes >= layers * width * width * 4
  assert counts.collectives.keys() & {"all-reduce", "reduce-scatter"}  # the gradients
  # What XLA says itself, which counts the body of a loop once.
  assert compiled.cost_analysis()["flops"] < counts.product_flops
