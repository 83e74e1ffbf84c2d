"""Presets: named values for several settings at once, which the config's own values override."""

from __future__ import annotations

from typing import Any

_PAPER: dict[str, Any] = {
    "population": {"learning_rate": 3e-4, "train_on": "others", "batch_size": 16, "patience": 0},
    "groups": {"learning_rate": 2e-4, "train_on": "targets", "batch_size": 16, "embedding_init": 0.02},
    "users": {
        "learning_rate": 2e-4,
        "epochs": 2,
        "steps": None,
        "batch_size": 4,
        "scales": [],
        "router": "paper",
        "router_learning_rate": 2e-4,
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "released": {
        **_PAPER,
        "population": {**_PAPER["population"], "target_modules": "attention"},
        "groups": {
            **_PAPER["groups"],
            "router": "released",
            "embedding": "per-module",
            "embedding_init": 1.0,
            "constraint": {"kind": "released"},
        },
    },
}
