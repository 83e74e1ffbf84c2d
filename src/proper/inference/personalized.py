"""Personalized model loaded from a run folder: `generate` and `score` on mixed-user batches, each user at their tier.

none    group model with the mean user embedding     (an unknown user)
groups  group model with the user's embedding
users   the same with the user's LoRA adapter
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from proper.adapters.slot_cache import SlotCache
from proper.adapters.store import AdapterStore
from proper.adapters.validation import fault_of
from proper.config import Config, load_config
from proper.data.batching import Encoder
from proper.data.templates import parse_template
from proper.errors import InputError, ProperError, StoreError
from proper.files import hash_file
from proper.inference.generate import generate
from proper.inference.sampling import Sampling
from proper.inference.score import score_labels
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import RowContext
from proper.models.backbone import configured_backbone
from proper.models.peft_merge import apply_population
from proper.models.personal import ProperModel
from proper.models.tensors import load_tensors
from proper.run_folder import RunFolder, Stage, Tier, require_run

LABEL_TOKENS = 1024
"""Maximum label tokens, over all prompts of a batch, that are scored at once: each needs a row of logits."""


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its user, and the tier that answered."""

    text: str
    user: str | None
    tier: str


class PersonalizedModel:
    """A backbone with the population LoRA, the group experts and the users' adapters from a store.

    Attributes:
        model: backbone and adapted layers.
        store: the adapter store; None before stage 2.
        template: the prompt template of the run's data.
    """

    def __init__(
        self, model: ProperModel, encoder: Encoder, config: Config, cache: SlotCache | None, stage: Tier
    ) -> None:
        self.model, self.encoder, self.config, self.cache, self.stage = model, encoder, config, cache, stage
        self.store = cache.store if cache is not None else None
        self.template = parse_template(config.data.prompt, "data.prompt")

    def generate(
        self,
        prompts: Sequence[str],
        user_ids: Sequence[str | None],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Return one continuation per prompt, each for its own user; a batch may mix any users.

        Each prompt has its own generator seeded with `seed`, so its answer does not depend on the other prompts, and a
        repeated prompt of the same user gets the same answer.

        Raises:
            InputError: the two lists differ in length, or a prompt is empty.
            StoreError: a user's adapter is damaged.
        """
        length = max_new_tokens or self.config.task.max_new_tokens
        sampling = Sampling(length, temperature, top_p, seed)
        return [answer.text for answer in self.respond(prompts, user_ids, sampling)]

    def respond(
        self, prompts: Sequence[str], user_ids: Sequence[str | None], sampling: Sampling | None = None
    ) -> list[Answer]:
        """Like `generate`, but return answers that also name their user and the tier that answered."""
        if len(prompts) != len(user_ids):
            raise InputError(f"{len(prompts)} prompts and {len(user_ids)} user ids: there must be one user per prompt")
        if any(not prompt.strip() for prompt in prompts):
            raise InputError("a prompt is empty")
        sampling = sampling or Sampling(self.config.task.max_new_tokens)
        encoded = [self.encoder.prompt(prompt, room=sampling.max_new_tokens) for prompt in prompts]
        found = zip(generate(self, encoded, user_ids, sampling), user_ids, strict=True)
        return [Answer(self.encoder.decode(one.tokens), user, one.tier) for one, user in found]

    def score(
        self, prompts: Sequence[str], user_ids: Sequence[str | None], labels: Sequence[str]
    ) -> Float[Tensor, "B L"]:
        """Return the log-likelihood (nats) of every label after every prompt.

        Raises:
            StoreError: a user's adapter or embedding is damaged.
            ProperError: a likelihood is NaN; the message names the user.
        """
        tokens = [self.encoder.answer(label) for label in labels]
        room = max(len(label) for label in tokens)
        encoded = [self.encoder.prompt(prompt, room=room) for prompt in prompts]
        found = torch.empty(len(prompts), len(labels))
        size = max(1, min(self.config.compute.batch_size, LABEL_TOKENS // sum(map(len, tokens))))
        for chunk in by_length([len(ids) for ids in encoded], size):
            rows = self.rows([user_ids[i] for i in chunk])
            found[chunk] = score_labels(self.model, [encoded[i] for i in chunk], tokens, rows).cpu()
        for at in found.isnan().any(1).nonzero().flatten().tolist():
            raise ProperError(f"user {user_ids[at]!r}: the likelihoods are not finite")
        return found

    def tier(self, user: str | None) -> Tier:
        """Return the tier that answers this user."""
        if self.cache is None or self.stage in (Tier.BASE, Tier.POPULATION):
            return self.stage
        tier = self.cache.tier(user)
        return Tier.GROUPS if self.stage == Tier.GROUPS and tier == Tier.USERS else tier

    def close(self) -> None:
        """Close the store."""
        if self.store is not None:
            self.store.close()

    def rows(self, users: Sequence[str | None]) -> RowContext:
        """Return the row context of a batch of these users, and load their adapters into the bank."""
        if self.cache is None or self.stage in (Tier.BASE, Tier.POPULATION):
            return RowContext()
        embedding = self.cache.embeddings(users).to(self.model.device)
        if self.stage == Tier.GROUPS:
            return RowContext("groups", embedding=embedding)
        slots = self.cache.slots(users)
        if slots is None:
            return RowContext("groups", embedding=embedding)
        return RowContext("users", embedding=embedding, slots=slots.to(self.model.device))


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return row indices sorted by length, in chunks of `size`."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[at : at + size] for at in range(0, len(order), size)]


def load(folder: str | Path, stage: str | None = None) -> PersonalizedModel:
    """Load a run folder as one model for all its users.

    Args:
        folder: the run folder that `proper run` wrote.
        stage: the last stage to load; the highest that the folder has if None.

    Raises:
        RunFolderError: the folder is not a run folder, or the stage is missing from it.
        StoreError: the shared group tensors or routers have values that are not finite or absurdly large.
    """
    folder = Path(folder)
    run = require_run(folder)
    config = load_config(run.config)
    tier = highest_stage(folder) if stage is None else Tier(stage)
    backbone = configured_backbone(config)
    if tier != Tier.BASE:
        run.require_trained(Stage.POPULATION)
        apply_population(backbone, run.population)
    model = ProperModel(backbone)
    cache = None
    if tier in (Tier.GROUPS, Tier.USERS):
        cache = load_groups(folder, config, model)
        if tier == Tier.USERS:
            run.require_trained(Stage.USERS)
            load_router(folder, config, model)
    encoder = backbone.encoder(config.compute.max_length)
    return PersonalizedModel(model, encoder, config, cache, tier)


def highest_stage(folder: Path) -> Tier:
    """Return the tier of the last stage that is trained in a run folder."""
    trained = [Tier(stage.value) for stage in Stage if RunFolder(folder).is_trained(stage)]
    return trained[-1] if trained else Tier.BASE


def load_groups(folder: Path, config: Config, model: ProperModel) -> SlotCache:
    """Load the trained experts and routers of a run into a model; return the slot cache over its store.

    Raises:
        RunFolderError: stage 2 is missing.
        StoreError: the experts or routers have values that are not finite or absurdly large, or the store belongs to
            another backbone or other groups.
    """
    run = RunFolder(folder)
    run.require_trained(Stage.GROUPS)
    model.add_experts(config.groups, seed=0)
    tensors, _ = load_tensors(run.experts)
    _require_sound(run.experts, tensors)
    for name, parameter in model.group_parameters().items():
        parameter.data.copy_(tensors[name])
        parameter.requires_grad_(False)
    mean = tensors["mean_embedding"]
    store = AdapterStore(run.users.path)
    store.require({"backbone": model.backbone.digest, "groups": hash_file(run.experts)})
    layout = model.layout(config.users.rank)
    slots = max(2, config.compute.batch_size)
    # The stored dtype: half the memory, a load is one copy, and matrix products run in the input's dtype anyway.
    dtype = torch.bfloat16 if config.users.storage == "bf16" else torch.float32
    bank = AdapterBank(layout, slots, alpha=config.users.alpha, trainable=False, device=model.device, dtype=dtype)
    model.use_bank(bank)
    return SlotCache(store, bank, mean)


def load_router(folder: Path, config: Config, model: ProperModel) -> None:
    """Load the trained LoRA-aware routers of a run into a model."""
    model.add_lora_router(config.users)
    path = RunFolder(folder).users.router
    if not path.exists():
        return
    tensors, _ = load_tensors(path)
    _require_sound(path, tensors)
    for name, parameter in model.router_parameters().items():
        parameter.data.copy_(tensors[name])
        parameter.requires_grad_(False)


def _require_sound(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check tensors that all users share: a NaN, infinity or absurdly large value would spoil every answer."""
    fault = fault_of(tensors)
    if fault is not None:
        raise StoreError(f"{path}: {fault}")
