"""Kernels for chips that are not here lower through jax.export, which needs no compiler for them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.paged_attention import copy_pages, paged_attention
from pallas_kernels.targets import TARGETS
from pallas_kernels.typical import typical_cases

TPUS = [
    TARGETS["v5e"],
    TARGETS["tpu7x"],
    *(pytest.param(TARGETS[name], marks=pytest.mark.sweep) for name in ("v6e", "v5p")),
]


def exported(target: Any, function: Any, *arguments: Any) -> str:
    device = AbstractDevice(device_kind=target.device_kind, num_cores=1, platform=target.platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        return jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()


@pytest.mark.parametrize("target", TPUS, ids=lambda target: target.name)
def test_tpu_kernels_lower(target):
    from pallas_kernels.paged_attention import AttentionPlan

    for op, label, case in typical_cases("tpu", target.device_kind):
        arrays = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtypes[name])) for name, shape in case.shapes.items()
        }
        if op == "paged_attention":
            plan = AttentionPlan(**{name: arrays.pop(name) for name in AttentionPlan._fields})

            def attend(q: Any, k_new: Any, v_new: Any, pages: Any, plan: Any) -> Any:
                return paged_attention(q, k_new, v_new, pages, plan, layer=0, scale=0.1, implementation="tpu")

            module = exported(target, attend, *arrays.values(), plan)
        elif op == "copy_pages":
            count = jax.ShapeDtypeStruct((), jnp.int32)
            module = exported(target, copy_pages, *arrays.values(), count)
        else:
            continue
        assert "tpu_custom_call" in module, label
