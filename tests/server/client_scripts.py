"""Conversations by other projects' clients; each is run by an interpreter that has the client: `client_scripts.py NAME URL`.

Each prints JSON: what the client made of a plain answer, of a stream, and of a forced tool call or a structured answer.
"""

import json
import sys

MODEL = "tiny"
QUESTION = "What is the weather in Rome?"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather.", "parameters": PARAMETERS},
}


def openai(url):
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

    client = OpenAI(base_url=url, api_key="none")
    how = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 60,
        "seed": 1,
        "temperature": 0,
    }
    forced = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    plain = client.chat.completions.create(**how)
    ChatCompletion.model_validate(plain.model_dump())
    chunks = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **how)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    called = client.chat.completions.create(**forced, **how).choices[0].message.tool_calls
    name, arguments = "", ""
    for chunk in client.chat.completions.create(stream=True, **forced, **how):
        for call in chunk.choices[0].delta.tool_calls or ():
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    return {
        "plain": plain.choices[0].message.content,
        "streamed": streamed,
        "called": [[call.function.name, json.loads(call.function.arguments)] for call in called],
        "called in a stream": [[name, json.loads(arguments)]],
        "embedded": len(client.embeddings.create(model=MODEL, input="Hi").data[0].embedding),
    }


def langchain(url):
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    model = ChatOpenAI(model=MODEL, base_url=url, api_key="none", max_tokens=60, seed=1, temperature=0)
    streamed = "".join(chunk.content for chunk in model.stream(QUESTION))
    called = model.bind_tools([TOOL], tool_choice="weather").invoke(QUESTION)
    pieces = None
    for chunk in model.bind_tools([TOOL], tool_choice="weather").stream(QUESTION):
        pieces = chunk if pieces is None else pieces + chunk
    embedded = OpenAIEmbeddings(
        model=MODEL, base_url=url, api_key="none", check_embedding_ctx_length=False
    ).embed_query("Hi")
    return {
        "plain": model.invoke(QUESTION).content,
        "streamed": streamed,
        "called": [[call["name"], call["args"]] for call in called.tool_calls],
        "called in a stream": [[call["name"], call["args"]] for call in pieces.tool_calls],
        "embedded": len(embedded),
    }


def litellm(url):
    import litellm

    how = {
        "model": f"openai/{MODEL}",
        "api_base": url,
        "api_key": "none",
        "max_tokens": 60,
        "seed": 1,
        "temperature": 0,
    }
    messages = [{"role": "user", "content": QUESTION}]
    streamed = litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **how)
    texts = [chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices]
    forced = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    called = litellm.completion(messages=messages, **forced, **how).choices[0].message
    chunks = list(litellm.completion(messages=messages, stream=True, **forced, **how))
    whole = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
    shown = lambda message: [[c.function.name, json.loads(c.function.arguments)] for c in message.tool_calls]  # noqa: E731
    return {
        "plain": litellm.completion(messages=messages, **how).choices[0].message.content,
        "streamed": "".join(texts),
        "called": shown(called),
        "called in a stream": shown(whole),
    }


def instructor(url):
    import instructor
    from openai import OpenAI
    from pydantic import BaseModel

    class Weather(BaseModel):
        sunny: bool

    client = OpenAI(base_url=url, api_key="none")
    asking = instructor.from_openai(
        client, mode=instructor.Mode.TOOLS
    )  # its other modes need a longer context than ours
    messages = [{"role": "user", "content": QUESTION}]
    answer = asking.chat.completions.create(
        model=MODEL, messages=messages, response_model=Weather, max_tokens=90, seed=1
    )
    return {"typed": [type(answer.sunny).__name__]}


def pydantic_ai(url):
    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Weather(BaseModel):
        sunny: bool

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key="none"))
    settings = {"max_tokens": 60, "seed": 1, "temperature": 0.0}
    forced = Agent(model, output_type=Weather, model_settings=settings).run_sync(QUESTION).output
    native = Agent(model, output_type=NativeOutput(Weather), model_settings=settings).run_sync(QUESTION).output
    plain = Agent(model, model_settings=settings).run_sync(QUESTION).output
    return {"plain": plain, "typed": [type(forced.sunny).__name__, type(native.sunny).__name__]}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](sys.argv[2])))
