"""PEFT's Poly (polytropon) adapters on a backbone, with users as tasks: each task mixes shared skills by its logits.

    W x + (1/R) * B_u A_u x,   A_u = sum_i w_ui A_i,  B_u = sum_i w_ui B_i,   w_u = sigmoid(z_u) / sum sigmoid(z_u)

(Ponti et al. 2022, arXiv 2202.13914; layers and scale are PEFT's.) `RowContext.slots` holds the task of each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from peft import PolyConfig, get_peft_model
from peft.tuners.poly.layer import Linear
from torch import Tensor, nn
from transformers import PreTrainedModel

from proper.config import GroupsConfig
from proper.errors import ConfigError
from proper.layers.batch_context import BatchContext
from proper.models.personal import ProperModel
from proper.models.targets import find_targets

ADAPTER = "default"


class Poly:
    """The Poly layers of a model.

    Attributes:
        layers: Poly layers by module name; each has E skills of rank R and a row of E logits per task.
        tasks: number of rows of logits; the last row is for users without their own.
    """

    def __init__(self, layers: Mapping[str, Linear], tasks: int) -> None:
        self.layers, self.tasks = layers, tasks

    def skills(self) -> dict[str, nn.Parameter]:
        """Return the skills, which all tasks share: MODULE.a (1, E, I, R) and MODULE.b (1, E, R, O)."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            found |= {f"{name}.a": layer.poly_lora_A[ADAPTER], f"{name}.b": layer.poly_lora_B[ADAPTER]}
        return found

    def tables(self) -> list[nn.Parameter]:
        """Return the logits of each module (tasks, E)."""
        return [cast(nn.Parameter, layer.poly_router[ADAPTER].module_logits) for layer in self.layers.values()]

    def logits(self) -> Float[Tensor, "U P"]:
        """Return every task's logits, concatenated over the modules."""
        return torch.cat([table.detach() for table in self.tables()], dim=1).cpu()

    def put(self, rows: Tensor, logits: Float[Tensor, "n P"]) -> None:
        """Set the logits of the tasks in `rows`."""
        tables = self.tables()
        for table, part in zip(tables, logits.chunk(len(tables), dim=1), strict=True):
            table.data[rows.to(table.device)] = part.to(table)

    def sample(self, on: bool) -> None:
        """Switch sampling of the weights from a relaxed Bernoulli distribution (as in training) on or off."""
        for layer in self.layers.values():
            layer.poly_router.train(on)


def add_poly(model: ProperModel, config: GroupsConfig, tasks: int, seed: int) -> Poly:
    """Add frozen Poly layers to stage 2's target modules, with its number of experts as skills and its rank.

    Args:
        model: the model, changed in place.
        config: stage 2's settings.
        tasks: number of rows of logits.
        seed: seed of the skills' and logits' initial values.

    Raises:
        ConfigError: a target is not a dense `torch.nn.Linear`, the only kind that PEFT's Poly adapts.
    """
    names = list(find_targets(model.backbone.model, config.target_modules))
    for name in names:
        module = model.backbone.model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise ConfigError(f"evaluation.methods: 'poly' adapts torch.nn.Linear only; {name} is {kind}")
    settings: dict[str, Any] = {"r": config.rank, "n_skills": config.expert_count, "n_tasks": tasks}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wanted = PolyConfig(task_type="CAUSAL_LM", target_modules=names, **settings)
        wrapped = get_peft_model(model.backbone.model, wanted)
    wrapped.requires_grad_(False)
    wrapped.eval()
    base = cast(PreTrainedModel, wrapped.get_base_model())
    model.backbone.model = base
    layers = {name: cast(Linear, base.get_submodule(name)) for name in names}
    for layer in layers.values():
        layer.register_forward_pre_hook(partial(_with_tasks, model.routing), with_kwargs=True)
    return Poly(layers, tasks)


def _with_tasks(
    routing: BatchContext, layer: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Pass each row's task to a Poly layer, as a forward pre-hook."""
    return args, {**kwargs, "task_ids": routing.rows.slots}
