"""Stage 3a, users: every user gets a small LoRA of their own beside the group model, which is frozen.

    h_u = s_u B_u A_u x                                  A_u (R, I) Kaiming-uniform, B_u (O, R) zero
    y   = W x + s_g * sum_i w_i B_i A_i x + h_u          w as in stage 2

Each user is trained as if alone, but many users share a batch: a bank has a slot for each user's A_u and B_u, and a row
of a batch uses its user's slot, so its loss has a gradient for that user only. A user's loss is the mean over their own
answer tokens, each user's gradient is clipped by its own norm, and AdamW keeps moments per user.

    python recipes/stage3a_users.py        (after stages 1 and 2)

In production: `proper.training.multi_user_trainer`, which `proper.training.users` runs, after a trial on held-out items
that chooses the number of passes and a factor on the adapters for all users (`proper.training.trials`).
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from demo_rows import demo_rows, report, setting
from torch import Tensor
from transformers import PreTrainedModel

from proper.data.batching import Batch, collate
from proper.data.encoder import Encoder
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import BatchContext, RowContext
from proper.layers.experts import Experts
from proper.layers.layout import Layout
from proper.layers.personalized_linear import AdaptedLinear
from proper.layers.routers import UserAwareRouter
from proper.models import load_backbone
from proper.models.answer_loss import answer_logits, answer_loss
from proper.models.checkpoints import load_tensors, save_tensors
from proper.models.peft_merge import apply_population
from proper.models.targets import find_targets
from proper.training.optim import RowAdamW, clip_rows

OUT = Path("runs/recipes")
BACKBONE = "proper-nano"
USERS = setting("USERS", 60)
SEED = setting("SEED", 0)
EPOCHS = setting("EPOCHS", 4)
EACH = 2  # rows of each user in a batch: a user has few rows, and needs many steps
EXPERTS, RANK, ALPHA, WIDTH = 5, 4, 8.0, 128  # of stage 2
OWN_RANK, OWN_ALPHA = 4, 8.0
RATE = 3e-3
CLIP = 1.0


def main() -> None:
    """Train every user's LoRA."""
    torch.manual_seed(SEED)
    shuffle = random.Random(SEED)
    backbone = load_backbone(BACKBONE, torch.bfloat16, torch.device("cpu"))
    history, queries = demo_rows(OUT / "data", USERS, SEED, Encoder(backbone.tokenizer, max_length=128))
    apply_population(backbone, OUT / "population")
    routing = BatchContext()
    layers, embeddings = load_groups(backbone.model, routing)

    # One slot per user: `bank.values` (users, parameters of one LoRA), and the same shape in `bank.gradients`.
    slot_of = {user: slot for slot, user in enumerate(history)}
    shapes = {name: (layer.inputs, layer.outputs) for name, layer in layers.items()}
    bank = AdapterBank(Layout.of(shapes, OWN_RANK), len(slot_of), alpha=OWN_ALPHA, trainable=True)
    for slot in slot_of.values():
        bank.fresh(slot, torch.Generator().manual_seed(SEED + slot))
    for layer in layers.values():
        layer.bank = bank

    def logits_of(batch: Batch) -> Tensor:
        slots = torch.tensor([slot_of[user] for user in batch.users])
        with routing.use(RowContext("fit", embedding=embeddings[slots], slots=slots)):
            return answer_logits(backbone.model, batch)

    print(f"{len(slot_of)} users; {bank.layout.width:,} trained parameters per user")
    report("before (this is stage 2: B_u = 0)", logits_of, queries, backbone.pad_id)

    optimizer = RowAdamW.of(bank.values)
    longest = max(len(rows) for rows in history.values())
    for epoch in range(EPOCHS):
        order = {user: shuffle.sample(rows, len(rows)) for user, rows in history.items()}
        for at in range(0, longest, EACH):
            # The next few rows of every user who has rows left.
            batch = collate([row for rows in order.values() for row in rows[at : at + EACH]], backbone.pad_id)
            slots = torch.tensor([slot_of[user] for user in batch.users])
            present = slots.unique()
            total, tokens = answer_loss(logits_of(batch), batch.labels)
            user_total = torch.zeros(len(slot_of)).index_add(0, slots, total)[present]
            user_tokens = torch.zeros(len(slot_of)).index_add(0, slots, tokens)[present]
            losses = user_total / user_tokens
            bank.gradients.zero_()
            losses.sum().backward()  # a sum of one loss per user: no user's gradient depends on another user

            progress = (epoch + at / longest) / EPOCHS
            rate = RATE * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.step(bank.values, present, clip_rows(bank.gradients[present], CLIP), rate)
            print(f"epoch {epoch + 1}, rows {at + 1}-{at + EACH} of each: loss {losses.mean().item():.4f}", flush=True)
        report(f"after epoch {epoch + 1}", logits_of, queries, backbone.pad_id)
    save_tensors(OUT / "users.safetensors", {"values": bank.values}, {"users": list(slot_of)})


def load_groups(model: PreTrainedModel, routing: BatchContext) -> tuple[dict[str, AdaptedLinear], Tensor]:
    """Add the frozen experts and routers that stage 2 trained; return the adapted layers and the embeddings e_u."""
    tensors, _ = load_tensors(OUT / "groups.safetensors")
    layers = {}
    for name, (inputs, outputs) in find_targets(model, "ffn").items():
        layer = AdaptedLinear(name, model.get_submodule(name), inputs, outputs, routing)
        layer.experts = Experts(inputs, outputs, experts=EXPERTS, rank=RANK, alpha=ALPHA)
        layer.router = UserAwareRouter(inputs, WIDTH, EXPERTS)
        frozen = {"down": layer.experts.down, "up": layer.experts.up}
        frozen |= {"token": layer.router.token, "user": layer.router.user}
        for key, parameter in frozen.items():
            parameter.requires_grad_(False).copy_(tensors[f"{name}.{key}"])
        model.set_submodule(name, layer)
        layers[name] = layer
    return layers, tensors["embeddings"]


if __name__ == "__main__":
    main()
