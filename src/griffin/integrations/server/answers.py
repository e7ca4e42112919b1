"""Answers in their generation phase."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from griffin.engine.batch import Running
from griffin.engine.lossless import Drafts
from griffin.engine.step import Draw
from griffin.generation.text import Answer
from griffin.integrations.server.scheduler import Prompt
from griffin.integrations.server.types import Constraint, GenerationRequest


@dataclass(eq=False)
class RunningAnswer:
    """One answer.

    Args:
        request: what it answers.
        index: its number within the request.
        sequence: its keys, values and experts.
        draw: draws its tokens.
        text: its text so far.
        nbytes: the key/value memory that is set aside for it.
        constraint: decides which tokens may come next; `None` allows all.
    """

    request: GenerationRequest
    index: int
    sequence: Running
    draw: Draw
    text: Answer
    nbytes: int
    constraint: Constraint | None


def answers_to(prompt: Prompt, sequence: Running, tokenizer: PreTrainedTokenizerBase) -> list[RunningAnswer]:
    """The answers to a prompt that has been run, each with a sequence of its own."""
    request = prompt.request
    ids = torch.tensor([list(request.prompts[prompt.number])], device=sequence.cache.buffers(0)[0].device)
    answers = []
    for number, copied in enumerate(sequence.copies(request.n)):
        if request.lossless:
            copied.drafts = Drafts(request.prompts[prompt.number], request.sampling.max_tokens)
        seed = None if request.sampling.seed is None else request.sampling.seed + number
        draw = Draw(replace(request.sampling, seed=seed), ids)
        text = Answer(tokenizer, request.sampling.stop)
        index = prompt.number * request.n + number
        constraint = None if request.constraint is None else request.constraint()
        answers.append(RunningAnswer(request, index, copied, draw, text, prompt.nbytes // request.n, constraint))
    return answers
