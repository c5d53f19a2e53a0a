"""What is refused or has failed, in OpenAI's shape."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from bminf.errors import BMInfError

logger = logging.getLogger("bminf")


class ApiError(Exception):
    """An error that the client is told of.

    status: of HTTP.   param: the field of the request that is wrong.   code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def as_json(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": "invalid_request_error" if self.status < 500 else "server_error",
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Any:
        return JSONResponse(self.as_json(), self.status, self.headers)


def api_error(error: BaseException) -> ApiError:
    """What a client is told of any error: of one that nobody has thought of, not its text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BMInfError):  # also of logits that are NaN: asking again would not help
        return ApiError(400, str(error), code="cannot_generate")
    logger.error("a request has failed", exc_info=error)
    text = f"the server has failed on this request: {type(error).__name__}; see its log"
    return ApiError(500, text, code="internal_error", headers={"x-should-retry": "false"})


def unavailable(message: str) -> ApiError:
    """While the model is loaded, and once the server stops."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": "5"})
