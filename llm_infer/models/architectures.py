"""The published architectures in configs/models: shapes of models that run with random weights, and what they take."""

from __future__ import annotations

import sysconfig
import tomllib
from pathlib import Path
from typing import Any

from llm_infer.base.errors import ModelError
from llm_infer.models.config import ModelConfig
from llm_infer.models.registry import family


def architectures_dir() -> Path:
    """Returns the folder of the TOML files: `configs/models` of the repository, or what the installed distribution has."""
    repository = Path(__file__).parents[2]
    if (repository / "pyproject.toml").is_file():
        return repository / "configs" / "models"
    installed = Path(sysconfig.get_path("data")) / "share" / "llm_infer" / "models"
    if not installed.is_dir():
        raise ModelError(f"the architecture files are not in {installed}: install llm-infer again")
    return installed


def architecture_names() -> list[str]:
    """Returns the names of all architectures, e.g. "llama-3.1-8b"."""
    return sorted(path.stem for path in architectures_dir().glob("*.toml"))


def read_architecture(name: str) -> dict[str, Any]:
    """Reads an architecture as its Hugging Face `config.json` would state it.

    Raises:
        ModelError: there is none of this name.
    """
    if name not in architecture_names():
        raise ModelError(f"no architecture {name!r}; there are {', '.join(architecture_names())}")
    with (architectures_dir() / f"{name}.toml").open("rb") as file:
        return tomllib.load(file)


def architecture_config(name: str, *, fused_qkv: bool = True) -> ModelConfig:
    """Returns the model configuration of an architecture."""
    values = read_architecture(name)
    return family(values).config(values, fused_qkv=fused_qkv)


def table(length: int = 8192) -> str:
    """Lists all architectures with their parameters and the memory of weights and KV pages, as `llm-infer models` prints it.

    Sizes are in GB and MB (10⁹ and 10⁶ bytes); KV bytes are over all layers, of one token and of a sequence of `length` tokens
    (or of the whole context, where it is shorter), of which layers with a window keep fewer. State bytes are those of recurrent
    layers for one sequence, however long it is.
    """
    from llm_infer.models.params import num_parameters  # needs JAX, which names of architectures do not

    head = f"{'architecture':<18}{'parameters':>17}{'float32':>11}{'bfloat16':>11}" + 2 * f"{'KV B/token':>13}"
    units = f"{'':<18}{'':>17}{'GB':>11}{'GB':>11}{'4-byte pages':>13}{'2-byte pages':>13}"
    head = f"{head}{'KV MB at':>15}{'state MB':>10}"
    units = f"{units}{f'{length:,}, 2-byte':>15}{'2-byte':>10}{'context':>10}"
    lines = [head, units]
    configs = {name: architecture_config(name) for name in architecture_names()}
    counts = {name: num_parameters(config) for name, config in configs.items()}
    for name, count in sorted(counts.items(), key=lambda item: item[1]):
        config = configs[name]
        kept = config.kv_bytes(min(length, config.max_position_embeddings)) / 1e6
        lines.append(
            f"{name:<18}{count:>17,}{count * 4 / 1e9:>11.2f}{count * 2 / 1e9:>11.2f}"
            f"{config.kv_bytes_per_token(4):>13,}{config.kv_bytes_per_token(2):>13,}{kept:>15,.1f}"
            f"{config.state_bytes() / 1e6:>10,.2f}{config.max_position_embeddings:>10,}"
        )
    return "\n".join(lines)
