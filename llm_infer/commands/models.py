"""Commands about models: `llm-infer models | pull | list | rm | convert`."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from llm_infer.base.errors import UserError
from llm_infer.commands.command import Commands
from llm_infer.commands.options import Debug, existing_model

commands = Commands()


@commands.command()
def models(
    context: Annotated[int, typer.Option(min=1, help="Tokens of the sequence whose KV pages are counted.")] = 8192,
    debug: Debug = False,
) -> None:
    """Lists architectures that can run with random weights.

    Shows parameters, and the memory that weights and KV pages take. Layers with a window keep no more than it holds, so a
    sequence may take less than its tokens times the bytes of one.
    """
    from llm_infer.models.architectures import table

    print(table(context))


@commands.command()
def pull(
    model: Annotated[str, typer.Argument(help="org/name, or org/name:Q4_K_M for a type of GGUF file.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; as org/name@REVISION.")] = None,
    debug: Debug = False,
) -> None:
    """Downloads a model, or the rest of one, and checks it.

    Of GGUF files it takes the type that is named, else Q4_K_M or the only one; otherwise config, tokenizer and
    safetensors files. They go to the cache of the Hugging Face hub (HF_HOME moves it), which other programs share. Give
    the same name to --model afterwards.
    """
    from dataclasses import replace

    from llm_infer.base.progress import Progress
    from llm_infer.base.sizes import size
    from llm_infer.weights.default_model import DEFAULT_MODEL, fetch, find
    from llm_infer.weights.hub import fetch_from_hub
    from llm_infer.weights.model_names import hub_name

    progress = Progress(delay=0.2)
    if model == DEFAULT_MODEL.name and revision is None:
        path = find(DEFAULT_MODEL) or fetch(DEFAULT_MODEL, progress)
        print(f"{model}: 1 file, {size(DEFAULT_MODEL.file_bytes)} in {path}")
        return
    name = hub_name(model)
    if name is None:
        raise UserError(
            f"{model!r} is no model of the hub: expected org/name, org/name:Q4_K_M or {DEFAULT_MODEL.name!r}"
        )
    if revision is not None:
        if name.revision not in (None, revision):
            raise UserError(f"{model!r} and --revision {revision} name two revisions: give one of them")
        name = replace(name, revision=revision)
    found = fetch_from_hub(name, progress)
    files = f"{len(found.files)} files" if len(found.files) > 1 else "1 file"
    print(f"{found.name}: {files}, {size(found.num_bytes)} in {found.path}")
    if found.unchecked:
        print(f"note: the hub gives no hash to check {', '.join(found.unchecked)}", file=sys.stderr)


@commands.command("list")
def list_models(debug: Debug = False) -> None:
    """Lists the models on this machine and their sizes."""
    from llm_infer.base.sizes import size
    from llm_infer.weights.local_models import local_models, total_bytes

    found = local_models()
    if not found:
        print("no model is here yet: `llm-infer pull org/name` fetches one", file=sys.stderr)
        return
    width = max(len(model.name) for model in found)
    for model in found:
        day = time.strftime("%Y-%m-%d", time.localtime(model.modified))
        print(f"{model.name:<{width}}  {size(model.num_bytes):>9}  {day}  {model.note}".rstrip())
    print(f"{'together':<{width}}  {size(total_bytes(found)):>9}")


@commands.command()
def rm(
    models: Annotated[list[str], typer.Argument(help="Names as `llm-infer list` shows them; org/name is all of it.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    debug: Debug = False,
) -> None:
    """Removes downloaded models, after asking."""
    from llm_infer.base.sizes import size
    from llm_infer.weights.local_models import found_by, local_models, remove, total_bytes

    here = local_models()
    chosen = list({one.name: one for name in models for one in found_by(name, here)}.values())
    for one in chosen:
        print(f"{one.name}  {size(one.num_bytes)}  {one.directory}", file=sys.stderr)
    if not yes and not _agreed(f"Remove {'it' if len(chosen) == 1 else 'them'}?"):
        print("nothing is removed", file=sys.stderr)
        return
    freed = total_bytes(here)
    remove(chosen)
    print(f"removed {', '.join(one.name for one in chosen)}: {size(freed - total_bytes(local_models()))}")


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError("rm asks before it removes, and nobody is at a terminal to answer: give -y")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@commands.command()
def convert(
    source: Annotated[str, typer.Argument(help="A model as for --model.", callback=existing_model)],
    dest: Annotated[str, typer.Argument(help="Directory to write, new or empty; give it to --model afterwards.")],
    dtype: Annotated[str, typer.Option(help="Type of the parameters: float32 or bfloat16.")] = "float32",
    debug: Debug = False,
) -> None:
    """Writes a model as an Orbax checkpoint that loads faster.

    It holds stacked, fused parameters, which need no conversion.
    """
    from llm_infer.base.progress import Progress
    from llm_infer.loading import convert as run

    print(run(source, dest, dtype=dtype, progress=Progress()))
