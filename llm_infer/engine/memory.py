"""Memory of devices: what programs and arrays take of it, and what is said when it runs out."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from llm_infer.base.errors import CapacityError, UserError
from llm_infer.config import EngineConfig
from llm_infer.models.load import LoadedModel


def page_dtype(model: LoadedModel, config: EngineConfig, platform: str) -> jnp.dtype:
    """Returns the type of the keys and values in the pages.

    Raises:
        UserError: the platform has no pages of this type.
    """
    if config.cache.dtype == "int8" and platform != "cpu":
        raise UserError(
            f"kv_cache_dtype='int8': expected a CPU, where pages hold scales, found {platform}: use auto or bfloat16"
        )
    return model.dtype if config.cache.dtype is None else jnp.dtype(config.cache.dtype)


def device_bytes(compiled: jax.stages.Compiled) -> int:
    """Counts the bytes a program needs on each device while it runs: arguments, temporaries, results that are not in place of
    an argument, and code."""
    found = compiled.memory_analysis()
    assert found is not None, "every backend of JAX says what its programs take"
    in_and_out = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return in_and_out + found.temp_size_in_bytes + found.generated_code_size_in_bytes


def local_bytes(arrays: Any) -> int:
    """Counts the bytes on each device of arrays, or of their descriptions (a pytree)."""

    def one(x: jax.Array | jax.ShapeDtypeStruct) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(one, jax.tree.leaves(arrays)))


def memory_limit(devices: Iterable[jax.Device]) -> int:  # pyright: ignore[reportInvalidTypeForm]
    """Returns bytes of the smallest of this host's devices: what its allocator may hand out; of CPU devices, a share of what
    the machine has free: nothing else keeps a pool from taking the memory that other programs are in."""
    devices = [device for device in devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() for device in devices]
    limits = [each["bytes_limit"] for each in stats if each and "bytes_limit" in each]
    return min(limits) if limits else free_memory() // len(devices)


def free_memory(meminfo: str = "/proc/meminfo") -> int:
    """Counts the bytes of memory that programs may still take, file caches included; all where the system does not tell."""
    try:
        with open(meminfo) as lines:
            found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        found = []
    return int(found[0]) << 10 if found else physical_memory()


def physical_memory() -> int:
    """Counts the bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether a device, or the compiler for it, has run out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@contextmanager
def out_of_memory_names_the_setting() -> Iterator[None]:
    """Turns an out-of-memory error of a device into a CapacityError that says what to change."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise CapacityError(
            f"the device is out of memory ({str(error).splitlines()[0]:.200}): lower memory_utilization (or num_pages, "
            "kv_cache_memory), max_num_batched_tokens or max_num_seqs, or raise tensor_parallel_size"
        ) from error


def release_free_memory() -> None:
    """Gives memory that compilers have freed back to the system; glibc's allocator would keep it (200 MB were seen)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
