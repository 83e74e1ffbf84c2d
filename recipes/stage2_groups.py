"""Stage 2, groups: LoRA experts that all users share, mixed per token by a router that reads the user's embedding.

    y = W x + s_g * sum_i w_i B_i A_i x            s_g = alpha / R, E experts of rank R, no top-k
    w = softmax(W_x x + W_u e_u)                   per token and per module; W_x (E, I), W_u (E, D)

e_u is one vector per user, shared by all modules. The model knows the user by e_u only: users with similar answers get
similar embeddings, hence similar mixtures of experts; that is what a group is here. The constraint keeps the mixtures
of different users from becoming equal:

    L = answer loss + lambda * mean over modules and pairs u != v of cos(m_u, m_v)

m_u is the mean of w over all tokens of user u in the batch. It needs stage 1's adapter:

    python recipes/stage1_population.py && python recipes/stage2_groups.py

In production: `proper.training.groups` (the stage) and `proper.training.trainer` (the loop).
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

from proper.data.batching import Batch, collate, number_users
from proper.data.encoder import Encoder
from proper.layers.batch_context import BatchContext, RowContext
from proper.layers.experts import Experts
from proper.layers.personalized_linear import AdaptedLinear
from proper.layers.routers import UserAwareRouter
from proper.layers.routing_losses import user_cosine
from proper.models import load_backbone
from proper.models.answer_loss import answer_logits, answer_loss
from proper.models.checkpoints import save_tensors
from proper.models.peft_merge import apply_population
from proper.models.targets import find_targets
from proper.training.optim import RowAdamW

OUT = Path("runs/recipes")
BACKBONE = "proper-nano"
USERS = setting("USERS", 60)
SEED = setting("SEED", 0)
EPOCHS = setting("EPOCHS", 7)
BATCH = 64
EXPERTS, RANK, ALPHA, WIDTH = 5, 4, 8.0, 128  # WIDTH is D
RATE, EMBEDDING_RATE = 3e-3, 3e-2
SPREAD = 1.0  # standard deviation of the initial e_u; with .02 users cannot be told apart for many steps
LAMBDA, WARM_UP = 0.01, 0.1
CLIP = 1.0


def main() -> None:
    """Train experts, routers and the users' embeddings."""
    torch.manual_seed(SEED)
    shuffle = random.Random(SEED)
    backbone = load_backbone(BACKBONE, torch.bfloat16, torch.device("cpu"))
    history, queries = demo_rows(OUT / "data", USERS, SEED, Encoder(backbone.tokenizer, max_length=128))
    rows = [row for own in history.values() for row in own]
    apply_population(backbone, OUT / "population")  # W <- W + s B A

    routing = BatchContext()  # tells all layers which user each row is from
    trained = add_experts(backbone.model, routing)
    index_of = {user: index for index, user in enumerate(history)}
    embeddings = SPREAD * torch.randn(len(index_of), WIDTH)  # e_u

    def logits_of(batch: Batch) -> Tensor:
        of_rows = embeddings[[index_of[user] for user in batch.users]]
        with routing.use(RowContext("groups", embedding=of_rows)):
            return answer_logits(backbone.model, batch)

    print(f"{len(rows)} rows of {len(index_of)} users; {sum(p.numel() for p in trained.values()):,} trained parameters")
    report("before", logits_of, queries, backbone.pad_id)

    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    # Plain AdamW would move every row of `embeddings` at every step; this one only those of the users in the batch.
    embedding_optimizer = RowAdamW.of(embeddings)
    steps = EPOCHS * math.ceil(len(rows) / BATCH)
    step = 0
    for epoch in range(EPOCHS):
        shuffle.shuffle(rows)
        for at in range(0, len(rows), BATCH):
            batch = collate(rows[at : at + BATCH], backbone.pad_id)
            present, numbers = number_users(batch.users)  # distinct users, and the number of each row's user
            index = torch.tensor([index_of[user] for user in present])
            e = embeddings[index].requires_grad_()
            users = torch.tensor(numbers)
            with routing.use(RowContext("groups", embedding=e[users], users=users, mask=batch.attention_mask.bool())):
                logits = answer_logits(backbone.model, batch)
            total, tokens = answer_loss(logits, batch.labels)
            loss = total.sum() / tokens.sum()
            cosine = user_cosine(routing.stacked())  # of the m_u, which the layers recorded in `routing`
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
        report(f"after epoch {epoch + 1}", logits_of, queries, backbone.pad_id)
    save_tensors(OUT / "groups.safetensors", {**trained, "embeddings": embeddings}, {"users": list(index_of)})


def add_experts(model: PreTrainedModel, routing: BatchContext) -> dict[str, Parameter]:
    """Add experts and their router to each FFN projection W; return the parameters."""
    trained: dict[str, Parameter] = {}
    for name, (inputs, outputs) in find_targets(model, "ffn").items():
        layer = AdaptedLinear(name, model.get_submodule(name), inputs, outputs, routing)
        layer.experts = Experts(inputs, outputs, experts=EXPERTS, rank=RANK, alpha=ALPHA)
        layer.router = UserAwareRouter(inputs, WIDTH, EXPERTS)
        model.set_submodule(name, layer)
        trained |= {f"{name}.down": layer.experts.down, f"{name}.up": layer.experts.up}  # all A_i, all B_i
        trained |= {f"{name}.token": layer.router.token, f"{name}.user": layer.router.user}  # W_x, W_u
    return trained


if __name__ == "__main__":
    main()
