"""Command `proper generate`: answer one prompt of a user, or a JSONL file of prompts of many users."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proper.cli.options import RunFolder
from proper.cli.prompts import PromptRequest, final_prompts, from_fields, from_file, render_with
from proper.config import DataConfig, load_run_config
from proper.console import progress
from proper.data.chat import readable
from proper.data.rows import parse_template
from proper.errors import InputError
from proper.run_folder import require_run

if TYPE_CHECKING:
    from proper.inference import Answer

logger = logging.getLogger(__name__)

EXAMPLES = """\
  proper generate runs/demo --user u007 --field input="The bus was late again."
  proper generate runs/notes --user u7 --prompt "The bus was late again. Tag:" --max-new-tokens 8
  proper generate runs/demo --input questions.jsonl > answers.jsonl
  proper generate runs/both --task headline --user u7 --field description="The bus was late again."
"""

# Number of requests that are answered before their answers are printed; the model batches within them.
_PIECE = 256


User = Annotated[str | None, typer.Option(metavar="ID", help="The user; with --input, the user of lines without one.")]
Prompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The complete prompt, in the format of the run's template.")
]
Fields = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Fill a column of the run's template; repeatable.")
]
InputFile = Annotated[
    Path | None,
    typer.Option(
        "--input",
        metavar="FILE",
        help="JSONL: user_id (or the task's user column), and prompt or the template's columns; - is stdin.",
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Maximum answer tokens; the config's by default.", show_default=False),
]
Temperature = Annotated[
    float, typer.Option(metavar="X", help="0 takes the likeliest token; above 0, sampling temperature.")
]
TopP = Annotated[float, typer.Option(metavar="X", help="Sample from the likeliest tokens with this total probability.")]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the sampling, used for each prompt separately.")]
TaskName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Task of the prompts in a run of several tasks; the first by default."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print user, output and tier as JSON.")]


def command(
    folder: RunFolder,
    user: User = None,
    prompt: Prompt = None,
    field: Fields = None,
    input_file: InputFile = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    task: TaskName = None,
    as_json: AsJson = False,
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
    if prompt is not None:
        return [PromptRequest(user, readable(prompt), {}, "--prompt")]
    config = load_run_config(require_run(folder).config)
    own = list(config.each_task.values())[config.task_number(task)].data
    if path is None:
        requests = [from_fields(user, fields)]
    else:
        requests = from_file(path, user, own.user, _columns(own))
        nameless = sum(request.user is None for request in requests)
        if nameless:
            logger.info(
                f"{path}: {nameless} of {len(requests)} lines have no user; the mean over all users answers them"
            )
    return [_with_user(request, own.user) for request in requests]


def _with_user(request: PromptRequest, column: str) -> PromptRequest:
    """Return a request whose user is also a field, for templates that name the column of users."""
    return request if request.user is None else replace(request, fields={column: request.user, **request.fields})


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
