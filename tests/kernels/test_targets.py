"""Programs are compiled for every chip of the table, in processes of their own, with the chip's own dispatch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pallas_kernels.targets import TARGETS, Target, environment, why_not

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from pallas_kernels import dispatch
from pallas_kernels.targets import TARGETS, devices, make_mesh
for name in sys.argv[1:]:
    target = TARGETS[name]
    assert len(devices(target)) == target.devices_in_topology, name
    mesh = make_mesh(target)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert dispatch.target() == (target.platform, target.device_kind), dispatch.target()
        x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(lambda x: x @ x).lower(x).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 256 * 256, name
    try:
        make_mesh(target, axes={"tp": 64})
    except ValueError as error:
        assert "choose a larger topology" in str(error)
    else:
        raise AssertionError("a mesh of 64 devices was made")
if target.platform == "tpu":
    try:
        devices(target, "3x7x1x9")
    except ValueError as error:
        assert "the nearest is" in str(error), error
    else:
        raise AssertionError("an unknown topology was accepted")
"""


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_program_compiles_for_every_target(platform: str) -> None:
    targets = [target for target in TARGETS.values() if target.platform == platform]
    reason = why_not(targets[0])
    if reason is not None:
        pytest.skip(reason)
    names = [target.name for target in targets]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        env={**os.environ, **environment(targets[0]), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = {target.platform: why_not(target) or "" for target in TARGETS.values()}
    assert "pip install libtpu" in said["tpu"] and "jax-cuda13-plugin" in said["gpu"]


def test_published_figures_have_plausible_units() -> None:
    for target in TARGETS.values():
        assert isinstance(target, Target) and 16 << 30 <= target.memory_bytes < 256 << 30
        assert 0.5e12 < target.bytes_per_s < 1e13 and 1e14 < target.flops < 3e15
