"""One exception tree. The command line turns each into one line on stderr and the tree's exit code.

Knows nothing about what the rest of the package does.
"""

from __future__ import annotations


class ProperError(Exception):
    """Something failed; the message is one line a person can act on. Exit code 1."""

    exit_code = 1


class InputError(ProperError):
    """Bad input or usage. The message names the file, line or key. Exit code 2."""

    exit_code = 2


class ConfigError(InputError):
    """A config has an unknown key, a wrong type or an impossible value."""


class DataError(InputError):
    """A data file cannot be read, or has bad rows."""


class RunFolderError(InputError):
    """A run folder is missing something, or was made by another config."""


class StoreError(ProperError):
    """The adapter store is damaged, or an adapter does not fit this model."""


class NoVersionError(StoreError):
    """The store does not have the version that was asked for."""


class NonFiniteLossError(ProperError):
    """A training step's loss is NaN or infinite; the message says where and which users."""


class ReadOnlyError(StoreError):
    """Something would be written where nothing may be written: a read-only copy of a run. Exit code 2."""

    exit_code = 2
