"""/tokenize, /detokenize and /tokenizer_info: the tokenizer for clients that have none."""

from __future__ import annotations

from typing import Any

from llm_infer.server.chat import conversation_ids, plain_messages
from llm_infer.server.choices import TokenTexts
from llm_infer.server.errors import bad_request
from llm_infer.server.exchange import Exchange
from llm_infer.server.protocol import DetokenizeRequest, TokenizeRequest


async def tokenize(exchange: Exchange, data: bytes) -> None:
    """Answers with the ids of a text or of a conversation."""
    body = await exchange.parsed(TokenizeRequest, data)
    service = exchange.service
    service.require_ready()
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("expected prompt or messages", "prompt", "invalid_value")

    def encode() -> list[int]:
        if body.messages is not None:
            return conversation_ids(service, plain_messages(body.messages), body)
        return service.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)

    ids = await service.in_worker(encode)
    texts = TokenTexts(service.tokenizer)
    shown = [texts.text(token) for token in ids] if body.return_token_strs else None
    length = service.session.engine.max_model_len
    await exchange.reply({"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": shown})


async def detokenize(exchange: Exchange, data: bytes) -> None:
    """Answers with the text of ids, those of special tokens included."""
    body = await exchange.parsed(DetokenizeRequest, data)
    service = exchange.service
    service.require_ready()
    size = service.session.engine.vocab_size
    if any(token >= size for token in body.tokens):
        raise bad_request(
            f"tokens holds an id outside the vocabulary, which ends at {size - 1}", "tokens", "invalid_value"
        )
    text = await service.in_worker(lambda: service.tokenizer.decode(body.tokens, skip_special_tokens=False))
    await exchange.reply({"prompt": text})


async def tokenizer_info(exchange: Exchange, _: bytes) -> None:
    """Answers with the special tokens and the chat template, as texts."""
    service = exchange.service
    service.require_ready()
    tokenizer = service.tokenizer

    def text(token: int | None) -> Any:
        return None if token is None else tokenizer.decode([token], skip_special_tokens=False)

    await exchange.reply(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": text(tokenizer.bos_token_id),
            "eos_token": text(tokenizer.eos_token_id),
            "pad_token": text(tokenizer.eos_token_id),
            "vocab_size": service.session.engine.vocab_size,
            "model_max_length": service.session.engine.max_model_len,
            "chat_template": service.options.chat_template or tokenizer.chat_template,
        }
    )
