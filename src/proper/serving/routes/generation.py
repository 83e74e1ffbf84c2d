"""Routes /v1/chat/completions, /v1/completions and /v1/models, with server-sent events for streams."""

# No `from __future__ import annotations`: FastAPI could not resolve the types that are defined inside a function.

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from proper.inference.requests import Request
from proper.serving.answers import AnswerPiece, Answers, Prompt, TokenIds
from proper.serving.auth import Authenticator, own_tenant
from proper.serving.errors import APIError
from proper.serving.json_bodies import CheckedRoute
from proper.serving.keys import Principal
from proper.serving.limits import RateLimiter
from proper.serving.reply_format import Kind, ReplyFormat, collect
from proper.serving.schemas.replies import Reply, dump
from proper.serving.schemas.requests import ChatRequest, CompletionRequest
from proper.serving.schemas.resources import ModelCard, ModelList

T = TypeVar("T")
_LINE_ENDS = {end: f"\\u{end:04x}" for end in (0x85, 0x2028, 0x2029)}
"""Unicode's line ends, escaped in events: JSON allows them, but some clients split a stream's text into lines there."""


def generation_routes(model: str, answers: Answers, auth: Authenticator, limiter: RateLimiter) -> APIRouter:
    """Return the routes for one model of the given name."""
    router = APIRouter(prefix="/v1", tags=["generate"], route_class=CheckedRoute)
    Caller = Annotated[Principal, Depends(auth.needs("generate"))]
    served = ServedModel(model, answers, limiter)

    @router.post("/chat/completions", response_model=Reply, response_model_exclude_unset=True)
    async def chat(http: HttpRequest, body: ChatRequest, caller: Caller) -> Response:
        """Complete a chat with the personal model of `user`; without `user`, with the mean over all users."""
        longest = body.max_completion_tokens or body.max_tokens
        return await served.reply("chat", http, caller, body, [body.messages], longest)

    @router.post("/completions", response_model=Reply, response_model_exclude_unset=True)
    async def completions(http: HttpRequest, body: CompletionRequest, caller: Caller) -> Response:
        """Complete each prompt with the personal model of `user`; without `user`, with the mean over all users."""
        prompts = [one if isinstance(one, str) else TokenIds(tuple(one)) for one in body.prompts]
        return await served.reply("text", http, caller, body, prompts, body.max_tokens)

    @router.get("/models")
    async def models(caller: Caller) -> ModelList:
        """List the models that are served: one model for all users."""
        return ModelList(data=[served.card()])

    @router.get("/models/{name}")
    async def one_model(name: str, caller: Caller) -> ModelCard:
        """Describe a model."""
        served.require(name)
        return served.card()

    return router


@dataclass(frozen=True)
class ServedModel:
    """The model that the routes answer with, under the name that clients send."""

    name: str
    answers: Answers
    limiter: RateLimiter

    def require(self, name: str) -> None:
        """Check the model name of a request.

        Raises:
            APIError: 404; another model is served.
        """
        if name != self.name:
            message = f"the model {name!r} does not exist; this server serves {self.name!r}"
            raise APIError(404, message, code="model_not_found", param="model")

    def card(self) -> ModelCard:
        """Return the model's description."""
        return ModelCard(id=self.name, proper=self.answers.card())

    async def reply(
        self,
        kind: Kind,
        http: HttpRequest,
        caller: Principal,
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[Prompt],
        longest: int | None,
    ) -> Response:
        """Answer the prompts of one request, whole or as a stream.

        Raises:
            APIError: the request is refused, or generation failed.
        """
        self.require(body.model)
        tenant = own_tenant(caller, body.proper.tenant if body.proper else None)
        if len(prompts) > 1 and body.proper is not None and body.proper.gates:
            raise APIError(400, "proper.gates: only for a request with one prompt", param="proper.gates")

        def tokenize() -> list[Request]:  # must not run on the event loop
            made = [self.answers.request(prompt, body, tenant, longest, body.alternatives) for prompt in prompts]
            return [replace(request, client=caller.id) for request in made]

        with ExitStack() as stack:
            stack.enter_context(self.limiter.enter(caller.id, len(prompts)))
            requests = await self.answers.threads.run(caller.id, tokenize)
            size = sum(len(request.prompt) for request in requests)
            shape = ReplyFormat(kind, self.name, size, self.answers.decode, body.alternatives is not None)
            pieces = self.answers.stream(requests, [body.stop] if isinstance(body.stop, str) else body.stop or [])
            if body.stream:
                usage = body.stream_options is not None and bool(body.stream_options.include_usage)
                lines = server_sent(shape, pieces, usage)
                return EventStream(lines, stack.pop_all(), self.limiter.limits.stalled_seconds)
            whole = await cancel_on_disconnect(http.receive, collect(shape, pieces, len(requests)))
            return JSONResponse(dump(whole))


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
        stack: the context that counts its prompts as open; closed at the end.
        stalled: seconds for which a client may leave an event unread.
    """

    def __init__(self, lines: AsyncGenerator[str, None], stack: ExitStack, stalled: float) -> None:
        # nginx holds a reply back until its buffers are full, unless this header says otherwise.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._lines, self._stack, self._stalled = lines, stack, stalled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events and stop when the client disconnects, even while there is nothing to send."""

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._stalled):
                    await send(message)
            except OSError as error:  # a timeout is one too
                raise ClientDisconnect from error

        with self._stack:
            try:
                await cancel_on_disconnect(receive, self.stream_response(send_in_time))
            except (APIError, ClientDisconnect):
                return  # the client is gone, so no error is sent
            finally:
                await self._lines.aclose()


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it if the client disconnects first.

    Raises:
        APIError: 499; the client disconnected.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise APIError(499, "the client disconnected")
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
    return f"data: {json.dumps(body, ensure_ascii=False).translate(_LINE_ENDS)}\n\n"
