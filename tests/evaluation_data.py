"""A tiny model that reads bytes, and made-up files in the layouts of the evaluation data."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import tiny_llama

WINDOW = 2048


def bytes_tokenizer(merge: str = "") -> PreTrainedTokenizerFast:
    """One token a byte, after three special tokens; last, if there is one, a token for two letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: number + 3 for number, letter in enumerate(letters)}
    if merge:
        vocabulary[merge] = len(vocabulary)
    tokens = Tokenizer(models.BPE(vocabulary, [(merge[0], merge[1])] if merge else []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def bytes_model(dtype: torch.dtype = torch.float64, merges: int = 0) -> LlamaForCausalLM:
    """A random model of that vocabulary."""
    return tiny_llama(
        dtype, vocab_size=259 + merges, max_position_embeddings=WINDOW, eos_token_id=2, num_hidden_layers=2
    )


def save_bytes_model(folder: Path, template: str | None = None) -> str:
    """Save them, for commands that load a model; greedy answers of this one do not end by themselves."""
    model, tokenizer = bytes_model(torch.float32), bytes_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def special_model(dtype: torch.dtype = torch.float64) -> tuple[LlamaForCausalLM, str, str, str]:
    """A model that answers "The river" with a special token: `<s>` and another token have changed places.

    Returns the model, the shown text before that token, its written form, and the shown text of the next token.
    """
    model, tokenizer = bytes_model(dtype), bytes_tokenizer()
    ids = tokenizer("The river", return_tensors="pt")
    answer = model.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids["input_ids"].shape[1] :].tolist()
    at = next(n for n in range(2, 12) if answer[n] not in answer[:n] and 35 < answer[n + 1] < 98)  # then ASCII
    swapped = torch.tensor([tokenizer.bos_token_id, answer[at]])
    with torch.no_grad():
        for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
            weight[swapped] = weight[swapped.flip(0)]
    return model, tokenizer.decode(answer[:at]), "<s>", tokenizer.decode(answer[at + 1 : at + 2])


def write_data(folder: Path) -> Path:
    """Write a few rows of every task; returns the folder."""
    topics = ("river", "garden", "engine", "violin")
    _json(
        folder / "hellaswag" / "validation.jsonl.gz",
        (
            {
                "ind": n,
                "activity_label": f"About a {topic}",
                "ctx_a": f"A person looks at the {topic}.",
                "ctx_b": "they",
                "ctx": f"A person looks at the {topic}. they",
                "endings": [f"walk to the {topic}.", "sing.", f"paint the {topic} in two colours.", "leave it alone"],
                "source_id": "made up",
                "split": "val",
                "split_type": "indomain",
                "label": str(n % 4),
            }
            for n, topic in enumerate(topics)
        ),
    )
    piqa = ({"goal": f"Clean the {topic}", "sol1": "use water.", "sol2": f"burn the {topic}."} for topic in topics)
    _json(folder / "piqa" / "valid.jsonl", piqa)
    (folder / "piqa" / "valid-labels.lst").write_text("0\n1\n0\n0\n")
    copa = (
        {
            "premise": f"The {topic} was wet.",
            "choice1": "It had rained.",
            "choice2": "The sun came out.",
            "question": ("cause", "effect")[n % 2],
            "label": n % 2,
            "idx": n,
        }
        for n, topic in enumerate(topics)
    )
    _json(folder / "copa" / "superglue_copa_val.jsonl", copa)
    for name in ("easy", "challenge"):
        rows = (
            {
                "query": f"Question: What is a {topic} in the {name} test?",
                "choices": ["a thing", "a name", "no"],
                "gold": n % 3,
            }
            for n, topic in enumerate(topics)
        )
        _json(folder / "arc" / f"arc_{name}.jsonl", rows)
    boolq = (
        {
            "question": f"is the {topic} old",
            "title": topic,
            "answer": n % 2 == 0,
            "passage": f"This {topic} is {n} years old.",
        }
        for n, topic in enumerate(topics)
    )
    _json(folder / "boolq" / "dev.jsonl", boolq)
    xsum = (
        {
            "article": f"###\nArticle: A {topic} was found.\n\nSummarize the above article in 1 sentence.\nFound.\n\n"
            f"###\nArticle: The {topic} was lost again.\n\nSummarize the above article in 1 sentences.",
            "summary_gt": f"Somebody lost the {topic}.",
            "stop": ["###"],
        }
        for topic in topics[:2]
    )
    _json(folder / "xsum" / "xsum_1shot_first500.jsonl", xsum)
    (folder / "cnn_dailymail").mkdir()
    with (folder / "cnn_dailymail" / "cnn_dailymail_test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["article", "highlights", "id"])
        for n, topic in enumerate(topics[:3]):
            writer.writerow(
                [f'They said: "the {topic}, {"again " * n}", and left.\nAll of them.', f"A {topic} .\nLeft .", n]
            )
    coqa = (
        {
            "doc": {
                "id": f"{topic}_turn{turn}",
                "source": "made up",
                "story": f"Tom has a {topic}. It is red.",
                "question": ("What has Tom?", "Which colour?")[turn],
                "answers": ([f"a {topic}", f"the {topic}"], ["red", "Red", "it is red", "dark red"])[turn],
                "previous_qa": [
                    {"question": "What has Tom?", "answer": f"a {topic}"},
                    {"question": "Which colour?", "answer": "red"},
                ],
            }
        }
        for topic in topics[:2]
        for turn in range(2)
    )
    _json(folder / "coqa" / "requests.jsonl.gz", coqa)
    qasper = (
        {
            "input": f"We study the {topic}.",
            "instructions": ["What do they study?", "What do they study?"],
            "outputs": [f"the {topic}", f"one {topic}"],
        }
        for topic in topics[:2]
    )
    _json(folder / "qasper" / "leval_scientific_qa.jsonl", qasper)
    gsm8k = ({"question": f"{n} plus {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(7))
    _json(folder / "gsm8k" / "test_first660.jsonl", gsm8k)
    (folder / "wikitext2").mkdir()
    pages = "".join(
        f" = {topic} = \n \n A {topic} is a thing . \n = = Use = = \n It is used . \n \n" for topic in topics[:2]
    )
    (folder / "wikitext2" / "wiki.valid.raw").write_text(f" \n{pages}")
    return folder


def _json(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
