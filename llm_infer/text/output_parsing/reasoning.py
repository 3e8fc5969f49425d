"""The forms in which model families write their reasoning before an answer."""

from __future__ import annotations

from dataclasses import dataclass

from llm_infer.base.errors import RequestError
from llm_infer.text.output_parsing.rules import HARMONY_MARKERS


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """How a family writes its reasoning: `start`, thoughts, `end`.

    Attributes:
        name, aliases: values of `--reasoning-parser`.
        start, end: markers around the reasoning; none for harmony, whose channels tell reasoning from answers.
        assumed: whether an output begins with reasoning although the prompt does not open it.
    """

    name: str
    start: str = ""
    end: str = ""
    aliases: tuple[str, ...] = ()
    assumed: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts that may be special tokens of a model."""
        return (self.start, self.end) if self.start else HARMONY_MARKERS


REASONING_FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat(name="openai", aliases=("harmony", "openai_gptoss", "gpt-oss")),
    ReasoningFormat(name="seed_oss", start="<seed:think>", end="</seed:think>"),
    ReasoningFormat(name="mistral", start="[THINK]", end="[/THINK]"),
    ReasoningFormat(
        name="qwen3",
        start="<think>",
        end="</think>",
        aliases=(
            *(
                "think",
                "deepseek_v3",
                "deepseek_v31",
                "deepseek_v32",
                "glm45",
                "glm47",
                "kimi_k2",
                "minimax_m2",
                "smollm3",
            ),
            *("nemotron_v3", "olmo3", "step3p5"),
        ),
    ),
    ReasoningFormat(name="deepseek_r1", start="<think>", end="</think>", aliases=("qwq",), assumed=True),
)


def reasoning_format(name: str) -> ReasoningFormat:
    """Returns the format of a name or alias.

    Raises:
        RequestError: there is none.
    """
    for each in REASONING_FORMATS:
        if name == each.name or name in each.aliases:
            return each
    names = ", ".join(each.name for each in REASONING_FORMATS)
    raise RequestError(f"reasoning_parser={name!r:.60}: expected one of {names}")


def reasoning_of_template(template: str) -> ReasoningFormat | None:
    """Returns the format of the reasoning that a chat template shows; None if it shows none that is known."""
    if "<|channel|>" in template and "analysis" in template:
        return reasoning_format("openai")
    return next((each for each in REASONING_FORMATS if each.start and each.end in template), None)


def starts_in_reasoning(rendered_prompt: str, reasoning: ReasoningFormat | None) -> bool:
    """Checks whether the output goes on with reasoning, as the end of the prompt says.

    A prompt that ends with the opening marker has opened it, one that ends with the closing marker has left it out.
    """
    if reasoning is None or not reasoning.start:
        return False
    tail = rendered_prompt[-256:].rstrip()
    return tail.endswith(reasoning.start) or (reasoning.assumed and not tail.endswith(reasoning.end))
