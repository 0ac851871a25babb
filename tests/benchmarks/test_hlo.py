"""A compiled program is read right: a text with known figures, and XLA's own count."""

import importlib.util
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%summed (data: bf16[64,8]) -> (f32[8], f32[4]) {
  %data = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = f32[] constant(0)
  %over = f32[8]{0} reduce(%data, %zero), dimensions={0}, to_apply=%add
  %four = f32[4]{0} slice(%over), slice={[0:4]}
  ROOT %both = (f32[8]{0}, f32[4]{0}) tuple(%over, %four)
}

%far (p: (f32[8], f32[4])) -> f32[8] {
  %p = (f32[8]{0}, f32[4]{0}) parameter(0)
  %part = f32[8]{0} get-tuple-element(%p), index=0
  ROOT %again = f32[8]{0} all-reduce(%part), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%near (q: f32[8]) -> f32[8] {
  ROOT %q = f32[8]{0} parameter(0)
}

%part_of (whole: bf16[64,8], other: f32[8]) -> f32[8] {
  %other = f32[8]{0} parameter(1)
  %whole = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %row = bf16[1,8]{1,0:T(8,128)(2,1)} slice(%whole), slice={[0:1], [0:8]}
  ROOT %y = f32[8]{0} add(%row, %other)
}

%sent (g: f32[16]) -> f32[16] {
  %g = f32[16]{0} parameter(0)
  ROOT %reduced = f32[16]{0} all-reduce(%g), replica_groups=[1,4]<=[4], to_apply=%add, \
metadata={op_name="jit(step)/transpose(jvp(Net))/dot"}
}

ENTRY %main (x: bf16[64,8], w: f32[16]) -> (f32[8], f32[16]) {
  %x = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %w = f32[16]{0} parameter(1)
  %copy-start = (f32[16]{0:S(1)}, f32[16]{0}, u32[]{:S(2)}) copy-start(%w)
  %sums = (f32[8]{0:T(128)S(1)}, f32[4]{0:S(1)}) fusion(%x), kind=kLoop, calls=%summed
  %first = f32[8]{0:S(1)} get-tuple-element(%sums), index=0
  %second = f32[4]{0:S(1)} get-tuple-element(%sums), index=1
  %all = (f32[4]{0}, /*index=1*/f32[8]{0:T(128)S(1)}) all-reduce(%second, %first), \
replica_groups=mesh['data'=4,'model'=2] {'data'}, metadata={op_name="jit(step)/jvp(Net)/sum"}
  %mean = f32[8]{0:S(1)} get-tuple-element(%all), index=1
  %loss = f32[4]{0} get-tuple-element(%all), index=0
  %operands = (f32[8]{0:S(1)}, f32[4]{0:S(1)}) tuple(%mean, %second)
  %which = s32[] constant(0)
  %conditional = f32[8]{0:S(1)} conditional(%which, %operands, %mean), \
branch_computations={%far, %near}
  %fused = f32[8]{0} fusion(%x, %conditional), kind=kLoop, calls=%part_of
  %copy-done = f32[16]{0:S(1)} copy-done(%copy-start)
  %joined = f32[16]{0} custom-call(%fused, %copy-done), custom_call_target="Kernel"
  %call-start = ((f32[16]{0}), f32[16]{0}, u32[]{:S(2)}) async-start(%joined), calls=%sent
  %call-done = f32[16]{0} async-done(%call-start)
  %begun = s32[1]{0:S(2)} call-start(), to_apply=%sent
  %brought = (f32[16]{0}, f32[16]{0}) call-update(%begun, %joined)
  %ended = f32[16]{0} call-done(%brought)
  ROOT %out = (f32[4]{0}, f32[16]{0}) tuple(%loss, %ended)
}
"""


def test_collectives():
    from benchmarks.hlo import Program

    statistics, again, gradient, twin = Program(TEXT).collectives
    assert twin == gradient
    assert statistics.kind == again.kind == gradient.kind == "all-reduce"
    assert [c.in_branch for c in (statistics, again, gradient)] == [False, True, False]
    assert [c.backward for c in (statistics, again, gradient)] == [False, False, True]
    assert [c.group_size for c in (statistics, again, gradient)] == [4, 2, 4]
    assert [a.shape for a in statistics.arrays] == [(4,), (8,)]
    # The mean leads to the gradient through the conditional; the loss leads nowhere.
    assert statistics.awaited == (False, True) and gradient.awaited == (False,)
    assert (statistics.bytes(), statistics.bytes(awaited=True)) == (48, 32)
    assert (gradient.bytes(awaited=True), gradient.bytes(awaited=False)) == (0, 64)


def test_bytes_to_and_from_hbm():
    from benchmarks.hlo import Program

    x, copied, handed_out = 64 * 8 * 2, 16 * 4, 4 * 4
    row_and_result, kernel, reduced = 8 * 2 + 8 * 4, 8 * 4 + 16 * 4, 2 * 16 * 4
    wanted = x + copied + handed_out + row_and_result + kernel + 2 * reduced
    assert Program(TEXT).hbm_bytes == wanted


def test_on_chip_memory_and_kernels():
    from benchmarks.hlo import Program

    program = Program(TEXT)
    copied, sums = 16 * 4, (8 + 4) * 4
    mean = 8 * 4  # of the all-reduce; the conditional's result is its branches'
    assert program.on_chip_bytes == copied + sums + mean
    assert program.kernels["fusion"] == 2 and program.kernels["Kernel"] == 1
    assert program.kernels["conditional"] == 1
    written_by_hand = TEXT.replace('"Kernel"', '"tpu_custom_call"').replace("%joined", "%norm.3")
    assert Program(written_by_hand).kernels["norm"] == 1


def test_a_loop_is_refused():
    from benchmarks.hlo import Program

    text = TEXT.replace("fusion(%x, %conditional), kind=kLoop, calls=", "while(%x), body=")
    with pytest.raises(ValueError, match=r"hbm_bytes: .* Unroll it"):
        _ = Program(text).hbm_bytes


@pytest.mark.optimized
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs: not installed"
)
def test_the_tpu_compiler_counts_the_same():
    """One read and one write; for Flax's norm, which has no branch, XLA's own count."""
    from benchmarks.hlo import Program
    from benchmarks.tpu import mesh_of

    device = jax.sharding.SingleDeviceSharding(mesh_of("v5e:2x2x1").devices[0])
    x = jax.ShapeDtypeStruct((16384, 4096), jnp.bfloat16, sharding=device)
    size = math.prod(x.shape) * 2

    def compiled(function) -> Any:
        return jax.jit(function).trace(x).lower(lowering_platforms=("tpu",)).compile()

    assert Program(compiled(lambda x: x + 1).as_text()).hbm_bytes == 2 * size
    norm = compiled(
        lambda x: nn.RMSNorm(dtype=x.dtype).apply({"params": {"scale": jnp.ones(4096)}}, x)
    )
    passes = Program(norm.as_text()).hbm_bytes / size
    assert passes == pytest.approx(3, abs=0.01)
    assert passes == pytest.approx(norm.cost_analysis()["bytes accessed"] / size, rel=0.02)
