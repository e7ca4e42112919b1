"""Errors in the OpenAI API's shape."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from griffin.integrations.server import schema
from griffin.integrations.server.types import FullError, LateError, StoppedError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


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
    if isinstance(error, ValueError):  # a config that this model refuses
        return ApiError(422, str(error), "griffin")
    return ApiError(500, f"the answer has failed: {type(error).__name__}: {error}")


def invalid(_: Request, error: Exception) -> JSONResponse:
    """Handle a body that the schema refuses; the message names the field."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    # A field with several alternative types reports an error for each. The deepest one is probably of the intended
    # type; of equally deep ones, one that is about the value and not about its type.
    same_field = (detail for detail in errors if detail["loc"][:2] == errors[0]["loc"][:2])
    deepest = max(same_field, key=lambda detail: (len(detail["loc"]), not detail["type"].endswith("_type")))
    if deepest["type"] == "json_invalid":
        return error_response(400, f"the body is not JSON: {deepest.get('ctx', {}).get('error', deepest['msg'])}")
    path = [str(part) for part in deepest["loc"][1:] if isinstance(part, int) or not _is_branch(part)]
    name = ".".join(path)
    if not name:
        return error_response(422, f"the body is not what is expected: {deepest['msg']}")
    neutral = name.split(".")[0] in schema.UNSUPPORTED
    unsupported = neutral or deepest["type"] == "extra_forbidden"
    text = f"{name} is not supported" if unsupported else f"{name}: {deepest['msg']}"
    if neutral:
        text += "; leave it out"
    elif not unsupported and isinstance(deepest.get("input"), str | int | float | bool):
        text += f" (found {_short(deepest['input'])})"
    return error_response(422, text, name, "unsupported_parameter" if unsupported else None)


def _is_branch(part: str) -> bool:
    """Whether a part of an error's location names one alternative of a type instead of a field."""
    return not part.isidentifier() or part in ("str", "int", "float", "bool", "list")


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
