"""Stage 1, population: one LoRA is trained on all users' histories, then merged into the backbone.

    y = W x + s B A x        A (R, I) Kaiming-uniform, B (O, R) zero, s = alpha / R

W is frozen; only A and B are trained, on attention and FFN, with the loss of the answers' tokens. The model does not
see which user a row is from. The merged weight W + s B A costs nothing more at inference.

In production: `proper.training.population` (the stage) and `proper.training.trainer` (the loop), which also keeps the
weights with the lowest loss on held-out rows of the histories (`proper.training.early_stopping`).

    python recipes/stage1_population.py
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from demo_rows import demo_rows, report, setting
from peft import LoraConfig, get_peft_model
from torch import Tensor

from proper.data.batching import Batch, collate
from proper.data.encoder import Encoder
from proper.models import load_backbone
from proper.models.answer_loss import answer_logits, answer_loss
from proper.models.targets import find_targets

OUT = Path("runs/recipes")
BACKBONE = "proper-nano"
USERS = setting("USERS", 60)
SEED = setting("SEED", 0)
EPOCHS = setting("EPOCHS", 3)
BATCH = 8
RANK, ALPHA, DROPOUT = 8, 16, 0.05
RATE = 3e-3  # the paper's 3e-4 is for a backbone 13 times as wide; narrow ones need larger steps
CLIP = 1.0


def main() -> None:
    """Train the population LoRA."""
    torch.manual_seed(SEED)
    shuffle = random.Random(SEED)
    backbone = load_backbone(BACKBONE, torch.bfloat16, torch.device("cpu"))
    history, queries = demo_rows(OUT / "data", USERS, SEED, Encoder(backbone.tokenizer, max_length=128))
    rows = [row for own in history.values() for row in own]

    # PEFT adds A and B to every linear layer of the blocks and freezes all other parameters.
    modules = list(find_targets(backbone.model, "all"))
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=modules)
    model = get_peft_model(backbone.model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"{len(rows)} rows of {USERS} users; {sum(p.numel() for p in trained):,} trained parameters")

    def logits_of(batch: Batch) -> Tensor:
        # A and B are fp32, their products run in the backbone's bf16.
        with torch.autocast("cpu", torch.bfloat16):
            return answer_logits(model, batch)

    model.eval()
    report("before", logits_of, queries, backbone.pad_id)
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.1)
    steps = EPOCHS * math.ceil(len(rows) / BATCH)
    step = 0
    for epoch in range(EPOCHS):
        model.train()
        shuffle.shuffle(rows)
        for at in range(0, len(rows), BATCH):
            optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            batch = collate(rows[at : at + BATCH], backbone.pad_id)
            total, tokens = answer_loss(logits_of(batch), batch.labels)
            loss = total.sum() / tokens.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            step += 1
            if step in (1, steps) or step % 10 == 0:
                print(f"step {step}/{steps}: loss {loss.item():.4f}", flush=True)
        model.eval()
        report(f"after epoch {epoch + 1}", logits_of, queries, backbone.pad_id)
    model.save_pretrained(str(OUT / "population"))  # safetensors, for stage 2


if __name__ == "__main__":
    main()
