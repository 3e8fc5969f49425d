"""What the reader of program texts finds."""

from __future__ import annotations

from llm_infer.planner.hlo import read_work

TEXT = """HloModule jit_step, is_scheduled=true

%body (arg: (s32[], bf16[64,4096])) -> (s32[], bf16[64,4096]) {
  %x = bf16[64,4096]{1,0:T(8,128)} fusion(%a), kind=kOutput, backend_config={"estimated_cycles":"100"}
  %reduce = bf16[64,4096]{1,0} all-reduce(%x), channel_id=1, to_apply=%add, backend_config={"estimated_cycles":"7"}
  %start = (bf16[64,4096], bf16[64,4096]) all-reduce-start(%x), to_apply=%add
  %done = bf16[64,4096]{1,0} all-reduce-done(%start)
  %unknown = f32[] custom-call(%x), backend_config={"estimated_cycles":"9223372036854775807"}
}

%condition (arg: (s32[], bf16[64,4096])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%dynamic_condition (arg: (s32[], s32[])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%cheap (arg: f32[]) -> f32[] {
  ROOT %c = f32[] fusion(%arg), backend_config={"estimated_cycles":"1"}
}

%dear (arg: f32[]) -> f32[] {
  ROOT %d = f32[] fusion(%arg), backend_config={"estimated_cycles":"5000"}
}

%on_sparse_core (arg: f32[1,16]) -> f32[8,16] {
  ROOT %all-gather.4 = f32[8,16]{1,0:T(8,128)} all-gather(%arg), channel_id=1, dimensions={0}
}

%elsewhere (arg: bf16[4,16,128]) -> bf16[4,16,128] {
  ROOT %copy.7 = bf16[4,16,128]{2,1,0:T(16,128)(2,1)} copy(%arg)
}

ENTRY %main (p: bf16[2,8]) -> bf16[2,8] {
  %layers = (s32[], bf16[64,4096]) while(%init), condition=%condition, body=%body
  %pages = (s32[], s32[]) while(%init), condition=%dynamic_condition, body=%cheap
  %drawn = f32[] conditional(%p, %a, %b), branch_computations={%dear, %cheap}
  %gathered = f32[8,16032,64]{2,1,0} all-gather(%y), channel_id=2, dimensions={0}
  %moved = bf16[8,128]{0,1} copy(%gathered)
  %near-start = (bf16[8,128]{1,0:S(1)}, bf16[8,128]{1,0}, u32[]) copy-start(%moved)
  %offloaded = ((), (), (s32[8]{0:T(1)S(11)})) custom-call-start(), called_computations={%on_sparse_core}, metadata={}
  %retiled = ((bf16[4,16,128]), bf16[4,16,128], u32[]) call-start(%w), async_execution_thread="sparsecore", to_apply=%elsewhere
  %more = ((f32[1,16]), f32[8,16], (s32[8]{0:T(1)S(11)})) custom-call-update(%offloaded, %y)
  %done = f32[8,16]{1,0:T(8,128)} custom-call-done(%more)
}
"""


def test_loops_count_as_often_as_they_run() -> None:
    work = read_work(TEXT)
    assert work.collectives == {"all-reduce": 64, "all-gather": 2}
    assert work.cycles == 32 * 107 + 1 + 1
    assert work.copies == [8 * 128 * 2, 4 * 16 * 128 * 2]
