"""Bodies of requests: fields by OpenAI's and vLLM's names, with their ranges. What is not here is in `fields.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

INT64 = 2**63
Id = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=1 << 22)]
Tokens = Annotated[list[Id], Field(min_length=1)]
MAX_PROMPTS = 1024
"""Most prompts of one request."""
MAX_CHOICES = 128
"""Most choices for one prompt."""
MAX_SEQUENCES = 4096
"""Most choices of one request, over all its prompts."""
MAX_STOPS = 16
MAX_WORDS = 128
MAX_BIASES = 1024


class Body(BaseModel):
    """A body: values have the types of JSON, numbers are finite, and unknown fields are kept for `fields.check`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())

    model: str | None = Field(None, description="One of the names of /v1/models; may be left out.")


class StreamOptions(BaseModel):
    """Wishes about a stream."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: bool | None = None


class StructuredOutputs(BaseModel):
    """The form that the text must have; exactly one field is given."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class JsonSchema(BaseModel):
    """A named schema of `response_format`."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())

    name: str = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of an answer, as OpenAI writes it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Generation(Body):
    """What completions and chat completions have in common."""

    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIASES)
    allowed_token_ids: Annotated[list[Id], Field(min_length=1)] | None = None
    bad_words: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_WORDS)] | None = None
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    stop_token_ids: Annotated[list[Id], Field(max_length=MAX_WORDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    truncate_prompt_tokens: int | None = Field(None, ge=1, lt=2**31)
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=128)
    request_id: str | None = Field(None, min_length=1, max_length=128)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = Field(None, ge=-10, le=10)
    user: str | None = None


class CompletionRequest(Generation):
    """The body of /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: int | None = Field(16, ge=0, lt=2**31)
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=20)
    add_special_tokens: bool | None = None


class CalledFunction(BaseModel):
    """The function of a call in the history; arguments that are no JSON stay text."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=128)
    arguments: str | dict[str, Any] | None = None


class ToolCall(BaseModel):
    """A call in the history."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    id: str | None = None
    type: Literal["function"] | None = "function"
    function: CalledFunction


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    role: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.\-]+$")
    content: Text | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class NamedFunction(BaseModel):
    """The name of a function."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: str = Field(min_length=1, max_length=128)


class ToolChoice(BaseModel):
    """A function that must be called."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["function"]
    function: NamedFunction


class Function(NamedFunction):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool; functions are the only kind."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    type: Literal["function"]
    function: Function


class ChatRequest(Generation):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class EmbeddingRequest(Body):
    """The body of /v1/embeddings."""

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    encoding_format: Literal["float", "base64"] | None = "float"
    truncate_prompt_tokens: int | None = Field(None, ge=1, lt=2**31)
    user: str | None = None


class TokenizeRequest(Body):
    """The body of /tokenize: a prompt or messages."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    tokens: list[Id] = Field(max_length=1 << 20)
