"""GGUF files by the gguf package: what is cut off, missing or out of the vocabulary is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from llmc.cli import main
from llmc.verify import verify

BLOCKS, WIDTH, WORDS = 4, 64, 40
PARTS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


def write(
    target: Path, *, leave_out: str = "", extra: str = "", eos: int = 2, words: int = WORDS, nan: str = ""
) -> Path:
    """A file of random weights in Q8_0, Q4_0, and F32 norms."""
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{index}" for index in range(words)])
    writer.add_token_types([1] * words)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)
    names = ["token_embd", "output_norm", *(f"blk.{index}.{part}" for index in range(BLOCKS) for part in PARTS)]
    names += [extra] if extra else []
    generator = np.random.default_rng(0)
    for name in names:
        if name == leave_out:
            continue
        rows = WORDS if name == "token_embd" else WIDTH
        values = generator.standard_normal((rows, WIDTH)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_0 if "ffn" in name else gguf.GGMLQuantizationType.Q8_0
        if "norm" in name:
            values = values[0]
            values[5] = np.nan if name == nan else 1
            writer.add_tensor(f"{name}.weight", values)
        else:
            data = gguf.quants.quantize(values, kind)
            if name == nan:
                data[3, :2] = (0, 0x7E)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def found(path: Path) -> list[str]:
    return [str(finding) for finding in verify(path).findings]


def test_a_whole_file_is_clean_by_itself_and_in_a_folder(tmp_path, capsys):
    file = write(tmp_path / "model.gguf")
    assert found(file) == []
    assert main(["verify", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "GGUF: 1 files, 38 tensors" in shown
    assert "9 F32" in shown
    assert "17 Q8_0" in shown
    assert "12 Q4_0" in shown


@pytest.mark.parametrize(
    ("made", "tensor", "problem"),
    [
        ({"leave_out": "token_embd"}, "token_embd.weight", "is missing"),
        ({"leave_out": "output_norm"}, "output_norm.weight", "is missing"),
        ({"leave_out": "blk.2.ffn_up"}, "blk.2.ffn_up.weight", "is missing, and other blocks have it"),
        ({"extra": "blk.4.ffn_up"}, "blk.4.ffn_up.weight", "is beyond the 4 blocks"),
        ({"eos": WORDS}, "tokenizer.ggml.eos_token_id", "is 40, and there are 40 tokens"),
        ({"words": WORDS + 1}, "token_embd.weight", "has 40 rows for 41 tokens"),
        ({"nan": "blk.1.attn_norm"}, "blk.1.attn_norm.weight", "1 of 64 values are NaN or infinite"),
        ({"nan": "blk.1.attn_q"}, "blk.1.attn_q.weight", "1 of 128 scales are NaN or infinite"),
        ({"nan": "blk.1.ffn_up"}, "blk.1.ffn_up.weight", "1 of 128 scales are NaN or infinite"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, made, tensor, problem):
    file = write(tmp_path / "model.gguf", **made)
    (finding,) = verify(file).findings
    assert (finding.place, finding.tensor) == ("model.gguf", tensor)
    assert problem in finding.problem


@pytest.mark.parametrize("cut", [1, 1000, 20000])
def test_a_truncated_file_is_named_by_the_tensors_that_are_cut_off(tmp_path, cut):
    whole = write(tmp_path / "whole.gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(whole.read_bytes()[:-cut])
    tensors = gguf.GGUFReader(whole).tensors
    lost = {tensor.name for tensor in tensors if tensor.data_offset + tensor.n_bytes > whole.stat().st_size - cut}
    assert lost or cut < 32  # the last bytes are padding
    assert {finding.tensor for finding in verify(file).findings} == lost


@pytest.mark.parametrize("size", [0, 3, 100, 1500])
def test_a_file_that_ends_within_its_header_is_named(tmp_path, size):
    file = write(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:size])
    (line,) = found(file)
    assert "its header can't be read" in line


def test_a_file_of_another_kind_is_named(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"safetensors" * 100)
    assert "GGUF magic invalid" in found(file)[0]


def test_a_folder_with_both_kinds_of_files_is_looked_at_whole(exported, tmp_path):
    shutil.copytree(exported("w4").vllm, tmp_path / "both")
    write(tmp_path / "both" / "model.gguf", leave_out="blk.0.attn_q")
    report = verify(tmp_path / "both")
    assert [one.tensor for one in report.findings] == ["blk.0.attn_q.weight"]
    assert len(report.checked) == 4
