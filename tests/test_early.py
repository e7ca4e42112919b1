"""What is done beside the imports and what is left out of them: a file's weights packed early, light imports."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import griffin
from griffin import GriffinError
from griffin.gguf.config import sources_of
from griffin.gguf.names import row_order
from griffin.gguf.reader import GgufFile
from griffin.layouts import find_ff_blocks
from griffin.method.dynamic import output_norms
from griffin.models import early, gguf_model
from griffin.models.builtin import BUILTIN, builtin_file
from griffin.native import grouped
from griffin.native.packing import GGUF_TYPES, Packing

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def path() -> Path:
    return builtin_file(BUILTIN["smollm2-135m"])


def test_threads_pack_what_one_call_packs(path: Path) -> None:
    with GgufFile(path) as file, Packing(file, sources_of(file)) as packing:
        packing.start()
        assert packing._threads
        packed = packing.wait()
        wanted = {f"{source.tensor}.weight": source for source in sources_of(file)}
        matrices = {name for name, tensor in file.tensors.items() if tensor.type.name in GGUF_TYPES}
        assert packed.keys() == matrices & wanted.keys()
        assert len(packed) > 100
        for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.7.ffn_up.weight", "blk.29.ffn_down.weight"):
            tensor, heads = file.tensors[name], wanted[name].heads
            order = None if heads is None else torch.from_numpy(row_order(tensor.rows, heads))
            blocks = torch.from_numpy(tensor.read()).reshape(-1)
            major = "ffn_down" in name
            whole = grouped.from_gguf(tensor.type.name, blocks, *tensor.shape, neuron_major=major, row_order=order)
            own = grouped.Packed.of(packed[name])
            assert torch.equal(own.rows, whole.rows), name
            assert own.format == whole.format
            if major:
                assert own.scales is not None
                assert whole.scales is not None
                assert torch.equal(own.scales, whole.scales)


def test_a_file_that_becomes_shorter_is_an_error(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(path.read_bytes())
    with GgufFile(copy) as file, Packing(file, sources_of(file)) as packing:
        with copy.open("r+b") as writable:
            writable.truncate(copy.stat().st_size // 2)
        packing.start()
        with pytest.raises(GriffinError, match="has become shorter; load it again"):
            packing.wait()


def test_what_was_begun_is_taken_once_and_can_be_dropped(path: Path) -> None:
    before = threading.active_count()
    early.begin(path)
    file, packing = early._begun[path]
    taken = early.taken(path)
    assert taken == (file, packing)
    assert not early._begun
    assert packing is not None
    packing.close()
    file.close()
    early.begin(path)
    early.dropped(path)
    assert not early._begun
    assert threading.active_count() == before
    early.begin(path.with_name("missing.gguf"))
    assert not early._begun


def test_norms_are_there_once_a_file_is_loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = griffin.load(path)
    blocks = find_ff_blocks(model)
    expected = [block.output_norms() for block in blocks]
    monkeypatch.delattr(grouped.Packed, "row_norms")
    assert all(torch.equal(output_norms(block), norms) for block, norms in zip(blocks, expected, strict=True))


def test_a_damaged_vocabulary_stops_the_packing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object) -> None:
        raise GriffinError("damaged")

    before = threading.active_count()
    monkeypatch.setattr(gguf_model, "tokenizer_of", damaged)
    with pytest.raises(GriffinError, match="damaged"):
        griffin.load(path)
    assert threading.active_count() == before


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)


def test_a_command_answers(path: Path) -> None:
    done = python(
        "import griffin.cli; print(griffin.cli.main())",
        *("generate", "-m", str(path), "--max-tokens", "3", "--density", "0.5", "The sea"),
    )
    assert done.stdout.splitlines()[-1] == "0"
    assert "generated 3 tokens" in done.stderr
