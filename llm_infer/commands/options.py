"""Options that several commands have, what is refused before JAX is imported, and flags for settings of the engine."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from functools import wraps
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_infer.base.errors import UserError
from llm_infer.base.files import typed_path
from llm_infer.commands.completion import complete_model, model_names, nearest
from llm_infer.options import EngineOptions, read_options, settings


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
            f"{name!r} is an architecture without weights{meant} Give the directory or hub id of weights, or "
            "--load-format dummy (of generate, chat and bench offline) for random ones"
        )
    near = nearest(name, [*model_names(), *architecture_names()])
    meant = f"; did you mean {near!r}?" if near else ""
    raise UserError(
        f"{problem}{meant} (`llm-infer list` shows what is here, `llm-infer models` what runs with random weights)"
    )


def _existing_architecture(name: str) -> None:
    """Refuses a name that no random weights can have."""
    from llm_infer.models.architectures import architecture_names

    if name in architecture_names() or os.path.isdir(typed_path(name)):
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


def writable_file(option: typer.CallbackParam, name: str | None) -> str | None:
    """Refuses a file that cannot be written before minutes are spent on what is to be in it."""
    if name is not None:
        existed = os.path.exists(name)
        try:
            with open(name, "a"):
                pass
            if not existed:
                os.remove(name)
        except OSError as error:
            raise UserError(f"{option.opts[0]} {name} cannot be written: {error.strerror}") from None
    return name


def engine_option(name: str) -> Any:
    """Returns the annotated type of a parameter that is the flag of a setting."""
    setting = settings()[name]
    kind = next(each for each in setting.kinds if each is not NoneType)
    flags = [f"--{each.replace('_', '-')}" for each in (name, *setting.aliases)]
    if kind is bool:
        flags = [f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags]
    parser = _json_mapping if kind is Mapping else None
    metavar = "NAME" if name == "model" else "|".join(setting.choices) or _METAVARS.get(kind)
    return Annotated[
        Any if parser else str if kind not in (bool, int, float) else kind,
        typer.Option(
            *flags,
            *filter(None, [setting.short]),
            help=setting.summary,
            metavar=metavar,
            parser=parser,
            autocompletion=complete_model if name == "model" else None,
        ),
    ]


_METAVARS = {int: "N", float: "X", str: "TEXT", Mapping: "JSON"}


def _json_mapping(text: str | dict[str, Any]) -> dict[str, Any]:
    try:
        value = json.loads(text) if isinstance(text, str) else text  # a file of defaults has it as a table
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f'{error}: expected JSON such as \'{{"method": "ngram"}}\'') from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f'{text:.60}: expected JSON such as \'{{"method": "ngram"}}\'')
    return value


Model = Annotated[
    str,
    typer.Option(
        *("--model", "-m"),
        help=settings()["model"].summary,
        callback=existing_model,
        metavar="NAME",
        autocompletion=complete_model,
    ),
]
if TYPE_CHECKING:  # as type checkers see it, and as typer does
    Precision = PageDtype = str
else:
    Precision, PageDtype = engine_option("precision"), engine_option("kv_cache_dtype")
ConfigFile = Annotated[
    str | None,
    typer.Option("--config", help="TOML file with settings of the engine; flags go before it.", metavar="FILE"),
]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", help="Also write the figures to this file.", callback=writable_file, metavar="FILE"),
]
ONE_USER = {"max_num_seqs": 1, "max_num_batched_tokens": 512}
"""Few rows are computed and little memory is taken."""
System = Annotated[str | None, typer.Option("--system", help="System message.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", help="Threads of the CPU kernels.", min=1, callback=_set_threads)
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also write the speed of answers to stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no hints.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def takes_engine_options(*names: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command `--config` and flags for settings of the engine; it gets all as `EngineOptions`, as `options`.

    What was typed goes before the file, also where it equals the default; the file goes before the user's defaults, and those
    before this command's `defaults`.
    A model that is not there is refused here, before JAX is imported.

    Args:
        names: of the settings that are flags beside the model; none stands for all that the command has no parameter for.
        defaults: this command's own.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        *before, last = inspect.signature(command, eval_str=True).parameters.values()
        assert last.name == "options", f"the last parameter of {command.__name__}"
        own = {each.name for each in before}
        flags = ["model", *(names or [name for name in settings() if name not in ("model", "progress", *own)])]
        flag = {
            each: _keyword(each, engine_option(each), defaults.get(each, settings()[each].default)) for each in flags
        }

        @wraps(command)
        def run(_context: typer.Context, config: str | None, debug: bool, **values: Any) -> None:
            set_here = {name: values.pop(name) for name in flags}
            source = {name: _source(_context, name) for name in flags}
            of_user = {name: value for name, value in set_here.items() if source[name] == "DEFAULT_MAP"}
            typed = {name: value for name, value in set_here.items() if source[name] not in ("DEFAULT", "DEFAULT_MAP")}
            of_file = {} if config is None else read_options(config)
            options = EngineOptions(**{**defaults, **of_user, **of_file, **typed})
            if options.load_format == "auto":
                existing_model(str(options.model))
            else:
                _existing_architecture(str(options.model))
            try:
                command(**values, options=options)
            except UserError as error:
                if "device" in of_file and "device" not in typed and str(error).startswith("device="):
                    raise UserError(f"--config {config}: {error}, in the file or with --device") from None
                raise

        shown = [_keyword("_context", typer.Context), flag.pop("model")]
        shown += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in before]
        shown += [*flag.values(), _keyword("config", ConfigFile, None), _keyword("debug", Debug, False)]
        run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in shown}
        return run

    return decorate


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _source(context: typer.Context, name: str) -> str:
    """Says where a value comes from, as click calls it."""
    source = context.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name
