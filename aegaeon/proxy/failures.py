"""Errors as HTTP sees them: status, OpenAI's error body, and whether trying again helps."""

import math

import msgspec

from aegaeon.errors import AegaeonError, GivenUp, MemoryFull

# The longest wait that clients honour; above it they give up at once.
MAX_RETRY_AFTER_S = 120.0
MAX_MESSAGE_CHARS = 2000

_STATUS_OF_CODE = {
    "invalid_value": 400,
    "context_length_exceeded": 400,
    "record_too_large": 400,
    "out_of_blocks": 400,
    "model_not_found": 404,
    "queue_full": 429,
    "rate_limit_exceeded": 429,
    "overloaded": 503,
    "model_loading": 503,
    "draining": 503,
    "instance_lost": 503,
    "mailbox_full": 503,
    "mailbox_closed": 503,
    "store_unavailable": 503,
    "memory_full": 503,
    "timeout": 504,
}
_RETRIABLE = frozenset({408, 429, 503})
# A model that cannot be loaded: the operator must act, and the reason names files of this machine.
_BROKEN_MODEL = frozenset(
    {"config_error", "unsupported_model", "checkpoint_error", "budget_too_small"}
)


class ErrorDetail(msgspec.Struct, frozen=True):
    """What stands under `error` in every body that is not a success."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is not 2xx, and the last frame of a broken stream."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is not 2xx. `retry_after_s` is a prediction, never a guess above 120 s; one
    that `is_final` says that the same request is not to be sent again, whatever its status."""

    is_final = False

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        if len(message) > MAX_MESSAGE_CHARS:  # it may repeat what was sent
            message = f"{message[:MAX_MESSAGE_CHARS]}…"
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """Return the JSON body."""
        detail = ErrorDetail(self.message, _type_of(self.status), self.param, self.code)
        return msgspec.json.encode(ErrorBody(detail))

    def headers(self) -> dict[str, str]:
        """Return the headers that tell an SDK whether and when to try again, or what to send."""
        can_help = self.status in _RETRIABLE and not self.is_final
        headers = {"x-should-retry": "true" if can_help else "false"}
        if can_help:
            wait_s = min(max(self.retry_after_s or 1.0, 1.0), MAX_RETRY_AFTER_S)
            headers["retry-after"] = str(math.ceil(wait_s))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def invalid(param: str | None, message: str) -> ApiError:
    """A known field with a value that cannot be."""
    return ApiError(400, "invalid_value", message, param)


def unsupported(param: str) -> ApiError:
    """A known field whose feature is not built; never silently ignored."""
    return ApiError(
        400, "unsupported_parameter", f"'{param}' is not supported; leave it out", param
    )


def as_api_error(error: AegaeonError, retry_after_s: float = 1.0) -> ApiError:
    """Give `error` its HTTP status; what only the operator should read stays in the log."""
    code = error.code
    if code in _BROKEN_MODEL:
        text = f"the model cannot be loaded ({code}); the server's log says why"
        return ApiError(500, code, text, "model")
    status = _STATUS_OF_CODE.get(code, 500)
    text = str(error)
    if code == MemoryFull.code:  # names a file of this machine
        text = "the server has no memory for the model just now; its log says what to do"
    if status == 500:
        return internal_error()
    param = {"context_length_exceeded": "messages", "model_not_found": "model"}.get(code)
    answer = ApiError(status, code, text, param, retry_after_s)
    answer.is_final = isinstance(error, GivenUp)
    return answer


def internal_error() -> ApiError:
    """What a client learns of a fault of ours: that there was one."""
    return ApiError(500, "internal_error", "internal error; the server's log has the x-request-id")


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
