"""Bodies of requests, field by field.

A field that is not here is refused by its name: what would change the text is never left out in
silence.  Fields that the service knows and that cannot change the text are taken and not used; they
are listed as such.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from ossature.talk.refused import Refused

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
"""Of a function, as in OpenAI's API: it stands in the header of a message."""
Count = Annotated[int, Field(ge=1)]
Unused = Any
Body = TypeVar("Body", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: Unused = None


class CommonBody(_Body):
    """Of all three."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    # Not used:
    user: Unused = None
    metadata: dict[str, Any] | None = None
    service_tier: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_retention: Unused = None
    # vLLM's:
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class SampledBody(CommonBody):
    """Of chats and completions."""

    n: Count | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None


class Function(_Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    name: str


class NamedTool(_Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(SampledBody):
    messages: list[dict[str, Any]]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    # vLLM's:
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Not used:
    store: Unused = None
    parallel_tool_calls: Unused = None
    prediction: Unused = None


class CompletionBody(SampledBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None


class Reasoning(_Body):
    effort: Literal["low", "medium", "high"] | None = None
    # Not used: the whole analysis is given.
    summary: Unused = None
    generate_summary: Unused = None


class TextFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(_Body):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class FlatTool(_Body):
    """A function as `/v1/responses` has it."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatNamedTool(_Body):
    type: Literal["function"]
    name: str


class ResponsesBody(CommonBody):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    stream_options: StreamOptions | None = None
    # Not used:
    store: Unused = None
    parallel_tool_calls: Unused = None
    include: Unused = None
    max_tool_calls: Unused = None


def read(kind: type[Body], body: bytes) -> Body:
    """The body of a request.

    Raises:
        Refused: it is not JSON, or a field is not as it must be; in a sentence with its name.
    """
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Refused(400, "the body is not a JSON object")
    if _overflows(fields):
        raise Refused(400, "the body is not JSON that can be told again: a number is too large")
    try:  # null is as good as nothing
        return kind.model_validate({key: v for key, v in fields.items() if v is not None})
    except ValidationError as error:
        raise _refused(error) from None


def _overflows(value: Any) -> bool:
    """Whether a number, such as 1e400, was read as infinite."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return any(map(_overflows, value))
    return value in (math.inf, -math.inf)


def _refused(error: ValidationError) -> Refused:
    found = error.errors(include_url=False, include_context=False)
    first = found[0]
    # Of a union pydantic names every branch; the field is what they share.
    place = [str(part) for part in first["loc"] if isinstance(part, int) or part.islower()]
    if len(found) > 1 and found[1]["loc"][:1] == first["loc"][:1]:
        place = place[:1]
    name = ".".join(place)
    if first["type"] == "extra_forbidden":
        return Refused(400, f"{name}: this server does not know the field", name)
    if first["type"] == "missing":
        return Refused(400, f"{name}: the field is missing", name)
    reasons = "; or ".join(dict.fromkeys(e["msg"] for e in found if e["loc"][0] == first["loc"][0]))
    return Refused(400, f"{name}: {reasons}", name)
