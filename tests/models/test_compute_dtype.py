"""The type of weights and activations: what "auto" means where, and what contradicts each other."""

from __future__ import annotations

import pytest

from llm_infer.base.errors import UserError
from llm_infer.models.load import compute_dtype
from pallas_kernels import cpu_ffi, dispatch


@pytest.mark.parametrize(("platform", "expected"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_auto_follows_the_platform(platform: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "target", lambda: (platform, "some device"))
    dtype, stored = compute_dtype("auto", "exact")
    assert dtype == expected
    assert (stored == "exact") == (platform == "cpu" and cpu_ffi.why_not() is None)


def test_a_given_type_leaves_the_form_of_the_file() -> None:
    assert compute_dtype("bfloat16", "exact") == ("bfloat16", None)
    with pytest.raises(UserError, match=r"precision='fast' .*dtype=bfloat16 is not float32"):
        compute_dtype("bfloat16", "fast")
    with pytest.raises(UserError, match=r"dtype='int3': expected auto, float32, bfloat16, float16"):
        compute_dtype("int3", "exact")
