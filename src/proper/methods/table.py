"""Registry of all methods by name: the stages, baselines, the paper's ablations, and the controls.

A new method is a new entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from proper.config import PRESETS, Config
from proper.data.dataset import Dataset
from proper.data.derived.copies import shuffle_users
from proper.data.derived.views import SINGLE_USER
from proper.errors import ConfigError, DataError, did_you_mean
from proper.evaluation.comparisons import TRIVIAL
from proper.export.converted_models import STATIC_EXPORT, USERS_INT8
from proper.methods.derived_runs import varied
from proper.methods.end_to_end import answer_end_to_end, train_end_to_end, train_equal_steps
from proper.methods.head import HEAD
from proper.methods.overrides import change, split_name
from proper.methods.per_user_lora import answer_per_user, train_leaking, train_per_user
from proper.methods.poly import answer_poly, train_poly
from proper.methods.prior import prior, with_prior
from proper.methods.residual import RESIDUAL, with_residual
from proper.methods.retrieved import add_profile, retrieved_run
from proper.methods.spec import DerivedRun, Method, PerUser, TrainingWork
from proper.methods.stage_and_head import with_head
from proper.methods.stage_methods import (
    Answer,
    as_another,
    as_itself,
    as_one,
    exported,
    in_eight_bits,
    train_one_user,
    train_stages,
)
from proper.methods.trivial import global_majority, lead, user_majority, user_majority_same
from proper.run_folder import Stage, Tier

ALL = tuple(Stage)
POPULATION, GROUPS = ALL[:1], ALL[:2]

OPPU: Mapping[str, Any] = {
    "form": "lora",
    "rank": 8,
    "layers": "all",
    "alpha": 8,
    "dropout": 0.05,
    "batch_size": 16,
    "weight_decay": 0.01,
    "warmup": 0.1,
    "schedule": "linear",
    "clip": 0.3,
    "router": "none",
    "slots": 1,
    "tiers": {"select": False},
}
"""OPPU's recipe for a user's LoRA (its released code), except for the learning rate, which is the run's: OPPU's 1e-4 is
for a 7 B model, and learning rates scale with the backbone's width here."""

OPPU_MODULES = ["q_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"]
"""OPPU adapts q and v; if a model family fuses them into one layer, that layer."""


ON_ALL_TASKS = (
    *("base", *map(str, Stage), USERS_INT8, "swapped", "population-more", "groups-shared-e"),
    *("groups-no-constraint", "constraint-experts", "users-no-router", "users-residual", "users-paper"),
    *("per-user-only", "oppu", "user-majority", "user-majority-same", "global-majority", "lead"),
)
"""The methods that a run of several tasks can evaluate."""


def all_methods(config: Config) -> dict[str, Method]:
    """Return all methods by name that can answer the task of this config."""
    return {name: method for name, method in _registered(config).items() if method.obstacle_in(config) is None}


def _registered(config: Config) -> dict[str, Method]:
    ours = [*_stages(), *_trivial(), *_priors(), *_controls(config), *_ablations(config)]
    methods = [*ours, *_baselines(), *_retrieval(config)]
    return {method.name: replace(method, on_all_tasks=method.name in ON_ALL_TASKS) for method in methods}


def known_methods(names: Sequence[str], config: Config) -> list[Method]:
    """Return methods by their names, with the overrides in brackets applied (`overrides.change`).

    Raises:
        ConfigError: a name is unknown, an override is impossible, the task has not what the method needs, or the config
            excludes its settings.
    """
    known = _registered(config)
    found = []
    for full in dict.fromkeys(names):
        name, changes = split_name(full)
        if name not in known:
            raise ConfigError(f"evaluation.methods: no method '{name}'; {did_you_mean(name, [*known])}")
        obstacle = known[name].obstacle_in(config)
        if obstacle is not None:
            raise ConfigError(f"evaluation.methods: {obstacle}")
        found.append(change(known[name], changes, config) if changes else known[name])
        if (variant := found[-1].variant) is not None:
            varied(config, variant)  # refuses its settings before anything is trained
    return found


def table_methods(names: Sequence[str], config: Config) -> list[Method]:
    """Return methods by their names, then the trivial rows that the task allows; every table has these.

    Raises:
        ConfigError: as `known_methods`.
    """
    # For free text, the best constant is no bar, and two rows say enough.
    writes = all(one.task.kind == "generation" for one in config.each_task.values())
    wanted = ("user-majority", "lead") if writes else TRIVIAL
    known = all_methods(config)
    return known_methods([*names, *(name for name in wanted if name in known)], config)


def require_targets(methods: Sequence[Method], dataset: Dataset) -> None:
    """Check that the data has as many target users as each method needs, and others if it trains on these.

    Raises:
        DataError: it has fewer.
    """
    targets = sum(1 for _ in dataset.users("target"))
    others = any(user.history for user in dataset.users("other"))
    for method in methods:
        first = method.variant.settings.get("population", {}) if method.variant is not None else {}
        if first.get("train_on") == "others" and not others:
            raise DataError(
                f"evaluation.methods: '{method.name}' trains population on users who are not targets, and this data "
                "has no row of such a user; leave it out, or lower split.target_users"
            )
        if targets < method.targets:
            raise DataError(
                f"evaluation.methods: '{method.name}' needs at least {method.targets} target users; this data has "
                f"{targets}; leave it out, or raise split.target_users or lower split.min_history if users allow it"
            )


def _stages() -> list[Method]:
    return [
        Method("base", as_itself(Tier.BASE)),
        Method("population", as_itself(Tier.POPULATION), POPULATION),
        Method("groups", as_itself(Tier.GROUPS), GROUPS, keeps="embedding"),
        Method("users", as_itself(Tier.USERS), ALL, keeps="adapter"),
        Method(STATIC_EXPORT, exported, ALL, keeps="export"),
        Method(USERS_INT8, in_eight_bits, ALL, keeps="int8"),
    ]


def _trivial() -> list[Method]:
    return [
        Method("user-majority", user_majority, keeps="history"),
        Method("user-majority-same", user_majority_same, keeps="history"),
        Method("global-majority", global_majority),
        Method("prior", prior, keeps="history", needs="labels"),
        Method("lead", lead, needs="text"),
    ]


def _priors() -> list[Method]:
    return [
        Method("groups+prior", with_prior(Tier.GROUPS), GROUPS, keeps="embedding", needs="labels"),
        Method("users+prior", with_prior(Tier.USERS), ALL, keeps="adapter", needs="labels"),
        Method("groups+residual", with_residual(Tier.GROUPS), GROUPS, RESIDUAL, keeps="embedding", needs="labels"),
        Method("users+residual", with_residual(Tier.USERS), ALL, RESIDUAL, keeps="adapter", needs="labels"),
        HEAD,
        Method("groups+head", with_head(Tier.GROUPS), GROUPS, keeps="embedding", needs="labels"),
        Method("users+head", with_head(Tier.USERS), ALL, keeps="adapter", needs="labels"),
    ]


def _controls(config: Config) -> list[Method]:
    groups = config.groups
    # A single expert always has gate 1: stage 2 with one expert of rank E R is a plain LoRA trained on stage 2's rows.
    more = {
        "experts": 1,
        "rank": groups.expert_count * groups.rank,
        "alpha": groups.expert_count * groups.alpha,
        "router": "default",
        "constraint": {"kind": "none"},
    }
    shared = DerivedRun("groups-shared-e", train_one_user, POPULATION)
    shuffled = DerivedRun("shuffled", train_stages, POPULATION, derive=_shuffled, seeded=True)
    return [
        _derived("population-more", as_itself(Tier.GROUPS), GROUPS, train_stages, POPULATION, {"groups": more}),
        Method("groups-shared-e", as_one(Tier.GROUPS, SINGLE_USER), GROUPS, shared, pools_users=True),
        Method("swapped", as_another, ALL, keeps="adapter", targets=2),
        Method("shuffled", as_itself(Tier.USERS), ALL, shuffled, keeps="adapter", targets=2),
    ]


def _ablations(config: Config) -> list[Method]:
    released = {
        section: {key: value for key, value in values.items() if "learning_rate" not in key}
        for section, values in PRESETS["released"].items()
    }
    return [
        _groups("groups-no-constraint", {"constraint": {**config.groups.constraint.model_dump(), "kind": "none"}}),
        _groups("constraint-experts", {"constraint": {**config.groups.constraint.model_dump(), "kind": "experts"}}),
        # The architecture and losses of the preset, but the run's learning rates, since the preset's are for 7 B.
        _derived("released", as_itself(Tier.USERS), ALL, train_stages, (), released, keeps="adapter"),
        _users("users-no-router", config, "none"),
        _users("users-residual", config, "residual"),
        _users("users-paper", config, "paper"),
    ]


def _groups(name: str, settings: Mapping[str, Any]) -> Method:
    groups = {"groups": settings}
    return _derived(name, as_itself(Tier.GROUPS), GROUPS, train_stages, POPULATION, groups, keeps="embedding")


def _users(name: str, config: Config, router: str) -> Method:
    users = {"users": {"router": router}}
    found = _derived(name, as_itself(Tier.USERS), ALL, train_stages, GROUPS, users, keeps="adapter")
    return replace(found, variant=None) if config.users.router == router else found


def _baselines() -> list[Method]:
    oppu = {"users": OPPU, "groups": {"target_modules": OPPU_MODULES, "layers": "all"}}
    plain = {"users": {"router": "none", "form": "lora"}}
    joint, own = (Stage.GROUPS, Stage.USERS), (Stage.POPULATION, Stage.USERS)
    return [
        _derived("per-user-only", answer_per_user, (Stage.USERS,), train_per_user, (), plain, keeps="adapter"),
        _derived("end-to-end", answer_end_to_end, joint, train_end_to_end, (), plain, keeps="adapter"),
        _derived("end-to-end-steps", answer_end_to_end, joint, train_equal_steps, (), plain, keeps="adapter"),
        _derived("poly", answer_poly, GROUPS, train_poly, POPULATION, keeps="embedding"),
        _derived("oppu", answer_per_user, own, train_per_user, POPULATION, oppu, keeps="adapter"),
        _derived("oppu-released", answer_per_user, own, train_leaking, POPULATION, oppu, keeps="adapter"),
    ]


def _derived(
    name: str,
    answer: Answer,
    stages: tuple[Stage, ...],
    train: Callable[[TrainingWork], None],
    inherits: tuple[Stage, ...],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    keeps: PerUser = "nothing",
) -> Method:
    """Return a method that answers from a derived run of its own name."""
    return Method(name, answer, stages, DerivedRun(name, train, inherits, settings or {}), keeps)


def _retrieval(config: Config) -> list[Method]:
    own = retrieved_run(config, config.retrieval.k)
    answer = as_itself(Tier.POPULATION)
    return [
        Method("rag", answer, POPULATION, own, keeps="history"),
        *(Method(f"rag-{k}", answer, POPULATION, retrieved_run(config, k), keeps="history") for k in (1, 2, 4)),
        Method("pag", answer, POPULATION, DerivedRun("pag", train_stages, derive=add_profile), keeps="history"),
        Method("users+rag", as_itself(Tier.USERS), ALL, own, keeps="adapter"),
    ]


def _shuffled(source: Dataset, path: Path, config: Config, seed: int) -> None:
    shuffle_users(source, path, seed)
