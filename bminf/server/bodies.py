"""What clients may ask for, field by field: of a type, within bounds, or refused by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bminf.engine.request import MAX_LOGPROBS
from bminf.server.errors import ApiError

MAX_CHOICES = 128
MAX_STOPS = 64
MAX_PROMPTS = 256
_MAX_STOP = 1024  # characters of a stop string

Ignored = Any
"""A field of OpenAI's that changes nothing here."""

Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
Temperature = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e6)]
Share = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)]
Bias = Annotated[float, Field(allow_inf_nan=False, ge=-100, le=100)]

_ONLY: dict[str, tuple[object, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
    "repetition_penalty": (1, 1.0), "min_p": (0, 0.0), "use_beam_search": (False,),
    "length_penalty": (1, 1.0), "guided_json": (), "guided_regex": (), "logits_processors": ([],),
    "tool_calls": ([],), "refusal": ("",), "annotations": ([],), "ignore_eos": (False,),
}  # fmt: skip
"""What these fields may be, beside null: what asks for nothing. All else is refused by name."""

_KINDS = {
    "prompt": "give a text, a list of token ids, or a list of such",
    "stop": "give a text, or a list of texts",
    "content": "the content of a message is a text, or a list of parts",
}
"""Of fields that may be of several kinds."""


class Body(BaseModel):  # type: ignore[misc]
    """The JSON of a request. null is as if a field were left out."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")  # type: ignore[untyped-decorator]
    @classmethod
    def _checked(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        for name in given.keys() & _ONLY.keys() - cls.model_fields.keys():
            if given.pop(name) not in _ONLY[name]:
                raise ValueError(f"{name} is not supported; leave it out")
        return given


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Ignored = None


class Generating(Body):
    """What completions of both kinds take."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] = Field(default_factory=list)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    frequency_penalty: Number = 0.0
    presence_penalty: Number = 0.0
    logit_bias: dict[str, Bias] = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    user: Ignored = None
    store: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    parallel_tool_calls: Ignored = None
    reasoning_effort: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    verbosity: Ignored = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def seed_of(self, choice: int) -> int | None:
        """That of a choice: of the first the request's own."""
        if self.seed is None:
            return None
        return (self.seed + choice * _STEP) % 2**64


_STEP = 0x9E3779B97F4A7C15
"""Odd and large: seeds that are near one another share none with each other's choices."""


class CompletionBody(Generating):
    """POST /v1/completions."""

    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    suffix: str | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        given: Any = self.prompt
        is_one = isinstance(given, str) or isinstance(given[0], int)
        return [given] if is_one else given

    @model_validator(mode="after")  # type: ignore[untyped-decorator]
    def _check_together(self) -> CompletionBody:
        if self.best_of is not None and self.best_of > self.n:
            raise ValueError("best_of is not supported; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 is for echo alone; accepted: at least 1")
        if self.suffix is not None and (self.echo or self.logprobs is not None):
            raise ValueError("suffix goes with neither echo nor logprobs; leave one of them out")
        return self


class Part(Body):
    """Of a message in parts."""

    type: Literal["text"]
    text: str


class MessageBody(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] = ""
    name: Ignored = None
    reasoning_content: Ignored = None

    @property
    def as_message(self) -> dict[str, str]:
        """As templates take it: parts as one text."""
        role = "system" if self.role == "developer" else self.role
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": role, "content": text}


class ChatBody(Generating):
    """POST /v1/chat/completions."""

    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")  # type: ignore[untyped-decorator]
    def _check_together(self) -> ChatBody:
        if self.max_tokens == 0:
            raise ValueError("max_tokens=0; accepted: at least 1")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true")
        return self


class FillBody(Body):
    """POST /v1/fill.   max_tokens: of each blank, or of all blanks together as the model has it."""

    model: str | None = None
    text: str
    max_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None


class TokenizeBody(Body):
    """POST /tokenize."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Id]


Parsed = TypeVar("Parsed", bound=Body)


def parse(kind: type[Parsed], content: bytes) -> Parsed:
    """The JSON of a request.   Raises ApiError 400, which says where, and never shows the input:
    what cannot be encoded would fail once more in the reply."""
    try:
        return kind.model_validate_json(content)  # type: ignore[no-any-return]
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        # Of the kinds that a field may be of, the one that it is of says what is wrong.
        of_right_kind = [one for one in errors if not one["type"].endswith("_type")]
        first = (of_right_kind or errors)[0]
        place = [str(item) for item in first["loc"] if isinstance(item, str)]
        text = str(first["msg"]).removeprefix("Value error, ")
        if not of_right_kind:
            text = _kinds_of(first["loc"]) or text
        if first["type"] == "value_error":  # ours, which begins with the field
            place = [text.split(" ")[0].split("=")[0]]
        param = place[0] if place else None
        raise ApiError(400, _message(first["type"], text, param), param, "invalid_value") from None


def _kinds_of(place: Sequence[str | int]) -> str | None:
    """What a field takes that may be of several kinds, each of which has an error of its own, whose
    place ends in the kind."""
    return next((_KINDS[str(name)] for name in place[:-1] if name in _KINDS), None)


def _message(kind: str, text: str, param: str | None) -> str:
    if kind == "json_invalid":
        return f"the body is no valid JSON: {text}"
    if kind == "extra_forbidden":
        return f"{param} is not a parameter here; leave it out"
    return f"{param}: {text}" if param and kind != "value_error" else text
