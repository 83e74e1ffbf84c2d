"""`ProperModel`: a backbone with LoRA experts, routers, a bank of user adapters and the LoRA-aware router.

Everything that is specific to the rows of a batch goes through `ProperModel.routing`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proper.config import GroupsConfig, UsersConfig
from proper.data.batching import Batch
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import BatchContext, RowContext
from proper.layers.experts import Experts
from proper.layers.layout import Bases, Layout
from proper.layers.personalized_linear import AdaptedLinear
from proper.layers.routers import LoraAwareRouter, UserAwareRouter
from proper.models.answer_loss import answer_logits, answer_losses
from proper.models.backbone import Backbone
from proper.models.label_choice import choice_losses
from proper.models.lower_layers import HiddenStates, LowerLayers
from proper.models.targets import expert_targets, first_adapted, user_targets

logger = logging.getLogger(__name__)


class ProperModel:
    """A frozen backbone and the adapted layers that are added to it.

    Attributes:
        backbone: the model and its tokenizer; its adapted modules are replaced in place.
        routing: the context of the current batch's rows, shared by all layers.
        layers: the adapted layers by module name.
        embedding_size: size of one user's embedding (D, or the sum of all inputs with per-module tables).
        bases: the bases of `users.form: core`; empty until they are trained or loaded.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.routing = BatchContext()
        self.layers: dict[str, AdaptedLinear] = {}
        self.embedding_size = 0
        self.bases: Bases = {}
        self._states: HiddenStates | None = None
        self._lower: LowerLayers | None = None

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return self.backbone.device

    def add_experts(self, config: GroupsConfig, seed: int, tasks: int = 0) -> None:
        """Add experts and user-aware routers to the target modules, initialized from `seed`.

        Several `tasks` add a term per task to the routers.

        Raises:
            ConfigError: the model has no such modules or fewer layers than `groups.layers`.
        """
        shapes, count = expert_targets(self.backbone.model, config), config.expert_count
        per_module, separate = config.embedding == "per-module", config.task_experts == "separate"
        self.embedding_size = sum(i for i, _ in shapes.values()) if per_module else config.user_embedding
        offset = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, (inputs, outputs) in shapes.items():
                layer = AdaptedLinear(name, self._module(name), inputs, outputs, self.routing)
                layer.experts = Experts(
                    inputs,
                    outputs,
                    experts=count,
                    rank=config.rank,
                    alpha=config.alpha,
                    dropout=config.dropout,
                )
                width = inputs if per_module else config.user_embedding
                layer.router = UserAwareRouter(
                    inputs, width, count, form=config.router, offset=offset, tasks=tasks, separate=separate
                )
                offset += width if per_module else 0
                layer.experts.to(self.device)
                layer.router.to(self.device)
                self._put(name, layer)
        self.train(False)
        self._find_lower_layers()

    def add_lora_router(self, config: UsersConfig) -> None:
        """Add the LoRA-aware router of stage 3b to the layers with user adapters, initialized to zero.

        `router: none` adds nothing.
        """
        wanted = user_targets(self._shapes(), config)
        for name, layer in self.layers.items():
            layer.residual = config.router == "residual"
            layer.lora_router = None
            if config.router != "none" and layer.experts is not None and name in wanted:
                made = LoraAwareRouter(layer.outputs, layer.experts.experts, config.router_input == "normalized")
                layer.lora_router = made.to(self.device)

    def add_plain_targets(self, config: GroupsConfig) -> None:
        """Adapt the modules that would get experts, for user adapters only."""
        for name, (inputs, outputs) in expert_targets(self.backbone.model, config).items():
            self._put(name, AdaptedLinear(name, self._module(name), inputs, outputs, self.routing))
        self._find_lower_layers()

    def layout(self, rank: int) -> Layout:
        """Return the memory layout of a LoRA of this rank on every adapted layer."""
        return Layout.of(self._shapes(), rank)

    def user_layout(self, config: UsersConfig) -> Layout:
        """Return the memory layout of one user's adapter: of `users.form` and `users.rank`, in `users.layers`.

        Raises:
            ConfigError: there are fewer layers with experts than `users.layers`.
        """
        return Layout.of(
            user_targets(self._shapes(), config), config.rank, self.bases if config.form == "core" else None
        )

    def add_bank(
        self,
        config: UsersConfig,
        slots: int,
        *,
        trainable: bool = False,
        dtype: torch.dtype | None = None,
        dropout: float = 0.0,
    ) -> AdapterBank:
        """Make the layers read user adapters from a new bank of `user_layout`, and return it.

        Args:
            config: settings of stage 3.
            slots: S.
            trainable: whether the bank has gradients.
            dtype: of the bank's values; None: that of the backbone, at least fp32.
            dropout: dropout rate on the adapters' input.
        """
        dtype = dtype or torch.promote_types(self.backbone.model.dtype, torch.float32)
        layout, device = self.user_layout(config), self.device
        bank = AdapterBank(layout, slots, alpha=config.alpha, trainable=trainable, device=device, dtype=dtype)
        self.use_bank(bank, dropout)
        return bank

    def use_bank(self, bank: AdapterBank | None, dropout: float = 0.0) -> None:
        """Make the layers in `bank` read user adapters from it, with this dropout rate on the adapters' input."""
        for name, layer in self.layers.items():
            layer.bank, layer.user_dropout = (bank if bank is not None and name in bank else None), dropout

    def group_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of experts and user-aware routers as MODULE.{down,up,token,user,task}."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            if layer.experts is not None and layer.router is not None:
                found |= {f"{name}.down": layer.experts.down, f"{name}.up": layer.experts.up}
                found |= {f"{name}.token": layer.router.token, f"{name}.user": layer.router.user}
                if layer.router.task is not None:
                    found[f"{name}.task"] = layer.router.task
        return found

    def router_parameters(self) -> dict[str, nn.Parameter]:
        """Return the LoRA-aware routers' W_r by module name."""
        pairs = ((name, layer.lora_router) for name, layer in self.layers.items())
        return {name: router.weight for name, router in pairs if router is not None}

    def train(self, on: bool) -> None:
        """Switch the experts' dropout on or off; the backbone always runs in evaluation mode."""
        for layer in self.layers.values():
            if layer.experts is not None:
                layer.experts.train(on)

    def answer_logits(self, batch: Batch, rows: RowContext) -> Float[Tensor, "B A V"]:
        """Return the logits that predict the last A tokens of each row, in the compute dtype."""
        with self._running(batch, rows):
            return answer_logits(self.backbone.model, batch)

    def answer_losses(self, batch: Batch, rows: RowContext) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Return each row's summed answer loss (nats, fp32) and its number of answer tokens; or see `choice_losses`."""
        with self._running(batch, rows):
            return (choice_losses if batch.choices else answer_losses)(self.backbone.model, batch)

    @contextmanager
    def _running(self, batch: Batch, rows: RowContext) -> Iterator[None]:
        """Set the rows of a forward pass over this batch, and start it from cached states where there are any."""
        lower = None if batch.choices else self._lower
        rows = replace(rows, tasks=torch.tensor(batch.tasks, device=self.device)) if batch.tasks else rows
        with self.routing.use(rows), nullcontext() if lower is None else lower.skipped(batch):
            yield

    @contextmanager
    def caching(self, folder: Path, megabytes: int) -> Iterator[None]:
        """Compute the layers below the first adapted one once per text while the block runs.

        This holds for `answer_logits` and `answer_losses`.

        Args:
            folder: an existing folder, on the disk that has room for the cache.
            megabytes: maximum size of the cache in MiB; with 0, nothing is cached.
        """
        before = self._states
        states = self._states = HiddenStates(folder, megabytes << 20) if megabytes else None
        self._find_lower_layers()
        try:
            yield
        finally:
            self._states = before
            self._find_lower_layers()
            if states is not None:
                states.close()

    def _find_lower_layers(self) -> None:
        """Find the layers below the first adapted one, whenever layers are added."""
        self._lower = None
        if self._states is None or not self.layers:
            return
        path, depth = first_adapted(self.backbone.model, self.layers)
        if not depth:
            return
        lower = LowerLayers(self.backbone.model, path, depth, self._states, self.backbone.pad_id)
        if lower.exact():
            self._lower = lower
        else:
            family = type(self.backbone.model).__name__
            logger.info(f"the first {depth} layers of {family} cannot be computed separately, and run in every pass")

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {name: (layer.inputs, layer.outputs) for name, layer in self.layers.items()}

    def _module(self, name: str) -> nn.Module:
        module = self.backbone.model.get_submodule(name)
        return module.base if isinstance(module, AdaptedLinear) else module

    def _put(self, name: str, layer: AdaptedLinear) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.backbone.model.get_submodule(parent), leaf, layer)
        self.layers[name] = layer
