"""Stage 1, population: one LoRA learns from everybody's histories what is common to all, then joins the backbone.

    y = W x + s B A x        A (R, I) Kaiming-uniform, B (O, R) zero, s = alpha / R

W stays as it is; only A and B learn, on attention and FFN, from the loss of the answers' tokens. Nobody's name is used:
this stage cannot know who is asking. Merged, W + s B A costs nothing more at inference.

    python recipes/stage1_population.py
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from demo_rows import demo_rows, held_out, setting
from peft import LoraConfig, get_peft_model

from proper.data.batching import collate
from proper.data.encoder import Encoder
from proper.models import load_backbone
from proper.models.personal import answer_logits, answer_loss
from proper.models.targets import find_targets

OUT = Path("runs/recipes")
BACKBONE = "proper-nano"
PEOPLE = setting("PEOPLE", 60)
SEED = setting("SEED", 0)
EPOCHS = setting("EPOCHS", 3)
BATCH = 16
RANK, ALPHA, DROPOUT = 8, 16, 0.05
RATE = 3e-3  # the paper's 3e-4 is for a backbone 13 times as wide; narrow ones need larger steps
CLIP = 1.0


def main() -> None:
    """Train the population's LoRA."""
    torch.manual_seed(SEED)
    shuffle = random.Random(SEED)
    backbone = load_backbone(BACKBONE, torch.bfloat16, torch.device("cpu"))
    history, queries = demo_rows(OUT / "data", PEOPLE, SEED, Encoder(backbone.tokenizer, max_length=128))
    everything = [row for rows in history.values() for row in rows]

    def show(when: str) -> None:
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            loss, accuracy = held_out(lambda batch: answer_logits(model, batch), queries, backbone.pad_id)
        print(f"{when}: held-out loss {loss:.4f}, accuracy {accuracy:.4f}", flush=True)

    # PEFT puts A and B beside every linear layer of the blocks and leaves only them to be trained.
    modules = list(find_targets(backbone.model, "all"))
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=modules)
    model = get_peft_model(backbone.model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"{len(everything)} rows of {PEOPLE} people; {sum(p.numel() for p in trained):,} numbers learn")
    show("before")

    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.1)
    steps = EPOCHS * math.ceil(len(everything) / BATCH)
    step = 0
    for epoch in range(EPOCHS):
        model.train()
        shuffle.shuffle(everything)
        for at in range(0, len(everything), BATCH):
            optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            batch = collate(everything[at : at + BATCH], backbone.pad_id)
            # A and B are fp32, their products run in the backbone's bf16.
            with torch.autocast("cpu", torch.bfloat16):
                logits = answer_logits(model, batch)
            total, tokens = answer_loss(logits, batch.labels)
            loss = total.sum() / tokens.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            step += 1
            if step in (1, steps) or step % 10 == 0:
                print(f"step {step}/{steps}: loss {loss.item():.4f}", flush=True)
        show(f"after epoch {epoch + 1}")
    model.save_pretrained(str(OUT / "population"))  # safetensors, for stage 2


if __name__ == "__main__":
    main()
