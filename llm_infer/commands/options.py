"""Options that several commands have, what is refused before JAX is imported, and flags for settings of the engine."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from functools import wraps
from types import NoneType
from typing import Annotated, Any

import typer

from llm_infer.base.errors import UserError
from llm_infer.options import EngineOptions, read_options, settings


def existing_model(name: str) -> str:
    """Refuses a name that no model can have, before JAX is imported, which takes seconds."""
    from llm_infer.models.architectures import architecture_names
    from llm_infer.weights.model_names import why_unknown

    if (problem := why_unknown(name)) is not None:
        if name in architecture_names():
            problem = (
                f"{name!r} is an architecture without weights: give the directory or hub id of weights, or for random "
                "ones --load-format dummy (of generate and bench offline)"
            )
        raise UserError(problem)
    return name


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


def engine_option(name: str) -> Any:
    """Returns the annotated type of a parameter that is the flag of a setting."""
    setting = settings()[name]
    kind = next(each for each in setting.kinds if each is not NoneType)
    flags = [f"--{each.replace('_', '-')}" for each in (name, *setting.aliases)]
    if kind is bool:
        flags = [f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags]
    parser = _json_mapping if kind is Mapping else None
    metavar = "|".join(setting.choices) or _METAVARS.get(kind)
    return Annotated[
        Any if parser else str if kind not in (bool, int, float) else kind,
        typer.Option(*flags, *filter(None, [setting.short]), help=setting.summary, metavar=metavar, parser=parser),
    ]


_METAVARS = {int: "N", float: "X", str: "TEXT", Mapping: "JSON"}


def _json_mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f'{error}: expected JSON such as \'{{"method": "ngram"}}\'') from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f'{text:.60}: expected JSON such as \'{{"method": "ngram"}}\'')
    return value


Model = Annotated[str, typer.Option("--model", "-m", help=settings()["model"].summary, callback=existing_model)]
Precision = engine_option("precision")
MaxTokens = Annotated[int, typer.Option(help="Most new tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token each time.")]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; -1 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the most likely tokens with this probability mass.")]
Seed = Annotated[int | None, typer.Option(help="Makes random draws repeatable.")]
ConfigFile = Annotated[
    str | None, typer.Option("--config", help="TOML file with settings of the engine; flags go before it.")
]
JsonFile = Annotated[
    str | None, typer.Option("--json", help="Also write the figures to this file.", callback=writable_file)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def takes_engine_options(*names: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command `--config` and flags for settings of the engine; it gets all as `EngineOptions`, as `options`.

    What was typed goes before the file, also where it equals the default; the file goes before this command's `defaults`.
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
            typed = {name: value for name, value in set_here.items() if _is_typed(_context, name)}
            of_file = {} if config is None else read_options(config)
            options = EngineOptions(**{**defaults, **of_file, **typed})
            if options.load_format == "auto":
                existing_model(str(options.model))
            command(**values, options=options)

        shown = [_keyword("_context", typer.Context), flag.pop("model")]
        shown += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in before]
        shown += [*flag.values(), _keyword("config", ConfigFile, None), _keyword("debug", Debug, False)]
        run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in shown}
        return run

    return decorate


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
