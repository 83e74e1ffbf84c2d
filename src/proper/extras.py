"""Optional dependencies (extras of the distribution), and the error for a missing one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from proper.errors import InputError

EXTRAS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cluster": ("ray",),
        "data": ("datasets", "ijson"),
        "gguf": ("gguf",),
        "postgresql": ("alembic", "psycopg"),
        "privacy": ("opacus",),
        "s3": ("boto3", "botocore"),
        "serve": ("fastapi", "prometheus_client", "starlette", "uvicorn"),
        "simulate": ("simpy",),
    }
)
"""Modules that each extra installs."""


class MissingExtraError(InputError):
    """A feature needs an extra that is not installed; the message says how to install it."""


@contextmanager
def needs_extra(extra: str, feature: str) -> Iterator[None]:
    """Turn a failed import of one of the extra's modules within the block into an error that names the extra.

    Args:
        extra: a key of `EXTRAS`.
        feature: what needs it; the first words of the message.

    Raises:
        MissingExtraError: the block imported a module of the extra that is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS[extra]:
            raise
        raise MissingExtraError(f"{feature} needs the extra '{extra}': pip install 'proper-llm[{extra}]'") from error
