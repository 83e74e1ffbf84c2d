"""Bridge from asyncio to the engine thread: builds and tokenizes prompts, submits requests, streams text."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

from proper.data.chat import Turn, readable
from proper.errors import ConfigError, InputError, ProperError
from proper.inference.detokenizer import Detokenizer
from proper.inference.generate import answer_length
from proper.inference.requests import Event, Request, Sink, Started, Token
from proper.inference.sampling import Sampling
from proper.run_folder import Tier
from proper.serving.engines import Cancellable, EngineRunner
from proper.serving.errors import APIError
from proper.serving.limits import LimitedThreads
from proper.serving.metrics import Metrics
from proper.serving.schemas.requests import Options, ProperOptions
from proper.serving.schemas.resources import RunCard

LONG_ANSWER = 512
"""Number of tokens of an answer from which on it is detokenized on a worker thread."""


@dataclass(frozen=True)
class AnswerPiece:
    """A piece of one streamed answer.

    Attributes:
        index: index of the answer, where the request has several prompts.
        started: on the first piece of each answer: the tier and version that answer.
        tokens: number of tokens in the piece.
        gates: expert gates of each token, where they were requested and the model has experts.
        scored: the tokens themselves, where their log-probabilities were requested.
        finish: on the last piece of each answer: the finish reason.
    """

    index: int
    text: str = ""
    started: Started | None = None
    tokens: int = 0
    gates: tuple[tuple[float, ...], ...] = ()
    scored: tuple[Token, ...] = ()
    finish: Literal["stop", "length"] | None = None


@dataclass(frozen=True)
class TokenIds:
    """A prompt given as the ids of all its tokens."""

    ids: tuple[int, ...]


Prompt = str | TokenIds | Sequence[Turn]
"""A prompt: its text, its tokens, or the messages of a conversation."""


def sampling_of(options: Options, length: int) -> Sampling:
    """Return the sampling parameters of a request: greedy by default, with a random seed if it sets none."""
    temperature = options.temperature or 0.0
    seed = options.seed
    if seed is None:
        seed = secrets.randbits(63) if temperature else 0
    return Sampling(length, temperature, 1.0 if options.top_p is None else options.top_p, seed)


class Answers:
    """Submits requests to a running engine and streams the answers."""

    def __init__(self, runner: EngineRunner, metrics: Metrics, log: Callable[[str], None]) -> None:
        self.runner, self.metrics, self.log = runner, metrics, log
        self.encoder = runner.engine.model.encoder
        self.threads = LimitedThreads(4)
        self._longest_token = max(map(len, self.encoder.tokenizer.get_vocab()))

    def decode(self, token: int) -> str:
        """Return the text of one token inside a text: many tokenizers drop the space of a text's first token."""
        letter, whole = (self._text([*self._letter, *more]) for more in ((), (token,)))
        return whole.removeprefix(letter) if whole.startswith(letter) else self._text([token])

    @cached_property
    def _letter(self) -> tuple[int, ...]:
        """The tokens of some text, behind which a token is not a text's first."""
        return self.encoder.tokens("a")

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def card(self) -> RunCard:
        """Return the description of the run that is served."""
        model = self.runner.engine.model
        experts = model.config.groups.expert_count if model.stage in (Tier.GROUPS, Tier.USERS) else 0
        template = model.template
        return RunCard(
            stage=model.stage,
            experts=experts,
            literals=list(template.literals),
            columns=list(template.columns),
            tasks=list(model.config.tasks),
        )

    def request(
        self,
        prompt: Prompt,
        options: Options,
        tenant: str,
        max_tokens: int | None,
        alternatives: int | None = None,
    ) -> Request:
        """Return the engine request for one prompt. Do not call it on the event loop: tokenizing is slow.

        Args:
            prompt: its text, the ids of all its tokens, or the messages of a conversation.
            options: options of the HTTP request.
            tenant: the tenant that the user belongs to.
            max_tokens: longest answer in tokens; the config's if None.
            alternatives: number of likeliest tokens reported at each answer token; None for no log-probabilities.

        Raises:
            APIError: the prompt is empty, does not fit, or has a token that the model has no embedding for; or the run
                has no such task.
        """
        engine = self.runner.engine
        task = self._task(options)
        room = max_tokens or answer_length(engine.model.config, task)
        ids = self._ids(prompt, room)
        if len(ids) + room > engine.limit:
            raise self._too_long(f"{len(ids)} tokens", room)
        extra = options.proper or ProperOptions()
        request = Request(
            ids,
            options.user,
            tenant,
            Tier(extra.tier or Tier.USERS),
            sampling_of(options, room),
            bool(extra.gates),
            alternatives=alternatives,
            task=task,
        )
        try:
            engine.check(request)
        except InputError as error:
            raise APIError(400, str(error), code="invalid", param=_field(prompt)) from error
        return request

    def _task(self, options: Options) -> int:
        """Return the number of the task that a request names.

        Raises:
            APIError: the run has no such task.
        """
        named = options.proper.task if options.proper is not None else None
        try:
            return self.runner.engine.model.config.task_number(named)
        except ConfigError as error:
            raise APIError(400, f"proper.task: {error}", code="invalid", param="proper.task") from error

    def _too_long(self, prompt: str, answer: int) -> APIError:
        limit = self.runner.engine.limit
        why = f"prompt ({prompt}) and answer (up to {answer}) are longer than the {limit} that fit"
        return APIError(400, why, code="context_length_exceeded", param="max_tokens")

    def _ids(self, prompt: Prompt, answer: int) -> tuple[int, ...]:
        """Return a prompt's tokens. A text longer in characters than the token limit allows is refused untokenized.

        Raises:
            APIError: the text is empty, is too long, has a token that the model has no embedding for, or the chat
                template refuses the messages.
        """
        if isinstance(prompt, TokenIds):
            return prompt.ids
        field = _field(prompt)
        if isinstance(prompt, str):
            prompt = readable(prompt)  # a text is one message, whatever a client writes into it
        texts = [prompt] if isinstance(prompt, str) else [turn.text for turn in prompt]
        if not any(text.strip() for text in texts):
            raise APIError(400, "the prompt is empty", code="invalid", param=field)
        characters = sum(map(len, texts))
        if characters > self._longest_token * max(1, self.runner.engine.limit - answer):
            raise self._too_long(f"{characters} characters", answer)
        try:
            return self.encoder.untruncated(prompt)
        except InputError as error:
            raise APIError(400, f"the prompt: {error}", code="invalid", param=field) from error

    async def stream(self, requests: Sequence[Request], stop: Sequence[str]) -> AsyncGenerator[AnswerPiece, None]:
        """Yield pieces of the answers as they are generated; leaving the loop early cancels the requests.

        Raises:
            APIError: the server is stopping, or a request failed.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        handles: list[Cancellable] = []
        texts, counts = [Detokenizer(self.encoder.tokenizer, stop) for _ in requests], [0] * len(requests)
        try:
            for index, request in enumerate(requests):

                def sink(event: Event, index: int = index) -> None:
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))

                handles.append(self._submit(request, self.metrics.timed(sink)))
            open_answers = set(range(len(requests)))
            while open_answers:
                index, event = await events.get()
                if index not in open_answers:
                    continue
                counts[index] += 1
                work = partial(self._piece, index, event, texts[index])
                piece = work() if counts[index] < LONG_ANSWER else await self.threads.run(requests[index].client, work)
                if texts[index].stopped and piece.finish is None:
                    handles[index].cancel()
                    piece = replace(piece, text=piece.text + texts[index].close(), finish="stop")
                if piece.finish is not None:
                    open_answers.discard(index)
                yield piece
        finally:
            for handle in handles:
                handle.cancel()

    def _submit(self, request: Request, sink: Sink) -> Cancellable:
        try:
            return self.runner.engine.submit(request, sink)
        except InputError as error:
            raise APIError(400, str(error)) from error
        except ProperError as error:
            raise APIError(503, "the server is stopping", code="stopping") from error

    def _piece(self, index: int, event: Event, text: Detokenizer) -> AnswerPiece:
        if isinstance(event, Started):
            return AnswerPiece(index, started=event)
        if isinstance(event, Token):
            gates = () if event.gates is None else (event.gates,)
            return AnswerPiece(index, text.push(event.id), None, 1, gates, () if event.logprobs is None else (event,))
        if event.reason == "error":
            self.log(f"a request failed: {event.error}")
            raise APIError(500, "the request failed", code="failed")
        if event.reason == "lost":
            self.log(f"a request was lost: {event.error}")
            headers = {"Retry-After": "1"}
            raise APIError(503, "the replica that answered has died; send it again", code="lost", headers=headers)
        if event.reason == "cancelled":
            raise APIError(503, "the server is stopping", code="stopping")
        return AnswerPiece(index, text.close(), finish=event.reason)


def _field(prompt: Prompt) -> str:
    """Return the name of the field of a request that has its prompt."""
    return "prompt" if isinstance(prompt, str | TokenIds) else "messages"
