"""What differs between platforms in a step program: data, chosen from compiled programs' memory analyses."""

from __future__ import annotations

from llm_infer.models.decoder import LayerLoop


def layer_loop(platform: str, device_kind: str) -> LayerLoop:
    """The form of the loop over layers that copies neither weights nor pages.

    A scan keeps the program small whatever the depth. On a GPU it keeps a step out of one CUDA graph and can make XLA copy a
    layer's weights; on TPU7x it copies all of them, out of the tiles of 8 × 128 that XLA gives to arguments.
    """
    return "unroll" if platform == "gpu" or "TPU7x" in device_kind else "scan"


def query_rows(platform: str, group: int) -> int:
    """Most query rows of one work item of a prefill, for `group` query heads per KV head.

    A GPU's thread block holds all heads of a group at once: 128 queries are what Hopper's matrix units want. A TPU unpacks
    a block of K and V once per item, so items are as long as the state of all their heads leaves room in VMEM.
    """
    if platform == "tpu":
        return max(16, min(128, 512 // group))
    return max(8, min(128, 128 // group)) if platform == "gpu" else 32
