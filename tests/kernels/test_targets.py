"""Programs are compiled for every chip of the table, in processes of their own, with the chip's own dispatch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.targets import TARGETS, Target, environment, prepare_libtpu, why_not

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


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("0x0076", None, "FLAG=false"),
        ("0x0076", "--other=1", "--other=1 FLAG=false"),
        ("0x0076", "FLAG=true", "FLAG=true"),
        ("0x0076", "", ""),
        ("0x006f", None, None),  # v6e
        (None, "--other=1", "--other=1"),
    ],
)
def test_libtpu_is_told_on_machines_with_tpu7x_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str | None, given: str | None, expected: str | None
) -> None:
    flag = environment(TARGETS["tpu7x"])["LIBTPU_INIT_ARGS"].removesuffix("=false")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    if given is not None:
        monkeypatch.setenv("LIBTPU_INIT_ARGS", given.replace("FLAG", flag))
    for address, vendor, number in (("0000:00:01.0", "0x8086", "0x0076"), ("0000:00:05.0", "0x1ae0", device)):
        (tmp_path / address).mkdir()
        for name, value in (("vendor", vendor), ("device", number)):
            if value is not None:
                (tmp_path / address / name).write_text(value + "\n")
    (tmp_path / "0000:00:00.0").mkdir()
    (tmp_path / "0000:00:00.0" / "vendor").write_bytes(b"\xff\xfe")  # no text
    prepare_libtpu(tmp_path)
    prepare_libtpu(tmp_path)  # once is enough
    assert os.environ.get("LIBTPU_INIT_ARGS") == (expected and expected.replace("FLAG", flag))


def test_published_figures_have_plausible_units() -> None:
    for target in TARGETS.values():
        assert isinstance(target, Target) and 16 << 30 <= target.memory_bytes < 256 << 30
        assert 0.5e12 < target.bytes_per_s < 1e13 and 1e14 < target.flops < 3e15
