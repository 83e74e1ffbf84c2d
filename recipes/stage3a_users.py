"""Stage 3a, users: everybody gets a small LoRA of their own, beside the group model, which stays as it is.

    h_u = s_u B_u A_u x                                  A_u (R, I) Kaiming-uniform, B_u (O, R) zero
    y   = W x + s_g * sum_i w_i B_i A_i x + h_u          w as in stage 2

Each person is trained as if alone. All of them still share a batch: a bank holds everybody's A_u and B_u, each row of a
batch uses its owner's, so its loss has a gradient for its owner only. Every person's loss is the mean over their own
answer tokens, every gradient is clipped by its own norm, and AdamW keeps moments per person.

    python recipes/stage3a_users.py        (after stages 1 and 2)
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
from proper.layers.routers import UserAwareRouter
from proper.models import load_backbone
from proper.models.checkpoints import load_tensors, save_tensors
from proper.models.peft_merge import apply_population
from proper.models.personal import answer_logits, answer_loss
from proper.models.targets import find_targets
from proper.training.optim import RowAdamW, clip_rows

OUT = Path("runs/recipes")
BACKBONE = "proper-nano"
PEOPLE = setting("PEOPLE", 60)
SEED = setting("SEED", 0)
EPOCHS = setting("EPOCHS", 4)
EACH = 4  # rows of each person in a batch
EXPERTS, RANK, ALPHA, WIDTH = 5, 4, 8.0, 128  # of stage 2
OWN_RANK, OWN_ALPHA = 4, 8.0
RATE = 3e-3
CLIP = 1.0


def main() -> None:
    """Train everybody's own LoRA."""
    torch.manual_seed(SEED)
    shuffle = random.Random(SEED)
    backbone = load_backbone(BACKBONE, torch.bfloat16, torch.device("cpu"))
    history, queries = demo_rows(OUT / "data", PEOPLE, SEED, Encoder(backbone.tokenizer, max_length=128))
    apply_population(backbone, OUT / "population")
    groups, _ = load_tensors(OUT / "groups.safetensors")
    embeddings = groups.pop("embeddings")  # e_u, not trained any more

    # The group model as stage 2 left it.
    routing, layers = BatchContext(), []
    frozen: dict[str, Parameter] = {}
    shapes = find_targets(backbone.model, "ffn")
    for name, (inputs, outputs) in shapes.items():
        layer = AdaptedLinear(name, backbone.model.get_submodule(name), inputs, outputs, routing)
        layer.experts = Experts(inputs, outputs, experts=EXPERTS, rank=RANK, alpha=ALPHA)
        layer.router = UserAwareRouter(inputs, WIDTH, EXPERTS)
        backbone.model.set_submodule(name, layer)
        layers.append(layer)
        frozen |= {f"{name}.down": layer.experts.down, f"{name}.up": layer.experts.up}
        frozen |= {f"{name}.token": layer.router.token, f"{name}.user": layer.router.user}
    for name, parameter in frozen.items():
        parameter.requires_grad_(False).copy_(groups[name])

    # One slot per person. `bank.values` (people, numbers of one LoRA) holds everything, `bank.gradients` its gradients.
    people = {user: slot for slot, user in enumerate(history)}
    bank = AdapterBank(Layout.of(shapes, OWN_RANK), len(people), alpha=OWN_ALPHA, trainable=True)
    for slot in people.values():
        bank.fresh(slot, torch.Generator().manual_seed(SEED + slot))
    for layer in layers:
        layer.bank = bank

    def logits_of(batch: Batch) -> Tensor:
        slots = torch.tensor([people[user] for user in batch.users])
        with routing.use(RowContext("fit", embedding=embeddings[slots], slots=slots)):
            return answer_logits(backbone.model, batch)

    def show(when: str) -> None:
        loss, accuracy = held_out(logits_of, queries, backbone.pad_id)
        print(f"{when}: held-out loss {loss:.4f}, accuracy {accuracy:.4f}", flush=True)

    print(f"{len(people)} people; {bank.layout.width:,} numbers learn for each")
    show("before (this is stage 2: B_u = 0)")

    optimizer = RowAdamW.of(bank.values)
    longest = max(len(rows) for rows in history.values())
    for epoch in range(EPOCHS):
        order = {user: shuffle.sample(rows, len(rows)) for user, rows in history.items()}
        for at in range(0, longest, EACH):
            # The next few rows of everybody who has some left.
            batch = collate([row for rows in order.values() for row in rows[at : at + EACH]], backbone.pad_id)
            owner = torch.tensor([people[user] for user in batch.users])
            present = owner.unique()
            total, tokens = answer_loss(logits_of(batch), batch.labels)
            own_total = torch.zeros(len(people)).index_add(0, owner, total)[present]
            own_tokens = torch.zeros(len(people)).index_add(0, owner, tokens)[present]
            losses = own_total / own_tokens
            bank.gradients.zero_()
            losses.sum().backward()  # a sum of one loss per person: nobody's gradient depends on anybody else

            progress = (epoch + at / longest) / EPOCHS
            rate = RATE * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.step(bank.values, present, clip_rows(bank.gradients[present], CLIP), rate)
            print(f"epoch {epoch + 1}, rows {at + 1}-{at + EACH} of each: loss {losses.mean().item():.4f}", flush=True)
        show(f"after epoch {epoch + 1}")
    save_tensors(OUT / "users.safetensors", {"values": bank.values}, {"people": list(people)})


if __name__ == "__main__":
    main()
