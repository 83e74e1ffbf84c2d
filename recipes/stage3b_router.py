"""Stage 3b, router: the mixture of experts learns to see each person's own LoRA, which stays as it is.

    h_u = s_u B_u A_u x
    b   = softmax(W_x x + W_u e_u + W_r h_u)             W_r (E, O), zero at the start, one per module, for everybody
    y   = W x + s_g * sum_i b_i B_i A_i x + h_u

The paper leaves stage 2's part out, b = softmax(W_r h_u), and so starts from a uniform mixture; with RESIDUAL = False
so does this. The layers never need h_u for the router: W_r h_u = M_u (A_u x) with a small M_u = s_u W_r B_u (E, R).

    python recipes/stage3b_router.py       (after stages 1, 2 and 3a)
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from demo_rows import demo_rows, held_out, setting
from torch import Tensor
from torch.nn import Parameter

from proper.data.batching import Batch, collate
from proper.data.encoder import Encoder
from proper.layers.bank import AdapterBank, Layout
from proper.layers.batch_context import BatchContext, RowContext
from proper.layers.experts import Experts
from proper.layers.personalized_linear import AdaptedLinear
from proper.layers.routers import LoraAwareRouter, UserAwareRouter
from proper.models import load_backbone
from proper.models.checkpoints import load_tensors, save_tensors
from proper.models.peft_merge import apply_population
from proper.models.personal import answer_logits, answer_loss
from proper.models.targets import find_targets

OUT = Path("runs/recipes")
BACKBONE = "proper-nano"
PEOPLE = setting("PEOPLE", 60)
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
    history, queries = demo_rows(OUT / "data", PEOPLE, SEED, Encoder(backbone.tokenizer, max_length=128))
    everything = [row for rows in history.values() for row in rows]
    apply_population(backbone, OUT / "population")
    groups, _ = load_tensors(OUT / "groups.safetensors")
    embeddings = groups.pop("embeddings")
    own, _ = load_tensors(OUT / "users.safetensors")
    people = {user: slot for slot, user in enumerate(history)}

    # The model as stages 2 and 3a left it, and in each adapted layer the new router.
    shapes = find_targets(backbone.model, "ffn")
    bank = AdapterBank(Layout.of(shapes, OWN_RANK), len(people), alpha=OWN_ALPHA, trainable=False)
    bank.values.copy_(own["values"])
    routing = BatchContext()
    frozen: dict[str, Parameter] = {}
    trained: dict[str, Parameter] = {}
    for name, (inputs, outputs) in shapes.items():
        layer = AdaptedLinear(name, backbone.model.get_submodule(name), inputs, outputs, routing)
        layer.experts = Experts(inputs, outputs, experts=EXPERTS, rank=RANK, alpha=ALPHA)
        layer.router = UserAwareRouter(inputs, WIDTH, EXPERTS)
        layer.bank = bank
        layer.lora_router, layer.residual = LoraAwareRouter(outputs, EXPERTS), RESIDUAL
        backbone.model.set_submodule(name, layer)
        frozen |= {f"{name}.down": layer.experts.down, f"{name}.up": layer.experts.up}
        frozen |= {f"{name}.token": layer.router.token, f"{name}.user": layer.router.user}
        trained[name] = layer.lora_router.weight  # W_r
    for name, parameter in frozen.items():
        parameter.requires_grad_(False).copy_(groups[name])

    def logits_of(batch: Batch) -> Tensor:
        slots = torch.tensor([people[user] for user in batch.users])
        with routing.use(RowContext("users", embedding=embeddings[slots], slots=slots)):
            return answer_logits(backbone.model, batch)

    def show(when: str) -> None:
        loss, accuracy = held_out(logits_of, queries, backbone.pad_id)
        print(f"{when}: held-out loss {loss:.4f}, accuracy {accuracy:.4f}", flush=True)

    print(f"{len(everything)} rows of {len(people)} people; {sum(p.numel() for p in trained.values()):,} numbers learn")
    show("before (this is stage 3a: W_r = 0)" if RESIDUAL else "before (experts mixed evenly: W_r = 0)")

    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    steps = EPOCHS * math.ceil(len(everything) / BATCH)
    step = 0
    for epoch in range(EPOCHS):
        shuffle.shuffle(everything)
        for at in range(0, len(everything), BATCH):
            batch = collate(everything[at : at + BATCH], backbone.pad_id)
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
        show(f"after epoch {epoch + 1}")
    save_tensors(OUT / "router.safetensors", trained, {"residual": RESIDUAL})


if __name__ == "__main__":
    main()
