"""Exception tree of the package. The command line prints each as one line on stderr and exits with its `exit_code`.

    ProperError              1   a failure of the program or its environment: a full disk, a damaged file
      InputError             2   the caller's mistake: a bad option, id, path or file; the message says what to change
        ConfigError          2     a setting: unknown key, wrong type, impossible value; names the key
        DataError            2     a data file: unreadable, or with bad rows; names file, line and column
        RunFolderError       2     a run folder: not one, made by another config, in use, or a stage is missing
        UnstorableError      2     a value that the run's database cannot hold
      StoreError             1   the adapter store or the interaction log is damaged or unusable
        ChangedError         1     another process has changed the store since it was read
        NoVersionError       1     a version of a user that the store does not have
        ReadOnlyError        2     a write into a run that cannot be written here
        UnavailableError     1     the database or bucket does not answer, or the disk is full: no user's fault
      NonFiniteLossError     1   training diverged

Raise the most specific class whose line is true; the message is one line that names the file, line or key and says what
to do. A class that only one part raises or handles lies in that part and derives from one of these, for example
`data.rows.BadValue` and `serving.errors.APIError`. An exception that only leaves a loop or a call stack within one
module is private to that module, and in no tree.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


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


class UnstorableError(InputError):
    """The run's database cannot hold a value: PostgreSQL has no character NUL, and limits the length of ids."""


class StoreError(ProperError):
    """The adapter store is damaged, or an adapter does not fit this model."""


class NoVersionError(StoreError):
    """The store does not have the requested version."""


class ChangedError(StoreError):
    """Another process has changed the store since the caller read it."""


class ReadOnlyError(StoreError):
    """A write was requested in a read-only copy of a run. Exit code 2."""

    exit_code = 2


class UnavailableError(StoreError):
    """The run's database or bucket does not answer or refuses everything, or the disk is full for a fit.

    The same call may succeed later.
    """


class NonFiniteLossError(ProperError):
    """The loss or gradient of a training step is NaN or infinite; the message says where and which users."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known name, or the first 20 if none is near.

    Capitals do not count. A name that shares half of its letters is not near: "site" is no guess for "text", nor
    "output" for "input".
    """
    folded = {each.casefold(): each for each in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.7)
    if near:
        return f"did you mean '{folded[near[0]]}'?"
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"known: {shown}" if known else "none is known"


def shortened(text: str, most: int = 40) -> str:
    """Return the beginning of a text that a message quotes."""
    return text if len(text) <= most else f"{text[:most]}..."


def first_line(error: BaseException, longest: int | None = None) -> str:
    """Return another library's error as one line, or its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:longest]
