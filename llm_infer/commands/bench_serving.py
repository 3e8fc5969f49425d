"""`llm-infer bench serving`: its flags, by vLLM's names."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_infer.commands.options import Debug, JsonFile, writable_file


def serving(
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="The server's address; default: that of --host and --port.")
    ] = None,
    host: Annotated[str, typer.Option(help="Host of the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the server.", min=1, max=65535)] = 8000,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="Name of the model; default: the server's first."),
    ] = None,
    backend: Annotated[
        str, typer.Option(metavar="openai|openai-chat", help="Whether completions or chat completions are asked for.")
    ] = "openai",
    endpoint: Annotated[
        str | None, typer.Option(metavar="PATH", help="Path of requests; default: the backend's under /v1.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Key of the server.", envvar="LLM_INFER_API_KEY", show_envvar=True)
    ] = None,
    dataset_name: Annotated[
        str,
        typer.Option(
            metavar="random|prefix_repetition|sharegpt|spec_bench|timed_trace",
            help="What is sent. timed_trace plays a trace of Azure (CSV), BurstGPT (CSV) or Mooncake (JSON lines).",
        ),
    ] = "random",
    dataset_path: Annotated[str | None, typer.Option(metavar="FILE", help="File of the data set.")] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="Conversations to send; default: a whole trace, else 100.", min=1)
    ] = None,
    random_input_len: Annotated[int, typer.Option(help="Tokens of random prompts.", min=1)] = 1024,
    random_output_len: Annotated[int, typer.Option(help="Most tokens of their answers.", min=1)] = 128,
    random_range_ratio: Annotated[
        float, typer.Option(help="Lengths vary evenly by this share up and down, 0 to 1.")
    ] = 0.0,
    random_prefix_len: Annotated[int, typer.Option(help="Further tokens, first and the same in all.", min=0)] = 0,
    prefix_repetition_num_prefixes: Annotated[int, typer.Option(help="Prefixes of prefix_repetition.", min=1)] = 10,
    prefix_repetition_prefix_len: Annotated[int, typer.Option(help="Tokens of each prefix.", min=0)] = 256,
    prefix_repetition_suffix_len: Annotated[int, typer.Option(help="Tokens after a prefix.", min=1)] = 256,
    max_turns: Annotated[
        int, typer.Option(help="Most questions of a conversation; each follows the answer before it.", min=1)
    ] = 1,
    max_input_len: Annotated[int | None, typer.Option(help="Cuts longer prompts of a trace.", min=1)] = None,
    max_output_len: Annotated[
        int | None, typer.Option(help="Most tokens of an answer, for data sets other than random.", min=1)
    ] = None,
    request_rate: Annotated[float, typer.Option(help="Conversations per second; inf sends all at once.")] = float(
        "inf"
    ),
    burstiness: Annotated[
        float, typer.Option(help="Shape of the gaps' gamma distribution: 1 is Poisson, less burstier, inf even.")
    ] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="Most conversations at once.", min=1)] = None,
    ramp_up_strategy: Annotated[
        str | None, typer.Option(metavar="linear|exponential", help="How the rate grows, in place of --request-rate.")
    ] = None,
    ramp_up_start_rps: Annotated[float, typer.Option(help="Conversations per second at the start.")] = 0.0,
    ramp_up_end_rps: Annotated[float, typer.Option(help="Conversations per second at the end.")] = 0.0,
    trace_scale: Annotated[float, typer.Option(help="Plays a trace so many times as fast.")] = 1.0,
    num_warmups: Annotated[int, typer.Option(help="Requests before the load, in no figure.", min=0)] = 0,
    ready_check_timeout_sec: Annotated[float, typer.Option(help="Seconds to wait for the server.", min=0)] = 0.0,
    request_timeout: Annotated[float, typer.Option(help="Most seconds of one request.")] = 3600.0,
    temperature: Annotated[float, typer.Option(help="Temperature of sampling; 0 is greedy.")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Has answers go on to their most tokens (vLLM's field).")
    ] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Asks for whole answers.")] = False,
    extra_body: Annotated[str | None, typer.Option(metavar="JSON", help="Further fields of each request.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts and arrivals.", min=0)] = 0,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC:MS", help="Limit of ttft, tpot or e2el; may be repeated. In ms, as ttft:200."),
    ] = None,
    percentile_metrics: Annotated[
        str, typer.Option(help="Latencies to report, comma separated.")
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles of them, comma separated.")] = "50,90,99",
    json_file: JsonFile = None,
    html_file: Annotated[
        str | None,
        typer.Option("--html", help="Also write a page with plots.", callback=writable_file, metavar="FILE"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Loads any OpenAI-compatible server and measures it.

    Shows throughput, goodput, and the times to the first token and between tokens.
    """
    from llm_infer.bench.serving import settings as of
    from llm_infer.bench.serving.datasets import Lengths
    from llm_infer.bench.serving.load import Arrivals
    from llm_infer.bench.serving.run import run

    fields = {"temperature": temperature, **({"ignore_eos": True} if ignore_eos else {}), **of.read_fields(extra_body)}
    settings = of.Settings(
        base_url=base_url or f"http://{f'[{host}]' if ':' in host else host}:{port}",
        backend=backend,
        endpoint=endpoint,
        model=model,
        api_key=api_key,
        dataset=dataset_name.replace("-", "_"),
        path=dataset_path,
        num_prompts=num_prompts,
        lengths=Lengths(random_input_len, random_output_len, random_range_ratio, random_prefix_len, max_turns),
        prefixes=prefix_repetition_num_prefixes,
        prefix=prefix_repetition_prefix_len,
        suffix=prefix_repetition_suffix_len,
        max_input=max_input_len,
        max_output=max_output_len,
        arrivals=Arrivals(request_rate, burstiness, ramp_up_strategy, ramp_up_start_rps, ramp_up_end_rps),
        trace_scale=trace_scale,
        max_concurrency=max_concurrency,
        warmups=num_warmups,
        ready_seconds=ready_check_timeout_sec,
        timeout=request_timeout,
        stream=not no_stream,
        fields=fields,
        seed=seed,
        metrics=of.read_metrics(percentile_metrics),
        percentiles=of.read_percentiles(metric_percentiles),
        goodput=of.read_goodput(goodput or ()),
    )
    run(settings, json_file, html_file)
