"""Builds chat and completion replies from answer pieces in OpenAI's formats, whole or as stream chunks."""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from proper.inference.requests import Token
from proper.serving.answers import AnswerPiece
from proper.serving.schemas.replies import (
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    End,
    ProperDetails,
    Reply,
    TextChoice,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)

Kind = Literal["chat", "text"]
Decode = Callable[[int], str]
GATE_DIGITS = 4
"""Decimals of the gates in a reply."""


@dataclass
class ReplyFormat:
    """One reply, built up piece by piece, in the format of its kind.

    Attributes:
        decode: function from a token id to its text.
        logprobs: whether log-probabilities were requested.
        gates: expert gates received and not yet sent.
        scored: by answer, tokens with log-probabilities received and not yet sent.
        offsets: by answer, number of characters of the tokens sent so far.
    """

    kind: Kind
    model: str
    prompt_tokens: int
    decode: Decode
    logprobs: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    tokens: int = 0
    details: ProperDetails | None = None
    gates: list[list[float]] = field(default_factory=list)
    scored: defaultdict[int, list[Token]] = field(default_factory=lambda: defaultdict(list))
    offsets: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))

    def note(self, piece: AnswerPiece) -> None:
        """Add a piece: count its tokens, and keep its tier, gates and log-probabilities until they are sent."""
        self.tokens += piece.tokens
        self.gates += [[round(gate, GATE_DIGITS) for gate in token] for token in piece.gates]
        self.scored[piece.index] += piece.scored
        if piece.started is not None:
            started = piece.started
            known = {"version": started.version, "fallback": started.fallback}
            self.details = ProperDetails(
                tier=started.tier, **{name: one for name, one in known.items() if one is not None}
            )

    def reply(self, choices: Any, streamed: bool, **usage: Usage | None) -> Reply:
        """Return a reply, or a stream chunk, with these choices."""
        details = self.details
        if details is not None and self.gates:
            details, self.gates = details.model_copy(update={"gates": self.gates}), []
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        whole: Any = "chat.completion" if self.kind == "chat" else "text_completion"
        kind = "chat.completion.chunk" if streamed and self.kind == "chat" else whole
        known: dict[str, Any] = {**usage, **({} if details is None else {"proper": details})}
        return Reply(
            id=f"{prefix}-{self.id}", object=kind, created=self.created, model=self.model, choices=choices, **known
        )

    def chunk(self, piece: AnswerPiece, usage: bool) -> Reply:
        """Return one stream chunk; its `usage` is null if the last chunk will carry the usage."""
        choice: ChatChunkChoice | TextChoice
        if self.kind == "chat":
            first: dict[str, Any] = {"role": "assistant"} if piece.started is not None else {}
            delta = ChatDelta(content=piece.text, **first)
            chat = self._chat_logprobs(piece.index)
            choice = ChatChunkChoice(index=piece.index, delta=delta, logprobs=chat, finish_reason=piece.finish)
        else:
            text = self._text_logprobs(piece.index)
            choice = TextChoice(index=piece.index, text=piece.text, logprobs=text, finish_reason=piece.finish)
        return self.reply([choice], True, **({"usage": None} if usage else {}))

    def totals(self) -> Usage:
        """Return the token counts so far."""
        total = self.prompt_tokens + self.tokens
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.tokens, total_tokens=total)

    def whole(self, texts: list[str], ends: list[End]) -> Reply:
        """Return the whole reply, not streamed."""
        if self.kind == "text":
            choices = [
                TextChoice(index=at, text=text, logprobs=self._text_logprobs(at), finish_reason=ends[at])
                for at, text in enumerate(texts)
            ]
            return self.reply(choices, False, usage=self.totals())
        message = ChatMessage(role="assistant", content=texts[0], refusal=None)
        choice = ChatChoice(index=0, message=message, logprobs=self._chat_logprobs(0), finish_reason=ends[0])
        return self.reply([choice], False, usage=self.totals())

    def _chat_logprobs(self, index: int) -> ChatLogprobs | None:
        if not self.logprobs:
            return None
        scored = []
        for token in self.scored.pop(index, []):
            assert token.logprobs is not None
            likely = [self._likely(one, share) for one, share in token.logprobs.likeliest]
            own = self._likely(token.id, token.logprobs.own)
            scored.append(TokenLogprob(**own.model_dump(), top_logprobs=likely))
        return ChatLogprobs(content=scored, refusal=None)

    def _text_logprobs(self, index: int) -> TextLogprobs | None:
        if not self.logprobs:
            return None
        found = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in self.scored.pop(index, []):
            assert token.logprobs is not None
            text, own = self.decode(token.id), token.logprobs.own
            likely = {self.decode(one): share for one, share in reversed(token.logprobs.likeliest)}
            found.tokens.append(text)
            found.token_logprobs.append(own)
            found.top_logprobs.append(dict(reversed({**likely, text: own}.items())))
            found.text_offset.append(self.offsets[index])
            self.offsets[index] += len(text)
        return found

    def _likely(self, token: int, share: float) -> TopLogprob:
        text = self.decode(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return TopLogprob(token=text, logprob=share, bytes=list(text.encode()) if whole else None)


async def collect(shape: ReplyFormat, pieces: AsyncGenerator[AnswerPiece, None], count: int) -> Reply:
    """Read all pieces and return the whole reply."""
    texts = [""] * count
    ends: list[End] = ["stop"] * count
    async with aclosing(pieces) as stream:
        async for piece in stream:
            shape.note(piece)
            texts[piece.index] += piece.text
            ends[piece.index] = piece.finish or ends[piece.index]
    return shape.whole(texts, ends)
