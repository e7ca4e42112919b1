"""Errors in the OpenAI API's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from griffin.integrations.server import schema
from griffin.integrations.server.types import FormError, FullError, LateError, StoppedError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
# Alternatives of a type as pydantic names them in an error's location, beside classes and such as list[str].
_BRANCHES = ("str", "int", "float", "bool", "list")
_TAGGED = ("response_format", "format")  # fields whose alternatives pydantic names by their `type`


class ApiError(Exception):
    """The server refuses a request.

    Args:
        status: the HTTP status.
        message: what is wrong and what to do about it.
        param: the field that is wrong.
        code: the error code that a program can compare.
        retry_after_s: seconds that the client should wait before it tries again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after_s = (
            status,
            message,
            param,
            code,
            retry_after_s,
        )

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response, with a `Retry-After` header where `retry_after_s` is given."""
        headers = None if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return JSONResponse(self.body(), self.status, headers)


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error response with the given status, as `ApiError` writes it."""
    return ApiError(status, message, param, code).response()


def refusal(error: Exception) -> ApiError:
    """The API error that reports an exception of the engine."""
    if isinstance(error, FullError):
        return ApiError(429, f"{error}; try again later", code="queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, LateError):
        return ApiError(504, str(error), code="deadline_exceeded")
    if isinstance(error, StoppedError):
        return ApiError(503, str(error))
    if isinstance(error, FormError):
        return ApiError(422, str(error), code="unsupported_form")
    if isinstance(error, ValueError):  # a config that this model refuses
        return ApiError(422, str(error), "griffin")
    return ApiError(500, f"the answer has failed: {type(error).__name__}: {error}")


def invalid(_: Request, error: Exception) -> JSONResponse:
    """Handle a body that the schema refuses; the message names the field."""
    assert isinstance(error, RequestValidationError)
    chosen = _most_helpful(error.errors())
    if chosen["type"] == "json_invalid":
        return error_response(400, f"the body is not JSON: {chosen.get('ctx', {}).get('error', chosen['msg'])}")
    name = ".".join(_fields(chosen["loc"]))
    if not name:
        return error_response(422, f"the body is not what is expected: {chosen['msg']}")
    neutral = name.split(".")[0] in schema.UNSUPPORTED
    unsupported = neutral or chosen["type"] == "extra_forbidden"
    text = f"{name} is not supported" if unsupported else f"{name}: {chosen['msg'].removeprefix('Value error, ')}"
    if neutral:
        text += "; leave it out"
    elif not unsupported and isinstance(chosen.get("input"), str | int | float | bool):
        text += f" (found {_short(chosen['input'])})"
    return error_response(422, text, name, "unsupported_parameter" if unsupported else None)


def _most_helpful(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The error that says most about the first wrong field.

    A field with several alternative types has errors for each. The intended one is probably that whose errors lie
    deepest; among equally deep ones that which has the right type and a wrong value; then that with the fewest errors.
    Where nothing but the field's own type is wrong, one error names all types that it may have.
    """
    first = _fields(errors[0]["loc"])[:1]
    branches: dict[tuple[object, ...], list[dict[str, Any]]] = {}
    for detail in errors:
        if _fields(detail["loc"])[:1] == first:
            branches.setdefault(_branches(detail["loc"]), []).append(detail)

    def helpful(detail: dict[str, Any]) -> tuple[int, bool]:
        return len(_fields(detail["loc"])), not detail["type"].endswith("_type")

    chosen = max(
        (max(branch, key=helpful) for branch in branches.values()),
        key=lambda detail: (*helpful(detail), -len(branches[_branches(detail["loc"])])),
    )
    where = _fields(chosen["loc"])
    same = [detail for branch in branches.values() for detail in branch if _fields(detail["loc"]) == where]
    if len(same) > 1 and all(detail["type"].endswith("_type") for detail in same):
        names = dict.fromkeys(detail["msg"].removeprefix("Input should be ") for detail in same)
        chosen = {**chosen, "msg": "Input should be " + " or ".join(names)}
    return chosen


def _fields(location: Sequence[object]) -> list[str]:
    """The names of fields and numbers of items in an error's location, which also names alternatives of types."""
    parts = zip(location[1:], location, strict=False)
    return [str(part) for part, before in parts if isinstance(part, int) or not _is_branch(str(part), before)]


def _branches(location: Sequence[object]) -> tuple[object, ...]:
    return tuple(part for part in location[1:] if isinstance(part, str) and _is_branch(part))


def _is_branch(part: str, before: object = None) -> bool:
    """Whether a part of an error's location names one alternative of a type instead of a field."""
    return not part.isidentifier() or part in _BRANCHES or part[0].isupper() or before in _TAGGED


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def of_http(request: Request, error: Exception) -> JSONResponse:
    """Handle an unknown path or a method that is not allowed."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(404, f"there is nothing at {request.url.path[:80]}; the API is at /v1, the page at /")
    if error.status_code == 405:
        response = error_response(405, f"{request.method} is not allowed here")
        response.headers.update(error.headers or {})
        return response
    return error_response(error.status_code, str(error.detail))


def failed(_: Request, error: Exception) -> JSONResponse:
    """Handle an unexpected exception, which is a defect of the server."""
    return error_response(500, f"this server has failed: {type(error).__name__}")
