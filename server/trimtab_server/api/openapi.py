"""What the OpenAPI document says beyond the routes: bodies that the gateway reads, but vLLM owns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trimtab_processors.pack import ControlName
from trimtab_server.controls.request import Selection
from trimtab_server.protocol import CONTROL_HEADER


class ErrorObject(BaseModel):
    """What went wrong, as in the OpenAI API."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorAnswer(BaseModel):
    error: ErrorObject


class AnthropicErrorObject(BaseModel):
    """What went wrong, as in Anthropic's API."""

    type: str
    message: str


class AnthropicErrorAnswer(BaseModel):
    type: Literal["error"]
    error: AnthropicErrorObject
    request_id: str | None = None
    """None in vLLM's own errors."""


class LoadControl(BaseModel):
    """The body of `/v1/load_control`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    control_name: ControlName
    """What requests will call it."""
    control_path: Annotated[str, Field(min_length=1, max_length=4096)]
    """The directory of its pack, below one of the configuration's `control_roots`."""
    models: list[str] | None = None
    """Which models offer it; without, all that offer every control."""


class UnloadControl(BaseModel):
    """The body of `/v1/unload_control`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    control_name: ControlName


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "The request is wrong; `param` says where.",
        401: "A key is needed, or another one.",
        403: "This key may not, or nobody may.",
        404: "There is no such model, control or path.",
        408: "The body did not arrive in time.",
        409: "What there is stands against it.",
        413: "The body or the prompt is too large.",
        415: "The body is no JSON.",
        429: "Too many requests at once; `Retry-After` says when to try again.",
        500: "The gateway or the replica failed.",
        502: "The replica broke off.",
        503: "No replica of the model answers now.",
        504: "The replica fell silent.",
    }.items()
}

ANTHROPIC_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**answer, "model": AnthropicErrorAnswer | ErrorAnswer} for status, answer in ERRORS.items()
}
"""Errors of `/v1/messages`: Anthropic's shape, and OpenAI's where vLLM refuses the body itself."""

_CONTROL_OBJECT: dict[str, Any] = Selection.model_json_schema()
_CONTROL: dict[str, Any] = {
    "description": (
        "The controls of this request: false for none, true for the model's default or only one, a name, an"
        " object, or a list of names and objects, whose shifts are summed. It goes before the header"
        f" `{CONTROL_HEADER}`, that before an alias `model:control=strength`, and that before the model's"
        " default."
    ),
    "anyOf": [
        {"type": "null"},
        {"type": "boolean"},
        {"type": "string"},
        _CONTROL_OBJECT,
        {"type": "array", "items": {"anyOf": [{"type": "string"}, _CONTROL_OBJECT]}},
    ],
    "examples": [False, "alpaca", {"name": "alpaca", "strength": 0.7}, ["alpaca", {"name": "forget"}]],
}


def generating(content: str, what: str) -> dict[str, Any]:
    """The part of the document of an endpoint that generates `what` from the field `content`."""
    schema = {
        "type": "object",
        "description": f"What vLLM takes for {what}, and `control`.",
        "properties": {"model": {"type": "string"}, content: {}, "control": _CONTROL},
        "additionalProperties": True,
    }
    return {
        "parameters": [
            {
                "name": CONTROL_HEADER,
                "in": "header",
                "required": False,
                "description": (
                    "Controls, for clients that add no field: `alpaca=0.7;top_k=50,forget;routing=pm-mined`,"
                    " `on` or `off`."
                ),
                "schema": {"type": "string"},
            }
        ],
        "requestBody": _json_body(schema),
        "responses": {
            "200": {
                "description": f"What vLLM answers: {what}, or a stream of events.",
                "headers": {
                    CONTROL_HEADER: {
                        "description": "The controls that were applied, with their strengths; or `off`.",
                        "schema": {"type": "string"},
                    }
                },
                "content": {
                    "application/json": {"schema": {"type": "object"}},
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            }
        },
    }


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """The part of the document of an endpoint whose body is `model`."""
    return {"requestBody": _json_body(model.model_json_schema())}


def _json_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}
