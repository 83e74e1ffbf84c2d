"""Command `proper generate`: answer one prompt of a user, or a JSONL file of prompts of many users."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from proper.cli.options import RunFolder
from proper.config import DataConfig, load_run_config
from proper.console import progress
from proper.data.chat import readable
from proper.data.conversations import MESSAGES, PROMPT, question
from proper.data.rows import BadValue, parse_template
from proper.errors import DataError, InputError
from proper.run_folder import require_run

if TYPE_CHECKING:
    from proper.data.rows import Template
    from proper.inference import Answer

logger = logging.getLogger(__name__)

EXAMPLES = """\
  proper generate runs/demo --user u007 --field input="The bus was late again."
  proper generate runs/notes --user u7 --prompt "The bus was late again. Tag:" --max-new-tokens 8
  proper generate runs/demo --input questions.jsonl > answers.jsonl
  proper generate runs/both --task headline --user u7 --field description="The bus was late again."
"""

USER = "user_id"
"""Key of the user in a JSONL line, accepted in addition to the run's own user column."""

# Number of requests that are answered before their answers are printed; the model batches within them.
_PIECE = 256
_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


def command(
    folder: RunFolder,
    user: Annotated[
        str | None, typer.Option(metavar="ID", help="The user; with --input, the user of lines without one.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The complete prompt, in the format of the run's template.")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Fill a column of the run's template; repeatable.")
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="JSONL: user_id (or the task's user column), and prompt or the template's columns; - is stdin.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Maximum answer tokens; the config's by default.", show_default=False),
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="0 takes the likeliest token; above 0, sampling temperature.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="X", help="Sample from the likeliest tokens with this total probability.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the sampling, used for each prompt separately.")
    ] = 0,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Task of the prompts in a run of several tasks; the first by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print user, output and tier as JSON.")] = False,
) -> None:
    """Answer prompts with a user's personal model.

    A user without an adapter is answered by the group model, an unknown user by the group model with the mean user
    embedding. The answer goes to stdout, the tier that gave it to stderr. With --input each line of stdout is one JSON
    object with user_id, output and tier. --field fills the template of the run's config; --prompt is not changed, so it
    must have the same format.

    With a --temperature each prompt is sampled from --seed separately: no answer depends on the other prompts, and
    the same prompt of the same user gets the same answer again.
    """
    require_run(folder)
    requests = _requests(folder, user, prompt, field or [], input_file, task)
    if not 0 <= temperature < math.inf:
        raise InputError(f"--temperature: {temperature} is not a number from 0 up")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p: {top_p} is not above 0 and at most 1")
    from proper.inference import load
    from proper.inference.generate import answer_length, respond
    from proper.inference.sampling import Sampling

    model = load(folder)
    number = model.config.task_number(task)
    prompts = final_prompts(requests, render_with(model.template_of(task)))
    sampling = Sampling(max_new_tokens or answer_length(model.config, number), temperature, top_p, seed)

    def answer(piece: slice) -> list[Answer]:
        return respond(model, prompts[piece], [request.user for request in requests[piece]], sampling, task=number)

    _print_answers(answer, len(requests), of_file=input_file is not None, as_json=as_json)


def _requests(
    folder: Path, user: str | None, prompt: str | None, fields: list[str], path: Path | None, task: str | None
) -> list[PromptRequest]:
    given = [prompt is not None, bool(fields), path is not None]
    if sum(given) != 1:
        raise InputError("give one of --prompt, --field and --input; see 'proper generate --help'")
    if path is not None:
        config = load_run_config(require_run(folder).config)
        own = list(config.each_task.values())[config.task_number(task)].data
        requests = from_file(path, user, own.user, _columns(own))
        nameless = sum(request.user is None for request in requests)
        if nameless:
            logger.info(
                f"{path}: {nameless} of {len(requests)} lines have no user; the mean over all users answers them"
            )
        return requests
    if fields:
        return [from_fields(user, fields)]
    return [PromptRequest(user, readable(prompt or ""), {}, "--prompt")]


def _columns(data: DataConfig) -> tuple[str, ...]:
    """Return the columns of the prompt's template; none for data whose rows are conversations."""
    return parse_template(data.prompt, "data.prompt").columns if data.rows in ("auto", "template") else ()


def _print_answers(answer: Callable[[slice], list[Answer]], count: int, *, of_file: bool, as_json: bool) -> None:
    """Print the answers to `count` requests as they are made, and log how many each tier gave."""
    tiers: Counter[str] = Counter()
    with progress("generate", count) if of_file else nullcontext(_ignore) as advance:
        for start in range(0, count, _PIECE):
            answers = answer(slice(start, start + _PIECE))
            for each in answers:
                typer.echo(_line(each) if as_json or of_file else each.text)
            tiers.update(each.tier for each in answers)
            advance(len(answers))
    given = ", ".join(f"{tier} ({number})" if of_file else tier for tier, number in tiers.items())
    logger.info(f"answered by: {given}")


def _ignore(n: int) -> None:
    """Replace the progress bar where there is only one prompt."""


def _line(answer: Answer) -> str:
    return json.dumps({"user_id": answer.user, "output": answer.text, "tier": answer.tier}, ensure_ascii=False)


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
