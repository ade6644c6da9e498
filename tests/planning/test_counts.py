"""FLOPs and memory traffic of small texts, by hand."""

from collections import Counter

import pytest

from safemoe_jax.planning.counts import flops, hbm_bytes, kernels
from safemoe_jax.planning.hlo import Array, Program


def program(body, computations=""):
    return Program.parse(f"{computations}\nENTRY %main (a: f32[2]) -> f32[2] {{\n{body}\n}}\n")


def counted(count, body, computations=""):
    found = program(body, computations)
    return count(found, found.runs())


@pytest.mark.parametrize(
    ("layout", "padded"),
    [
        ("1,2,0:T(8,128)", 7 * 256 * 16 * 4),  # 256 is the minor dimension, 16 the next
        ("2,1,0:T(8,128)", 7 * 256 * 128 * 4),
        ("2,1,0:T(8,128)(2,1)S(1)", 7 * 256 * 128 * 4),
        ("", 7 * 256 * 16 * 4),
    ],
)
def test_what_an_array_takes_in_whole_tiles(layout, padded):
    assert Array("f32", (7, 256, 16), layout).padded_bytes == padded


def test_a_number_takes_a_tile():
    assert Array("s32", (), ":T(128)").padded_bytes == 512


def test_flops_of_a_dot():
    assert counted(
        flops,
        """
  %a = bf16[5,7,11]{2,1,0} parameter(0)
  %b = bf16[5,11,13]{2,1,0} parameter(1)
  ROOT %c = bf16[5,7,13]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
""",  # noqa: E501
    ) == (2 * 5 * 7 * 11 * 13)


def test_flops_of_a_matmul_that_is_a_convolution():
    assert counted(
        flops,
        """
  %a = bf16[512,256]{1,0} parameter(0)
  %b = bf16[512,128]{1,0} parameter(1)
  ROOT %c = bf16[256,128]{1,0} convolution(%a, %b), dim_labels=fb_io->bf
""",
    ) == (2 * 512 * 256 * 128)


def test_flops_of_a_matmul_that_is_a_product_and_a_sum():
    assert counted(
        flops,
        """
  %a = f32[16,32]{1,0} parameter(0)
  %b = f32[16,32]{1,0} parameter(1)
  %zero = f32[] constant(0)
  %ab = f32[16,32]{1,0} multiply(%a, %b)
  ROOT %c = f32[16]{0} reduce(%ab, %zero), dimensions={1}, to_apply=%add
""",
    ) == (2 * 16 * 32)


def test_a_batch_that_is_a_window_counts_without_its_padding():
    """Eight matmuls [7, 11] x [11, 13]: of 8 x 8 places, those on the diagonal are no padding."""
    assert counted(
        flops,
        """
  %a = bf16[8,7,11]{2,1,0} parameter(0)
  %b = bf16[8,11,13]{2,1,0} parameter(1)
  ROOT %c = bf16[8,7,13]{2,1,0} convolution(%a, %b), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf
""",  # noqa: E501
    ) == (2 * 8 * 7 * 11 * 13)


SLICED = """
%fused (whole: bf16[6,4,128], at: s32[]) -> bf16[1,4,128] {
  %whole = bf16[6,4,128]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %one = bf16[1,4,128]{2,1,0} dynamic-slice(%whole, %at), dynamic_slice_sizes={1,4,128}
}
%written (whole.1: bf16[6,4,128], new: bf16[1,4,128], at.1: s32[]) -> bf16[6,4,128] {
  %whole.1 = bf16[6,4,128]{2,1,0} parameter(0)
  %new = bf16[1,4,128]{2,1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  ROOT %all = bf16[6,4,128]{2,1,0} dynamic-update-slice(%whole.1, %new, %at.1)
}
%fused_twice (whole.2: bf16[6,4,128], at.2: s32[]) -> bf16[1,4,128] {
  %whole.2 = bf16[6,4,128]{2,1,0} parameter(0)
  %at.2 = s32[] parameter(1)
  %inner = bf16[1,4,128]{2,1,0} fusion(%whole.2, %at.2), kind=kLoop, calls=%fused
  ROOT %twice = bf16[1,4,128]{2,1,0} multiply(%inner, %inner)
}
%written_within (whole.3: bf16[6,4,128], new.3: bf16[1,4,128], at.3: s32[]) -> bf16[6,4,128] {
  %whole.3 = bf16[6,4,128]{2,1,0} parameter(0)
  %new.3 = bf16[1,4,128]{2,1,0} parameter(1)
  %at.3 = s32[] parameter(2)
  ROOT %inner.3 = bf16[6,4,128]{2,1,0} fusion(%whole.3, %new.3, %at.3), kind=kLoop, calls=%written
}
"""


def test_a_slice_counts_as_the_slice_and_what_is_on_chip_not_at_all():
    layer = 4 * 128 * 2
    for fused in ("fused", "fused_twice"):
        read = counted(
            hbm_bytes,
            f"""
  %w = bf16[6,4,128]{{2,1,0}} parameter(0)
  %i = s32[]{{:S(6)}} parameter(1)
  ROOT %s = bf16[1,4,128]{{2,1,0:S(1)}} fusion(%w, %i), kind=kLoop, calls=%{fused}
""",
            SLICED,
        )
        assert read == layer
    for written in ("written", "written_within"):
        updated = counted(
            hbm_bytes,
            f"""
  %w = bf16[6,4,128]{{2,1,0}} parameter(0)
  %n = bf16[1,4,128]{{2,1,0}} parameter(1)
  %i = s32[]{{:S(6)}} parameter(2)
  ROOT %s = bf16[6,4,128]{{2,1,0}} fusion(%w, %n, %i), kind=kLoop, calls=%{written}
""",
            SLICED,
        )
        assert updated == 2 * layer
    copied = counted(
        hbm_bytes,
        """
  %w = bf16[6,4,128]{2,1,0} parameter(0)
  %s = (bf16[6,4,128]{2,1,0:S(1)}, bf16[6,4,128]{2,1,0}, u32[]{:S(2)}) copy-start(%w)
  ROOT %d = bf16[6,4,128]{2,1,0:S(1)} copy-done(%s)
""",
    )
    assert copied == 6 * layer
    prefetched = counted(
        hbm_bytes,
        """
  %w = bf16[6,4,128]{2,1,0} parameter(0)
  %s = (bf16[6,4,128]{2,1,0}, bf16[1,4,128]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:1]}
  ROOT %d = bf16[1,4,128]{2,1,0:S(1)} slice-done(%s)
""",  # noqa: E501
    )
    assert prefetched == layer


def test_a_kernel_is_found_with_its_operands():
    (kernel,) = counted(
        kernels,
        """
  %q = bf16[1,4,256,64]{3,2,1,0} parameter(0)
  ROOT %splash_mha_fwd.2 = bf16[1,4,256,64]{3,2,1,0} custom-call(%q), custom_call_target="tpu_custom_call"
""",  # noqa: E501
    )
    assert kernel.name == "splash_mha_fwd.2"
    assert [array.sizes for array in kernel.arrays] == [(1, 4, 256, 64)] * 2
    assert kernel.runs == 1


def test_runs_of_what_is_not_called_are_none():
    found = program("  ROOT %a = f32[2]{0} parameter(0)", SLICED)
    assert found.runs() == Counter({"main": 1})
