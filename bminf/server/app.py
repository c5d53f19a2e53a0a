"""The app: which path is answered by what."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response

from bminf import __version__
from bminf.server import picture
from bminf.server.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    FillBody,
    TokenizeBody,
    parse,
)
from bminf.server.errors import ApiError, api_error
from bminf.server.generating import Generation, check_letters
from bminf.server.metrics import CONTENT_TYPE, Metrics
from bminf.server.middleware import App, BodyLimit, Counted, Key
from bminf.server.sending import PING_S
from bminf.server.worker import Worker

MAX_BODY_BYTES = 4 * 2**20
_ICON = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><path d="M0 0h4v8H0z"/></svg>'

Kind = TypeVar("Kind", bound=Body)
Handler = Callable[[Request], Awaitable[Any]]


@dataclass(frozen=True)
class ServerSettings:
    """name: of the model, as clients ask for it.   api_key: None for no key.   cors_origins: of
    pages that browsers may show answers to.   ping_s: between bytes, where there are none.
    body_timeout_s: for a body to arrive."""

    name: str
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    body_timeout_s: float = 30.0
    ping_s: float = PING_S


def create_app(worker: Worker, settings: ServerSettings, metrics: Metrics) -> App:
    """The ASGI app of a worker, which need not be loaded yet."""
    metrics.watch(worker)
    api = _Api(worker, settings, metrics)
    app = FastAPI(
        title="bminf", version=__version__, docs_url=None, redoc_url=None,
        exception_handlers={HTTPException: _refused},
    )  # fmt: skip
    schemas: dict[str, Any] = {}
    for method, path, handler, kind in api.routes():
        more = _path_parameter(settings.name) if "{" in path else None
        if kind is not None:
            more = _request_body(kind, settings.name, schemas)
        app.add_api_route(
            path, _guarded(handler), methods=[method], response_model=None, openapi_extra=more
        )
    _add_schemas(app, schemas)
    wrapped: App = BodyLimit(app, settings.max_body_bytes, settings.body_timeout_s)
    if settings.api_key is not None:
        wrapped = Key(wrapped, settings.api_key)
    if settings.cors_origins:  # outside of the key: a preflight has none
        wrapped = CORSMiddleware(
            wrapped, list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return Counted(wrapped, metrics.count_reply)


class _Api:
    """The handlers."""

    def __init__(self, worker: Worker, settings: ServerSettings, metrics: Metrics) -> None:
        self._worker, self._name, self._metrics = worker, settings.name, metrics
        self._generation = Generation(worker, settings.name, settings.ping_s)
        self._page = (files("bminf.server") / "page.html").read_text(encoding="utf-8")

    def routes(self) -> list[tuple[str, str, Handler, type[Body] | None]]:
        return [
            ("GET", "/", self._show_page, None),
            ("GET", "/favicon.ico", self._icon, None),
            ("GET", "/health", self._health, None),
            ("GET", "/metrics", self._scrape, None),
            ("GET", "/plan", self._plan, None),
            ("GET", "/v1/models", self._models, None),
            ("GET", "/v1/models/{name:path}", self._model, None),
            ("GET", "/tokenizer_info", self._tokenizer_info, None),
            ("POST", "/tokenize", self._tokenize, TokenizeBody),
            ("POST", "/detokenize", self._detokenize, DetokenizeBody),
            ("POST", "/v1/completions", self._complete, CompletionBody),
            ("POST", "/v1/chat/completions", self._chat, ChatBody),
            ("POST", "/v1/fill", self._fill, FillBody),
        ]

    async def _show_page(self, request: Request) -> Any:
        return HTMLResponse(self._page)

    async def _icon(self, request: Request) -> Any:
        return Response(_ICON, media_type="image/svg+xml")

    async def _health(self, request: Request) -> Any:
        self._worker.ready()
        return JSONResponse({"status": "ok"})

    async def _scrape(self, request: Request) -> Any:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def _plan(self, request: Request) -> Any:
        return JSONResponse(picture.plan_json(self._worker))

    async def _models(self, request: Request) -> Any:
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def _model(self, request: Request) -> Any:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._entry())

    async def _tokenizer_info(self, request: Request) -> Any:
        return JSONResponse(dict(self._worker.ready().special))

    async def _tokenize(self, request: Request) -> Any:
        body, texts = await self._body(request, TokenizeBody), self._worker.ready()
        check_letters(texts, body.prompt, "prompt")
        tokens = await self._generation.in_thread(
            texts.encode, body.prompt, body.add_special_tokens
        )
        return JSONResponse(
            {"tokens": tokens, "count": len(tokens), "max_model_len": texts.max_length}
        )

    async def _detokenize(self, request: Request) -> Any:
        body, texts = await self._body(request, DetokenizeBody), self._worker.ready()
        if max(body.tokens, default=0) >= texts.vocab_size:
            raise ApiError(400, f"tokens: ids are 0 to {texts.vocab_size - 1}", "tokens")
        text = await self._generation.in_thread(texts.decode, body.tokens)
        return JSONResponse({"prompt": text})

    async def _complete(self, request: Request) -> Any:
        return await self._generation.complete(await self._body(request, CompletionBody))

    async def _chat(self, request: Request) -> Any:
        return await self._generation.chat(await self._body(request, ChatBody))

    async def _fill(self, request: Request) -> Any:
        return await self._generation.fill(await self._body(request, FillBody))

    async def _body(self, request: Request, kind: type[Kind]) -> Any:
        """Raises ApiError.   Any other type of content a page may post to a server of this machine
        without asking the browser."""
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise ApiError(415, "the body is JSON; send Content-Type: application/json")
        body: Any = parse(kind, await request.body())
        if body.model is not None:
            self._check_name(body.model)
        return body

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise ApiError(
                404, f"there is no model of that name; this server has {self._name!r}", "model",
                "model_not_found",
            )  # fmt: skip

    def _entry(self) -> dict[str, Any]:
        texts = self._worker.ready()
        can = {"chat": texts.can_chat, "fill": texts.can_fill, "echo_logprobs": texts.can_score}
        return {
            "id": self._name, "object": "model", "created": 0, "owned_by": "bminf",
            "max_model_len": texts.max_length, "capabilities": can,
        }  # fmt: skip


def _guarded(handler: Handler) -> Handler:
    """Its errors as replies."""

    @functools.wraps(handler)
    async def guarded(request: Request) -> Any:
        try:
            return await handler(request)
        except Exception as error:
            return api_error(error).response()

    return guarded


async def _refused(request: Request, error: Any) -> Any:
    """What the router refuses."""
    text = {
        404: f"there is no {request.url.path} here; a client's base_url ends in /v1",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, text, headers=error.headers).response()


# ---- the OpenAPI document ------------------------------------------------------------------------


def _path_parameter(name: str) -> dict[str, Any]:
    schema = {"type": "string", "enum": [name]}
    return {"parameters": [{"name": "name", "in": "path", "required": True, "schema": schema}]}


def _request_body(kind: type[Body], name: str, schemas: dict[str, Any]) -> dict[str, Any]:
    """Of a body, whose `model` is the one that there is: else tests that are made from it would
    never get past that."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schema["properties"]["model"] = {"type": "string", "enum": [name]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _add_schemas(app: Any, schemas: dict[str, Any]) -> None:
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document: dict[str, Any] = made()
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return document

    app.openapi = openapi
