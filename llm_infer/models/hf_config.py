"""Reads a Hugging Face config.json into the fields of a `ModelConfig`; no key is passed over in silence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llm_infer.base.errors import ModelError
from llm_infer.models.config import RopeConfig
from llm_infer.models.config_keys import is_neutral, same
from llm_infer.models.config_numbers import MAX_INTEGER, MAX_LAYERS, MAX_THETA, an_object, positive
from llm_infer.models.hf_rope import read_rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Hugging Face's name of an activation → that of `ModelConfig`."""
FULL, SLIDING, CONV = "full_attention", "sliding_attention", "conv"
"""Kinds of layers, as `layer_types` names them."""


class ConfigReader:
    """Reads a Hugging Face config.json so that no key is passed over in silence.

    Every key is taken, or at a value that changes nothing (see `config_keys`), or an error at `finish`.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._taken: set[str] = set()

    def take(self, key: str, default: Any = ...) -> Any:
        """Returns the value of `key`; without a default a missing key is an error."""
        self._taken.add(key)
        if key in self._values and self._values[key] is not None:
            return self._values[key]
        if default is ...:
            raise ModelError(f"config.json has no {key!r}, which this architecture needs")
        return default

    def integer(self, key: str, default: Any = ...) -> int:
        """Takes a positive whole number."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_INTEGER:
            raise ModelError(f"config.json: {key}={value!r:.60}, expected a positive whole number up to {MAX_INTEGER}")
        return value

    def number(self, key: str, default: Any = ..., *, high: float = math.inf) -> float:
        """Takes a finite positive number, at most `high`."""
        return positive(key, self.take(key, default), high)

    def optional_number(self, key: str) -> float | None:
        """Takes a finite positive number, or null for none."""
        value = self.take(key, None)
        return None if value is None else positive(key, value)

    def count(self, key: str, default: int) -> int:
        """Takes a whole number from 0."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelError(f"config.json: {key}={value!r:.60}, expected a whole number from 0")
        return value

    def optional_integer(self, key: str) -> int | None:
        """Takes a positive whole number, or null for none."""
        return None if self.take(key, None) is None else self.integer(key)

    def ignore(self, *keys: str) -> None:
        """Takes keys that change nothing here, whatever they say."""
        self._taken.update(keys)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuses other values of the key than these: they would change the computation in a way that is not built here."""
        value = self.take(key, allowed[0])
        if not any(same(value, each) for each in allowed):
            raise ModelError(f"config.json: {key}={value!r:.60} is not supported, expected one of {list(allowed)}")

    def flag(self, key: str, default: bool) -> bool:
        """Takes true or false."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"config.json: {key}={value!r}, expected true or false")
        return value

    def windows(self) -> tuple[int | None, ...]:
        """Reads the window of each layer, in the older and the newer way to say which layers have one."""
        # A window of null hides nothing, whatever the switch says.
        switched_on = self.flag("use_sliding_window", False) and self._values.get("sliding_window", 4096) is not None
        # Without the switch these two have no effect.
        self._taken.update(("sliding_window", "max_window_layers"))
        window = self.integer("sliding_window", 4096) if switched_on else None
        first = self.count("max_window_layers", 28)
        default = [FULL if i < first else SLIDING for i in range(self.layers())]
        return self.layer_windows(window, self.kinds(default, FULL, *([SLIDING] if switched_on else [])))

    def full_attention(self) -> None:
        """Refuses sliding windows, in the older and the newer way to ask for them."""
        if self.flag("use_sliding_window", False):
            raise ModelError("config.json: use_sliding_window=true is not supported, expected false")
        # Without the switch these two have no effect.
        self._taken.update(("sliding_window", "max_window_layers"))
        self._layer_types(FULL)

    def same_layers(self) -> None:
        """Refuses layers that do not attend to the whole context."""
        self._layer_types(FULL)

    def _layer_types(self, *allowed: str) -> list[str]:
        kinds = self.take("layer_types", [])
        if not isinstance(kinds, list):
            raise ModelError(f"config.json: layer_types={kinds!r:.60}, expected a list")
        for kind in kinds:
            if kind not in allowed:
                raise ModelError(f"config.json: layer_types has {kind!r:.60}, which is not supported")
        return kinds

    def kinds(self, default: list[str], *allowed: str) -> list[str]:
        """Reads `layer_types`, each one of those allowed; where they are not listed, the default."""
        kinds = self._layer_types(*allowed) or default
        if len(kinds) != len(default):
            raise ModelError(
                f"config.json: layer_types has {len(kinds)} entries, expected num_hidden_layers={len(default)}"
            )
        return kinds

    def layers(self) -> int:
        """Takes the number of layers."""
        found = self.integer("num_hidden_layers")
        if found > MAX_LAYERS:  # lists are made that long
            raise ModelError(f"config.json: num_hidden_layers={found}, expected at most {MAX_LAYERS}")
        return found

    def _context(self) -> int:
        return self.integer("max_position_embeddings")

    def layer_kinds(self, full_every: int | None = None) -> list[str]:
        """Reads `layer_types`, of full and sliding layers; where they are not listed, each `full_every`-th is full, or none."""
        default = [FULL if full_every and (i + 1) % full_every == 0 else SLIDING for i in range(self.layers())]
        return self.kinds(default, FULL, SLIDING)

    def layer_windows(self, window: int | None, kinds: Sequence[str]) -> tuple[int | None, ...]:
        """Returns the window of each layer of these kinds; a window as long as the context hides nothing and is none."""
        if window is None or window >= self._context() or SLIDING not in kinds:
            return ()
        return tuple(window if kind == SLIDING else None for kind in kinds)

    def sliding_windows(self) -> tuple[int | None, ...]:
        """Reads `sliding_window`, of all layers but those that `layer_types` calls full."""
        return self.layer_windows(self.optional_integer("sliding_window"), self.layer_kinds())

    def rope(self, *, partial: bool = False, original: int | None = None, theta: float = 10000.0) -> RopeConfig:
        """Reads `rope_theta` with `rope_scaling`, or the newer `rope_parameters` that holds both.

        `partial` says that the architecture may rotate a part of each head; `original` is the context before the scaling where
        the config has it elsewhere, `theta` the base unless the config says it.
        """
        name = "rope_parameters" if self.take("rope_parameters", None) else "rope_scaling"
        scaling = an_object(name, self.take(name, {}))
        if original is not None and {"short_factor", "long_factor"} <= scaling.keys():
            scaling["original_max_position_embeddings"] = original
        theta, fraction = self.take("rope_theta", theta), self.take("partial_rotary_factor", 1.0) if partial else 1.0
        result = read_rope(name, scaling, theta, fraction, self._context)
        if result.fraction != 1.0 and not partial:
            raise ModelError("config.json: a partial_rotary_factor other than 1 is not supported here")
        return result

    def layer_ropes(self, kinds: Sequence[str], theta: float, local: float | None = None) -> dict[str, Any]:
        """Reads the fields of `ModelConfig` on rotations where those of sliding layers, whatever their window, are others.

        Args:
            kinds: the kind of each layer.
            theta: base of full layers unless the config says it, and of sliding ones where `local` is None.
            local: base of sliding layers unless the config says it. In older configs their rotation is not scaled, and without
                `local` has the base of full layers.
        """
        full, sliding = self._full_and_sliding(theta, local)
        return {"rope": full, "layer_ropes": tuple(sliding if kind == SLIDING else full for kind in kinds)}

    def _full_and_sliding(self, theta: float, local: float | None) -> tuple[RopeConfig, RopeConfig]:
        """Reads both rotations; newer configs hold them by the kind of layer."""
        parameters = an_object("rope_parameters", self.take("rope_parameters", {}))
        if parameters.keys() & {FULL, SLIDING}:
            if unknown := sorted(parameters.keys() - {FULL, SLIDING}):
                raise ModelError(f"config.json: unknown keys in rope_parameters: {unknown}")
            bases = (theta, theta if local is None else local)
            full, sliding = (
                read_rope(
                    f"rope_parameters[{kind!r}]", an_object(kind, parameters.get(kind, {})), base, 1.0, self._context
                )
                for kind, base in zip((FULL, SLIDING), bases, strict=True)
            )
            return full, sliding
        if self._values.get("rope_theta") is None:
            self._values["rope_theta"] = theta
        full = self.rope()
        if local is None:
            return full, RopeConfig(full.theta)
        return full, RopeConfig(
            positive("rope_local_base_freq", self.take("rope_local_base_freq", local), MAX_THETA, 1.0)
        )

    def activation(self, key: str = "hidden_act", default: str = "silu") -> str:
        """Reads the activation of a gated MLP, as `ModelConfig` names it."""
        value = self.take(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise ModelError(f"config.json: {key}={value!r:.60} is not supported, expected one of {list(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def llama_like(self, *, partial: bool = False, original: int | None = None) -> dict[str, Any]:
        """Reads the fields of `ModelConfig` that all Llama-like configs spell the same way; arguments as for `rope`."""
        return {
            **self.sizes(),
            "rope": self.rope(partial=partial, original=original),
            "activation": self.activation(),
            "tie_word_embeddings": self.flag("tie_word_embeddings", False),
        }

    def attention_biases(self) -> dict[str, Any]:
        """Reads the fields of `ModelConfig` on biases where one key speaks of all of attention's projections."""
        biased = self.flag("attention_bias", False)
        return {"qkv_bias": biased, "output_bias": biased}

    def sizes(self, epsilon: str = "rms_norm_eps") -> dict[str, Any]:
        """Reads the sizes, and the epsilon of norms, whose key has this name."""
        heads, width = self.integer("num_attention_heads"), self.integer("hidden_size")
        return {
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": width,
            "num_layers": self.layers(),
            "num_heads": heads,
            "num_kv_heads": self.integer("num_key_value_heads", heads),
            "head_dim": self.integer("head_dim", max(1, width // heads)),
            "intermediate_size": self.integer("intermediate_size"),
            "max_position_embeddings": self.integer("max_position_embeddings"),
            "norm_eps": self.number(epsilon, 1e-6, high=1.0),
        }

    def finish(self) -> None:
        """Raises for every key that was neither taken nor is known to be harmless."""
        left = {key: value for key, value in self._values.items() if key not in self._taken}
        unknown = sorted(key for key, value in left.items() if not is_neutral(key, value))
        if unknown:
            shown = ", ".join(key[:60] if key.isidentifier() else repr(key)[:60] for key in unknown[:20])
            raise ModelError(
                f"config.json has keys this architecture does not know: {shown}. "
                "They may change the computation, so the model is not loaded."
            )
