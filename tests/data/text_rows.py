"""A row of text and a chat template, for tests of the encoder."""

from __future__ import annotations

from dataclasses import dataclass

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Row:
    prompt: str
    target: str
    user: str = "ann"
    task: int = 0
