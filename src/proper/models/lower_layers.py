"""Cached hidden states: the decoder layers below the first adapted one run once per text, not once per pass.

    states = layers 0..L-1 of a text           computed once, kept in a `HiddenStates` file
    logits = head(layers L.. of the states)    computed in every pass, with experts and adapters

Nothing below layer L is adapted or trained, so the states depend on the text alone. transformers' models are used as
they are: while `LowerLayers.skipped` runs, layer L-1 returns the cached states instead of its own result, and the
layers before it return their input. Embeddings, positions, masks and the upper layers are the model's own.

The file has no name: it is deleted as soon as it is open, so the kernel frees its bytes when the process ends, however
it ends. No half-written cache can be read, and no user's data outlives the process. On a CPU each text is computed by
itself, so the states have the same bits in whatever batch they are needed, also after a kill.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proper.data.batching import Batch, collate
from proper.data.encoder import EncodedExample

logger = logging.getLogger(__name__)

PROBES = ((2, 3, 5, 7, 11, 13), (4, 6, 9))
"""Token ids of the two rows that tell whether a model family can skip its lower layers."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference of two logits that count as equal, as a share of the largest logit, by the model's dtype."""


TOGETHER = 16
"""Texts whose states a GPU computes at once."""


class HiddenStates:
    """Hidden states (T, H) of texts by their token ids, in a file without a name, of at most `limit` bytes.

    Args:
        folder: a folder on the disk that has room for the file.
        limit: maximum number of bytes, lowered to half of what is free on the disk; texts beyond it are not stored.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        # Checkpoints and results go to the same disk, and a run fails where they do not fit.
        self.limit, self.used = min(limit, shutil.disk_usage(folder).free // 2), 0
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".states.", suffix=".tmp", buffering=0)  # noqa: SIM115
        self._where: dict[bytes, tuple[int, torch.Size, torch.dtype]] = {}

    def close(self) -> None:
        """Delete all states."""
        self._file.close()

    def __contains__(self, ids: Sequence[int]) -> bool:
        return _key(ids) in self._where

    def read(self, ids: Sequence[int]) -> Float[Tensor, "T H"]:
        """Return a stored text's states, on the CPU."""
        offset, shape, dtype = self._where[_key(ids)]
        size = shape.numel() * dtype.itemsize
        content = os.pread(self._file.fileno(), size, offset)
        if len(content) != size:
            raise OSError(f"cached hidden states: {len(content)} of {size} bytes could be read")
        return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)

    def write(self, ids: Sequence[int], states: Float[Tensor, "T H"]) -> None:
        """Store a text's states (on the CPU), unless the file is full or the disk is."""
        size = states.numel() * states.itemsize
        if self.used + size > self.limit:
            self._stop(f"{self.limit >> 20} MiB are full (compute.cache_mb, or half of the free disk)")
            return
        why = "the disk is full"
        try:
            done = os.pwrite(self._file.fileno(), states.contiguous().view(torch.uint8).numpy().data, self.used)
        except OSError as error:
            done, why = 0, error.strerror or str(error)
        if done < size:
            self._stop(f"they cannot be written: {why}")
            return
        self._where[_key(ids)] = (self.used, states.shape, states.dtype)
        self.used += size

    def _stop(self, why: str) -> None:
        """Store no more texts, and log that once."""
        if self.limit > 0:
            logger.info(f"hidden states of lower layers: {why}; other texts are computed in every pass")
        self.limit = 0


class LowerLayers:
    """The decoder layers of a model below the first adapted one, and the cached states that replace them.

    Args:
        model: the backbone, with its adapted layers.
        path: the path of its list of decoder layers, as `decoder_layers` returns it.
        depth: number of layers below the first adapted one, at least 1.
        states: the cache.
        pad: id of the padding token.
    """

    def __init__(self, model: nn.Module, path: str, depth: int, states: HiddenStates, pad: int) -> None:
        layers = model.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        self.model, self.states, self.pad = model, states, pad
        self.lower, self.upper = list(layers)[:depth], list(layers)[depth:]
        self.device = next(model.parameters()).device

    @contextmanager
    def skipped(self, batch: Batch) -> Iterator[None]:
        """Let the model start from this batch's states, cached where they are known, while the block runs."""
        with self._from(self._states(batch)):
            yield

    @torch.no_grad()
    def exact(self) -> bool:
        """Return whether the model's logits are the same from states as from token ids, tried on two short rows."""
        batch = collate([EncodedExample("", ids, 1) for ids in PROBES], self.pad, self.device)
        inputs = _inputs(batch)
        try:
            whole: Tensor = self.model(**inputs).logits
            with self._from(self._run(batch)):
                found: Tensor = self.model(**inputs).logits
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return False
        real = batch.attention_mask.bool()
        gap = (found[real].float() - whole[real].float()).abs().max()
        return bool(gap <= TOLERANCE.get(whole.dtype, 0.1) * whole[real].float().abs().max())

    @contextmanager
    def _from(self, states: Float[Tensor, "B T H"]) -> Iterator[None]:
        with _replaced(self.lower, [*[_identity] * (len(self.lower) - 1), lambda _: states]):
            yield

    def _states(self, batch: Batch) -> Float[Tensor, "B T H"]:
        """Return the rows' states, zero where there is padding; compute and store those that are not cached."""
        mask, ids = batch.attention_mask.bool().cpu(), batch.input_ids.cpu()
        texts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        missing = {tuple(text) for text in texts if text not in self.states}
        computed = dict(self._computed(sorted(missing, key=len)))
        rows = [computed[tuple(text)] if tuple(text) in computed else self.states.read(text) for text in texts]
        states = torch.zeros(*mask.shape, rows[0].shape[1], dtype=rows[0].dtype)
        for at, row in enumerate(rows):
            states[at, mask.shape[1] - len(row) :] = row
        return states.to(self.device)

    def _computed(self, texts: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], Float[Tensor, "T H"]]]:
        """Run the lower layers on texts and store their states; yield each text's states, on the CPU."""
        together = 1 if self.device.type == "cpu" else TOGETHER
        for at in range(0, len(texts), together):
            piece = texts[at : at + together]
            batch = collate([EncodedExample("", text, len(text) - 1) for text in piece], self.pad, self.device)
            for text, states in zip(piece, self._run(batch).cpu(), strict=True):
                own = states[states.shape[0] - len(text) :]
                self.states.write(text, own)
                yield text, own

    @torch.no_grad()
    def _run(self, batch: Batch) -> Float[Tensor, "B T H"]:
        """Return the output of the last lower layer; the upper layers do nothing."""
        seen: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden

        last = torch.zeros(1, dtype=torch.long, device=self.device)
        with _replaced(self.upper, [keep, *[_identity] * (len(self.upper) - 1)]):
            self.model(**_inputs(batch), logits_to_keep=last)
        return seen[0]


def _identity(hidden: Tensor) -> Tensor:
    return hidden


@contextmanager
def _replaced(layers: Sequence[nn.Module], forms: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let each of these layers return `form(hidden states)` while the block runs."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer, form in zip(layers, forms, strict=True):
        layer.forward = _forward_of(form)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:  # another library has replaced it, too
                layer.forward = own


def _forward_of(form: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return form(hidden_states)

    return forward


def _inputs(batch: Batch) -> dict[str, Any]:
    found = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    return {**found, "use_cache": False}


def _key(ids: Sequence[int]) -> bytes:
    return blake2b(array("q", ids).tobytes(), digest_size=16).digest()
