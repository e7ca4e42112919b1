"""GRIFFIN inside vLLM's engine, against the library itself, in float32. Each engine is a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import griffin
from griffin.models.builtin import BUILTIN

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed here: make test-vllm has an environment of its own", allow_module_level=True)

pytestmark = pytest.mark.model

LENGTH = 24
TEXTS = (
    "Once upon a time there was a",
    "The capital of France is the city of",
    "def fibonacci(n):\n",
    "Photosynthesis is the process by which plants use sunlight, water and carbon dioxide to make food. " * 12,
)


class Library:
    """The same model by the library: the truth."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, self.tokenizer = griffin.load(name, dtype=torch.float32)
        for parameter in self.model.parameters():  # the numbers of the folder that vLLM reads
            parameter.data = parameter.data.to(torch.bfloat16).float()
        self.prompts: list[list[int]] = [self.tokenizer(text)["input_ids"] for text in TEXTS]

    def tokens(self, prompt: list[int], density: float | None) -> tuple[list[int], dict[int, list[int]]]:
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False}
        if density is None:
            return self.model.generate(ids, **settings)[0, len(prompt) :].tolist(), {}
        with griffin.attach(self.model, density=density, backend="reference", selection="topk") as handle:
            found = self.model.generate(ids, **settings)[0, len(prompt) :].tolist()
            return found, {layer: own.tolist() for layer, own in handle.experts.items()}


@pytest.fixture(scope="module")
def library() -> Library:
    return Library("smollm2-135m")


def saved(model: str, folder: Path) -> Path:
    """A built-in model as a folder of safetensors, which vLLM wants; written once."""
    made = folder / model
    if not made.exists():
        for each in griffin.load(model, dtype="bf16", device="cpu"):
            each.save_pretrained(made)
    return made


def run(
    model: str, folder: Path, rounds: list[list[list[Any]]], threads: str = "auto", v2: bool = False, **arguments: Any
) -> dict[str, Any]:
    job, answer = folder / "job.json", folder / "found.json"
    settings = {
        "model": str(saved(model, folder.parent)) if model in BUILTIN else model,
        "enforce_eager": True,
        **arguments,
    }
    job.write_text(json.dumps({"arguments": settings, "rounds": rounds}))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": threads,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(v2)),
    }
    if v2:
        environment["PYTHONPATH"] = str(Path(__file__).parent / "interpreter")
    command = [sys.executable, str(Path(__file__).parent / "engine.py"), str(job), str(answer)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert answer.exists(), (done.stdout + done.stderr)[-6000:]
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def test_one_rank(library: Library, tmp_path: Path) -> None:
    """Compiled. Mixed densities in mixed batches, prompts in chunks of 64, and a prefix cache that stays clean."""
    densities = (0.5, 1.0, 0.25, 0.5)
    first = [
        [prompt, None if density == 0.5 else {"griffin_density": density}, LENGTH]
        for prompt, density in zip(library.prompts, densities, strict=True)
    ]
    expected = [library.tokens(p, None if d == 1.0 else d) for p, d in zip(library.prompts, densities, strict=True)]
    long = library.prompts[3]
    longer = long + expected[3][0]  # its last blocks' keys were computed by a pruned FF, if they were published
    second = [[long, None, LENGTH], [longer, {"griffin_density": 1.0}, LENGTH], [longer, None, LENGTH]]
    third = [[prompt, {"griffin_density": 1.0}, LENGTH] for prompt in library.prompts]
    rounds = [first, second, third]
    found = run(
        library.name, tmp_path, rounds, max_num_batched_tokens=64, enable_prefix_caching=True, enforce_eager=False,
        additional_config={"griffin": {"density": 0.5}},
    )  # fmt: skip
    for own, (tokens, experts) in zip(found["rounds"][0], expected, strict=True):
        assert own["tokens"] == tokens
        if experts:
            assert {int(layer): e for layer, e in own["experts"][0].items()} == experts
        else:
            assert "experts" not in own
    again, full, pruned = found["rounds"][1]
    assert again["tokens"] == expected[3][0]
    assert again["cached"] == pruned["cached"] == 0
    assert 0 < full["cached"] <= len(long)  # the prompt's blocks were published, those of generated tokens not
    assert full["tokens"] == library.tokens(longer, None)[0]
    assert pruned["tokens"] == library.tokens(longer, 0.5)[0]
    assert [own["tokens"] for own in found["rounds"][2]] == [library.tokens(p, None)[0] for p in library.prompts]
    (report,) = found["report"]
    assert report["native_rows"] == 5 * (LENGTH - 1) * 30
    assert (report["masked_rows"], report["incomplete"]) == (0, 0)
    assert "density is 7" in found["refused"]


def test_copies_as_on_an_accelerator(library: Library, tmp_path: Path) -> None:
    """One request is computed from a copy of its experts; three at once leave them out: they are more than an FF."""
    rounds = [[[library.prompts[0], None, LENGTH]], [[prompt, None, LENGTH] for prompt in library.prompts[:3]]]
    found = run(
        library.name, tmp_path, rounds, enable_prefix_caching=False,
        additional_config={"griffin": {"density": 0.5, "backend": "gather"}},
    )  # fmt: skip
    assert found["rounds"][0][0]["tokens"] == library.tokens(library.prompts[0], 0.5)[0]
    # The first to arrive may generate alone for a step, and so may the last to end: those rows are pruned.
    for own, prompt in zip(found["rounds"][1][1:], library.prompts[1:3], strict=True):
        assert own["tokens"][:-2] == library.tokens(prompt, None)[0][:-2]
    (report,) = found["report"]
    assert report["native_rows"] == report["masked_rows"] == 0
    copied, left_out = report["copied_rows"] / 30, report["left_out_rows"]
    assert copied + left_out == (LENGTH - 1) * (1 + 3)
    assert LENGTH - 1 <= copied <= LENGTH + 3


def test_two_ranks(tmp_path: Path) -> None:
    """Tensor parallel: every rank selects within its part of the neurons, by the norms of whole rows.

    With Gemma, as SmolLM2's nine heads do not divide by two.
    """
    library = Library("gemma3-270m")
    rounds = [[[prompt, None, 8] for prompt in library.prompts]]
    found = run(
        library.name, tmp_path, rounds, threads="0|1", tensor_parallel_size=2, distributed_executor_backend="mp",
        additional_config={"griffin": {"density": 0.5}},
    )  # fmt: skip
    for own, prompt in zip(found["rounds"][0], library.prompts, strict=True):
        expected = of_halves(library, prompt)
        for rank, experts in enumerate(own["experts"]):
            assert {int(layer): e for layer, e in experts.items()} == expected[rank]
    assert all(report["masked_rows"] == 0 < report["native_rows"] for report in found["report"])


def of_halves(library: Library, prompt: list[int]) -> list[dict[int, list[int]]]:
    """Experts of the library's statistic, selected within either half of the neurons."""
    from griffin.method.selection import topk

    with griffin.attach(library.model, density=0.5, selection="topk") as handle, handle.prompt_phase(), torch.no_grad():
        library.model(torch.tensor([prompt]))
    halves: list[dict[int, list[int]]] = [{}, {}]
    for layer, own in handle.statistic.items():
        for half, part in zip(halves, own.chunk(2), strict=True):
            half[layer] = topk(part[None], len(part) // 2)[0].tolist()
    return halves


def opt() -> Any:
    """Ungated, with biases, and in vLLM with one activation module for all layers."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=3, ffn_dim=256, num_attention_heads=4, init_std=0.2,
        max_position_embeddings=1024, word_embed_proj_dim=128, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, max_position_embeddings=1024, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(("make", "v2"), [(opt, False), (llama, True)], ids=["opt-v1", "llama-v2"])
def test_preempted_requests_on_both_model_runners(make: Callable[[], Any], v2: bool, tmp_path: Path) -> None:
    """Too little cache for all requests at once: some are preempted, and computed again with the experts they had."""
    torch.manual_seed(2)
    model = make().eval()
    model.generation_config.eos_token_id = None  # vLLM is told to go on behind it, where generate would never choose it
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    prompts = [torch.randint(3, 512, (length,)).tolist() for length in (7, 40, 3, 25)]
    densities, expected = (0.5, 0.25, 1.0, 0.5), []
    for prompt, density in zip(prompts, densities, strict=True):
        with griffin.attach(model, density=density, backend="reference", selection="topk"):
            settings = {"max_new_tokens": 2 * LENGTH, "min_new_tokens": 2 * LENGTH, "do_sample": False}
            expected.append(model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist())
    requests = [[p, {"griffin_density": d}, 2 * LENGTH] for p, d in zip(prompts, densities, strict=True)]
    found = run(
        str(folder), tmp_path, [requests], v2=v2, skip_tokenizer_init=True, block_size=32, num_gpu_blocks_override=8,
        max_num_batched_tokens=64, max_model_len=128, enable_prefix_caching=False,
        additional_config={"griffin": {"density": 0.5}},
    )  # fmt: skip
    assert [own["tokens"] for own in found["rounds"][0]] == expected
    assert found["preemptions"] > 0
    (report,) = found["report"]
    assert report["native_rows"] > 0
    assert report["masked_rows"] > 0  # of requests that came back with more rows than the native library takes
    assert (report["left_out_rows"], report["incomplete"]) == (0, 0)
