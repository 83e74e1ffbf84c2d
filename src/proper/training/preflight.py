"""Preflight check before training: runs every operation that a run needs from its backbone, on two short rows.

    find the modules of all stages -> stage 1 and stages 2, 3: forward, backward, save, load -> cached decoding

A failure is reported as one line that names the step. The backbone is left unchanged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import Tensor

from proper.config import Config
from proper.data.batching import Batch, collate
from proper.errors import ConfigError
from proper.files import read_json, write_json
from proper.inference.forward import decode, prefill
from proper.inference.kv_cache import RowCache
from proper.layers.batch_context import RowContext
from proper.models.answer_loss import answer_logits
from proper.models.backbone import EMBEDDED, Backbone
from proper.models.checkpoints import load_tensors, save_tensors
from proper.models.gradient_checkpointing import gradient_checkpointing
from proper.models.peft_merge import load_lora
from proper.models.personal import ProperModel
from proper.models.targets import expert_targets, find_targets, user_targets
from proper.run_folder import RunFolder
from proper.training.bases import random_bases
from proper.training.population import in_training, wrap

MIN_COSINE = 0.8
"""Minimum cosine between logits with and without a cache; rounding, which can change a token's expert, stays above."""
STEPS = 2
"""Tokens that are decoded for each sample."""


class PreflightSample(NamedTuple):
    """A sample row with the fields that `Encoder.encode` needs."""

    prompt: str
    target: str
    user: str
    task: int = 0


SAMPLES = (
    PreflightSample("Which word fits?", "none", "a"),
    PreflightSample("A line that is longer than the other. Which?", "two", "b"),
)


def check_once(backbone: Backbone, config: Config, folder: Path, *, write: bool = True) -> None:
    """Run `preflight` unless it passed for this run folder, backbone and libraries; with `write`, record the pass.

    Of the embedded backbone, only the target modules are looked up.

    Raises:
        ConfigError: see `preflight`.
    """
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    metadata = {"backbone": backbone.digest, **versions}
    marker = RunFolder(folder).preflight
    if marker.exists() and read_json(marker) == metadata:
        return
    if backbone.name == EMBEDDED:  # covered by the tests of every release
        _find_all(backbone, config)
        return
    preflight(backbone, config)
    if write:
        write_json(marker, metadata)


def preflight(backbone: Backbone, config: Config) -> None:
    """Run every operation that a run needs from its backbone, and leave the backbone unchanged.

    Raises:
        ConfigError: an operation is not supported; one line names it.
    """
    _refuse_states(backbone)
    _find_all(backbone, config)
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as place:
        with _step(backbone, "turning text into tokens"):
            encoder = backbone.encoder()
            batch = collate([encoder.encode(sample) for sample in SAMPLES], backbone.pad_id, backbone.device)
        with _step(backbone, "stage 1 (forward, backward, save, load)"):
            _try_population(backbone, config, batch, Path(place))
        with _step(backbone, "stages 2 and 3 (forward, backward, save, load)"):
            model, rows = _try_personal(backbone, config, batch, Path(place))
        with _step(backbone, "cached decoding"):
            _try_decoding(model, [encoder.prompt(sample.prompt) for sample in SAMPLES], rows)
        for name, layer in model.layers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(backbone.model.get_submodule(parent), leaf, layer.base)


@contextmanager
def _step(backbone: Backbone, name: str) -> Iterator[None]:
    """Convert any exception of a step to a one-line error."""
    try:
        yield
    except _Unsupported as error:
        raise _refusal(backbone, f"{name} fails: {error}") from error
    except ConfigError:
        raise
    except Exception as error:
        what = (str(error).strip().splitlines() or [""])[0][:200]
        raise _refusal(backbone, f"{name} fails: {type(error).__name__}: {what}") from error


def _refusal(backbone: Backbone, why: str) -> ConfigError:
    family = f"{backbone.name!r} ({type(backbone.model).__name__})"
    return ConfigError(f"backbone: {family} is not supported: {why}")


class _Unsupported(Exception):
    """A failed check that raises no exception by itself."""


def _find_all(backbone: Backbone, config: Config) -> None:
    for stage, wanted in (("population", config.population.target_modules), ("groups", config.groups.target_modules)):
        try:
            find_targets(backbone.model, wanted)
        except ConfigError as error:
            raise ConfigError(f"{stage}.{error}") from error
    user_targets(expert_targets(backbone.model, config.groups), config.users)


def _refuse_states(backbone: Backbone) -> None:
    """Reject stateful layers (other than a KV cache): continuous batching moves only keys and values of a row."""
    config: Any = backbone.model.config.get_text_config()
    kinds = {kind for kind in getattr(config, "layer_types", None) or () if not _is_attention(kind)}
    if kinds or getattr(backbone.model, "_is_stateful", False):
        which = f"its {' and '.join(sorted(kinds))} layers keep" if kinds else "its layers keep"
        states = "states (of a convolution, a state space, linear attention) instead of keys and values"
        raise _refusal(backbone, f"{which} {states}, which continuous batching cannot move between rows")


def _is_attention(kind: str) -> bool:
    return kind.endswith("attention") and "linear" not in kind


def _try_population(backbone: Backbone, config: Config, batch: Batch, place: Path) -> None:
    scratch = RunFolder(place)
    wrapped = wrap(backbone, config.population, seed=0)
    with in_training(backbone, wrapped, config.population) as stage:
        loss = stage.loss(batch, 0.0)
        _backward(loss.total / loss.tokens)
    parameters = list(stage.parameters().values())
    _check_gradients(parameters)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad.sign(), alpha=0.1)
        wrapped.eval()
        expected = answer_logits(wrapped, batch)
        wrapped.save_pretrained(str(scratch.population))
        wrapped.unload()
        again = load_lora(backbone.model, scratch.population)
        again.eval()
        _compare(answer_logits(again, batch), expected, "the loaded adapter answers otherwise than the saved one")
        again.unload()


def _try_personal(backbone: Backbone, config: Config, batch: Batch, place: Path) -> tuple[ProperModel, RowContext]:
    model = ProperModel(backbone)
    model.add_experts(config.groups, seed=0)
    model.add_lora_router(config.users)
    if config.users.form == "core":
        model.bases = random_bases(model, config.users, torch.Generator().manual_seed(0))
    bank = model.add_bank(config.users, len(SAMPLES), trainable=True)
    for slot in range(len(SAMPLES)):
        bank.fresh(slot, torch.Generator().manual_seed(slot))
    embedding = torch.ones(len(SAMPLES), model.embedding_size, device=model.device, requires_grad=True)
    slots = torch.arange(len(SAMPLES), device=model.device)
    own = RowContext("users", embedding=embedding, slots=slots)
    with gradient_checkpointing(backbone.model, config.groups.gradient_checkpointing):
        total, tokens = model.answer_losses(batch, own)
        _backward(total.sum() / tokens.sum())
    _check_gradients([*model.group_parameters().values()])
    path = RunFolder(place).experts
    save_tensors(path, model.group_parameters(), {})
    loaded, _ = load_tensors(path)
    if any(not torch.equal(loaded[name], p.detach().cpu()) for name, p in model.group_parameters().items()):
        raise _Unsupported("the loaded tensors differ from the saved ones")
    return model, RowContext("users", embedding=embedding.detach(), slots=slots)


def _try_decoding(model: ProperModel, prompts: list[tuple[int, ...]], rows: RowContext) -> None:
    """Decode a few tokens with the KV cache as the engine does, and compare with passes over the whole rows.

    The rows are also compared with each one alone: some families (Bart) ignore the positions of a padded row.
    """
    with torch.no_grad():
        cache = RowCache(len(prompts), max(map(len, prompts)) + STEPS)
        logits = prefill(model, cache, prompts, rows)
        plain, longest = RowContext(), max(map(len, prompts))
        alone = [prefill(model, RowCache(1, longest), [prompt], plain) for prompt in prompts]
        together = prefill(model, RowCache(len(prompts), longest), prompts, plain)
        _compare(together, torch.cat(alone), "a row's answer depends on the length of the other rows of its batch")
        for _ in range(STEPS):
            chosen = logits.argmax(-1).tolist()
            prompts = [(*prompt, token) for prompt, token in zip(prompts, chosen, strict=True)]
            logits = decode(model, cache, chosen, rows)
        whole = prefill(model, RowCache(len(prompts), max(map(len, prompts))), prompts, rows)
    _compare(logits, whole, "decoding with a cache answers otherwise than without")


def _backward(loss: Tensor) -> None:
    if not torch.isfinite(loss):
        raise _Unsupported(f"the loss is {loss.item()}")
    loss.backward()  # type: ignore[no-untyped-call]


def _check_gradients(parameters: list[torch.nn.Parameter]) -> None:
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(bool(gradient.any()) for gradient in found):
        raise _Unsupported("no gradient reaches the trained parameters")
    if not all(bool(torch.isfinite(gradient).all()) for gradient in found):
        raise _Unsupported("a gradient is not finite")


def _compare(found: Tensor, expected: Tensor, otherwise: str) -> None:
    one, two = (logits.float().flatten(0, -2) for logits in (found, expected))
    alike = torch.nn.functional.cosine_similarity(one - one.mean(-1, True), two - two.mean(-1, True), dim=-1)
    if not bool((alike > MIN_COSINE).all()):
        raise _Unsupported(otherwise)
