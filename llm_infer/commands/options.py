"""Options that several commands have, what is refused before JAX is imported, and how options become arguments of `LLM`."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

from llm_infer.base.errors import UserError
from llm_infer.base.interrupts import uninterrupted
from llm_infer.commands.completion import complete_model, model_names, nearest


def existing_model(name: str) -> str:
    """Refuses a name that no model can have, before JAX is imported, which takes seconds."""
    from llm_infer.models.architectures import architecture_names
    from llm_infer.weights.model_names import why_unknown

    if (problem := why_unknown(name)) is None:
        return name
    if name in architecture_names():
        near = nearest(name, model_names())
        meant = f": did you mean {near!r}?" if near else "."
        raise UserError(
            f"{name!r} is an architecture without weights{meant} Give the directory or hub id of weights, or for random "
            "ones --load-format dummy (of generate and bench offline)"
        )
    near = nearest(name, [*model_names(), *architecture_names()])
    meant = f"; did you mean {near!r}?" if near else ""
    raise UserError(
        f"{problem}{meant} (`llm-infer list` shows what is here, `llm-infer models` what runs with random weights)"
    )


def _existing_architecture(name: str) -> None:
    """Refuses a name that no random weights can have."""
    from llm_infer.models.architectures import architecture_names

    if name in architecture_names() or os.path.isdir(os.path.expanduser(name)):
        return
    near = nearest(name, architecture_names())
    meant = f"did you mean {near!r}? " if near else ""
    raise UserError(
        f"no architecture {name!r}: {meant}`llm-infer models` lists them; a directory with a config.json is one, too"
    )


def _set_threads(threads: int | None) -> int | None:
    """Has the native kernels use so many threads: they look here when they start."""
    if threads is not None:
        os.environ["LLM_INFER_NUM_THREADS"] = str(threads)
    return threads


def _json_object(text: str | None) -> Any:
    """Returns the setting as a mapping."""
    if text is None or not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(
            f'--speculative-config {text}: not valid JSON ({error}); expected e.g. \'{{"method": "ngram"}}\''
        ) from None


def writable_file(name: str | None) -> str | None:
    """Refuses a file that cannot be written before minutes are spent on what is to be in it."""
    if name is not None:
        existed = os.path.exists(name)
        try:
            with open(name, "a"):
                pass
            if not existed:
                os.remove(name)
        except OSError as error:
            raise UserError(f"--json {name} cannot be written: {error.strerror}") from None
    return name


DEFAULT_MODEL_NAME = "smollm2-135m-instruct"
MODEL_HELP = "A name of `list`, a hub id org/name[:Q4_K_M], a GGUF file, or a directory."
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help=MODEL_HELP, callback=existing_model, metavar="NAME", autocompletion=complete_model
    ),
]
AnyModel = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP, metavar="NAME", autocompletion=complete_model)]
"""Or, with random weights, a published architecture: see `check_model`."""
MaxModelLen = Annotated[int | None, typer.Option(help="Longest sequence in tokens; default: the model's context.")]
LoadFormat = Annotated[str, typer.Option(help="auto, or dummy: random weights of an architecture of `models`.")]
Precision = Annotated[str, typer.Option(help="exact, or fast: int8 activations and bfloat16 pages, on CPUs.")]
Dtype = Annotated[
    str, typer.Option(help="Of weights and activations: auto (float32 on CPUs, else bfloat16), float32 …")
]
Device = Annotated[str, typer.Option(help="auto, or run only where JAX finds cpu, gpu or tpu.")]
MemoryUtilization = Annotated[
    float | None,
    typer.Option("--memory-utilization", "--gpu-memory-utilization", help="Share of device memory to use (0.9)."),
]
TensorParallel = Annotated[
    int | None, typer.Option("--tensor-parallel-size", "-tp", help="Devices over which every layer is cut.")
]
DataParallel = Annotated[
    int | None, typer.Option("--data-parallel-size", "-dp", help="Shards of the batch, each on devices of its own.")
]
ExpertParallel = Annotated[int | None, typer.Option(help="Devices over which the experts of a mixture are spread.")]
CoordinatorAddress = Annotated[
    str | None, typer.Option(help="With several hosts: address and free port of process 0, as in 10.0.0.1:8476.")
]
NumProcesses = Annotated[int | None, typer.Option(help="With several hosts: processes, one on each.")]
ProcessId = Annotated[int | None, typer.Option(help="With several hosts: number of this process, from 0.")]
ConfigFile = Annotated[
    str | None, typer.Option("--config", help="TOML file with engine arguments; flags go before it.", metavar="FILE")
]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", help="Also write the figures to this file.", callback=writable_file, metavar="FILE"),
]
System = Annotated[str | None, typer.Option("--system", help="System message.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", help="Threads of the CPU kernels.", min=1, callback=_set_threads)
]
SpeculativeConfig = Annotated[
    str | None,
    typer.Option("--speculative-config", help="Speculative decoding as JSON.", metavar="JSON", callback=_json_object),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also write the speed of answers to stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no hints.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def check_model(name: str, load_format: str, config: str | None) -> None:
    """As `existing_model`, unless the weights may be random ones, which a file of `--config` may ask for, too."""
    if load_format == "auto" and config is None:
        existing_model(name)
    if load_format == "dummy":
        _existing_architecture(name)


def engine_arguments(config: str | None, context: typer.Context | None = None, **flags: Any) -> dict[str, Any]:
    """Arguments of `LLM` from the file of `--config`, and over them the flags that were typed, whatever their values.

    Without the `context` of a command, which knows what was typed, all flags but None count as typed.
    """
    with uninterrupted():  # imports JAX: Ctrl-C within an extension module would be another error, or none
        from llm_infer.engine_arguments import read_engine_arguments

    def typed(name: str, value: object) -> bool:
        source = None if context is None else context.get_parameter_source(name)
        return value is not None if source is None else source.name != "DEFAULT"

    arguments = {} if config is None else read_engine_arguments(config)
    return arguments | {name: value for name, value in flags.items() if typed(name, value)}
