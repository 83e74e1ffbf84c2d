"""Derived data of `rag` and `users+rag`: prompts with the user's own earlier items, found by BM25 or by embeddings.

An embedding is the mean of a prompt's hidden states after the last layer of the frozen backbone, before any training,
minus the mean over the histories; items are compared by cosine. Embeddings cover the queries and the newest 200 history
items of every target user. All other rows, such as those that stage 1 reads of other users, have BM25 only.

The written dataset is the cache: it is made once for the settings, and found again by their hash.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from proper.config import Config
from proper.console import progress
from proper.data.chat import readable
from proper.data.dataset import Dataset
from proper.data.derived.copies import Count
from proper.data.derived.retrieval import Vectors, add_profiles, retrieve
from proper.data.stage_sample import SHARED_STAGES, stage_sample
from proper.methods.prompt_states import mean_state, prompt_states
from proper.methods.spec import DerivedRun
from proper.methods.stage_methods import train_stages
from proper.models.backbone import configured_backbone
from proper.models.tokenizer import configured_encoder

NEWEST = 200
"""History items of a target user that have embeddings."""

MAX_TOKENS = 128
"""Tokens of a prompt that are embedded, from its begin."""


def retrieved_run(config: Config, k: int) -> DerivedRun:
    """Return the variant whose prompts have up to k items, by `config.retrieval`."""
    kind, longest = config.retrieval.kind, config.retrieval.max_length
    settings: dict[str, dict[str, Any]] = {"retrieval": {"k": k}}
    if longest is not None:
        settings["compute"] = {"max_length": longest}
    name = f"rag-{k}" if kind == "bm25" else f"rag-{k}-{kind}"
    return DerivedRun(name, train_stages, settings=settings, derive=_retrieve)


def token_counter(config: Config) -> Count:
    """Return the function that counts the tokens of a prompt and a target together."""
    encoder = configured_encoder(config)

    def count(prompt: str, target: str) -> int:
        return encoder.count([prompt], [target])[0]

    return count


def _retrieve(source: Dataset, path: Path, config: Config, seed: int) -> None:
    chosen = config.retrieval
    vectors = None if chosen.kind == "bm25" else prompt_vectors(source, config)
    count, longest = token_counter(config), config.compute.max_length
    rows = rows_that_are_read(source, config)
    with progress("retrieval: finds", len(rows)) as advance:
        retrieve(source, path, chosen.k, count, longest, vectors, chosen.kind, rows, advance)


def add_profile(source: Dataset, path: Path, config: Config, seed: int) -> None:
    """Write the rows of `pag`: a profile of the user in front of the prompts that are read."""
    rows = rows_that_are_read(source, config)
    with progress("profiles: writes", len(rows)) as advance:
        kind, longest = config.task.kind, config.compute.max_length
        add_profiles(source, path, kind, token_counter(config), longest, only=rows, advance=advance)


def rows_that_are_read(source: Dataset, config: Config) -> set[int]:
    """Return the ids of the queries and of all rows that the stages of any seed can train on.

    A sample of the written dataset is a part of the same sample of `source`: rows are taken in the same order up to the
    same number of tokens, and prompts with items are not shorter.
    """
    found = {query.id for query in source.queries()}
    for user in source.users("target"):
        found |= {item.id for item in source.history(user.id, config.users.max_items)}
    for seed in config.evaluation.seeds:
        for stage in SHARED_STAGES:
            sample = stage_sample(source, stage, config, seed)
            found |= {row for (row,) in source.connection.execute(f"SELECT id FROM {sample.table}")}
    return found


def prompt_vectors(source: Dataset, config: Config) -> Vectors:
    """Return the centered embeddings of the target users' newest items and queries, by row id; fp32, length 1."""
    items = [row for user in source.users("target") for row in source.history(user.id, NEWEST)]
    rows = [*items, *source.queries()]
    backbone = configured_backbone(config)
    encoder = backbone.encoder()
    encoded = [encoder.start + encoder.tokens(readable(row.prompt))[:MAX_TOKENS] for row in rows]
    found: dict[int, np.ndarray[Any, np.dtype[np.float32]]] = {}
    for chunk, states, mask in prompt_states(backbone, encoded, config.compute.batch_size, "retrieval: embeds"):
        found |= dict(zip((rows[at].id for at in chunk), mean_state(states, mask).cpu().numpy(), strict=True))
    center = np.mean([found[item.id] for item in items], axis=0)
    centered = {row: vector - center for row, vector in found.items()}
    return {row: vector / max(float(np.linalg.norm(vector)), 1e-12) for row, vector in centered.items()}
