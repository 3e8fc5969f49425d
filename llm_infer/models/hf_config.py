"""Reads a Hugging Face config.json into the fields of a `ModelConfig`; no key is passed over in silence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llm_infer.base.errors import ModelError
from llm_infer.models.config import RopeConfig
from llm_infer.models.config_keys import is_neutral, same

MAX_INTEGER = 2**31 - 1
"""Largest size or position: programs count in int32."""
MAX_THETA = 1e15
"""Published bases of rotary frequencies end at 5e10."""
MAX_FACTOR = 1e6
"""Published factors by which a context grows end at 128."""
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Hugging Face's name of an activation → that of `ModelConfig`."""


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

    def optional_integer(self, key: str) -> int | None:
        """Takes a positive whole number, or null for none."""
        return None if self.take(key, None) is None else self.integer(key)

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
        layers = self.integer("num_hidden_layers")
        # A window of null hides nothing, whatever the switch says.
        switched_on = self.flag("use_sliding_window", False) and self._values.get("sliding_window", 4096) is not None
        # Without the switch these two have no effect.
        self._taken.update(("sliding_window", "max_window_layers"))
        window = self.integer("sliding_window", 4096) if switched_on else None
        first = self.take("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ModelError(f"config.json: max_window_layers={first!r:.60}, expected a whole number from 0")
        kinds = self._layer_types("full_attention", *(["sliding_attention"] if switched_on else []))
        if not kinds:
            kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
        if len(kinds) != layers:
            raise ModelError(f"config.json: layer_types has {len(kinds)} entries, expected num_hidden_layers={layers}")
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
        return windows if any(windows) else ()

    def full_attention(self) -> None:
        """Refuses sliding windows, in the older and the newer way to ask for them."""
        if self.flag("use_sliding_window", False):
            raise ModelError("config.json: use_sliding_window=true is not supported, expected false")
        # Without the switch these two have no effect.
        self._taken.update(("sliding_window", "max_window_layers"))
        self._layer_types("full_attention")

    def same_layers(self) -> None:
        """Refuses layers that do not attend to the whole context."""
        self._layer_types("full_attention")

    def _layer_types(self, *allowed: str) -> list[str]:
        kinds = self.take("layer_types", [])
        if not isinstance(kinds, list):
            raise ModelError(f"config.json: layer_types={kinds!r:.60}, expected a list")
        for kind in kinds:
            if kind not in allowed:
                raise ModelError(f"config.json: layer_types has {kind!r:.60}, which is not supported")
        return kinds

    def layer_windows(self, window: int | None, kinds: Sequence[str] = ()) -> tuple[int | None, ...]:
        """Reads `layer_types`, of full and sliding layers; where they are not listed, `kinds` has them for all layers."""
        found = self._layer_types("full_attention", "sliding_attention") or list(kinds)
        layers = self.integer("num_hidden_layers")
        if found and len(found) != layers:
            raise ModelError(f"config.json: layer_types has {len(found)} entries, expected num_hidden_layers={layers}")
        windows = tuple(window if kind == "sliding_attention" else None for kind in found)
        return windows if any(windows) else ()

    def rope(self, *, partial: bool = False) -> RopeConfig:
        """Reads `rope_theta` with `rope_scaling`, or the newer `rope_parameters` that holds both.

        `partial` says that the architecture may rotate a part of each head.
        """
        name = "rope_parameters" if self.take("rope_parameters", None) else "rope_scaling"
        scaling = self._object(name, self.take(name, {}))
        theta, fraction = self.take("rope_theta", 10000.0), self.take("partial_rotary_factor", 1.0) if partial else 1.0
        result = self._rope(name, scaling, theta, fraction)
        if result.fraction != 1.0 and not partial:
            raise ModelError("config.json: a partial_rotary_factor other than 1 is not supported here")
        return result

    def ropes(self, theta: float, local: float | None = None) -> tuple[RopeConfig, RopeConfig]:
        """Reads the rotations of full and of sliding layers: newer configs hold both by the kind of layer.

        Args:
            theta: base of full layers unless the config says it.
            local: base of sliding layers in older configs without `rope_local_base_freq`, None for that of full layers; their
                rotation is not scaled there.
        """
        parameters = self._object("rope_parameters", self.take("rope_parameters", {}))
        kinds = ("full_attention", "sliding_attention")
        if parameters.keys() & set(kinds):
            if unknown := sorted(parameters.keys() - set(kinds)):
                raise ModelError(f"config.json: unknown keys in rope_parameters: {unknown}")
            full, sliding = (
                self._rope(f"rope_parameters[{kind!r}]", self._object(kind, parameters.get(kind, {})), theta, 1.0)
                for kind in kinds
            )
            return full, sliding
        if self._values.get("rope_theta") is None:
            self._values["rope_theta"] = theta
        full = self.rope()
        if local is None:
            return full, full
        return full, RopeConfig(
            positive("rope_local_base_freq", self.take("rope_local_base_freq", local), MAX_THETA, 1.0)
        )

    @staticmethod
    def _object(name: str, value: object) -> dict[str, Any]:
        """Returns a JSON object without its nulls, which say that a key is not set."""
        if not isinstance(value, dict):
            raise ModelError(f"config.json: {name}={value!r:.60}, expected an object or null")
        return {key: each for key, each in value.items() if each is not None}

    def _rope(self, name: str, scaling: dict[str, Any], theta: object, fraction: object) -> RopeConfig:
        """Reads one rotation; `theta` and `fraction` are used where `scaling` does not say its own."""
        plain = RopeConfig(
            positive("rope_theta", scaling.pop("rope_theta", theta), MAX_THETA, 1.0),
            fraction=positive("partial_rotary_factor", scaling.pop("partial_rotary_factor", fraction), 1.0),
        )
        older = scaling.pop("type", "default")
        kind = str(scaling.pop("rope_type", older))
        if kind == "dynamic":  # sets in behind max_position_embeddings, which no sequence passes
            scaling, kind = {}, "default"
        readers = {"llama3": self._llama3, "yarn": self._yarn, "linear": self._linear}
        if kind in readers and "factor" in scaling and not same(scaling["factor"], 1.0):
            result = readers[kind](name, scaling, plain)
            if scaling:
                raise ModelError(f"config.json: unknown keys in the rope scaling: {sorted(scaling)}")
            return result
        return self._unscaled(plain, kind, scaling)

    def _linear(self, name: str, scaling: dict[str, Any], plain: RopeConfig) -> RopeConfig:
        scaling.pop("original_max_position_embeddings", None)
        return replace(
            plain, kind="linear", factor=positive(f"{name}['factor']", scaling.pop("factor"), MAX_FACTOR, 1.0)
        )

    def _yarn(self, name: str, scaling: dict[str, Any], plain: RopeConfig) -> RopeConfig:
        def number(key: str, default: float) -> float:
            return positive(f"{name}[{key!r}]", scaling.pop(key, default), float(MAX_INTEGER))

        factor = positive(f"{name}['factor']", scaling.pop("factor"), MAX_FACTOR, 1.0)
        # Without a number of its own, or two whose quotient counts, it follows from the factor (Peng et al., section 3.3).
        scales = [number(key, 0.0) if scaling.get(key) else 0.0 for key in ("mscale", "mscale_all_dim")]
        for key in ("mscale", "mscale_all_dim", "finetuned"):
            scaling.pop(key, None)
        grown = [0.1 * each * math.log(factor) + 1.0 for each in (scales if all(scales) else (1.0, 0.0))]
        original = number("original_max_position_embeddings", float(self.integer("max_position_embeddings")))
        fast, slow = number("beta_fast", 32.0), number("beta_slow", 1.0)
        if original != int(original) or fast <= slow or plain.theta == 1.0:
            raise ModelError(
                f"config.json: rope scaling 'yarn' has original_max_position_embeddings={original:g}, beta_fast={fast:g}, "
                f"beta_slow={slow:g}: expected a whole number of positions and a beta_fast above beta_slow"
            )
        return replace(
            plain,
            kind="yarn",
            factor=factor,
            original_max_position=int(original),
            beta_fast=fast,
            beta_slow=slow,
            truncate=bool(scaling.pop("truncate", True)),
            amplitude=number("attention_factor", grown[0] / grown[1]),
        )

    def _llama3(self, name: str, scaling: dict[str, Any], plain: RopeConfig) -> RopeConfig:
        numbers = {}
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            if key not in scaling:
                raise ModelError(f"config.json: rope scaling 'llama3' has no {key!r}")
            numbers[key] = positive(f"{name}[{key!r}]", scaling.pop(key), float(MAX_INTEGER))
        factor, low, high, original = numbers.values()
        if high <= low or factor < 1 or original != int(original):
            raise ModelError(
                f"config.json: rope scaling 'llama3' has factor={factor:g}, low_freq_factor={low:g}, "
                f"high_freq_factor={high:g}, original_max_position_embeddings={original:g}: expected a factor of at least "
                "1, a high one above the low one, and a whole number of positions"
            )
        return replace(
            plain, factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position=int(original)
        )

    def _unscaled(self, plain: RopeConfig, kind: object, scaling: dict[str, Any]) -> RopeConfig:
        """Accepts frequencies as they are: no scaling, or one by the factor 1."""
        neutral = {"factor": 1.0, "attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
        # Where the scaling would set in, which means nothing without one.
        where = {"original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "finetuned"}
        where |= {"low_freq_factor", "high_freq_factor"} if kind == "llama3" else set()
        known = kind == "default" or (kind in ("linear", "yarn", "llama3") and "factor" in scaling)
        if not known or not all(
            key in where or (key in neutral and same(value, neutral[key])) for key, value in scaling.items()
        ):
            raise ModelError(
                f"config.json: rope scaling {kind!r:.60} with {scaling!r:.120} is not supported, expected 'default', "
                "'llama3', 'yarn' or 'linear' with a factor"
            )
        return plain

    def activation(self, key: str = "hidden_act", default: str = "silu") -> str:
        """Reads the activation of a gated MLP, as `ModelConfig` names it."""
        value = self.take(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise ModelError(f"config.json: {key}={value!r:.60} is not supported, expected one of {list(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def llama_like(self, *, partial: bool = False) -> dict[str, Any]:
        """Reads the fields of `ModelConfig` that all Llama-like configs spell the same way; `partial` as for `rope`."""
        return {
            **self.sizes(),
            "rope": self.rope(partial=partial),
            "activation": self.activation(),
            "tie_word_embeddings": self.flag("tie_word_embeddings", False),
        }

    def sizes(self) -> dict[str, Any]:
        """Reads the sizes, and the epsilon of norms."""
        heads, width = self.integer("num_attention_heads"), self.integer("hidden_size")
        return {
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": width,
            "num_layers": self.integer("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": self.integer("num_key_value_heads", heads),
            "head_dim": self.integer("head_dim", max(1, width // heads)),
            "intermediate_size": self.integer("intermediate_size"),
            "max_position_embeddings": self.integer("max_position_embeddings"),
            "norm_eps": self.number("rms_norm_eps", 1e-6, high=1.0),
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


def positive(key: str, value: object, high: float = math.inf, low: float = 0.0) -> float:
    """Returns the value as a finite number above 0, from `low` to `high`.

    Raises:
        ModelError: the value is something else.
    """
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not (0 < value < math.inf and low <= value <= high):  # type: ignore[operator]
        limits = f", from {low:g} to {high:g}" if high < math.inf else ""
        raise ModelError(f"config.json: {key}={value!r:.60}, expected a finite positive number{limits}")
    return float(value)  # type: ignore[arg-type]
