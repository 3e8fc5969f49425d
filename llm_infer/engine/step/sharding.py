"""Where the arguments of a step program lie on the devices, and the program that runs on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from llm_infer.engine.step.state import CONV, StepInputs, StepState
from llm_infer.engine.step.step import StepFunction
from llm_infer.models.config import ModelConfig
from llm_infer.models.params import Params
from llm_infer.parallel.axes import AxisNames
from llm_infer.parallel.collectives import gather_rows
from llm_infer.parallel.rules import num_parts, partition, size_over
from pallas_kernels.paged_attention import KV_HEADS_AXIS, kv_pool_dtype, kv_pool_shape


@dataclass(frozen=True)
class StepSharding:
    """The devices of a model and how a step's arguments are cut over them.

    Attributes:
        config: of the model, as it is cut.
        mesh: None for one device, where nothing is cut.
        platform: cpu, gpu or tpu.
    """

    config: ModelConfig
    mesh: Mesh | None
    platform: str

    @classmethod
    def of(cls, config: ModelConfig, mesh: Mesh | None) -> StepSharding:
        """Makes it for the platform of the mesh's devices, or else the default one."""
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        return cls(config, mesh, "gpu" if platform == "cuda" else platform)

    @property
    def names(self) -> AxisNames:
        """How the mesh calls its axes."""
        return self.config.shards.names

    @property
    def batch(self) -> PartitionSpec:
        """How all is cut but parameters and pages: it has the shards of the batch in front."""
        return partition("batch", names=self.names)

    @property
    def num_shards(self) -> int:
        """Data-parallel shards: dp."""
        return 1 if self.mesh is None else size_over(self.mesh, self.names.dp)

    @property
    def devices(self) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
        """All devices that run the step."""
        return jax.devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)

    def struct(
        self, shape: tuple[int, ...], dtype: DTypeLike, spec: PartitionSpec | None = None
    ) -> jax.ShapeDtypeStruct:
        """Describes an argument, cut as `batch` unless told otherwise."""
        sharding = None if self.mesh is None else NamedSharding(self.mesh, self.batch if spec is None else spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def pool(self, num_pages: int, page_size: int, num_layers: int, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        """Describes the KV pool: `num_pages` of each shard with ids of its own, each for so many layers, and of every page
        each device's heads."""
        shape = kv_pool_shape(
            self.platform,
            num_layers=num_layers,
            num_pages=num_pages,
            page_size=page_size,
            num_kv_heads=self.config.num_kv_heads // self.config.shards.devices,
            head_dim=self.config.head_dim,
            dtype=dtype,
        )
        axes: list[str | None] = [None] * len(shape)
        axes[1], axes[KV_HEADS_AXIS] = "pages", "kv_heads"
        return self.whole(shape, kv_pool_dtype(self.platform, dtype), partition(*axes, names=self.names))

    def states(self, num_states: int, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """Describes the pools of states, by kind: `num_states` of each shard with ids of its own, of which each device has its
        channels; none for models without."""
        config = self.config
        if not config.layers_of("conv"):
            return {}
        channels = config.hidden_size // config.shards.devices
        local = len(config.layers_of("conv")), num_states, config.conv_taps - 1, channels
        return {CONV: self.whole(local, dtype, partition(None, "pages", None, "channels", names=self.names))}

    def whole(self, local: tuple[int, ...], dtype: DTypeLike, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        """Describes the array of which every device has a part of shape `local`."""
        if self.mesh is None:
            return jax.ShapeDtypeStruct(local, dtype)
        sizes = [size * parts for size, parts in zip(local, num_parts(self.mesh, spec, len(local)), strict=True)]
        return self.struct(tuple(sizes), dtype, spec)

    def zeros(self, struct: jax.ShapeDtypeStruct) -> jax.Array:
        """Makes an array of zeros of that description."""
        return jnp.zeros(struct.shape, struct.dtype, device=struct.sharding)

    def jit(
        self,
        step: StepFunction,
        params: Mapping[str, Any],
        state: StepState,
        inputs: StepInputs,
        options: Mapping[str, Any],
    ) -> Any:
        """Jits the step with the state donated, for XLA with these options; the cut of each argument is that of its description.

        Over a mesh every device runs the step on its part of each argument. All collectives are written out in the
        model; the devices of a shard draw the same ids because they gather the same logits.
        """
        if self.mesh is None:
            return jax.jit(step, donate_argnums=1, compiler_options=dict(options))
        cuts = partial(jax.tree.map, lambda x: x.sharding.spec)
        # The first process reads the results of all shards, also of those on other hosts.
        several_hosts = len({device.process_index for device in self.devices}) > 1

        def local_step(params: Params, state: StepState, inputs: StepInputs) -> tuple[StepState, dict[str, Any]]:
            state, outputs = step(params, state, inputs)
            gather = partial(gather_rows, axes=self.names.dp if self.num_shards > 1 else ())
            return state, jax.tree.map(gather, outputs) if several_hosts else outputs

        over_mesh = jax.shard_map(
            local_step,
            mesh=self.mesh,
            in_specs=(cuts(params), cuts(state), cuts(inputs)),
            out_specs=(cuts(state), PartitionSpec() if several_hosts else self.batch),
            check_vma=False,
        )
        return jax.jit(over_mesh, donate_argnums=1, compiler_options=dict(options))
