"""Bodies as strict JSON (RFC 8259), read beside the event loop: a large one keeps no other request waiting.

Refused besides what is no JSON: bytes that are not UTF-8, halves of surrogate pairs, NaN and infinities, a
key that stands twice, too many or too deeply nested objects, more entries than `limits.max_items`. Only then
are models built.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from email.message import Message
from itertools import chain
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from frpo.config.service import LimitsConfig
from frpo.strict_json import HOOKS, NotStrict

M = TypeVar("M", bound=BaseModel)
MAX_DEPTH = 64
"""Of nested lists and objects: far above what any column holds, far below what exhausts a stack."""

FEWEST_CONTAINERS = 2**16
"""Lists and objects that every body may hold; brackets in its texts count too."""


class Malformed(ValueError):
    """A body that no model is made of. Its words never repeat the text."""


def strict_route(limits: LimitsConfig) -> type[APIRoute]:
    """A route whose body reaches its model through `read_body`."""

    class StrictRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            kind: Any = self.body_field.field_info.annotation if self.body_field else None

            class StrictRequest(Request):
                async def json(self) -> Any:
                    return await asyncio.to_thread(read_body, kind, await self.body(), limits)

            async def strict(request: Request) -> Response:
                if kind is None:
                    return await handle(request)
                refuse_other_media(request.headers)
                return await handle(StrictRequest(request.scope, request.receive))

            return strict

    return StrictRoute


def refuse_other_media(headers: Headers) -> None:
    """Raises HTTPException 415 for a body that is compressed or not said to be JSON (RFC 9110, 15.5.16)."""
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise HTTPException(
            415,
            f"Content-Encoding: {coding[:40]} is not read here; send the body as it is",
            {"Accept-Encoding": "identity"},
        )
    given = Message()
    given["content-type"] = headers.get("content-type", "")
    media = given.get_content_type()
    charset = given.get_content_charset("utf-8")
    is_json = media == "application/json" or (media.startswith("application/") and media.endswith("+json"))
    if not headers.get("content-type") or not is_json or charset not in ("utf-8", "utf8", "us-ascii"):
        raise HTTPException(
            415, "the body must be JSON in UTF-8: send the header Content-Type: application/json"
        )


def read_body(kind: type[M], body: bytes, limits: LimitsConfig) -> M:
    """The model made of a body. Raises HTTPException 422 that names the place and never repeats the text."""
    try:
        value = parse_json(body)
        refuse_too_many(kind, value, limits)
        return kind.model_validate(value)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_context=False, include_input=False)
        raise HTTPException(422, describe_mistakes(mistakes, "body")) from None
    except Malformed as error:
        raise HTTPException(422, f"body: {error}") from None


def describe_mistakes(errors: Any, *part: str) -> str:
    """The first mistakes of pydantic's error dictionaries, each with where it stands in that part of the
    request.

    Example: "body.items.0.completion: Field required".
    """
    mistakes = []
    for error in errors[:5]:
        place = ".".join(map(str, (*part, *error["loc"])))
        mistakes.append(f"{place}: {error['msg']}")
    return "; ".join(mistakes)


def refuse_too_many(kind: type[BaseModel], value: Any, limits: LimitsConfig) -> None:
    """Raises Malformed. Fields that the model does not know (slime sends token ids) may be of any length."""
    fields = value.items() if isinstance(value, dict) else ()
    for name, entries in fields:
        if name in kind.model_fields and isinstance(entries, list) and len(entries) > limits.max_items:
            most = f"at most {limits.max_items} (limits.max_items); send several requests"
            raise Malformed(f"{name}: {len(entries)} items in one request, {most}")


def parse_json(body: bytes) -> Any:
    """The value of a body. Raises Malformed that says what is wrong, and where."""
    most = max(FEWEST_CONTAINERS, len(body) // 32)
    # Python makes them while every other thread waits: 2 us each
    if body.count(b"[") + body.count(b"{") > most:
        raise Malformed(f"more than {most} lists and objects")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Malformed(f"byte {error.start} is not UTF-8") from None
    try:
        value = json.loads(text, **HOOKS)
    except json.JSONDecodeError as error:
        raise Malformed(f"no JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise Malformed(f"nested deeper than {MAX_DEPTH} levels") from None
    except NotStrict as error:
        raise Malformed(error.rule) from None
    except ValueError:  # Python reads at most 4300 digits
        raise Malformed("a number has too many digits") from None
    _refuse_deep_or_torn(value, torn="\\ud" in text or "\\uD" in text)
    return value


def _refuse_deep_or_torn(value: Any, *, torn: bool) -> None:
    """A level of nesting at a time. `torn`: whether a string may hold half of a surrogate pair, which UTF-8
    can't say."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if torn:
            _refuse_torn([text for text in level if isinstance(text, str)])
        objects = [node for node in level if isinstance(node, dict)]
        lists = [node for node in level if isinstance(node, list)]
        if torn:
            _refuse_torn(list(chain.from_iterable(objects)))
        level = [*chain.from_iterable(node.values() for node in objects), *chain.from_iterable(lists)]
        if not level:
            return
    raise Malformed(f"nested deeper than {MAX_DEPTH} levels")


def _refuse_torn(texts: list[str]) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise Malformed("a string holds half of a surrogate pair (\\ud800 to \\udfff)") from None
