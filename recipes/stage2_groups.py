"""Stage 2, groups: a few experts, mixed per token by a router that knows the user, learn what kinds of users there are.

    y = W x + s_g * sum_i w_i B_i A_i x            s_g = alpha / R, E experts of rank R, no top-k
    w = softmax(W_x x + W_u e_u)                   per token and per module; W_x (E, I), W_u (E, D)

e_u is one vector per person, shared by all modules. Nothing but e_u says who asks: people who answer alike are pushed
towards alike vectors, hence alike mixtures, and that is what a group is here. The constraint keeps mixtures of
different people from being all the same:

    L = answer loss + lambda * mean over modules and pairs u != v of cos(m_u, m_v)

m_u is the mean of w over all tokens of person u in the batch. It needs stage 1's adapter:

    python recipes/stage1_population.py && python recipes/stage2_groups.py
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from demo_rows import demo_rows, held_out, setting
from torch import Tensor
from torch.nn import Parameter

from proper.data.batching import Batch, collate, number_users
from proper.data.encoder import Encoder
from proper.layers.batch_context import BatchContext, RowContext
from proper.layers.experts import Experts
from proper.layers.personalized_linear import AdaptedLinear
from proper.layers.routers import UserAwareRouter
from proper.layers.routing_losses import user_cosine
from proper.models import load_backbone
from proper.models.checkpoints import save_tensors
from proper.models.peft_merge import apply_population
from proper.models.personal import answer_logits, answer_loss
from proper.models.targets import find_targets
from proper.training.optim import RowAdamW

OUT = Path("runs/recipes")
BACKBONE = "proper-nano"
PEOPLE = setting("PEOPLE", 60)
SEED = setting("SEED", 0)
EPOCHS = setting("EPOCHS", 7)
BATCH = 64
EXPERTS, RANK, ALPHA, WIDTH = 5, 4, 8.0, 128  # WIDTH is D
RATE, EMBEDDING_RATE = 3e-3, 3e-2
SPREAD = 0.02  # of e_u at the start
LAMBDA, WARM_UP = 0.01, 0.1
CLIP = 1.0


def main() -> None:
    """Train experts, routers and the people's embeddings."""
    torch.manual_seed(SEED)
    shuffle = random.Random(SEED)
    backbone = load_backbone(BACKBONE, torch.bfloat16, torch.device("cpu"))
    history, queries = demo_rows(OUT / "data", PEOPLE, SEED, Encoder(backbone.tokenizer, max_length=128))
    everything = [row for rows in history.values() for row in rows]
    apply_population(backbone, OUT / "population")  # W <- W + s B A

    # Beside each FFN projection W: the experts and their router. `routing` tells all of them who owns each row.
    routing = BatchContext()
    trained: dict[str, Parameter] = {}
    for name, (inputs, outputs) in find_targets(backbone.model, "ffn").items():
        layer = AdaptedLinear(name, backbone.model.get_submodule(name), inputs, outputs, routing)
        layer.experts = Experts(inputs, outputs, experts=EXPERTS, rank=RANK, alpha=ALPHA)
        layer.router = UserAwareRouter(inputs, WIDTH, EXPERTS)
        backbone.model.set_submodule(name, layer)
        trained |= {f"{name}.down": layer.experts.down, f"{name}.up": layer.experts.up}  # all A_i, all B_i
        trained |= {f"{name}.token": layer.router.token, f"{name}.user": layer.router.user}  # W_x, W_u
    people = {user: number for number, user in enumerate(history)}
    embeddings = SPREAD * torch.randn(len(people), WIDTH)  # e_u

    def logits_of(batch: Batch) -> Tensor:
        owners = embeddings[[people[user] for user in batch.users]]
        with routing.use(RowContext("groups", embedding=owners)):
            return answer_logits(backbone.model, batch)

    def show(when: str) -> None:
        loss, accuracy = held_out(logits_of, queries, backbone.pad_id)
        print(f"{when}: held-out loss {loss:.4f}, accuracy {accuracy:.4f}", flush=True)

    print(f"{len(everything)} rows of {len(people)} people; {sum(p.numel() for p in trained.values()):,} numbers learn")
    show("before")

    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    # An ordinary AdamW moves every row of `embeddings` at every step; this one only those of the people in the batch.
    embedding_optimizer = RowAdamW.of(embeddings)
    steps = EPOCHS * math.ceil(len(everything) / BATCH)
    step = 0
    for epoch in range(EPOCHS):
        shuffle.shuffle(everything)
        for at in range(0, len(everything), BATCH):
            batch = collate(everything[at : at + BATCH], backbone.pad_id)
            present, owner = number_users(batch.users)  # distinct people, and whose each row is
            index = torch.tensor([people[user] for user in present])
            e = embeddings[index].requires_grad_()
            users = torch.tensor(owner)
            with routing.use(RowContext("groups", embedding=e[users], users=users, mask=batch.attention_mask.bool())):
                logits = answer_logits(backbone.model, batch)
            total, tokens = answer_loss(logits, batch.labels)
            loss = total.sum() / tokens.sum()
            cosine = user_cosine(routing.stacked())  # of the m_u, which the layers left in `routing`
            warm = min(1.0, step / (WARM_UP * steps))
            optimizer.zero_grad()
            (loss + warm * LAMBDA * cosine).backward()

            torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
            scale = 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = RATE * scale
            optimizer.step()
            embedding_optimizer.step(embeddings, index, e.grad, EMBEDDING_RATE * scale)
            step += 1
            if step in (1, steps) or step % 10 == 0:
                print(f"step {step}/{steps}: loss {loss.item():.4f}, cosine {cosine.item():.4f}", flush=True)
        show(f"after epoch {epoch + 1}")
    save_tensors(OUT / "groups.safetensors", {**trained, "embeddings": embeddings}, {"people": list(people)})


if __name__ == "__main__":
    main()
