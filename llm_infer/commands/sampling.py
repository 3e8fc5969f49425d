"""Flags that say how tokens are drawn: one table over the fields of `SamplingParams`, for all commands that answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_infer.base.errors import UserError
from llm_infer.commands.command import Flag

if TYPE_CHECKING:
    from llm_infer.decoding.sampling_params import SamplingParams
    from llm_infer.decoding.structured import StructuredOutputsParams

GENERATE_TOKENS, CHAT_TOKENS = 256, 512
"""Most new tokens of `generate` and of `chat` where nothing is said."""

FIELDS = (
    Flag(
        "max_tokens",
        int,
        "Most new tokens; -1: until the context is full.",
        GENERATE_TOKENS,
        "-n",
        aliases=("--n-predict",),
    ),
    Flag("temperature", float, "0 takes the most likely token each time.", 0.0, aliases=("--temp",)),
    Flag("top_k", int, "Keep the k most likely tokens; -1 keeps all.", -1),
    Flag("top_p", float, "Keep the most likely tokens with this probability mass.", 1.0),
    Flag("min_p", float, "Keep tokens with this share of the most likely one's probability.", 0.0),
    Flag("typical_p", float, "Keep the most typical tokens with this probability mass.", 1.0),
    Flag(
        "repetition_penalty", float, "Above 1: avoid tokens that were there before.", 1.0, aliases=("--repeat-penalty",)
    ),
    Flag("presence_penalty", float, "Above 0: avoid tokens that the answer has.", 0.0),
    Flag("frequency_penalty", float, "Above 0: avoid them more the more often it has them.", 0.0),
    Flag("seed", int, "Makes random draws repeatable; -1 is none.", None, "-s"),
    Flag("stop", list[str], "Text that ends the answer; may be given again."),
    Flag("stop_token_ids", list[int], "Token that ends the answer; may be given again.", value="ID"),
    Flag("bad_words", list[str], "Text that the answer must not have; may be given again."),
    Flag("min_tokens", int, "Fewest new tokens.", 0),
    Flag("ignore_eos", bool, "Go on after the model's end of the answer.", False),
    Flag("logprobs", int, "After the answer, write log-probabilities, and those of so many likely tokens, to stderr."),
    Flag("beam_width", int, "Search with so many beams for the most likely answer."),
    Flag("length_penalty", float, "Of beams: above 1 favours long answers.", 1.0),
    Flag("early_stopping", bool, "Of beams: end as soon as there are enough answers.", False),
)
"""Names of flags are those of the fields."""

NO_FLAGS = {
    **dict.fromkeys(("n", "best_of"), "one answer is shown"),
    **dict.fromkeys(("logit_bias", "allowed_token_ids"), "mappings and sets of ids are for programs"),
    **dict.fromkeys(("prompt_logprobs", "truncate_prompt_tokens"), "about prompts, which are not shown"),
    **dict.fromkeys(("include_stop_str_in_output", "skip_special_tokens"), "for programs that read the answer"),
    "kept_tokens": "for programs that train",
    "structured_outputs": "has flags of its own: STRUCTURED",
}
"""Fields without a flag, and why."""

STRUCTURED = (
    Flag("json_schema", str, "File with a JSON schema that the answer follows.", value="FILE"),
    Flag("json_object", bool, "The answer is a JSON object.", False),
    Flag("regex", str, "Regular expression that the whole answer matches."),
    Flag("choice", list[str], "The answer is one of these; give it several times."),
    Flag("grammar", str, "File with a grammar (Lark) that the answer follows.", value="FILE"),
)

FLAGS = (*FIELDS, *STRUCTURED)

_STRUCTURED_FIELDS = {"json_schema": "json"}
_NONE = (("max_tokens", -1), ("seed", -1))
"""Values that mean "none" in llama.cpp."""


def sampling_params(values: dict[str, Any]) -> SamplingParams:
    """Makes parameters of the values of FLAGS.

    Raises:
        UserError: a value is not acceptable, or a file cannot be read.
    """
    from llm_infer.decoding.sampling_params import SamplingParams

    names = {flag.name for flag in FIELDS}
    given = {name: value for name, value in values.items() if name in names and value is not None}
    for name, none in _NONE:
        if given.get(name) == none:
            given[name] = None
    if given.get("logprobs") == -1:
        raise UserError("--logprobs -1: expected 0 or more; all of the vocabulary is for LLM.generate")
    return SamplingParams(**given, structured_outputs=_structured(values))


def _structured(values: dict[str, Any]) -> StructuredOutputsParams | None:
    """Makes what says how the answer must look; the schema and the grammar are read from files."""
    from llm_infer.decoding.structured import StructuredOutputsParams

    given = {flag.name: values[flag.name] for flag in STRUCTURED if values[flag.name] not in (None, False, [])}
    flags = ["--" + name.replace("_", "-") for name in given]
    if len(given) > 1:
        raise UserError(f"{' and '.join(flags)}: an answer follows one of them")
    for (name, value), flag in zip(given.items(), flags, strict=True):
        shown = value if isinstance(value, str) else " ".join(value) if isinstance(value, list) else ""
        try:
            if name in ("json_schema", "grammar"):
                with open(str(value), encoding="utf-8") as file:
                    value = file.read()
            field: dict[str, Any] = {_STRUCTURED_FIELDS.get(name, name): value}
            return StructuredOutputsParams(**field)
        except OSError as error:
            raise UserError(f"{flag} {shown}: {error.strerror}") from None
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{flag} {shown}: {error}") from None
    return None
