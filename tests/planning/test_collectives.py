"""What devices exchange, read from small texts in each of the forms that XLA prints."""

import numpy as np
import pytest

from safemoe_jax.planning.collectives import collectives, replica_groups
from safemoe_jax.planning.hlo import Program


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}, use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("{}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0), dimensions={0}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['x'=2,'y'=4] {'y'}, dimensions={1}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['x'=2,'y'=4] {'x'}, dimensions={1}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['x'=2,'y'=4] {'x','y'}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}, a=1", [[0, 2], [1, 3]]),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['x'=8] {'x':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_every_form_of_replica_groups(text, groups):
    assert replica_groups(text, 8).tolist() == groups


def test_a_form_that_is_not_known_is_no_guess():
    with pytest.raises(ValueError, match="unknown form: @mesh"):
        replica_groups("@mesh<x=2> {x}", 2)


TEXT = """
HloModule jit_step

%gather_begins (p.1: bf16[1,256]) -> (bf16[1,256], bf16[4,256]) {
  %p.1 = bf16[1,256]{1,0} parameter(0)
  %all-gather.1 = bf16[4,256]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[2,4]<=[8]
  ROOT %c = (bf16[1,256]{1,0}, bf16[4,256]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%gather_ends (p.2: bf16[1,256], p.3: bf16[4,256]) -> bf16[4,256] {
  %p.2 = bf16[1,256]{1,0} parameter(0)
  %p.3 = bf16[4,256]{1,0} parameter(1)
  %all-gather.2 = bf16[4,256]{1,0} all-gather(%p.2), channel_id=7, replica_groups=[2,4]<=[8]
  ROOT %d = bf16[4,256]{1,0} custom-call(%p.2, %p.3, %all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%body (carry: (s32[], f32[128], bf16[1,256])) -> (s32[], f32[128], bf16[1,256]) {
  %carry = (s32[], f32[128]{0}, bf16[1,256]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%carry), index=0
  %x = f32[128]{0} get-tuple-element(%carry), index=1
  %w = bf16[1,256]{1,0} get-tuple-element(%carry), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%at, %two)
  %begin = (bf16[1,256]{1,0}, bf16[4,256]{1,0}) fusion(%w), kind=kCustom, calls=%gather_begins
  %b0 = bf16[1,256]{1,0} get-tuple-element(%begin), index=0
  %b1 = bf16[4,256]{1,0} get-tuple-element(%begin), index=1
  %end = bf16[4,256]{1,0} fusion(%b0, %b1), kind=kCustom, calls=%gather_ends
  %sum = f32[128]{0} all-reduce(%x), channel_id=8, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %out = (s32[], f32[128]{0}, bf16[1,256]{1,0}) tuple(%next, %sum, %w)
}

%condition (carry.1: (s32[], f32[128], bf16[1,256])) -> pred[] {
  %carry.1 = (s32[], f32[128]{0}, bf16[1,256]{1,0}) parameter(0)
  %at.1 = s32[] get-tuple-element(%carry.1), index=0
  %limit = s32[] constant(12)
  ROOT %lt = pred[] compare(%at.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[128], w.1: bf16[1,256]) -> f32[16] {
  %x.1 = f32[128]{0} parameter(0), metadata={op_name="x"}
  %w.1 = bf16[1,256]{1,0} parameter(1), metadata={op_name="w[\\'k\\']"}
  %zero = s32[] constant(0)
  %start = s32[] copy(%zero)
  %init = (s32[], f32[128]{0}, bf16[1,256]{1,0}) tuple(%start, %x.1, %w.1)
  %loop = (s32[], f32[128]{0}, bf16[1,256]{1,0}) while(%init), condition=%condition, body=%body
  %y = f32[128]{0} get-tuple-element(%loop), index=1
  %alone = f32[128]{0} all-reduce(%y), channel_id=9, replica_groups=[8,1]<=[8], to_apply=%add
  %permuted = (f32[128]{0}, f32[128]{0}, u32[], u32[]) collective-permute-start(%alone), channel_id=3, source_target_pairs={{0,1},{1,0},{2,2}}
  %moved = f32[128]{0} collective-permute-done(%permuted)
  %exchanged = f32[128]{0} all-to-all(%moved), channel_id=4, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %scattered = f32[16]{0} reduce-scatter(%exchanged), channel_id=5, replica_groups=mesh['x'=8] {'x'}, to_apply=%add
}
"""  # noqa: E501 - as XLA prints it


def test_bytes_of_each_kind_and_how_often():
    """A ring's lower bounds; an exchange among one device moves nothing, one that is written as
    beginning and end counts once, and what is in a loop as often as the loop runs: 0, 2, .. 10."""
    program = Program.parse(TEXT)
    listed = collectives(program, program.runs(), num_devices=8)
    assert len(listed) == 5
    found = {one.kind: one for one in listed}
    assert {kind: (one.bytes, one.runs) for kind, one in found.items()} == {
        "all-gather": (4 * 256 * 2 * 3 / 4, 6),
        "all-reduce": (2 * 128 * 4 / 2, 6),
        "collective-permute": (128 * 4, 1),
        "all-to-all": (128 * 4 * 7 / 8, 1),
        "reduce-scatter": (16 * 4 * 7, 1),
    }
    np.testing.assert_array_equal(found["collective-permute"].groups, [[0, 1], [1, 0]])
    np.testing.assert_array_equal(found["reduce-scatter"].groups, [range(8)])


def test_a_loop_of_unknown_length_runs_as_often_as_is_said():
    counted = Program.parse(TEXT.replace("constant(12)", "parameter(1)"))
    assert counted.runs(unknown_trips=3)["body"] == 3
