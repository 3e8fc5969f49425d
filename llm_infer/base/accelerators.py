"""Tells whether this machine may have an accelerator, before JAX is imported.

JAX loads libtpu and the CUDA plugin wherever they are installed, and both write a screenful when there is no such device.
"""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from importlib.metadata import entry_points

DEVICE_FILES = ("/dev/nvidia*", "/dev/nvmap", "/dev/nvhost*", "/dev/dxg", "/dev/accel*", "/dev/vfio/*")
"""Files that drivers of NVIDIA GPUs (also under Windows' Linux) and of TPUs make; without such a file no process reaches the
device."""


def none_is_here(files: Sequence[str] = DEVICE_FILES) -> bool:
    """Checks that neither a GPU nor a TPU can be here; False if a plugin of JAX for something else is installed."""
    plugins = entry_points(group="jax_plugins")
    known = all(plugin.name.startswith(("cuda", "xla_cuda")) for plugin in plugins)
    return known and not any(glob(pattern) for pattern in files)
