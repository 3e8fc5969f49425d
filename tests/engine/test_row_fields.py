"""The table of per-row fields is all that the draw and the penalties read."""

from __future__ import annotations

import numpy as np

from llm_infer.decoding.penalties import PenaltyRows
from llm_infer.decoding.sample import SamplingRows
from llm_infer.decoding.sampling_params import SamplingParams
from llm_infer.engine.step.row_fields import ROW_FIELDS
from llm_infer.scheduler.request import Request, Sequence


def test_the_table_has_what_the_device_reads() -> None:
    read = {*SamplingRows._fields, *PenaltyRows._fields} - {"position"}  # differs from step to step
    assert sorted(field.name for field in ROW_FIELDS) == sorted(read)


def test_a_seed_is_two_words() -> None:
    fields = {field.name: field for field in ROW_FIELDS}
    for seed in (0, 5, 2**31, 2**32 - 1, 2**63 + 7, 2**64 - 1):
        request = Request("a", [1, 2], SamplingParams(seed=seed))
        words = [fields[name].value(Sequence(request, 0, (0, 0, 0), 8)) for name in ("seed_high", "seed_low")]
        assert int.from_bytes(np.array(words, np.int32).astype(">i4").tobytes()) == seed
