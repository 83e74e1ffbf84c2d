"""Exception hierarchy of the package; the command line prints each as one line on stderr and uses its exit code."""

from __future__ import annotations


class ProperError(Exception):
    """Base of all errors of the package; the message is one line that tells the user what to do. Exit code 1."""

    exit_code = 1


class InputError(ProperError):
    """Bad input or usage. The message names the file, line or key. Exit code 2."""

    exit_code = 2


class ConfigError(InputError):
    """A config has an unknown key, a wrong type or an impossible value."""


class DataError(InputError):
    """A data file cannot be read, or has bad rows."""


class RunFolderError(InputError):
    """A run folder lacks a file or stage, or was made by another config."""


class StoreError(ProperError):
    """The adapter store is damaged, or an adapter does not fit this model."""


class NoVersionError(StoreError):
    """The store does not have the requested version."""


class NonFiniteLossError(ProperError):
    """A training step's loss is NaN or infinite; the message says where and which users."""


class ReadOnlyError(StoreError):
    """A write was requested in a read-only copy of a run. Exit code 2."""

    exit_code = 2
