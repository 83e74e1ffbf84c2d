"""Target module selection: the linear layers of a backbone to adapt (FFN, attention or by name; all layers or last)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from proper.config import GroupsConfig, UsersConfig
from proper.errors import ConfigError

# A part of a layer's path shows whether it is FFN or attention; in OPT and some Phi models only the last part does.
_FFN = re.compile(r"(^|[._])(mlp|ffn|feed_forward|fc1|fc2)($|[._])")
_ROUTER = re.compile(r"(\w+_)?(gate|router)|experts")
_EXPERTS = re.compile(r"(^|[._])(moe|experts?)($|[._])")
_ATTENTION = re.compile(r"(^|[._])(attn|attention)($|[._])")
_LAYER = re.compile(r"^(.*?)\.(\d+)\.")

Shapes = dict[str, tuple[int, int]]
"""Modules as name -> (inputs, outputs), in the model's order."""


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a linear layer of any kind (dense, quantized, Conv1D, with LoRA), else None."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.nf)
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return inputs, outputs
    return None


def find_targets(model: nn.Module, wanted: str | Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the adapted modules as name -> (inputs, outputs), in the model's order.

    Only layers of the text model are selected: in a multimodal model, no text reaches the others. In a mixture of
    experts, the keywords select shared experts but neither routers, gates nor single experts.

    Args:
        model: the backbone.
        wanted: a keyword: "ffn", "attention", "all" (both), "auto" ("ffn", or "attention" where a mixture of experts
            leaves no FFN to adapt); or names: a full module name, its last part, or any dotted ending.

    Raises:
        ConfigError: no module matches; the message names the candidates.
    """
    known = _layers(model)
    found = {name: shape for name, shape in known.items() if _is_wanted(name, wanted)}
    fused = _fused_experts(model)
    if not found and wanted == "auto" and fused:
        found = {name: shape for name, shape in known.items() if _is_wanted(name, "attention")}
    if not found:
        leaves = sorted({name.rpartition(".")[2] for name in known if not _of_mixture(name)})
        there = f"there are: {', '.join(leaves)}" if leaves else "it has no linear layers"
        if fused:
            which = f"its experts are fused parameters ({fused}), which are not adapted"
            there = f"{which}; {there} ('auto' takes the attention's)"
        raise ConfigError(f"target_modules: nothing in {type(model).__name__} matches {wanted!r}; {there}")
    return found


def expert_targets(model: nn.Module, config: GroupsConfig) -> Shapes:
    """Return the modules that get experts: `groups.target_modules` within `groups.layers`.

    Raises:
        ConfigError: there are no such modules, or the model has fewer layers; the message names the key.
    """
    found, last = find_targets(model, config.target_modules), config.layers
    if last == "all":
        return found
    path, count = decoder_layers(model)
    name = type(model).__name__
    if last > count:
        raise ConfigError(f"groups.layers: {last} is more than the {count} decoder layers of {name}")
    kept = {module: shape for module, shape in found.items() if _number(module, path) >= count - last}
    if not kept:
        raise ConfigError(f"groups.layers: none of groups.target_modules is in the last {last} layers of {name}")
    return kept


def user_targets(shapes: Mapping[str, tuple[int, int]], config: UsersConfig) -> Shapes:
    """Return those of the modules with experts, given by `shapes`, that get user adapters: `users.layers`.

    Raises:
        ConfigError: there are fewer layers with experts; the message names the key.
    """
    if config.layers == "all":
        return dict(shapes)
    layers = list(dict.fromkeys(_place(name) for name in shapes))
    if config.layers > len(layers):
        raise ConfigError(f"users.layers: {config.layers} is more than the {len(layers)} layers with experts")
    return {name: shape for name, shape in shapes.items() if _place(name) in layers[-config.layers :]}


def decoder_layers(model: nn.Module) -> tuple[str, int]:
    """Return the path of the text model's decoder layers (`model.layers` in Llama) and their number.

    Raises:
        ConfigError: the layers cannot be told from the modules' names.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    found: dict[str, set[int]] = {}
    for name in _layers(model):
        path, number = _place(name)
        found.setdefault(path, set()).add(number)
    # Beside the decoder layers, a model may have others (say, for predicting several tokens at once).
    stacks = [path for path, numbers in found.items() if numbers == set(range(count or len(numbers)))]
    if len(stacks) != 1:
        raise ConfigError(f"groups.layers: the layers of {type(model).__name__} have no clear order; set it to all")
    return stacks[0], len(found[stacks[0]])


def first_adapted(model: nn.Module, names: Iterable[str]) -> tuple[str, int]:
    """Return the path of the decoder layers, and how many of them lie below the first one with an adapted module.

    The number is 0 where the order of the layers is unclear, or a module lies outside them.
    """
    try:
        path, _ = decoder_layers(model)
    except ConfigError:
        return "", 0
    return path, max(0, min(_number(name, path) for name in names))


def _place(name: str) -> tuple[str, int]:
    """Return the path of the list of layers that a module is in, and its layer's number there."""
    found = _LAYER.match(name)
    assert found is not None, "every target is in a numbered layer"
    return found[1], int(found[2])


def _number(name: str, path: str) -> int:
    """Return the number of a module's layer in the list at `path`; -1 for a module outside it."""
    where, number = _place(name)
    return number if where == path else -1


def _layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the linear layers of the text model's blocks, without linear layers nested in another one."""
    found: dict[str, tuple[int, int]] = {}
    inner = _text_model(model)
    for name, module in model.named_modules():
        shape = linear_shape(module)
        if shape is None or not name.startswith(inner) or not re.search(r"\.\d+\.", name):
            continue
        if not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = shape
    return found


def _text_model(model: nn.Module) -> str:
    """Return the name prefix of the text model's modules; "" if the whole model is the text model."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return ""
    decoder = model.get_decoder()  # type: ignore[operator]
    return next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")


def _fused_experts(model: nn.Module) -> str:
    """Return the name of the first parameter that fuses all experts of a layer (E, O, I); "" without one."""
    inner = _text_model(model)
    parameters = (name for name, p in model.named_parameters() if p.dim() == 3 and name.startswith(inner))
    return next((name for name in parameters if _FFN.search(name) or _EXPERTS.search(name)), "")


def _of_mixture(name: str) -> bool:
    """Return whether a module is a router or gate of a mixture of experts, or one of its routed experts."""
    return any(_ROUTER.fullmatch(part) for part in name.split("."))


def _is_wanted(name: str, wanted: str | Sequence[str]) -> bool:
    if not isinstance(wanted, str):
        return any(name == ending or name.endswith(f".{ending}") for ending in wanted)
    if _of_mixture(name):
        return False
    ffn, attention = bool(_FFN.search(name)), bool(_ATTENTION.search(name))
    return {"ffn": ffn, "auto": ffn, "attention": attention, "all": ffn or attention}[wanted]
