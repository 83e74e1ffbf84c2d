"""Command `proper generate`: answer one prompt of a user, or a JSONL file of prompts of many users."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proper.cli.options import RunFolder, existing_run
from proper.cli.requests import PromptRequest, final_prompts, from_fields, from_file
from proper.config import load_run_config
from proper.console import progress
from proper.errors import InputError
from proper.run_folder import require_run

if TYPE_CHECKING:
    from proper.inference import Answer

logger = logging.getLogger(__name__)

EXAMPLES = """\
  proper generate runs/demo --user p0007 --field input="The bus was late again."
  proper generate runs/demo --user p0007 --prompt "The bus was late again. Category:" --max-new-tokens 8
  proper generate runs/demo --input questions.jsonl > answers.jsonl
"""

# Number of requests that are answered before their answers are printed; the model batches within them.
_PIECE = 256


def command(
    folder: RunFolder,
    user: Annotated[
        str | None, typer.Option(metavar="ID", help="The user; with --input, the user of lines without one.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Final prompt text for the model to complete.")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Fill a column of the run's template; repeatable.")
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="JSONL with user_id (or the run's user column) and prompt, or columns; - is stdin.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Longest answer in tokens; the config's by default.", show_default=False),
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
    as_json: Annotated[bool, typer.Option("--json", help="Print user, output and tier as JSON.")] = False,
) -> None:
    """Answer prompts with a user's personal model.

    A user without an adapter gets the best tier that they have. The answer goes to stdout, the tier that gave it to
    stderr. With --input each line of stdout is one JSON object with user_id, output and tier.

    With a --temperature each prompt is sampled from --seed separately: no answer depends on the other prompts, and
    the same prompt of the same user gets the same answer again.
    """
    existing_run(folder)
    requests = _requests(folder, user, prompt, field or [], input_file)
    if not 0 <= temperature < math.inf:
        raise InputError(f"--temperature: {temperature} is not a number from 0 up")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p: {top_p} is not above 0 and at most 1")
    from proper.inference import load
    from proper.inference.generate import respond
    from proper.inference.sampling import Sampling

    model = load(folder)
    prompts = final_prompts(requests, model.template.fill)
    sampling = Sampling(max_new_tokens or model.config.task.max_new_tokens, temperature, top_p, seed)
    tiers: Counter[str] = Counter()
    with progress("generate", len(requests)) if input_file else nullcontext(_ignore) as advance:
        for start in range(0, len(requests), _PIECE):
            piece = slice(start, start + _PIECE)
            answers = respond(model, prompts[piece], [request.user for request in requests[piece]], sampling)
            for answer in answers:
                typer.echo(_line(answer) if as_json or input_file else answer.text)
            tiers.update(answer.tier for answer in answers)
            advance(len(answers))
    logger.info(
        "answered by: " + ", ".join(f"{tier} ({count})" if input_file else tier for tier, count in tiers.items())
    )


def _requests(
    folder: Path, user: str | None, prompt: str | None, fields: list[str], path: Path | None
) -> list[PromptRequest]:
    given = [prompt is not None, bool(fields), path is not None]
    if sum(given) != 1:
        raise InputError("give one of --prompt, --field and --input; see 'proper generate --help'")
    if path is not None:
        requests = from_file(path, user, load_run_config(require_run(folder).config).data.user)
        nameless = sum(request.user is None for request in requests)
        if nameless:
            logger.info(f"{path}: {nameless} of {len(requests)} lines name no user; the mean of all users answers them")
        return requests
    if fields:
        return [from_fields(user, fields)]
    return [PromptRequest(user, prompt, {}, "--prompt")]


def _ignore(n: int) -> None:
    """Replace the progress bar where there is only one prompt."""


def _line(answer: Answer) -> str:
    return json.dumps({"user_id": answer.user, "output": answer.text, "tier": answer.tier}, ensure_ascii=False)
