"""Early stopping of stage 1 on held-out rows of the histories: the rows, when they are measured, the best weights.

The rows are sampled evenly over users and left out of the stage's training rows; later stages may train on them. The
trained parameters of the measurement with the lowest loss are kept, and training ends after `patience` measurements
without a lower one, but not within the first pass: its rows are new, and while the learning rate is high, a loss that
does not fall for a while falls later. All state is in the checkpoint, so a resumed stage ends with the same weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from proper.data.batching import Batch, RowEncoder, collate
from proper.data.encoder import EncodedExample
from proper.data.histories import SampledRows, TextExample

MEASUREMENTS = 10
"""Measurements of the held-out loss over all steps: with at most `MAX_ROWS` rows, 5 % of the stage's time."""

MIN_ROWS, MAX_ROWS = 16, 128
"""Limits of the number of held-out rows; a sample for which the share is below the first has no early stopping."""

HELD_OUT_EPOCH = -1
"""The epoch whose seeded order decides which rows are held out; training epochs count from 0."""

_BATCH = 32  # rows of a forward pass


@dataclass(frozen=True)
class RemainingRows:
    """A sample without its held-out rows."""

    sample: SampledRows
    held_out: tuple[TextExample, ...]
    max_length: int

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.sample.size - len(self.held_out)

    @property
    def tokens(self) -> int:
        """Number of tokens; a row counts at most the model's maximum length."""
        return self.sample.tokens - sum(min(row.tokens, self.max_length) for row in self.held_out)

    def rows(self, epoch: int) -> Iterator[TextExample]:
        """Yield every remaining row once, in the sample's order of the epoch."""
        left_out = {row.id for row in self.held_out}
        return (row for row in self.sample.rows(epoch) if row.id not in left_out)


def hold_out(sample: SampledRows, share: float, max_length: int) -> tuple[SampledRows, tuple[TextExample, ...]]:
    """Split a sample into training rows and held-out rows, taken evenly over users in seeded order.

    Returns:
        The sample itself and no rows if the share is less than `MIN_ROWS` rows.
    """
    wanted = min(MAX_ROWS, round(share * sample.size))
    if wanted < MIN_ROWS:
        return sample, ()
    chosen: dict[int, TextExample] = {}
    of_user: Counter[str] = Counter()
    limit = 1
    while len(chosen) < wanted:
        for row in sample.rows(HELD_OUT_EPOCH):
            if row.id not in chosen and of_user[row.user] < limit:
                chosen[row.id] = row
                of_user[row.user] += 1
                if len(chosen) == wanted:
                    break
        limit *= 2
    held_out = tuple(chosen.values())
    return RemainingRows(sample, held_out, max_length), held_out


@dataclass
class EarlyStopping:
    """Measures the held-out loss during training, and keeps the best weights.

    Attributes:
        rows: the held-out rows, encoded.
        patience: measurements without a lower loss after which training ends, once all rows were seen.
        losses_of: function from a batch to the summed answer loss and the number of answer tokens, without dropout.
        losses: held-out loss per answer token (nats) of every measurement so far.
        best: the trained parameters at the lowest loss.
    """

    rows: Sequence[EncodedExample]
    patience: int
    pad: int
    losses_of: Callable[[Batch], tuple[Tensor, Tensor]]
    losses: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def on(
        cls,
        rows: Sequence[TextExample],
        patience: int,
        encoder: RowEncoder,
        pad: int,
        losses_of: Callable[[Batch], tuple[Tensor, Tensor]],
    ) -> EarlyStopping | None:
        """Return early stopping on these rows; None if there are none or the patience is 0."""
        if not rows or not patience:
            return None
        encoded = sorted((encoder.encode(row) for row in rows), key=lambda row: len(row.ids))
        return cls(encoded, patience, pad, losses_of)

    def is_due(self, step: int, updates: int) -> bool:
        """Return whether the loss is measured after `step` of `updates` steps."""
        every = max(1, updates // MEASUREMENTS)
        return step == updates or step % every == 0

    def measure(self, parameters: Mapping[str, nn.Parameter], accelerator: Accelerator) -> float:
        """Measure the held-out loss over all processes, keep the parameters if it is the lowest, and return it."""
        loss = self._loss(accelerator)
        self.losses.append(loss)
        if loss <= min(self.losses):
            self.best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        return loss

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` measurements were no better than one before them, in the first pass too."""
        lowest = max(at for at, loss in enumerate(self.losses) if loss == min(self.losses)) if self.losses else 0
        return len(self.losses) - 1 - lowest >= self.patience

    def restore_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Set the parameters to those of the lowest loss, if any was measured."""
        for name, tensor in self.best.items():
            parameters[name].data.copy_(tensor)

    def tensors(self) -> dict[str, Tensor]:
        """Return the best parameters for a checkpoint."""
        return {f"best/{name}": tensor for name, tensor in self.best.items()}

    def resume(self, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Restore losses and best parameters from a checkpoint."""
        self.losses = list(metadata.get("held_out_losses", ()))
        prefix = "best/"
        self.best = {k.removeprefix(prefix): v.to(device) for k, v in tensors.items() if k.startswith(prefix)}

    @torch.no_grad()
    def _loss(self, accelerator: Accelerator) -> float:
        own = self.rows[accelerator.process_index :: accelerator.num_processes]
        sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        for at in range(0, len(own), _BATCH):
            total, tokens = self.losses_of(collate(own[at : at + _BATCH], self.pad, accelerator.device))
            sums += torch.stack([total.double(), tokens.double()])
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="sum")
        loss = float(sums[0] / sums[1])
        return loss if math.isfinite(loss) else math.inf
