"""What clients send and get, in OpenAI's shapes. What would change an answer and isn't here is refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from foreword.serve.request import MOST_ALTERNATIVES, Sampling

Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
_IGNORED = "Accepted for compatibility; has no effect."


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = Field(False, description="Send a last event with the usage.")
    include_obfuscation: bool | None = Field(None, description=_IGNORED)


class Common(_Body):
    """What completions and chats have in common."""

    model: str = Field(min_length=1, max_length=256, description="A task, or the base model: see /v1/models.")
    n: int = Field(1, ge=1, le=128, description="Answers to each prompt.")
    temperature: float | None = Field(None, ge=0, le=100, description="0: the likeliest token. 1 by default.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="Draw from this many likeliest tokens; 0: from all. Not OpenAI's.")
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: list[int] = Field([], max_length=64, description="Not OpenAI's.")
    ignore_eos: bool = Field(False, description="Go on where the model would end. Not OpenAI's.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[TokenId, float], Field(max_length=300)] | None = None
    strength: float = Field(1.0, ge=0, le=100, description="Weight of the task's prefix: 1 as trained, 0 none.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description=_IGNORED)

    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        """How the answers are written."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            n=self.n,
            stop=self.stops(),
            stop_tokens=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(k): v for k, v in (self.logit_bias or {}).items()},
            strength=self.strength,
        )


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Common):
    prompt: str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES, description="Alternatives to show for each token.")
    echo: Literal[False] | None = Field(False, description="Only false: prompts are not given back.")
    best_of: Literal[1] | None = Field(None, description="Only 1.")
    suffix: None = Field(None, description="Only null.")

    def prompts(self) -> list[str | list[int]]:
        """Each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast("list[str | list[int]]", self.prompt)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name is not None else {})


class ChatRequest(Common):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="Older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    response_format: TextFormat | None = None
    metadata: dict[str, str] | None = Field(None, description=_IGNORED)
    store: bool | None = Field(None, description=_IGNORED)
    service_tier: str | None = Field(None, description=_IGNORED)
    safety_identifier: str | None = Field(None, description=_IGNORED)
    prompt_cache_key: str | None = Field(None, description=_IGNORED)
    parallel_tool_calls: bool | None = Field(None, description=_IGNORED)


class TextFormat(_Body):
    type: Literal["text"]


class SharesRequest(_Body):
    model: str = Field(min_length=1, max_length=256, description="A task, or the base model: see /v1/models.")
    prompt: str | None = Field(None, description="A text; or give messages.")
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    answer: str = Field("", description="What came after it.")
    strength: float = Field(1.0, ge=0, le=100, description="Weight of the task's prefix: 1 as trained, 0 none.")
    columns: int = Field(64, ge=1, le=1024, description="Parts of the text, at most, that means are given for.")


# ---------------------------------------------------------------- what comes back (for the specification)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(BaseModel):
    token: str
    bytes: list[int] | None
    logprob: float


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChosenLogprob]


class Said(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: Said
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = Field(description="Of a task: the base model.")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class LayerShare(BaseModel):
    site: str = Field(description="The attention call's name in the model.")
    share: list[float | None] = Field(
        description="Of each column: what the virtual tokens get of the attention, 0 to 1, as a mean over heads and "
        "tokens; null where a gate keeps them out of the softmax."
    )
    mean: float | None = Field(description="Over all tokens.")


class Shares(BaseModel):
    object: Literal["foreword.shares"]
    model: str
    strength: float
    virtual_tokens: int
    prompt_tokens: int
    tokens: int = Field(description="Of the prompt and the answer.")
    edges: list[int] = Field(description="The first token of each column, and the end of the last.")
    layers: list[LayerShare] = Field(description="In the model's order; only those that read virtual tokens.")


class Task(BaseModel):
    name: str
    folder: str | None = Field(description="In the folder of prefixes; null where it was named on the command line.")
    virtual_tokens: int
    bytes: int = Field(description="Of its numbers, where they are.")
    tier: str = Field(description="Where its numbers are: device, cpu or file.")
    storage: str = Field(description="plain, or in how many bits they are.")
    priority: int
    pinned: bool
    loaded: int = Field(description="Unix seconds.")


class Tasks(BaseModel):
    tasks: list[Task]
    available: list[str] = Field(description="Folders that could be loaded.")


class LoadRequest(_Body):
    folder: str | None = Field(None, description="A folder in the folder of prefixes; by default named as the task.")
    priority: int | None = Field(
        None, ge=-1000, le=1000, description="Who is less important makes room for it; by default what it had, or 0."
    )
    pinned: bool | None = Field(None, description="It stays on the device; by default as it was.")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class State(BaseModel):
    status: str
