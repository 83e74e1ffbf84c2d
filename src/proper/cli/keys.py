"""Commands `proper keys ...`: add, list and revoke the API keys of a run's server."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import Annotated

import typer

from proper.cli.options import RunFolder, chosen, examples
from proper.run_folder import require_run

logger = logging.getLogger(__name__)


app = typer.Typer(
    help="Add, list and revoke the API keys of a server.",
    rich_markup_mode=None,
    epilog=examples("keys", "add runs/demo", "list runs/demo"),
)


@app.command(epilog=examples("keys", "add runs/demo", "add runs/demo --scopes generate,write --tenant acme"))
def add(
    folder: RunFolder,
    scopes: Annotated[
        str, typer.Option(metavar="A,B", help="Any of generate, write (enrol, add interactions, roll back) and admin.")
    ] = "generate",
    tenant: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Tenant of the key, which gives access to its users only; by default the run's own."
        ),
    ] = "",
) -> None:
    """Create a key and print it.

    The key is printed only once, since only its hash is stored. A running server accepts it immediately.
    """
    require_run(folder)
    from proper.serving.keys import FILE, SCOPES, Keys

    names = chosen("--scopes", scopes, SCOPES)
    with closing(Keys(folder / FILE)) as keys:
        key = keys.add(tenant, [scope for scope in SCOPES if scope in names])
    logger.info("proper: keep this key, it cannot be shown again")
    typer.echo(key)


@app.command("list", epilog=examples("keys", "list runs/demo"))
def list_keys(folder: RunFolder) -> None:
    """Print each key's id, scopes and tenant."""
    require_run(folder)
    from proper.serving.keys import FILE, Keys

    with closing(Keys(folder / FILE)) as keys:
        for principal in keys.principals():
            typer.echo(f"{principal.id}\t{','.join(principal.scopes)}\t{principal.tenant}")


@app.command(epilog=examples("keys", "revoke runs/demo 3f9a1c0b7d52"))
def revoke(
    folder: RunFolder,
    key: Annotated[
        str, typer.Argument(metavar="ID", help="The key's id, as 'proper keys list' prints it.", show_default=False)
    ],
) -> None:
    """Revoke a key. A running server refuses it at once."""
    require_run(folder)
    from proper.serving.keys import FILE, Keys

    with closing(Keys(folder / FILE)) as keys:
        keys.revoke(key)
        left = len(keys)
    if not left:
        logger.info(
            f"proper: no key is left, so every request is refused; 'proper keys open {folder}' accepts this machine's"
        )


@app.command("open", epilog=examples("keys", "open runs/demo"))
def open_run(folder: RunFolder) -> None:
    """Let this machine use a server without keys again.

    A run that has had a key refuses requests without one, even if its keys are lost. This command ends that: every
    request from the server's own machine, those of a proxy included, is accepted with all scopes.
    """
    require_run(folder)
    from proper.serving.keys import FILE, Keys

    with closing(Keys(folder / FILE)) as keys:
        keys.open()
    logger.info("proper: the run has no keys now; its server accepts every request of its own machine")
