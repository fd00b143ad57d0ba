"""Records what nvidia-modelopt writes for a tiny Llama: names, dtypes, shapes, configurations, and packed values.

tests/export/test_trtllm.py compares llmc's folder for TensorRT-LLM with this record, so that tests need no ModelOpt.
To renew it: pip install --no-deps nvidia-modelopt omegaconf 'pulp<4' nvidia-ml-py antlr4-python3-runtime==4.9.3, and

    python scripts/record_modelopt.py tests/export/modelopt.json
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import modelopt
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.convert_hf_config import _quant_algo_to_group_config
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

MODEL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "tie_word_embeddings": False,
    "architectures": ["LlamaForCausalLM"],
}
CONFIGS = {
    "W4A16_AWQ": mtq.INT4_AWQ_CFG,
    "W4A8_AWQ": mtq.W4A8_AWQ_BETA_CFG,
    "FP8": mtq.FP8_DEFAULT_CFG,
    "FP8_PER_CHANNEL_PER_TOKEN": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "W8A16": mtq.INT8_WEIGHT_ONLY_CFG,
    "NVFP4": mtq.NVFP4_DEFAULT_CFG,
}


def with_cache(config: dict[str, Any]) -> dict[str, Any]:
    return mtq.utils.update_quant_cfg_with_kv_cache_quant(copy.deepcopy(config), mtq.FP8_KV_CFG["quant_cfg"])


def mixed() -> dict[str, Any]:
    """FP8, and NVFP4 for down_proj."""
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    for one in mtq.NVFP4_DEFAULT_CFG["quant_cfg"]:
        if one["quantizer_name"] in ("*weight_quantizer", "*input_quantizer"):
            name = one["quantizer_name"].removeprefix("*")
            config["quant_cfg"].append({**copy.deepcopy(one), "quantizer_name": f"*down_proj*{name}"})
    return config


def exported(model: LlamaForCausalLM, config: dict[str, Any]) -> dict[str, Any]:
    """A folder's tensors of the block and its configurations."""
    copied = copy.deepcopy(model)

    def calibrate(module: torch.nn.Module) -> None:
        with torch.no_grad():
            module(torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0)))

    mtq.quantize(copied, copy.deepcopy(config), calibrate)
    with tempfile.TemporaryDirectory() as folder:
        export_hf_checkpoint(copied, export_dir=folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        described = {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in sorted(tensors.items())
            if ".layers." in name
        }
        stored = json.loads((Path(folder) / "hf_quant_config.json").read_text())
        quantization = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    return {"tensors": described, "hf_quant_config": stored, "quantization_config": quantization}


def hexed(tensor: torch.Tensor) -> str:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes().hex()


def packed() -> dict[str, dict[str, str]]:
    """One weight ``[4, 128]``, ``((i * 37) % 101 - 50) / 64``, as each algorithm stores it."""
    weight = ((torch.arange(512) * 37) % 101 - 50).reshape(4, 128) / 64
    rows = weight.abs().amax(1)
    int4 = rows[:, None] / 7
    fp8, fp8_rows, int8 = weight.abs().amax() / 448, rows / 448, rows / 127
    block, whole = NVFP4QTensor.get_weights_scaling_factor(weight, 16)
    pairs = NVFP4QTensor.quantize(weight, 16, block, whole)[0]
    dense = pairs.dequantize(torch.float32, scale=block, double_scale=whole, block_sizes={-1: 16})
    return {
        "W4A16_AWQ": {"weight": hexed(to_quantized_weight(weight, int4, "int4_awq", block_size=128))},
        "FP8": {"weight": hexed(to_quantized_weight(weight, fp8, "fp8")), "weight_scale": hexed(fp8)},
        "FP8_PER_CHANNEL_PER_TOKEN": {
            "weight": hexed(to_quantized_weight(weight, fp8_rows, "fp8_pc_pt")),
            "weight_scale": hexed(fp8_rows),
        },
        "W8A16": {"weight": hexed(to_quantized_weight(weight, int8, "int8_wo")), "weight_scale": hexed(int8)},
        "NVFP4": {
            "weight": hexed(pairs._quantized_data),
            "weight_scale": hexed(block),
            "weight_scale_2": hexed(whole),
            "dequantized": hexed(dense),
        },
    }


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).to(torch.bfloat16)
    record: dict[str, Any] = {"modelopt": modelopt.__version__, "model": MODEL, "packed": packed()}
    record["exports"] = {name: exported(model, config) for name, config in CONFIGS.items()}
    record["exports"]["FP8 cache"] = exported(model, with_cache(mtq.FP8_DEFAULT_CFG))
    record["exports"]["mixed"] = exported(model, mixed())
    record["groups"] = {name: _quant_algo_to_group_config(name) for name in CONFIGS}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
