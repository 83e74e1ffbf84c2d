"""Two ways to decode a batch: transformers' own `generate`, which is the oracle, and the engine's two passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from proper.inference.forward import decode, pad_left, prefill
from proper.inference.kv_cache import RowCache
from proper.inference.model import PersonalizedModel
from proper.inference.sampling import Sampling
from proper.layers.batch_context import RowContext
from proper.models.personal import ProperModel


def theirs(
    model: ProperModel, prompts: Sequence[Sequence[int]], rows: RowContext, sampling: Sampling, end: int | None = None
) -> list[list[int]]:
    """Continue each prompt until its end token with transformers' `generate`; the draws are those of one row alone."""
    ids, mask = pad_left(prompts, model.backbone.pad_id, model.device)
    sampled = sampling.temperature > 0
    assert not sampled or len(prompts) == 1, "rows would draw from one generator"
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampled,
        temperature=sampling.temperature if sampled else None,
        top_p=sampling.top_p if sampled else None,
        top_k=0 if sampled else None,
        pad_token_id=model.backbone.pad_id,
        eos_token_id=end,
        use_cache=True,
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]), model.routing.use(rows):
        torch.manual_seed(sampling.seed)
        output = model.backbone.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    answers = output[:, ids.shape[1] :].tolist()
    return [answer[: answer.index(end)] if end in answer else answer for answer in answers]


def alone(model: PersonalizedModel, prompt: str, user: str | None, sampling: Sampling) -> str:
    """One answer's text, from transformers' `generate` on one row."""
    ids = model.encoder.prompt(prompt, room=sampling.max_new_tokens)
    (answer,) = theirs(model.model, [ids], model.rows([user]), sampling, model.encoder.end)
    text: str = model.encoder.tokenizer.decode(answer, skip_special_tokens=True)
    return text.strip()


def ours(model: ProperModel, prompts: Sequence[Sequence[int]], rows: RowContext, steps: int) -> list[list[int]]:
    """The likeliest `steps` tokens after each prompt, an end token like any other, from the engine's passes."""
    cache = RowCache(len(prompts), max(map(len, prompts)) + steps)
    with torch.no_grad():
        found = [prefill(model, cache, prompts, rows).argmax(-1).tolist()]
        while len(found) < steps:
            found.append(decode(model, cache, found[-1], rows).argmax(-1).tolist())
    return [list(answer) for answer in zip(*found, strict=True)]
