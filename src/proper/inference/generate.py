"""Offline generation: continues a list of prompts with an engine that exists for the call only.

The batches depend on the list only, never on how fast adapters load, so the same call gives bit-identical results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from proper.config import Config
from proper.console import Advance, no_advance
from proper.errors import InputError
from proper.inference.engine import Engine
from proper.inference.model import PersonalizedModel
from proper.inference.requests import EngineLimits, Event, Request, Started, Token
from proper.inference.sampling import Sampling


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its user, and the tier that answered."""

    text: str
    user: str | None
    tier: str


@dataclass
class Continuation:
    """Generated continuation of one prompt; it is the request's event sink.

    Attributes:
        tokens: token ids without the end token.
        tier: the tier that answered.
        advance: called with 1 when the continuation has ended.
    """

    tokens: list[int] = field(default_factory=list)
    tier: str = ""
    advance: Advance = no_advance

    def __call__(self, event: Event) -> None:
        """Receive an event of the engine."""
        if isinstance(event, Started):
            self.tier = event.tier
        elif isinstance(event, Token):
            self.tokens.append(event.id)
        else:
            self.advance(1)


def generate(
    model: PersonalizedModel,
    prompts: Sequence[str],
    user_ids: Sequence[str | None],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    task: str | None = None,
) -> list[str]:
    """Return the text of each answer; see `respond`. `task` is a name; None is the run's first or only one."""
    number = model.config.task_number(task)
    length = answer_length(model.config, number) if max_new_tokens is None else max_new_tokens
    sampling = Sampling(length, temperature, top_p, seed)
    return [answer.text for answer in respond(model, prompts, user_ids, sampling, task=number)]


def answer_length(config: Config, task: int = 0) -> int:
    """Return `task.max_new_tokens` of a task, by its number."""
    return list(config.each_task.values())[task].task.max_new_tokens


def respond(
    model: PersonalizedModel,
    prompts: Sequence[str],
    user_ids: Sequence[str | None],
    sampling: Sampling | None = None,
    advance: Advance = no_advance,
    task: int = 0,
) -> list[Answer]:
    """Answer each prompt for its own user; a batch may mix any users.

    Every prompt has its own generator seeded with `sampling.seed`: its answer does not depend on the other prompts, and
    a repeated prompt of the same user gets the same answer.

    Args:
        model: the model that answers.
        prompts: the prompts' texts.
        user_ids: the user of each prompt; None or an unknown user gets the group model with the mean embedding.
        sampling: sampling parameters; greedy with the config's `task.max_new_tokens` if None.
        advance: called with 1 when an answer is complete.
        task: number of the prompts' task in a run of several.

    Raises:
        InputError: see `require_pairs`; or a prompt is empty, or too long with its answer for the model's context.
        StoreError: a user's adapter is damaged.
    """
    require_pairs(prompts, user_ids)
    if any(not prompt.strip() for prompt in prompts):
        raise InputError("a prompt is empty")
    sampling = sampling or Sampling(answer_length(model.config, task))
    encoded = [model.encoder.prompt(prompt, room=sampling.max_new_tokens) for prompt in prompts]
    found = zip(continuations(model, encoded, user_ids, sampling, advance, task), user_ids, strict=True)
    return [Answer(model.encoder.decode(one.tokens), user, one.tier) for one, user in found]


def require_pairs(prompts: Sequence[str], user_ids: Sequence[str | None]) -> None:
    """Check the prompts of a call and their users.

    Raises:
        InputError: they are not two lists of one length, an id is not text, or a prompt is not whole Unicode text.
    """
    if any(isinstance(each, str) or not isinstance(each, Sequence) for each in (prompts, user_ids)):
        raise InputError("prompts and user ids must be lists; write [prompt] and [user] for a single prompt")
    if len(prompts) != len(user_ids):
        raise InputError(f"{len(prompts)} prompts and {len(user_ids)} user ids: there must be one user per prompt")
    for at, (prompt, user) in enumerate(zip(prompts, user_ids, strict=True)):
        if user is not None and not isinstance(user, str):
            raise InputError(f"user id {at}: {user!r} is not text")
        try:
            prompt.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise InputError(f"prompt {at}: not a text of whole Unicode characters") from error


def continuations(
    model: PersonalizedModel,
    prompts: Sequence[Sequence[int]],
    users: Sequence[str | None],
    sampling: Sampling,
    advance: Advance = no_advance,
    task: int = 0,
) -> list[Continuation]:
    """Continue each prompt's tokens until the end token or `max_new_tokens`, `compute.batch_size` rows at a time.

    `task` is the number of the prompts' task.

    Raises:
        StoreError: a user's adapter is damaged.
    """
    if not prompts:
        return []
    found = [Continuation(advance=advance) for _ in prompts]
    engine = Engine(model, _limits(model, prompts, sampling.max_new_tokens), strict=True)
    try:
        # Prompts of similar length run together: every row costs as much as the longest one.
        for at in sorted(range(len(prompts)), key=lambda at: len(prompts[at])):
            engine.submit(Request(tuple(prompts[at]), users[at], sampling=sampling, task=task), found[at])
        while not engine.idle:
            engine.step()
    finally:
        engine.close()
    return found


def _limits(model: PersonalizedModel, prompts: Sequence[Sequence[int]], room: int) -> EngineLimits:
    rows, longest = min(model.config.compute.batch_size, len(prompts)), max(map(len, prompts))
    # The size of the model's own bank, so that it is reused: a second bank would need as much memory again.
    slots = None if model.served is None else model.served.bank.slots
    # No prefix cache: it would make the results' bits depend on earlier requests.
    length = min(longest + room, _most_tokens(model))
    return EngineLimits(rows, slots, prefill=rows * longest, length=length, prefix_bytes=0)


def _most_tokens(model: PersonalizedModel) -> int:
    """Return the maximum tokens of a prompt and its answer, for which memory is allocated at once."""
    longest = model.config.compute.max_length
    answer = max(one.task.max_new_tokens for one in model.config.each_task.values())
    return max(longest, longest // 2 + answer, model.model.backbone.context or 0)
