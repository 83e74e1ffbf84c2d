"""Stage 3b, router: the router of the experts also sees the output of each user's own LoRA, which is frozen.

    h_u = s_u B_u A_u x
    b   = softmax(W_x x + W_u e_u + W_r h_u)             W_r (E, O), zero at the start, one per module, for all users
    y   = W x + s_g * sum_i b_i B_i A_i x + h_u

The paper omits stage 2's logits, b = softmax(W_r h_u), and so starts from a uniform mixture; RESIDUAL = False does the
same. The layers do not need h_u for the router: W_r h_u = M_u (A_u x) with a small M_u = s_u W_r B_u (E, R).

    python recipes/stage3b_router.py       (after stages 1, 2 and 3a)

In production: `proper.training.lora_router`; off by default (`users.router: none`), because it changed no result.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from demo_rows import demo_rows, report, setting
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from proper.data.batching import Batch, collate
from proper.data.encoder import Encoder
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import BatchContext, RowContext
from proper.layers.experts import Experts
from proper.layers.layout import Layout
from proper.layers.personalized_linear import AdaptedLinear
from proper.layers.routers import LoraAwareRouter, UserAwareRouter
from proper.models import load_backbone
from proper.models.answer_loss import answer_logits, answer_loss
from proper.models.checkpoints import load_tensors, save_tensors
from proper.models.peft_merge import apply_population
from proper.models.targets import find_targets

OUT = Path("runs/recipes")
BACKBONE = "proper-nano"
USERS = setting("USERS", 60)
SEED = setting("SEED", 0)
EPOCHS = setting("EPOCHS", 1)
BATCH = 32
EXPERTS, RANK, ALPHA, WIDTH = 5, 4, 8.0, 128  # of stage 2
OWN_RANK, OWN_ALPHA = 4, 8.0  # of stage 3a
RESIDUAL = True
RATE = 3e-3
CLIP = 1.0


def main() -> None:
    """Train the routers W_r."""
    torch.manual_seed(SEED)
    shuffle = random.Random(SEED)
    backbone = load_backbone(BACKBONE, torch.bfloat16, torch.device("cpu"))
    history, queries = demo_rows(OUT / "data", USERS, SEED, Encoder(backbone.tokenizer, max_length=128))
    rows = [row for own in history.values() for row in own]
    apply_population(backbone, OUT / "population")
    routing = BatchContext()
    slot_of = {user: slot for slot, user in enumerate(history)}
    trained, embeddings = load_model(backbone.model, routing, len(slot_of))

    def logits_of(batch: Batch) -> Tensor:
        slots = torch.tensor([slot_of[user] for user in batch.users])
        with routing.use(RowContext("users", embedding=embeddings[slots], slots=slots)):
            return answer_logits(backbone.model, batch)

    print(f"{len(rows)} rows of {len(slot_of)} users; {sum(p.numel() for p in trained.values()):,} trained parameters")
    start = "this is stage 3a: W_r = 0" if RESIDUAL else "a uniform mixture: W_r = 0"
    report(f"before ({start})", logits_of, queries, backbone.pad_id)

    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    steps = EPOCHS * math.ceil(len(rows) / BATCH)
    step = 0
    for epoch in range(EPOCHS):
        shuffle.shuffle(rows)
        for at in range(0, len(rows), BATCH):
            batch = collate(rows[at : at + BATCH], backbone.pad_id)
            total, tokens = answer_loss(logits_of(batch), batch.labels)
            loss = total.sum() / tokens.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
            optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
            step += 1
            if step in (1, steps) or step % 10 == 0:
                print(f"step {step}/{steps}: loss {loss.item():.4f}", flush=True)
        report(f"after epoch {epoch + 1}", logits_of, queries, backbone.pad_id)
    save_tensors(OUT / "router.safetensors", trained, {"residual": RESIDUAL})


def load_model(model: PreTrainedModel, routing: BatchContext, users: int) -> tuple[dict[str, Parameter], Tensor]:
    """Add what stages 2 and 3a trained, frozen, and the new routers; return the weights W_r and the embeddings e_u."""
    tensors, _ = load_tensors(OUT / "groups.safetensors")
    adapters, _ = load_tensors(OUT / "users.safetensors")
    shapes = find_targets(model, "ffn")
    bank = AdapterBank(Layout.of(shapes, OWN_RANK), users, alpha=OWN_ALPHA, trainable=False)
    bank.values.copy_(adapters["values"])
    trained = {}
    for name, (inputs, outputs) in shapes.items():
        layer = AdaptedLinear(name, model.get_submodule(name), inputs, outputs, routing)
        layer.experts = Experts(inputs, outputs, experts=EXPERTS, rank=RANK, alpha=ALPHA)
        layer.router = UserAwareRouter(inputs, WIDTH, EXPERTS)
        layer.bank = bank
        layer.lora_router, layer.residual = LoraAwareRouter(outputs, EXPERTS), RESIDUAL
        frozen = {"down": layer.experts.down, "up": layer.experts.up}
        frozen |= {"token": layer.router.token, "user": layer.router.user}
        for key, parameter in frozen.items():
            parameter.requires_grad_(False).copy_(tensors[f"{name}.{key}"])
        model.set_submodule(name, layer)
        trained[name] = layer.lora_router.weight  # W_r
    return trained, tensors["embeddings"]


if __name__ == "__main__":
    main()
