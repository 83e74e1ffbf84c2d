"""Prompts for `proper generate`, from options or from a JSONL file, and their final texts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from proper.data.chat import readable
from proper.data.conversations import MESSAGES, PROMPT, question
from proper.data.rows import BadValue, Template
from proper.errors import DataError, InputError

USER = "user_id"
"""Key of the user in a JSONL line, accepted in addition to the run's own user column."""

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One prompt to answer.

    Attributes:
        user: the user whose model answers; None for the model of an unknown user (the mean over all users).
        prompt: final text; None if `fields` fill the run's template.
        fields: values for the template's columns.
        where: origin for error messages: an option, or FILE:LINE.
    """

    user: str | None
    prompt: str | None
    fields: Mapping[str, Any]
    where: str


def from_fields(user: str | None, fields: Sequence[str]) -> PromptRequest:
    """Return the request of `k=v` pairs.

    Raises:
        InputError: a pair has no `=`, or no key.
    """
    values: dict[str, str] = {}
    for field in fields:
        key, separator, value = field.partition("=")
        if not separator or not key.strip():
            raise InputError(f"--field {field}: write it as name=value")
        values[key.strip()] = value
    return PromptRequest(user, None, values, "--field")


def from_file(
    path: Path, user: str | None = None, column: str = USER, columns: Collection[str] = ()
) -> list[PromptRequest]:
    """Read one request per line: `{"user_id": ..., "prompt": ...}`, or the template's columns instead of a prompt.

    A conversation is `messages`, or a list of messages as the prompt. If the template has a column `prompt`, a text of
    that name fills it.

    Args:
        path: a JSONL file; `-` is standard input. Empty lines are skipped.
        user: the user of lines without one.
        column: the run's own name for the user, which a line may use instead of `user_id`.
        columns: the columns of the run's template.

    Raises:
        DataError: the file cannot be read, or lines are bad; the message names the first as FILE:LINE and counts the
            others.
    """
    name = "<stdin>" if str(path) == "-" else str(path)
    try:
        lines = sys.stdin.buffer.readlines() if name == "<stdin>" else path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    numbered = [(f"{name}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    requests = _each(lambda item: _parse(item[1], user, column, item[0], PROMPT in columns), numbered)
    if not requests:
        raise DataError(f"{name}: has no lines to answer")
    return requests


def render_with(template: Template) -> Callable[[Mapping[str, Any]], str]:
    """Return the function that fills the template, or reads `messages` if the template has no such column."""

    def render(fields: Mapping[str, Any]) -> str:
        conversation = MESSAGES in fields and MESSAGES not in template.columns
        return question(fields, MESSAGES) if conversation else template.fill(fields)

    return render


def final_prompts(requests: Iterable[PromptRequest], render: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """Return each request's prompt; `render` fills the template for requests with fields.

    Raises:
        DataError: a template's column is missing or a prompt empty; the message names the first such request and
            counts the others.
    """

    def fill(request: PromptRequest) -> str:
        try:
            prompt = render(request.fields) if request.prompt is None else request.prompt
        except BadValue as error:
            raise DataError(f"{request.where}: {error}") from error
        if not prompt.strip():
            raise DataError(f"{request.where}: prompt: is empty")
        return prompt

    return _each(fill, requests)


def _each(function: Callable[[_Given], _Made], items: Iterable[_Given]) -> list[_Made]:
    """Apply `function` to every item; raise one `DataError` with the first problem and the number of others."""
    done: list[_Made] = []
    problems: list[DataError] = []
    for item in items:
        try:
            done.append(function(item))
        except DataError as error:
            problems.append(error)
    if problems:
        others = len(problems) - 1
        more = f" (and {others} more bad line{'s' if others > 1 else ''})" if others else ""
        raise DataError(f"{problems[0]}{more}")
    return done


def _parse(line: bytes, user: str | None, column: str, where: str, fills: bool) -> PromptRequest:
    try:
        row = json.loads(line)
        # A lone surrogate is valid JSON but cannot be encoded as UTF-8.
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not readable as JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a line is one JSON object, this is {type(row).__name__}")
    key = USER if USER in row else column
    name = row.pop(key, None)
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise DataError(f"{where}: {key}: should be text or a whole number, not {type(name).__name__}")
    prompt = None if fills and not isinstance(row.get(PROMPT), list) else row.pop(PROMPT, None)
    if isinstance(prompt, list):
        try:
            prompt = question({PROMPT: prompt}, PROMPT)
        except BadValue as error:
            raise DataError(f"{where}: {error}") from error
    elif isinstance(prompt, str):
        prompt = readable(prompt)  # a text is one message, whatever its author wrote into it
    elif prompt is not None:
        raise DataError(f"{where}: prompt: should be text, not {type(prompt).__name__}")
    if prompt is None and not row:
        raise DataError(f"{where}: prompt: is missing, and there are no fields for the template")
    return PromptRequest(user if name is None else str(name), prompt, row, where)
