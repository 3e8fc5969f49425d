"""Bytes on each device in closed form: weights, pages, step buffers, logits. Arithmetic on a configuration, no JAX."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_infer.config import ParallelConfig
from llm_infer.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Cut:
    """Over how many devices a model is cut: data, tensor and expert parallel sizes."""

    dp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def parts(self) -> int:
        """Devices that hold one copy of the model; dense layers and heads are cut over all of them."""
        return self.tp * self.ep

    def copies(self, config: ModelConfig) -> int:
        """Counts the devices that hold the same KV head, where there are more devices than KV heads."""
        return max(1, self.parts // config.num_kv_heads)

    def kv_heads(self, config: ModelConfig) -> int:
        """Counts the KV heads of one device."""
        return config.num_kv_heads * self.copies(config) // self.parts


@dataclass(frozen=True, slots=True)
class StepSize:
    """What decides how much memory a step takes, per data-parallel shard.

    Attributes:
        tokens: T.
        draws: R, rows of logits.
        buffer_words: int32 words of the step's packed buffer.
        slots: sequences that may run at once.
        state_bytes: of the states of recurrent layers on a device.
    """

    tokens: int
    draws: int
    buffer_words: int
    slots: int
    state_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one device.

    Attributes:
        weights: parameters, with every copy of a KV head and the padding of the vocabulary.
        pages: the pool, and that of states.
        buffers: what the host sends and the step returns.
        temporaries: activations of one layer and the logits.
    """

    weights: int
    pages: int
    buffers: int
    temporaries: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.pages + self.buffers + self.temporaries


def weights_of_device(config: ModelConfig, cut: Cut = Cut()) -> int:
    """Counts the weights that one device holds: the sum over what the modules declare."""
    from llm_infer.models.params import split_model  # needs JAX
    from llm_infer.models.sharded import cut_config

    _, specs = split_model(cut_config(config, ParallelConfig(cut.tp, cut.dp, cut.ep)))
    return sum(spec.size_on_device({"tp": cut.tp, "ep": cut.ep}) for spec in specs.values())


def page_bytes(
    config: ModelConfig, cut: Cut, platform: str, page_size: int, dtype: str, layers: int | None = None
) -> int:
    """Counts the bytes of one page of all layers, or of so many, on one device, in the platform's layout."""
    from pallas_kernels.paged_attention import kv_pool_dtype, kv_pool_shape  # needs JAX

    sizes = {
        "num_layers": layers or config.num_attending,
        "page_size": page_size,
        "head_dim": config.head_dim,
    }
    shape = kv_pool_shape(platform, num_pages=2, num_kv_heads=cut.kv_heads(config), dtype=dtype, **sizes)
    return math.prod(shape) // 2 * kv_pool_dtype(platform, dtype).itemsize


def temporaries(config: ModelConfig, cut: Cut, step: StepSize, itemsize: int) -> int:
    """Counts the bytes of activations alive at once in the largest layer, or of the logits, whichever is more.

    A layer holds the residual stream and its norm [T, E], the projections of attention and their rotated copies, or the
    two products of an MLP before they are multiplied; of experts, the rows of all blocks with padding. Logits [R, V] are
    float32, whole on every device, and the sampler looks at up to four arrays of that size.
    """
    width, head_dim = config.hidden_size, config.head_dim
    attention = 3 * config.num_heads // cut.parts * head_dim + 4 * cut.kv_heads(config) * head_dim
    mlp = 3 * config.intermediate_size // cut.parts if config.moe is None else 2 * config.moe.experts_per_token * width
    layer = step.tokens * (3 * width + max(attention, mlp)) * itemsize
    return max(layer, 4 * step.draws * config.vocab_size * 4)


def estimate(
    config: ModelConfig,
    cut: Cut,
    step: StepSize,
    *,
    num_pages: int,
    bytes_of_page: int,
    itemsize: int = 2,
) -> MemoryEstimate:
    """Estimates the memory of one device while a step runs.

    Args:
        config: of the whole model.
        cut: over how many devices.
        step: the largest step.
        num_pages: of a data-parallel shard, the null page included.
        bytes_of_page: see `page_bytes`.
        itemsize: bytes of a weight and of an activation.
    """
    buffers = 4 * (step.buffer_words + 2 * (step.slots + 1) + 2 * step.draws)
    return MemoryEstimate(
        weights_of_device(config, cut) * itemsize,
        num_pages * bytes_of_page + step.state_bytes,
        buffers,
        temporaries(config, cut, step, itemsize),
    )


def pages_beside_weights(config: ModelConfig, cut: Cut, step: StepSize, memory: int, bytes_of_page: int) -> int:
    """Counts the pages that fit `memory` bytes of a device in bfloat16; negative where not even weights and step do."""
    fixed = estimate(config, cut, step, num_pages=0, bytes_of_page=bytes_of_page).total
    return (memory - fixed) // bytes_of_page
