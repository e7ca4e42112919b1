"""What a weight format costs in quality: perplexity of a text, KL divergence and top-1 agreement with bf16.

    python benchmarks/weight_formats.py TEXT [-m smollm2-135m --tokens 2048 --chunk 512]

The text is cut into chunks that are run whole. A quantised model is dequantised to bf16 first. int8 and int4 round
their inputs too, in the prompt phase as in the generation step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

import griffin


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=512)
    args = parser.parse_args()
    base: list[torch.Tensor] = []
    for weights in ("bf16", "f32", "int8", "int4"):
        model, tokenizer = griffin.load(args.model, None if weights in ("bf16", "f32") else "bf16", weights=weights)
        text = args.text.read_text(encoding="utf-8")[: args.tokens * 8]
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : args.tokens]
        loss = divergence = agreed = count = 0.0
        for number, chunk in enumerate(ids.split(args.chunk, dim=1)):
            logs = model(chunk).logits[0, :-1].float().log_softmax(dim=-1)
            if weights == "bf16":
                base.append(logs)
            full = logs if weights == "bf16" else base[number]
            loss += float(F.nll_loss(logs, chunk[0, 1:], reduction="sum"))
            divergence += float(F.kl_div(logs, full, reduction="sum", log_target=True))
            agreed += float((logs.argmax(-1) == full.argmax(-1)).sum())
            count += logs.shape[0]
        perplexity = float(torch.tensor(loss / count).exp())
        print(
            f"{args.model} {weights}: perplexity {perplexity:.2f}, KL to bf16 {divergence / count:.4f}, "
            f"top-1 agreement {agreed / count:.3f} ({count:.0f} predictions)"
        )


if __name__ == "__main__":
    main()
