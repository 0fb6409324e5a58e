"""The reward service as a FastAPI application over any Backend. Limits, errors and formats are decided here,
scores are not.

Errors have a JSON body {"error": {"type", "message"}} that never repeats the request: 401 no or wrong token,
408 a body that does not come, 413 one too large, 415 compressed or no JSON, 422 not as the schema says, 429
too much at once from all callers, 503 overloaded or a reward that failed (for formats that have no null), 504
no scores in time. 429 and 503 carry Retry-After (RFC 9110, 10.2.3).
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from frpo.config import JudgeReward
from frpo.config.service import ServiceConfig
from frpo.service import wire
from frpo.service.door import TYPES, Door, problem_response
from frpo.service.reading import describe_mistakes, strict_route
from frpo.types import Decoding, Item, Reply, Reward

log = logging.getLogger("frpo.service")

T = TypeVar("T")


class Overloaded(Exception):
    """Too many requests wait for a reward."""


class Unavailable(Exception):
    """Whoever computes a reward is gone; asking again may help."""


class Backend(Protocol):
    async def score(self, items: Sequence[Item], names: Sequence[str]) -> list[Reward]:
        """One Reward per item, by the named rewards that apply to it. Raises Overloaded or Unavailable."""
        ...

    async def chat(
        self, name: str, messages: Sequence[dict[str, str]], decoding: Decoding
    ) -> Reply | Exception:
        """What the model of a judge says; ValueError for what it does not take, TimeoutError where it is too
        late. Raises as `score`."""
        ...

    async def ready(self) -> bool:
        """Whether every reward has a process that answers."""
        ...


class Desk:
    """Checks a request against the limits, asks the backend, and waits no longer than it may."""

    def __init__(self, config: ServiceConfig, backend: Backend) -> None:
        self.config = config
        self.backend = backend
        self.names = [reward.name for reward in config.rewards]
        self.in_flight = 0
        """Completions that are being scored."""

    async def score(self, items: Sequence[Item], names: Sequence[str] | None = None) -> list[Reward]:
        """One Reward per item, by the named rewards, or by all. Raises HTTPException."""
        self._check_request(items, names)
        if not items:
            return []
        return await self._within_limits(len(items), lambda: self.backend.score(items, names or self.names))

    @property
    def judges(self) -> list[str]:
        return [reward.name for reward in self.config.rewards if isinstance(reward, JudgeReward)]

    def judge_called(self, name: str, missing: int) -> str:
        """The name, if it is a judge's. Raises HTTPException of status `missing`."""
        if name not in self.judges:
            raise HTTPException(missing, f"no judge is called {name[:40]!r}; GET /v1/models lists them")
        return name

    async def chat(self, request: wire.ChatRequest) -> tuple[str, Reply]:
        """The name of the judge, and what its model says. Raises HTTPException."""
        only = self.judges[0] if len(self.judges) == 1 else ""
        name = self.judge_called(request.model or only, 422)
        messages = wire.message_dicts(request.messages)
        size = sum(len(message["content"]) for message in messages)
        most = self.config.limits.max_characters
        if size > most:
            raise HTTPException(422, f"messages: {size} characters, at most {most} (limits.max_characters)")
        decoding = wire.decoding_of(request)
        answer = await self._within_limits(1, lambda: self.backend.chat(name, messages, decoding))
        if isinstance(answer, TimeoutError):
            raise HTTPException(504, str(answer))
        if isinstance(answer, Exception):
            raise HTTPException(422, f"the judge does not take this: {answer}")
        return name, answer

    async def _within_limits(self, count: int, ask: Callable[[], Awaitable[T]]) -> T:
        """What the backend says to something as large as `count` completions. Raises HTTPException."""
        limits = self.config.limits
        if self.in_flight + count > limits.max_items_in_flight:
            raise HTTPException(
                429,
                f"{self.in_flight} completions are being scored, at most {limits.max_items_in_flight}; ask "
                "again",
            )
        self.in_flight += count
        try:
            return await asyncio.wait_for(ask(), limits.timeout_s)
        except TimeoutError:
            raise HTTPException(504, f"no scores within {limits.timeout_s:g} s (limits.timeout_s)") from None
        except Overloaded as error:
            raise HTTPException(503, f"overloaded: {error}") from None
        except Unavailable as error:
            raise HTTPException(503, str(error)) from None
        finally:
            self.in_flight -= count

    def _check_request(self, items: Sequence[Item], names: Sequence[str] | None) -> None:
        """That it is no larger than the limits, and names what there is. Raises HTTPException 422."""
        limits = self.config.limits
        if len(items) > limits.max_items:
            raise HTTPException(
                422,
                f"{len(items)} items in one request, at most {limits.max_items} (limits.max_items); send "
                "several requests",
            )
        for i, item in enumerate(items):
            size = wire.size_of(item)
            if size > limits.max_characters:
                raise HTTPException(
                    422,
                    f"item {i} has {size} characters, at most {limits.max_characters} "
                    "(limits.max_characters)",
                )
        unknown = sorted(set(names or ()) - set(self.names))
        if unknown:
            raise HTTPException(422, f"no reward is called {unknown[0][:40]!r}; GET /v1/rewards lists them")

    async def score_whole(self, items: Sequence[Item], names: Sequence[str] | None = None) -> list[Reward]:
        """For formats that have no null: every item has its score, or the request fails."""
        rewards = await self.score(items, names)
        for i, reward in enumerate(rewards):
            if reward.total is None:
                raise HTTPException(
                    503, f"item {i} has no score: {reward.error}; POST /v1/score answers null for it instead"
                )
        return rewards


aside = asyncio.to_thread
"""What takes seconds for the largest body that is let in keeps no other request waiting."""

Task = Annotated[str, Query(description="task of every item, as in a recipe: routes rewards")]
Name = Annotated[str | None, Query(description="a reward's name; all that apply without it")]


def describe_errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """As FastAPI's `responses` has them."""
    return {code: {"model": wire.Problem, "description": TYPES[code].replace("_", " ")} for code in codes}


ERRORS = describe_errors(401, 408, 413, 415, 422, 429, 503, 504)


def answer_errors(app: FastAPI) -> None:
    """Give every error the service's own body."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem_response(422, describe_mistakes(error.errors()))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return problem_response(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        # its words may hold a prompt
        log.error("%s %s: %s", request.method, request.url.path, type(error).__name__)
        return problem_response(500, "the service failed; its log has more")


def make_app(config: ServiceConfig, backend: Backend, digest: bytes | None) -> FastAPI:
    """`digest` is the SHA-256 of the token that callers must send; None asks for none."""
    app = FastAPI(title="frpo reward service", version="1", docs_url=None, redoc_url=None)
    app.router.route_class = strict_route(config.limits)
    app.add_middleware(Door, digest=digest, limits=config.limits)
    answer_errors(app)
    add_state(app, config, backend)
    desk = Desk(config, backend)
    add_own_format(app, desk)
    add_formats_of_others(app, desk)
    add_chat(app, desk)
    return app


def add_state(app: FastAPI, config: ServiceConfig, backend: Backend) -> None:
    """Whether the service is up, and what it serves."""

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses=describe_errors(503))
    async def readyz() -> dict[str, str]:
        """Every reward has a process that answers."""
        if not await backend.ready():
            raise HTTPException(503, "not every reward is up yet")
        return {"status": "ready"}

    @app.head("/v1/rewards", include_in_schema=False)
    @app.get("/v1/rewards", responses=describe_errors(401))
    async def rewards() -> wire.RewardsResponse:
        """What is served."""
        served = [
            wire.RewardInfo(
                name=reward.name, kind=reward.kind, weight=reward.weight, tasks=list(reward.tasks)
            )
            for reward in config.rewards
        ]
        return wire.RewardsResponse(rewards=served)


def add_own_format(app: FastAPI, desk: Desk) -> None:
    @app.post("/v1/score", responses=ERRORS)
    async def score(request: wire.ScoreRequest) -> wire.ScoreResponse:
        """Any number of items with chat messages, tasks and columns; a failed score is null, with the
        reason."""
        items = await aside(wire.items_of_score, request)
        return wire.score_response(await desk.score(items, request.rewards))


def add_formats_of_others(app: FastAPI, desk: Desk) -> None:
    @app.post("/get_reward", responses=ERRORS)
    async def get_reward(
        request: wire.GetRewardRequest, task: Task = "", reward: Name = None
    ) -> wire.GetRewardResponse:
        """OpenRLHF's format."""
        items = [_with_task(item, task) for item in await aside(wire.items_of_get_reward, request)]
        return wire.get_reward_response(await desk.score_whole(items, [reward] if reward else None))

    @app.post("/classify", responses=ERRORS)
    async def classify(request: wire.ClassifyRequest, task: Task = "") -> wire.ClassifyResponse:
        """vLLM's format: the score of each text stands in probs."""
        name = request.model if request.model in desk.names else None
        items = [_with_task(item, task) for item in wire.items_of_classify(request)]
        rewards = await desk.score_whole(items, [name] if name else None)
        data = [
            wire.Classification(index=i, label="score", probs=[reward.total or 0.0])
            for i, reward in enumerate(rewards)
        ]
        return wire.ClassifyResponse(
            id=f"classify-{uuid.uuid4().hex}", created=int(time.time()), model=name or "all", data=data
        )

    @app.post("/slime", responses=ERRORS)
    async def slime(request: wire.SlimeRequest, task: Task = "", reward: Name = None) -> float:
        """slime's format: one completion, one number."""
        item = _with_task(await aside(wire.item_of_slime, request), task)
        (scored,) = await desk.score_whole([item], [reward] if reward else None)
        return scored.total or 0.0


def add_chat(app: FastAPI, desk: Desk) -> None:
    """The models of the judges, in OpenAI's format: for reward functions that ask a judge themselves."""

    @app.get("/v1/models", responses=describe_errors(401))
    async def models() -> wire.ModelsResponse:
        """The judges."""
        return wire.ModelsResponse(data=[wire.ModelInfo(id=name) for name in desk.judges])

    @app.get("/v1/models/{name}", responses=describe_errors(401, 404))
    async def model(name: str) -> wire.ModelInfo:
        """A judge."""
        return wire.ModelInfo(id=desk.judge_called(name, 404))

    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat(request: wire.ChatRequest) -> wire.ChatResponse:
        """What a judge's model says to messages of one's own."""
        name, answer = await desk.chat(request)
        return wire.chat_response(name, answer)


def _with_task(item: Item, task: str) -> Item:
    return replace(item, task=task) if task else item
