"""The public Python API: a change of a name, parameter or default here breaks users' programs."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import proper
from proper.api import Model, Users
from proper.inference import Answer
from proper.inference.sampling import Sampling

FUNCTIONS = {
    "load": "(folder, stage=None)",
    "run": "(config, out, *, overrides=(), stages=('population', 'groups', 'users', 'evaluate', 'report'), "
    "skip_bad_rows=False, cluster=None, stores=())",
}
METHODS = {
    Model: {
        "close": "(self)",
        "config": "property",
        "generate": "(self, prompts, user_ids, *, max_new_tokens=None, temperature=0.0, top_p=1.0, seed=0, task=None)",
        "respond": "(self, prompts, user_ids, sampling=None)",
        "score": "(self, prompts, user_ids, labels, task=None)",
        "stage": "property",
        "tier": "(self, user)",
        "users": "property",
    },
    Users: {
        "__contains__": "(self, user)",
        "__iter__": "(self)",
        "close": "(self)",
        "delete": "(self, user)",
        "enrol": "(self, user, interactions, on_progress=None)",
        "export": "(self, user, path, *, form='native', force=False)",
        "head": "(self, user)",
        "rollback": "(self, user, to=None)",
        "update": "(self, user, interactions=(), on_progress=None)",
        "versions": "(self, user)",
    },
}
FIELDS = {
    Answer: {"text": "required", "user": "required", "tier": "required"},
    Sampling: {"max_new_tokens": 48, "temperature": 0.0, "top_p": 1.0, "seed": 0},
}


def signature_of(member: Any) -> str:
    """A member's parameters and defaults, without annotations, which mypy checks."""
    if isinstance(member, property):
        return "property"
    found = inspect.signature(member)
    return str(inspect.Signature([plain(one) for one in found.parameters.values()]))


def plain(parameter: inspect.Parameter) -> inspect.Parameter:
    """The parameter without its annotation, and with a default that prints as text where it is an enum."""
    default = parameter.default
    texts = tuple(map(str, default)) if isinstance(default, tuple) else default
    return parameter.replace(annotation=inspect.Parameter.empty, default=texts)


def test_the_package_offers_load_run_and_its_version() -> None:
    assert sorted(proper.__all__) == ["__version__", "load", "run"]
    assert {name: signature_of(getattr(proper, name)) for name in FUNCTIONS} == FUNCTIONS


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_what_load_returns_has_these_methods(kind: type) -> None:
    wanted = METHODS[kind]
    assert {name: signature_of(vars(kind)[name]) for name in wanted if name in vars(kind)} == wanted


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_results_and_settings_have_these_fields(kind: Any) -> None:
    found = {
        one.name: "required" if one.default is dataclasses.MISSING else one.default for one in dataclasses.fields(kind)
    }
    assert found == FIELDS[kind]


def test_the_facade_overrides_nothing() -> None:
    assert Model.__bases__ == Users.__bases__ == (object,)
