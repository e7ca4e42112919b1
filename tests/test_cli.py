"""The command line, mostly in-process on a tiny random Llama with a tokenizer of words."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from forked import Griffin
from griffin import cli
from griffin.analysis.ceiling import bytes_read_per_token
from griffin.attachment import attach
from griffin.cli import arguments, main
from griffin.cli.commands import info
from griffin.cli.commands.generate import summary
from griffin.config import GriffinConfig
from griffin.engine.step import Sampling
from griffin.generation import chat as session
from griffin.generation.generate import generate
from griffin.models.builtin import BUILTIN, DEFAULT_MODEL
from griffin.models.load import load

ROOT = Path(__file__).parent.parent
SPECIAL = ["<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
WORDS = [f"w{number}" for number in range(95)]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 512


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"), TEMPLATE, CONTEXT)


@pytest.fixture(scope="module")
def tiny_without_template(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("plain"), None, CONTEXT)


def save_tiny(folder: Path, template: str | None, context: int) -> str:
    """Save a tiny random Llama with a tokenizer of words."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<|end|>", additional_special_tokens=SPECIAL[2:]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 * torch.randn_like(parameter))
        model.lm_head.weight[: len(SPECIAL)] = 0  # words are likelier: text and tokens are then the same thing
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch, stdin: Any) -> None:
    stdin(b"")
    monkeypatch.delenv("GRIFFIN_DEBUG", raising=False)


def heed_ctrl_c() -> None:
    """Whoever runs the tests in the background lets their children ignore SIGINT; a terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def griffin(*words: str, **settings: Any) -> subprocess.CompletedProcess[Any]:
    return subprocess.run([sys.executable, "-m", "griffin", *words], capture_output=True, timeout=120, **settings)


# -- dispatcher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_loads_neither_torch_nor_transformers(words: list[str]) -> None:
    code = (
        "import sys; from griffin.cli import main; code = main(sys.argv[1:]); "
        "print({'torch', 'transformers', 'rich', 'matplotlib'} & set(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "set()")


def test_help_waits_for_nothing_heavy() -> None:
    asked = "import sys, griffin.cli\ntry: griffin.cli.main(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert not loaded & {"torch", "transformers", "numpy", "rich", "lm_eval", "matplotlib", "plotly", "jinja2"}
    assert "griffin" in loaded


def test_flags_are_the_fields_of_the_dataclasses() -> None:
    assert [*arguments._CONFIG, *arguments._SWITCHES] == [field.name for field in fields(GriffinConfig)]
    assert [*arguments._SAMPLING, "seed"] == [field.name for field in fields(Sampling)]
    for field in fields(Sampling):
        if field.name not in ("logit_bias", "stop", "seed"):
            assert re.search(rf"\(default: {field.default}[,)]", arguments._SAMPLING[field.name][2])
    assert tuple(BUILTIN) == arguments.BUILTIN_MODELS
    assert arguments.BUILTIN_MODELS[0] == DEFAULT_MODEL


BAD = {
    "no command": ([], "COMMAND"),
    "unknown command": (["fly"], "invalid choice: 'fly'"),
    "unknown flag": (["generate", "hi", "--denisty", "0.5"], "--denisty"),
    "density 7": (["generate", "hi", "--density", "7"], "density is 7.0"),
    "density 0": (["chat", "--density", "0"], "density is 0.0"),
    "density nan": (["generate", "hi", "--density", "nan"], "density is nan"),
    "density word": (["generate", "hi", "--density", "half"], "invalid float value: 'half'"),
    "selection": (["generate", "hi", "--selection", "topp"], "did you mean 'topk'"),
    "batch": (["generate", "hi", "--batch", "x"], "batch is 'x'"),
    "backend": (["generate", "hi", "--backend", "x"], "backend is 'x'"),
    "info backend": (["info", "--backend", "x"], "backend is 'x'"),
    "info density": (["info", "--density", "0.5,2"], "density is 2.0"),
    "info densities": (["info", "--density", "0.5;0.2"], "0.5;0.2"),
    "layers word": (["generate", "hi", "--layers", "a"], "found 'a'"),
    "layers reversed": (["generate", "hi", "--layers", "5-2"], "found '5-2'"),
    "layers endless": (["generate", "hi", "--layers", "0-999999999"], "expected layer indices"),
    "seed": (["generate", "hi", "--seed", "-1"], "seed is -1"),
    "max tokens": (["generate", "hi", "--max-tokens", "0"], "max_tokens is 0"),
    "temperature": (["generate", "hi", "--temperature", "-1"], "temperature is -1.0"),
    "top p": (["chat", "--top-p", "1.5"], "top_p is 1.5"),
    "stop": (["generate", "hi", "--stop", ""], "stop is"),
    "lossless density": (["generate", "hi", "--lossless", "--density", "0.5"], "--density is 0.5; leave one out"),
    "lossless loss": (["chat", "--lossless", "--loss", "0.1"], "--loss is 0.1; leave one out"),
    "empty prompt": (["generate", ""], "the prompt is empty"),
    "blank prompt": (["generate", " \n"], "the prompt is empty"),
    "two prompts": (["generate", "hi", "-f", "prompt.txt"], "two prompts"),
    "prompt bytes": (["generate", "a\udcff"], "not UTF-8"),
    "missing file": (["generate", "-f", "missing.txt"], "missing.txt cannot be read: No such file"),
    "folder": (["generate", "-f", "."], "cannot be read: Is a directory"),
    "raw and system": (["generate", "hi", "--raw", "--system", "x"], "--system"),
    "no such model": (["generate", "hi", "-m", "./nowhere"], "./nowhere does not exist"),
    "dtype": (["generate", "hi", "--dtype", "int3"], "dtype is 'int3'"),
    "device": (["generate", "hi", "--device", "toaster"], "device is 'toaster'"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_wrong_usage_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("griffin: error: ")
    assert err.count("\n") == 1
    assert "model" not in out


def test_settings_are_checked_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hi", "-m", "./nowhere", "--density", "7"]) == 2
    assert "density is 7.0" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"\xff\xfe", b"caf\xe9"])
def test_input_that_is_not_utf_8(data: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path, stdin: Any) -> None:
    (tmp_path / "prompt.txt").write_bytes(data)
    assert main(["generate", "-f", str(tmp_path / "prompt.txt")]) == 2
    assert "prompt.txt is not UTF-8" in capsys.readouterr().err
    stdin(data)
    assert main(["generate"]) == 2
    assert "stdin is not UTF-8" in capsys.readouterr().err


def test_a_terminal_without_a_prompt(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["generate"]) == 2
    assert "there is no prompt" in capsys.readouterr().err


def test_the_model_refuses(tiny: str, tiny_without_template: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["generate", "-m", tiny, " ".join(["w1"] * CONTEXT)], "the model's context is 512"),
        (["generate", "-m", tiny, "w1", "--layers", "0-3"], "layers names layer 3"),
        (["generate", "-m", tiny_without_template, "w1", "--system", "w2"], "has no chat template"),
        (["chat", "-m", tiny_without_template], "has no chat template; use griffin generate"),
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\nyou tried"), 1),
        (RuntimeError("CUDA out of memory."), 1),
        (MemoryError(), 1),
        (OSError("no"), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
    ],
)
def test_what_fails_outside(error: BaseException, code: int, capsys: Any, monkeypatch: Any) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("griffin.cli.commands.generate.read_text", fail)
    assert main(["generate", "-f", "x"]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("\n") == (0 if code == 141 else 1)


def test_a_defect_of_the_program_shows_its_traceback(monkeypatch: Any) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("griffin.cli.commands.generate.read_text", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["generate", "-f", "x"])


def test_debug_shows_the_traceback(monkeypatch: Any) -> None:
    monkeypatch.setenv("GRIFFIN_DEBUG", "1")
    with pytest.raises(ValueError, match="density is 7"):
        main(["generate", "hi", "--density", "7"])


@pytest.mark.parametrize(
    ("text", "layers"), [("0,1,2", (0, 1, 2)), ("0-3", (0, 1, 2, 3)), ("0-1,5", (0, 1, 5)), ("7", (7,))]
)
def test_layers(text: str, layers: tuple[int, ...]) -> None:
    assert arguments.parse_layers(text) == layers


# -- generate -------------------------------------------------------------------------------------------------------


def test_generate_text_on_stdout_summary_on_stderr(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-m", tiny, "w1 w2 w3", "--max-tokens", "5", "--density", "0.25"]) == 0
    out, err = capsys.readouterr()
    model, tokenizer = load(tiny)
    prompt = [{"role": "user", "content": "w1 w2 w3"}]
    expected = generate(model, tokenizer, prompt, griffin=GriffinConfig(density=0.25, selection="auto"), max_tokens=5)
    assert not isinstance(expected, list)
    assert expected.selection == "dynamic+topk"
    assert out == expected.text + "\n"
    assert re.fullmatch(
        r"prompt 6 tokens, [\d.]+ tokens/s \| selection [\d.]+ ms \| generated 5 tokens, [\d.]+ tokens/s \| "
        r"dynamic\+topk, density 0.25 \| FF 0.0 MB/token \| finish length\n",
        err,
    )


@pytest.mark.parametrize("source", ["argument", "file", "stdin"])
def test_generate_json(source: str, tiny: str, capsys: Any, stdin: Any, tmp_path: Path) -> None:
    words = ["generate", "-m", tiny, "--json", "--raw", "--max-tokens", "4", "--seed", "3", "--layers", "0-1"]
    if source == "argument":
        words.append("w1 w2")
    elif source == "file":
        (tmp_path / "p").write_text("w1 w2")
        words += ["-f", str(tmp_path / "p")]
    else:
        stdin(b"w1 w2")
    assert main(words) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert result["model"] == tiny
    assert result["config"] == {
        "density": 0.5,
        "selection": "auto",
        "layers": [0, 1],
        "batch": "shared",
        "backend": "auto",
        "seed": 3,
        "profile": None,
        "loss": None,
        "compact": True,
    }
    assert result["selection"] == "dynamic+topk"
    assert result["sampling"]["seed"] == 3
    assert (result["prompt_tokens"], result["generated_tokens"], result["density"]) == (2, 4, 0.5)
    assert result["text"] == " ".join((SPECIAL + WORDS)[token] for token in result["tokens"])


def test_density_1_is_the_full_model(tiny: str, capsys: Any) -> None:
    assert main(["generate", "-m", tiny, "w1 w2", "--density", "1", "--max-tokens", "6"]) == 0
    full = generate(*load(tiny), [{"role": "user", "content": "w1 w2"}], density=1.0, max_tokens=6)
    assert not isinstance(full, list)
    assert capsys.readouterr().out == full.text + "\n"


@pytest.mark.parametrize("words", [[], ["--density", "1"]])
def test_lossless_is_the_full_model(words: list[str], tiny: str, capsys: Any) -> None:
    prompt = "w1 w2 w3 w1 w2 w3 w1 w2"
    assert main(["generate", "-m", tiny, "--raw", prompt, "--lossless", "--max-tokens", "9", "--json", *words]) == 0
    result = json.loads(capsys.readouterr().out)
    full = generate(*load(tiny), prompt, density=1.0, max_tokens=9)
    assert not isinstance(full, list)
    assert result["tokens"] == list(full.tokens)
    assert (result["density"], result["selection"], result["config"]["density"]) == (1.0, "full", 1.0)
    assert result["accepted"] <= result["drafted"]
    assert "lossless_off" in result


def test_the_summary_says_what_drafts_gave(tiny: str) -> None:
    found = generate(*load(tiny), "w1 w2", density=1.0, max_tokens=2)
    assert not isinstance(found, list)
    drafts = {"drafted": 8, "accepted": 6, "acceptance": 0.75, "tokens_per_verify": 4.0, "lossless_off": "reasons"}
    line = summary(replace(found, **drafts))
    assert "drafted 8, accepted 6 (75%), 4.0 tokens/verification | lossless drafts off: reasons | finish" in line
    assert "draft" not in summary(found)


def test_system_raw_and_no_template(tiny: str, tiny_without_template: str, capsys: Any) -> None:
    tokens = {}
    for name, words in {
        "raw": ["-m", tiny, "--raw"],
        "template": ["-m", tiny],
        "system": ["-m", tiny, "--system", "w9"],
        "none": ["-m", tiny_without_template],
    }.items():
        assert main(["generate", "w1 w2", "--json", "--max-tokens", "2", *words]) == 0
        tokens[name] = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert tokens == {"raw": 2, "template": 5, "system": 8, "none": 2}


def test_stop_and_seed(tiny: str, capsys: Any) -> None:
    sampled = ["generate", "-m", tiny, "w1 w2", "--temperature", "5", "--seed", "1", "--max-tokens", "8"]
    answers = []
    for _ in range(2):
        assert main(sampled) == 0
        answers.append(capsys.readouterr().out.split())
    assert answers[0] == answers[1]
    assert main([*sampled, "--stop", answers[0][5], "--stop", answers[0][3]]) == 0
    out, err = capsys.readouterr()
    assert out.split() == answers[0][:3]
    assert "finish stop" in err


def test_stdout_closed_early_and_full(tiny: str) -> None:
    command = f"{sys.executable} -m griffin generate -m {tiny} w1 --max-tokens 200"
    pipe = subprocess.run(["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert (pipe.stdout, pipe.stderr) == ("141\n", "")
    if Path("/dev/full").exists():
        full = subprocess.run(["bash", "-c", f"{command} > /dev/full"], capture_output=True, text=True)
        assert (full.returncode, full.stderr.count("\n")) == (1, 1)
        assert "No space left on device" in full.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("words", ["--help", "generate --help", "--version"])
def test_help_that_cannot_be_written(words: str) -> None:
    full = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m griffin {words} > /dev/full"], capture_output=True, text=True
    )
    assert (full.returncode, full.stderr) == (1, "griffin: error: [Errno 28] No space left on device\n")


def test_generate_ctrl_c(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, TEMPLATE, 100_000)
    with Griffin(["generate", "-m", folder, "w1", "--max-tokens", "90000"], "stdout", "stderr") as process:
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert (process.stderr.read(), process.wait(60)) == ("\n", 130)


def test_entry_point_reads_stdin_and_ascii_stdout_is_no_failure(tiny: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = griffin("generate", "-m", tiny, "--max-tokens", "3", input="w1 é\n".encode(), env=environment)
    assert (done.returncode, len(done.stdout.split())) == (0, 3)
    assert griffin("generate", "-m", tiny, "--density", "7").returncode == 2


# -- chat -----------------------------------------------------------------------------------------------------------


def _open(folder: str, density: float = 1.0, max_tokens: int = 8) -> session.Session:
    model, tokenizer = load(folder, dtype="f32")
    return session.Session(
        model, tokenizer, GriffinConfig(density=density, selection="topk"), Sampling(max_tokens=max_tokens)
    )


def _ask(chat: session.Session, text: str) -> tuple[int, ...]:
    for _ in chat.ask(text):
        pass
    assert chat.last is not None
    return chat.last.tokens


def _fresh(folder: str, messages: list[dict[str, str]], max_tokens: int = 8) -> tuple[int, ...]:
    result = generate(*load(folder, dtype="f32"), messages, density=1.0, max_tokens=max_tokens)
    assert not isinstance(result, list)
    return result.tokens


def test_kept_cache_equals_a_fresh_run(tiny: str) -> None:
    with _open(tiny) as chat:
        for turn, text in enumerate(("w1 w2", "w3 w4 w5", "w6")):
            held = len(chat.cached)
            asked = [*chat.messages, {"role": "user", "content": text}]
            assert _ask(chat, text) == _fresh(tiny, asked)
            assert chat.reused == held  # the tiny tokenizer reads every answer back as the tokens it was
            assert (turn == 0) == (held == 0)
            assert chat._cache.get_seq_length() == len(chat.cached)


def test_the_statistic_goes_on_over_turns_and_densities(tiny: str) -> None:
    with _open(tiny, density=1.0) as chat:
        _ask(chat, "w1 w2")
        first = chat._handle.gathered.tokens[0].item()
        chat.configure(GriffinConfig(density=0.25, selection="topk"))
        _ask(chat, "w3")
        assert first == 5
        # after the 5: the answer's last token, <|end|>, and the new message's 3 with <|assistant|>
        assert chat._handle.gathered.tokens[0].item() == 5 + 1 + 1 + 4
        assert chat._handle.experts[0].shape == (16,)  # type: ignore[union-attr]
        assert chat.step_name == "native"  # as `generate`, whose speed it has
        assert chat.last.ff_bytes_per_token == chat._handle.ff_bytes_per_token  # type: ignore[union-attr]


def test_an_answer_that_does_not_read_back_is_cut_off_the_cache(tiny: str) -> None:
    with _open(tiny) as chat:
        _ask(chat, "w1 w2")
        chat.messages[-1]["content"] = "w9 w9"
        asked = [*chat.messages, {"role": "user", "content": "w3"}]
        assert _ask(chat, "w3") == _fresh(tiny, asked)
        assert chat.reused == 5
        chat.messages[0]["content"] = "w50"  # a prompt token: its statistic cannot be taken back
        asked = [*chat.messages, {"role": "user", "content": "w4"}]
        assert _ask(chat, "w4") == _fresh(tiny, asked)
        assert chat.reused == 0


@pytest.mark.parametrize("where", ["between tokens", "in a forward", "in the prompt"])
def test_interrupted_answer(where: str, tiny: str, monkeypatch: Any) -> None:
    with _open(tiny) as chat:
        _ask(chat, "w1 w2")
        before = list(chat.messages)
        if where == "between tokens":
            pieces = chat.ask("w3 w4")
            for _ in range(3):
                next(pieces)
            pieces.close()
        else:
            if where == "in a forward":  # of the model's own step: a native one is not broken off
                chat.configure(GriffinConfig(density=1.0, selection="topk", backend="reference"))
            calls, projection = 0, chat._model.model.layers[1].mlp.up_proj  # type: ignore[union-attr]

            def interrupt(*_: object) -> None:
                nonlocal calls
                calls += 1
                if calls == (4 if where == "in a forward" else 1):
                    raise KeyboardInterrupt

            hook = projection.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                _ask(chat, "w3 w4")
            hook.remove()
        if where == "in the prompt":
            assert (chat.messages, chat.cached, chat.last) == (before, [], None)
        else:
            assert chat.last is not None
            assert len(chat.last.tokens) == 3
            assert chat.messages[:-2] == before
            assert chat.messages[-1]["content"] == chat.last.text
        held = len(chat.cached)
        asked = [*chat.messages, {"role": "user", "content": "w5"}]
        assert _ask(chat, "w5") == _fresh(tiny, asked)
        assert chat.reused == held
        assert (held == 0) == (where == "in the prompt")


def test_session_detaches(tiny: str) -> None:
    with _open(tiny, density=0.5) as chat:
        _ask(chat, "w1")
        model = chat._model
    attach(model, selection="topk").detach()  # raises if it were attached still


def test_chat_commands(tiny: str, capsys: Any, stdin: Any) -> None:
    stdin(
        b"w1 w2\n/stats\n/density 0.25\n\nw3\n/stats\n/density 7\n/density\n/density x\n/fly\n/help\n/reset\n/stats\n"
        b"w1 w2\n/exit\nw9\n"
    )
    assert main(["chat", "-m", tiny, "--max-tokens", "4", "--density", "1"]) == 0
    out, err = capsys.readouterr()
    answers = out.splitlines()
    assert [len(answer.split()) for answer in answers] == [4, 4, 4]
    first = r"1 turn \| 8 tokens in the key/value cache, 0 of them reused by the last turn \| density 1"
    lines = err.splitlines()
    assert re.fullmatch(first, lines[0])
    assert lines[1].startswith("last answer: prompt 5 tokens, ")
    assert lines[2] == "density 0.25"
    assert lines[3].startswith("2 turns | 17 tokens in the key/value cache, 8 of them reused")
    assert lines[5].startswith("density is '7'; expected")
    assert lines[6].startswith("density 0.25; /density")
    assert lines[7].startswith("density is 'x'; expected")
    assert lines[8] == "unknown command /fly; known: /density, /reset, /stats, /help, /exit"
    assert lines[9].startswith("/density 0.75")
    assert lines[-2] == "the conversation is forgotten"
    assert lines[-1].startswith("0 turns | 0 tokens")


def test_a_lossless_chat_keeps_the_full_model(tiny: str, capsys: Any, stdin: Any) -> None:
    stdin(b"w1 w2\n/density 0.5\n/density\n")
    assert main(["chat", "-m", tiny, "--max-tokens", "4", "--lossless"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("lossless gives the tokens of the full model, and density is 0.5")
    assert lines[1].startswith("density 1; /density")


def test_chat_interrupt_and_too_long_message_do_not_end_it(
    tiny: str, capsys: Any, stdin: Any, monkeypatch: Any
) -> None:
    stream, calls = session.stream_generate, 0

    def interrupted(*args: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        for number, piece in enumerate(stream(*args, **settings)):
            if (calls, number) in ((1, 2), (2, 0)):
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(session, "stream_generate", interrupted)
    stdin(b"w1 w2\nw3\n" + b"w1 " * CONTEXT + b"\n/stats\nw4\n")
    assert main(["chat", "-m", tiny, "--max-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert [len(line.split()) for line in out.splitlines()] == [2, 0, 5]
    lines = err.splitlines()
    assert lines[:2] == ["stopped", "stopped before the first token; the message is not kept"]
    assert "the model's context is 512" in lines[2]
    assert lines[3].startswith("1 turn")


@pytest.mark.parametrize("source", ["argument", "file", "stdin", "system"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(
    source: str, tiny: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, stdin: Any
) -> None:
    mark, file = "\ufeff".encode(), tmp_path / "prompt.txt"

    def answered(mark: bytes, text: bytes = b"w1 w2 w3") -> tuple[int, str, str]:
        file.write_bytes(mark + text)
        stdin(mark + text)
        marked = (mark + text).decode()
        words = {"argument": [marked], "file": ["-f", str(file)], "stdin": [], "system": ["w4", "--system", marked]}
        code = main(["generate", "-m", tiny, *words[source], "--max-tokens", "5", "--density", "0.25"])
        out, err = capsys.readouterr()
        return code, out, err.split(",")[0]

    code, out, err = answered(mark)
    assert (code, out, err) == answered(b"")
    assert (code, len(out.split())) == (0, 5)
    if source != "system":
        code, out, err = answered(mark, b"")
        assert (code, out) == (2, "")
        assert "the prompt is empty" in err


def test_a_byte_order_mark_before_a_command_of_a_chat(tiny: str, capsys: Any, stdin: Any) -> None:
    mark = "\ufeff".encode()
    stdin(mark + b"/help\n" + mark + b"/stats\n")  # two files, one after the other
    assert main(["chat", "-m", tiny, "--max-tokens", "4", "--system", "\ufeffw1"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("/density 0.75")
    assert "0 turns" in err


def test_chat_input_that_is_not_utf_8(tiny: str, capsys: Any, stdin: Any) -> None:
    stdin(b"w1\n\xff\n")
    assert main(["chat", "-m", tiny, "--max-tokens", "2"]) == 2
    assert "stdin, line 2, is not UTF-8" in capsys.readouterr().err


def test_chat_on_a_terminal_ctrl_c_and_ctrl_d(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, TEMPLATE, 100_000)
    master, slave = pty.openpty()
    chat = subprocess.Popen(
        [sys.executable, "-m", "griffin", "chat", "-m", folder, "--max-tokens", "90000"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(slave)
    seen = ""

    def wait_for(pattern: str, interrupt: bool = False) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while not re.search(pattern, seen):
            assert time.monotonic() < deadline, seen[-2000:]
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096).decode()
            elif interrupt:  # CPython notices a signal just before it waits for a key only at the next one
                chat.send_signal(signal.SIGINT)

    try:
        wait_for("/help lists the commands.\r\n.*> ")
        os.write(master, b"w1 w2\n")
        wait_for(r"(w\d+ ){20}")
        chat.send_signal(signal.SIGINT)
        wait_for("stopped\r\n.*> ")
        os.write(master, b"/stats\n")
        wait_for("1 turn.*\n(.*\n)*.*finish interrupted\r\n.*> ")
        wait_for("Ctrl-D leaves\r\n.*> ", interrupt=True)
        os.write(master, b"\x04")
        assert chat.wait(30) == 0
        assert "Traceback" not in seen
    finally:
        chat.kill()
        chat.wait()
        os.close(master)


# -- info -----------------------------------------------------------------------------------------------------------


def test_info_json(tiny: str, capsys: Any) -> None:
    assert main(["info", "-m", tiny, "--json", "--density", "0.5", "--density", "0.75,1"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["machine"]["torch"] == torch.__version__
    assert about["machine"]["native_library"]
    assert about["model"]["backend"]
    model = about["model"]
    ff, attention, norms, head = 3 * 3 * 32 * 64, 3 * 4 * 32 * 32, 7 * 32, 100 * 32
    assert model["ff_bytes"] == 4 * ff
    assert model["read_bytes_per_token"] == 4 * (ff + attention + norms + head)  # the embedding is looked up
    share = ff / (ff + attention + norms + head)
    assert [row["speedup"] for row in model["ceilings"]] == pytest.approx(
        [1 / (1 - share * 0.5), 1 / (1 - share * 0.25), 1.0]
    )
    assert [(row["first"], row["last"], row["path"]) for row in model["layers"]] == [(0, 2, "model.layers.{}.mlp")]
    assert (model["layers"][0]["d_ff"], model["layers"][0]["d"], model["layers"][0]["gated"]) == (64, 32, True)


def test_a_tied_embedding_is_read_once() -> None:
    config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    assert bytes_read_per_token(model) == sum(parameter.nbytes for parameter in model.parameters())


def test_info_folds_only_layers_that_are_alike() -> None:
    def block(layer: int, width: int) -> Any:
        output = torch.nn.Linear(width, 4)
        path, size = f"model.layers.{layer}.mlp", 8 * width
        return SimpleNamespace(
            layer=layer, path=path, layout="a -> b", output=output, width=width, gated=False, nbytes=size
        )

    folded = info._fold([block(0, 8), block(1, 8), block(2, 6), block(3, 8)])
    assert [(row.first, row.last, row.d_ff) for row in folded] == [(0, 1, 8), (2, 2, 6), (3, 3, 8)]


def test_info_tables(tiny: str, capsys: Any) -> None:
    assert main(["info", "-m", tiny]) == 0
    out = capsys.readouterr().out
    for words in ("torch " + torch.__version__, "0-2", "gate_proj + up_proj -> down_proj", "ceiling at 0.75"):
        assert words in out
    assert main(["info", "--no-model"]) == 0
    assert "FF" not in capsys.readouterr().out


# -- a real model ---------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_chat_with_smollm2(capsys: Any, stdin: Any, smollm2: tuple[Any, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("griffin.cli.commands.chat.load_model", lambda args: smollm2)
    asked = ["My name is Ada. Name the capital of France in one word.", "What is my name?"]
    stdin("\n".join([*asked, "/stats\n"]).encode())
    # what a small model says hangs on the CPU's roundings; that it is what the library says, in float32, does not
    assert main(["chat", "--density", "1", "--max-tokens", "16"]) == 0
    out, err = capsys.readouterr()

    def answer(*messages: dict[str, str]) -> str:
        result = generate(*smollm2, list(messages), griffin=GriffinConfig(density=1.0), max_tokens=16)
        assert not isinstance(result, list)
        return result.text

    user = [{"role": "user", "content": text} for text in asked]
    first = answer(user[0])
    second = answer(user[0], {"role": "assistant", "content": first}, user[1])
    assert out == f"{first}\n{second}\n"
    assert first
    assert second != answer(user[1])  # it remembers the first turn
    about = re.match(r"2 turns \| \d+ tokens in the key/value cache, (\d+) of them reused", err)
    assert about is not None
    prompt = smollm2[1].apply_chat_template([user[0]], add_generation_prompt=True, return_dict=True)["input_ids"]
    answered = smollm2[1](first)["input_ids"]
    assert int(about[1]) >= len(prompt) + len(answered) - 1  # the whole first turn, of which the last token is not run
