"""What differs between platforms in a step program: data, chosen from compiled programs' memory analyses."""

from __future__ import annotations

from llm_infer.models.decoder import LayerLoop


def layer_loop(platform: str) -> LayerLoop:
    """Chooses the form of the loop over layers that copies neither weights nor pages.

    A loop keeps the program small whatever the depth. On a GPU it keeps a step out of one CUDA graph and can make XLA copy a
    layer's weights. On a TPU four layers an iteration let XLA fetch the weights of the next layer under this one's
    work: 2 to 13 % fewer cycles of a decode step by its estimate than one layer, and what no loop at all would save.
    """
    loops: dict[str, LayerLoop] = {"gpu": "unroll", "tpu": 4}
    return loops.get(platform, 1)


def query_rows(platform: str, group: int) -> int:
    """Chooses the most query rows of one work item of a prefill, for `group` query heads per KV head.

    A GPU's thread block holds all heads of a group at once: 128 queries are what Hopper's matrix units want. A TPU unpacks
    a block of K and V once per item, so items are as long as the state of all their heads leaves room in VMEM.
    """
    if platform == "tpu":
        return max(16, min(128, 512 // group))
    return max(8, min(128, 128 // group)) if platform == "gpu" else 32
