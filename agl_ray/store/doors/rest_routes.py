"""The frame of REST: from a handler with typed bodies to a FastAPI route, its errors, and its part of the OpenAPI document.

What it is: a handler is a coroutine over msgspec structs; `Routes.add` reads the body or the query into one, checks the ids in the path,
answers with JSON bytes. The document is made from the same structs. Nothing of a request is read by anything but msgspec, so
there is one set of rules for what is valid.
Who calls it: `agl_ray.store.doors.rest`. Test alone: tests/integration/test_store_rest.py.
"""

from __future__ import annotations

import logging
import re
import typing
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from agl_ray.ops.asgi import JSON, Gone, TooLarge, read_body, unless_gone
from agl_ray.store.checks import check_depth
from agl_ray.store.doors.errors import error_body, status_of
from agl_ray.store.doors.rest_records import Error, Id
from agl_ray.store.transport import StoreAway
from agl_ray.types import AglError

log = logging.getLogger("agl_ray.store")
T = TypeVar("T")
Handler = Callable[..., Awaitable[Any]]

ROOT = "/v1/agl/"
REFS = "#/components/schemas/{name}"
_MARK = "agl-type:"
_MEANINGS = {
    400: "The request contradicts itself or names what cannot be (InputError).",
    401: "The API key is missing or wrong.",
    404: "What it is about is not in the store (NotFound).",
    409: "It contradicts the state of a record (Conflict).",
    413: "The body is too large.",
    415: "The body is not JSON.",
    422: "The body or a parameter has another shape than this document says.",
    503: "The store cannot answer now (StoreError); it may be asked again.",
    504: "What was waited for did not come in time (WaitTimeout).",
}


class Malformed(AglError):
    """A request whose parts do not have the documented shape."""


class NoJson(AglError):
    """A body that says it is something else than JSON."""


class Routes:
    """A FastAPI application that grows by `add`; `keyed`: callers must show an API key (checked in front of this); max_body: bytes of a request."""

    def __init__(self, title: str, version: str, *, keyed: bool, max_body: int) -> None:
        self.app = FastAPI(
            title=title,
            version=version,
            openapi_url=f"{ROOT}openapi.json",
            docs_url=None,  # its page is loaded from elsewhere
            redoc_url=None,
            redirect_slashes=False,
        )
        self._keyed, self._max_body = keyed, max_body
        self._types = Types()
        self._document: dict[str, Any] | None = None
        self.app.openapi = self.document  # type: ignore[method-assign]
        for kind, answer in (
            (AglError, _known),
            (StoreAway, _known),
            (HTTPException, _http),
            (Gone, _gone),
            (Exception, _unknown),
        ):
            self.app.add_exception_handler(kind, answer)

    def add(
        self,
        method: str,
        path: str,
        handler: Handler,
        *,
        gives: Any,
        takes: type[Any] | None = None,
        query: type[Any] | None = None,
        status: int = 200,
        waits: bool = False,
    ) -> None:
        """`takes`, `query`: structs that the handler gets as `body` and `query`. gives: type of the answer. waits: it may block; it is
        cancelled when the caller leaves."""
        names = re.findall(r"{(\w+)}", path)

        async def endpoint(request: Request) -> Response:
            given: dict[str, Any] = {
                name: read(f"path: {name}", request.path_params[name], Id) for name in names
            }
            if query is not None:
                given["query"] = query_of(request, query)
            if takes is not None:
                given["body"] = await body_of(request, takes, self._max_body)
            work = handler(**given)
            result = await (unless_gone(work, request.receive) if waits else work)
            return Response(msgspec.json.encode(result), status, media_type=JSON)

        text = (handler.__doc__ or "").strip()
        self.app.add_api_route(
            ROOT + path,
            endpoint,
            methods=[method],
            name=handler.__name__,
            operation_id=handler.__name__,
            summary=text.partition("\n")[0],
            description=text,
            tags=[path.partition("/")[0]],
            status_code=status,
            response_model=None,
            openapi_extra=self._types.operation(names, takes, query, gives, status),
        )

    def document(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self._document is None:
            made = get_openapi(
                title=self.app.title,
                version=self.app.version,
                description="The LightningStore: rollouts, attempts, spans, resources and workers of a run.",
                routes=self.app.routes,
            )
            self._document = self._types.finished(made, self._keyed)
        return self._document


# Requests.


def read(what: str, value: Any, kind: Any) -> Any:
    """`value` (texts, for a path or a query) as `kind`; Malformed says what does not fit."""
    try:
        return msgspec.convert(value, kind, strict=False)
    except (msgspec.ValidationError, ValueError, OverflowError) as error:
        raise Malformed(f"{what}: {error}") from error


def query_of(request: Request, kind: type[T]) -> T:
    """The query string as a struct; a field of several values is a repeated parameter."""
    several = {
        field.encode_name
        for field in msgspec.structs.fields(typing.cast(type[msgspec.Struct], kind))
        if any(typing.get_origin(one) is list for one in (field.type, *typing.get_args(field.type)))
    }
    given: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        if name in several:
            given.setdefault(name, []).append(value)
        elif name in given:
            raise Malformed(f"query: {name!r} is given twice")
        else:
            given[name] = value
    found: T = read("query", given, kind)
    for name in given:
        if getattr(found, name) is None:  # msgspec reads the text `null` as nothing
            raise Malformed(f"query: {name!r}: got 'null'; leave it out instead")
    return found


async def body_of(request: Request, kind: type[T], limit: int) -> T:
    """The JSON body as `kind`; no body at all is an empty object."""
    body = await read_body(request.receive, limit)
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if body and media != JSON:
        raise NoJson(f"content-type: expected {JSON}, got {media!r}")
    try:
        check_depth("nesting", body)
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise Malformed(f"body: {error}") from error


# Errors.


def _error_answer(status: int, kind: str, message: str, headers: Any = None) -> Response:
    return Response(error_body(kind, message), status, headers=headers, media_type=JSON)


async def _known(_: Request, error: Exception) -> Response:
    if isinstance(error, Malformed):
        return _error_answer(422, "InputError", str(error))
    if isinstance(error, NoJson):
        return _error_answer(415, "InputError", str(error))
    kind = "InputError" if isinstance(error, TooLarge) else type(error).__name__
    return _error_answer(status_of(error), kind, str(error))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "NotFound" if error.status_code == 404 else "InputError"
    words = f"{request.method} {request.url.path}: {error.detail}"
    return _error_answer(error.status_code, kind, words, error.headers)


async def _gone(_request: Request, _error: Exception) -> Response:
    """Nobody reads it."""
    return Response(status_code=499)


async def _unknown(request: Request, error: Exception) -> Response:
    log.error("%s %s failed in the store's door", request.method, request.url.path)
    return _error_answer(500, type(error).__name__, "the store's door failed; its log says why")


# The document.


class Types:
    """Types that the document names. Each stands in it as a reference of ours until `finished` puts the schemas in."""

    def __init__(self) -> None:
        self._kinds: list[Any] = []

    def mark(self, kind: Any) -> dict[str, str]:
        self._kinds.append(kind)
        return {"$ref": f"{_MARK}{len(self._kinds) - 1}"}

    def operation(
        self, names: list[str], takes: Any, query: Any, gives: Any, status: int
    ) -> dict[str, Any]:
        """What an operation says of itself beside its name."""
        answers = {status: ("Done.", gives)}
        answers |= {code: (text, Error) for code, text in _MEANINGS.items()}
        said: dict[str, Any] = {
            "responses": {
                str(code): {"description": text, "content": {JSON: {"schema": self.mark(kind)}}}
                for code, (text, kind) in answers.items()
            },
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": self.mark(Id)}
                for name in names
            ],
        }
        for field in msgspec.structs.fields(query) if query is not None else ():
            said["parameters"].append(self._parameter(field))
        if takes is not None:
            said["requestBody"] = {
                "required": not _all_optional(takes),
                "content": {JSON: {"schema": self.mark(takes)}},
            }
        return said

    def _parameter(self, field: msgspec.structs.FieldInfo) -> dict[str, Any]:
        parts = [one for one in typing.get_args(field.type) if one is not type(None)]
        nullable = type(None) in typing.get_args(field.type)
        kind = (
            parts[0] if nullable and len(parts) == 1 else field.type
        )  # what is absent has no value
        one: dict[str, Any] = {"name": field.encode_name, "in": "query", "required": field.required}
        if field.default not in (msgspec.NODEFAULT, None):
            one["description"] = f"default: {field.default}"
        return {**one, "schema": self.mark(kind)}

    def finished(self, document: dict[str, Any], keyed: bool) -> dict[str, Any]:
        """`document` with schemas for the types."""
        schemas, components = msgspec.json.schema_components(self._kinds, ref_template=REFS)

        def replaced(node: Any) -> Any:
            if isinstance(node, list):
                return [replaced(one) for one in node]
            if not isinstance(node, dict):
                return node
            mark = node.get("$ref", "")
            if isinstance(mark, str) and mark.startswith(_MARK):
                return schemas[int(mark.removeprefix(_MARK))]
            return {key: replaced(one) for key, one in node.items()}

        parts: dict[str, Any] = {"schemas": components}
        made: dict[str, Any] = replaced(document)
        if keyed:
            parts["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
            made["security"] = [{"bearer": []}, {"key": []}]
            made["paths"][f"{ROOT}health"]["get"]["security"] = []
        return {**made, "components": parts}


def _all_optional(kind: Any) -> bool:
    return hasattr(kind, "__struct_fields__") and not any(
        field.required for field in msgspec.structs.fields(kind)
    )
