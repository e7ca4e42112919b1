"""Loading from the Hugging Face Hub: its own client against a server that answers as the Hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hub_server import TOKEN, serving

# A process of its own, as huggingface_hub reads its settings when it is imported: loads, and says what came of each.
LOADS = """
import json, sys
import griffin
for name, arguments in json.loads(sys.argv[1]):
    try:
        model, tokenizer = griffin.load(name, device="cpu", **arguments)
        found = [type(model).__name__, float(model.lm_head.weight.sum()), tokenizer("a")["input_ids"]]
    except Exception as error:
        found = [type(error).__name__, str(error)]
    print(json.dumps(found))
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    words = Tokenizer(WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    return folder


def run(home: Path, url: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home)}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)


def load_all(home: Path, url: str, loads: list[Any]) -> tuple[list[Any], str]:
    done = run(home, url, "-c", LOADS, json.dumps(loads))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_load_from_the_hub(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = LlamaForCausalLM.from_pretrained(tiny).lm_head.weight.sum().item()
    right = ["LlamaForCausalLM", pytest.approx(weight), [1]]
    with serving(tiny) as (url, hub):
        found, errors = load_all(tmp_path / "home", url, [
            ["org/tiny", {}],
            ["org/tiny", {"revision": "v1"}],
            ["org/tiny", {"revision": "v9"}],
            ["org/private", {"token": TOKEN}],
            ["org/private", {}],
            ["org/gated", {}],
            ["org/nothing", {}],
            ["org/broken", {}],
            ["org/busy", {}],
        ])  # fmt: skip
    assert any(path.endswith("model.safetensors") for path in hub.asked)
    assert [found[0], found[1], found[3]] == [right] * 3
    messages = [found[2], *found[4:]]
    for (kind, message), (expected, part) in zip(
        messages,
        [
            ("ValueError", "no revision 'v9' on the Hub"),
            ("ValueError", "org/private is not on the Hub, or private without a token"),
            ("ValueError", "org/gated is gated on the Hub"),
            ("ValueError", "org/nothing is not on the Hub"),
            ("GriffinError", "org/broken: the Hub answered with an error: Server error '500"),
            ("GriffinError", "org/busy: the Hub answered with an error"),
        ],
        strict=True,
    ):
        assert kind == expected
        assert part in message
        assert "\n" not in message
    assert "local cache" not in errors


def test_without_an_answer_the_local_cache_is_used_at_once(tiny: Path, tmp_path: Path) -> None:
    command = ["-m", "griffin", "generate", "-m", "org/tiny", "--max-tokens", "3", "a"]
    with serving(tiny) as (url, hub):
        first = run(tmp_path, url, *command)
        assert first.returncode == 0, first.stderr
        hub.down = True
        hub.asked.clear()
        again = run(tmp_path, url, *command)
        assert (again.returncode, again.stdout) == (0, first.stdout)
        assert "the Hub does not answer; org/tiny is loaded from its local cache" in again.stderr
        assert not any("resolve" in path for path in hub.asked)  # every file was asked for five times, for minutes
    (cached, missing), _ = load_all(tmp_path, url, [["org/tiny", {}], ["org/other", {}]])  # nobody listens any more
    assert cached[0] == "LlamaForCausalLM"
    assert missing[0] == "GriffinError"
    assert "org/other is not in the Hub's local cache and the Hub cannot be reached" in missing[1]
