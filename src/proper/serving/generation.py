"""Routes /v1/chat/completions, /v1/completions and /v1/models, with server-sent events for streams."""

# No `from __future__ import annotations`: FastAPI could not resolve the types that are defined inside a function.

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import ExitStack, aclosing
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from proper.inference.requests import Request
from proper.serving.answers import AnswerPiece, Answers
from proper.serving.auth import Authenticator, own_tenant
from proper.serving.chat import chat_prompt
from proper.serving.errors import APIError
from proper.serving.keys import Principal
from proper.serving.large_bodies import CheckedRoute
from proper.serving.rate_limits import RateLimiter
from proper.serving.reply_format import Kind, ReplyFormat, collect
from proper.serving.reply_schemas import Reply, dump
from proper.serving.request_schemas import ChatRequest, CompletionRequest, Options
from proper.serving.schemas import ModelCard, ModelList

T = TypeVar("T")
Ask = Callable[[], list[Request]]
"""Tokenizes the prompts; must not run on the event loop."""


def generation_routes(model: str, answers: Answers, gate: Authenticator, turnstile: RateLimiter) -> APIRouter:
    """Return the routes for one model of the given name."""
    router = APIRouter(prefix="/v1", tags=["generate"], route_class=CheckedRoute)
    Asking = Annotated[Principal, Depends(gate.needs("generate"))]

    def known(name: str) -> None:
        if name != model:
            raise APIError(
                404, f"there is no model {name!r}; there is {model!r}", code="model_not_found", param="model"
            )

    async def reply(kind: Kind, http: HttpRequest, who: Principal, body: Options, count: int, ask: Ask) -> Response:
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        with ExitStack() as stack:
            stack.enter_context(turnstile.enter(who.id, count))
            asked = [replace(one, client=who.id) for one in await answers.threads.run(who.id, ask)]
            size, logprobs = sum(len(request.prompt) for request in asked), asked[0].alternatives is not None
            shape = ReplyFormat(kind, model, size, answers.decode, logprobs)
            pieces = answers.stream(asked, stop)
            if body.stream:
                wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
                lines = server_sent(shape, pieces, wants_usage)
                return EventStream(lines, stack.pop_all(), turnstile.limits.stalled_seconds)
            whole = await unless_gone(http.receive, collect(shape, pieces, len(asked)))
            return JSONResponse(dump(whole))

    @router.post("/chat/completions", response_model=Reply, response_model_exclude_unset=True)
    async def chat(http: HttpRequest, body: ChatRequest, who: Asking) -> Response:
        """Complete a chat with the personal model of `user`; without `user`, with the mean over all users."""
        known(body.model)
        tenant = own_tenant(who, body.proper.tenant if body.proper else None)
        longest = body.max_completion_tokens or body.max_tokens

        def ask() -> list[Request]:
            return [answers.request(chat_prompt(body.messages), body, tenant, longest, body.alternatives)]

        return await reply("chat", http, who, body, 1, ask)

    @router.post("/completions", response_model=Reply, response_model_exclude_unset=True)
    async def completions(http: HttpRequest, body: CompletionRequest, who: Asking) -> Response:
        """Complete each prompt with the personal model of `user`; without `user`, with the mean over all users."""
        known(body.model)
        tenant = own_tenant(who, body.proper.tenant if body.proper else None)
        prompts = body.prompts
        if len(prompts) > 1 and body.proper is not None and body.proper.gates:
            raise APIError(400, "proper.gates: of one prompt at a time", param="proper.gates")

        def ask() -> list[Request]:
            return [answers.request(prompt, body, tenant, body.max_tokens, body.alternatives) for prompt in prompts]

        return await reply("text", http, who, body, len(prompts), ask)

    @router.get("/models")
    async def models(who: Asking) -> ModelList:
        """List the models that are served: one model for all users."""
        return ModelList(data=[ModelCard(id=model, proper=answers.card())])

    @router.get("/models/{name}")
    async def one_model(name: str, who: Asking) -> ModelCard:
        """Describe a model."""
        known(name)
        return ModelCard(id=model, proper=answers.card())

    return router


async def server_sent(
    shape: ReplyFormat, pieces: AsyncGenerator[AnswerPiece, None], usage: bool
) -> AsyncGenerator[str, None]:
    """Yield the reply as server-sent events; if generation fails, the last event is the error."""
    try:
        async with aclosing(pieces) as stream:
            async for piece in stream:
                shape.note(piece)
                if piece.text or piece.started is not None or piece.finish is not None:
                    yield _event(dump(shape.chunk(piece, usage)))
        if usage:
            yield _event(dump(shape.reply([], True, usage=shape.totals())))
    except APIError as refusal:
        yield _event(refusal.body())
        return
    yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Response of server-sent events; at its end, however caused, its batch rows and open prompts are released.

    Args:
        lines: the events.
        held: the context that counts its prompts as open; closed at the end.
        stalled: seconds for which a client may leave an event unread.
    """

    def __init__(self, lines: AsyncGenerator[str, None], held: ExitStack, stalled: float) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._lines, self._held, self._stalled = lines, held, stalled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events and stop when the client disconnects, even while there is nothing to send."""

        async def in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._stalled):
                    await send(message)
            except OSError as error:  # a timeout is one too
                raise ClientDisconnect from error

        with self._held:
            try:
                await unless_gone(receive, self.stream_response(in_time))
            except (APIError, ClientDisconnect):
                return  # the client is gone, so no error is sent
            finally:
                await self._lines.aclose()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it if the client disconnects first.

    Raises:
        APIError: 499; the client disconnected.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise APIError(499, "the client has gone")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        # The batch rows are free when this returns.
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection; the body has been read by now."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
