"""Several hosts: one process on each runs the same programs over the devices of all (JAX's distributed runtime).

Process 0 owns requests and scheduler and sends the others what each step computes (`parallel.channel`).
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import socket
from collections.abc import Mapping
from glob import glob

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_infer.base.errors import UserError
from llm_infer.parallel.channel import Follower, Leader, end_process

HEARTBEAT = 10
"""Seconds without a sign of life after which JAX gives a process up for lost, where its connection has not told."""

PATIENCE = 300.0
"""Seconds in which all processes must have started."""

Channel = Leader | Follower

_joined: tuple[Leader, Mapping[str, str]] | None = None
"""A connection that `keep` holds until it is asked for, and its settings. JAX joins processes once in their life."""


def join(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    settings: Mapping[str, str],
    *,
    as_first: bool = False,
) -> Channel | None:
    """Joins the other processes; to be called before JAX does anything else.

    Without arguments this looks for the other processes of a SLURM step or a Cloud TPU slice.

    Args:
        coordinator_address: host and a free port of process 0, e.g. "10.0.0.1:8476".
        num_processes, process_id: how many there are, and which one this is.
        settings: what all processes must agree on, by name.
        as_first: this process must be the first.

    Returns:
        The connection to the others; None for a single process.

    Raises:
        UserError: some of the arguments are missing, a process did not come, one has other settings, or this should be the
            first process and is another.
    """
    global _joined
    if _joined is not None:
        (leader, before), _joined = _joined, None
        if differ := [name for name in settings if settings[name] != before.get(name)]:
            raise UserError(
                f"{', '.join(differ)}: other than what llm_infer.follow was called with; give both the same"
            )
        return leader
    given = (coordinator_address, num_processes, process_id)
    if all(each is None for each in given):
        if not on_cluster():
            return None
    elif any(each is None for each in given):
        raise UserError(
            f"coordinator_address={coordinator_address}, num_processes={num_processes}, process_id={process_id}: "
            "give all three, or none where SLURM or Cloud TPU tells them"
        )
    elif not 0 <= process_id < num_processes:  # type: ignore[operator]
        raise UserError(f"process_id={process_id}: expected 0 to {num_processes - 1}")  # type: ignore[operator]
    if num_processes == 1:
        return None
    if as_first and process_id:
        raise _not_first(process_id)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT,
            initialization_timeout=int(PATIENCE),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes did not come together: {str(error).splitlines()[0]}") from error
    if jax.process_count() == 1:
        return None
    if as_first and jax.process_index():
        raise _not_first(jax.process_index())
    try:
        return _connect(coordinator_address, settings)
    except jax.errors.JaxRuntimeError as error:
        end_process(f"a process is gone ({str(error).splitlines()[0]:.200}): restart all processes")
        raise


def keep(leader: Leader, settings: Mapping[str, str]) -> None:
    """Has the next call of `join` in this process return a connection that exists already."""
    global _joined
    _joined = leader, settings


def _not_first(process: int) -> UserError:
    return UserError(
        f"this is process {process} of several, and only process 0 has an LLM: call llm_infer.follow here, with the same "
        "settings"
    )


def on_cluster() -> bool:
    """Tells whether this is one of several tasks of a SLURM step, or a host of a Cloud TPU slice."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return True
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    chips = bool(glob("/dev/accel0") or glob("/dev/vfio/0")) and importlib.util.find_spec("libtpu") is not None
    return chips and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")


def _connect(coordinator_address: str | None, settings: Mapping[str, str]) -> Channel:
    """Connects the processes; port and a secret travel once through the devices, which only these processes share."""
    settings = {**settings, "jax": jax.__version__, "devices": str(jax.local_device_count())}
    leader = Leader(jax.process_count() - 1, settings) if jax.process_index() == 0 else None
    message = np.zeros(512, np.uint8)
    if leader is not None:
        hosts = [] if coordinator_address is None else [coordinator_address.rpartition(":")[0]]
        text = "\n".join([str(leader.port), *dict.fromkeys([*hosts, socket.gethostname(), _own_address()])]).encode()
        message[: 16 + len(text)] = np.frombuffer(leader.token + text, np.uint8)
    message = np.asarray(multihost_utils.broadcast_one_to_all(message))
    if leader is not None:
        leader.accept(PATIENCE)
        atexit.register(leader.close)
        return leader
    port, *hosts = message[16:].tobytes().rstrip(b"\0").decode().split("\n")
    return Follower(hosts, int(port), message[:16].tobytes(), jax.process_index(), settings)


def _own_address() -> str:
    """Finds the address from which this host reaches others (a datagram socket that sends nothing)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:  # no network at all
            return "127.0.0.1"
        return probe.getsockname()[0]
