"""How tensors are quantized: the sections for weights, activations and KV cache, and for layers with schemes of their
own."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from llmc.config import forms
from llmc.config.places import read_layers
from llmc.config.rules import check_cache
from llmc.config.section import Section
from llmc.config.suggest import refuse_if


class TensorConfig(Section):
    """How one kind of tensor is quantized: what weights, activations and the KV cache share."""

    bit: forms.Bit = Field(description="Bits, 2..16 (16 means off), or e4m3, e5m2, e2m1, mxfp4, mxfp8, nvfp4.")
    quant_type: Literal["int-quant", "float-quant"] = Field("int-quant", description="Kind of grid; follows from bit.")
    symmetric: bool = Field(description="Whether the grid is symmetric around zero and so has no zero point.")
    granularity: str = Field(description="Which elements share one scale.")
    group_size: forms.GroupSize = Field(None, description="Elements in a group, for per_group.")
    head_num: int | None = Field(None, ge=1, description="Number of heads, for per_head.")
    calib_algo: str = Field("minmax", description="How ranges are found.")
    mse_b_num: int = Field(1, ge=1, description="Portions in which the mse search handles the rows, to save memory.")
    maxshrink: float = Field(0.8, gt=0, le=1, description="Largest fraction by which the mse search shrinks a range.")
    mse_grid: int = Field(100, ge=1, description="Steps of the mse search over the whole range.")
    bins: int = Field(2048, ge=2, description="Bins of the histogram for static_hist.")
    ste: bool = Field(False, description="Pass gradients straight through the rounding.")
    ste_all: bool = Field(False, description="Pass gradients straight through the whole quantizer.")
    round_zp: bool = Field(True, description="Round the zero point to a whole number.")
    int_range: forms.Range | None = Field(None, description="Smallest and largest integer code; None: all.")
    float_range: forms.Range | None = Field(None, description="Smallest and largest value of the float grid.")
    use_qtorch: bool = Field(False, description="Accepted from LLMC; float grids are always those of the hardware.")
    scale_dtype: forms.ScaleDType = Field("auto", description="Data type of stored scales; auto takes the model's.")

    _complete = model_validator(mode="before")(forms.complete_tensor)

    @model_validator(mode="after")
    def _tensor_rules(self) -> Self:
        size, grain, codes, floating = self.group_size, self.granularity, self.int_range, isinstance(self.bit, str)
        mixed = (self.quant_type == "float-quant") != floating
        refuse_if(mixed, "quant_type", f"{self.quant_type} doesn't go with bit {self.bit}")
        refuse_if(floating and not self.symmetric, "symmetric", f"{self.bit} has no zero point; set it to True")
        fixed = forms.MICRO_GROUPS.get(str(self.bit), size)
        refuse_if(size != fixed, "group_size", f"{self.bit} has groups of {fixed}; leave it and granularity out")
        grouped = grain == "per_group"
        refuse_if(grouped and (size is None or size < 1), "group_size", "granularity per_group needs one above 0")
        refuse_if(not grouped and size is not None, "group_size", f"{size} has no use with {grain}; leave it out")
        refuse_if(grain == "per_head" and not self.head_num, "head_num", "missing; granularity per_head needs it")
        wide = codes and isinstance(self.bit, int) and codes[1] - codes[0] >= 2**self.bit
        refuse_if(wide, "int_range", f"{codes} holds more codes than {self.bit} bits have")
        return self


class BitLevel(Section):
    """One of the two levels of 4-in-8-bit weights."""

    symmetric: bool = Field(description="Whether the codes are symmetric around zero.")
    granularity: Literal["per_group", "per_channel", "per_tensor"] = Field(description="What shares one scale.")
    group_size: forms.GroupSize = Field(None, ge=1, description="Elements in a group, for per_group.")
    scales_bit: int = Field(8, ge=2, le=16, description="Bits of the integer scales.")
    scales_symmetric: bool = Field(True, description="Whether the integer scales are symmetric around zero.")
    zeros_bit: int = Field(8, ge=2, le=16, description="Bits of the integer zero points.")
    zeros_symmetric: bool = Field(True, description="Whether the integer zero points are symmetric around zero.")
    int_range: forms.Range | None = Field(None, description="Smallest and largest integer code; None: all.")


class WeightConfig(TensorConfig):
    """How weights are quantized."""

    granularity: forms.WeightGrain = Field(description="Which weights share one scale.")
    block_size: int | None = Field(None, ge=1, description="Side of the square blocks, for per_block.")
    calib_algo: Literal["minmax", "mse", "learnable", "hqq"] = Field("minmax", description="How ranges are found.")
    sym_mode: Literal["restricted", "full", "gptq"] = Field("restricted", description="Convention of symmetric grids.")
    lp_norm: float = Field(0.7, gt=0, description="Norm of the error for calib_algo hqq.")
    beta: float = Field(10.0, gt=0, description="Initial penalty for calib_algo hqq.")
    kappa: float = Field(1.01, gt=0, description="Growth of the penalty for calib_algo hqq.")
    iters: int = Field(20, ge=1, description="Iterations for calib_algo hqq.")
    scale_digits: int | None = Field(
        None, ge=1, le=24, description="Binary digits kept of a scale (7: Q4_1 of GGUF); None: all."
    )
    need_pack: bool = Field(False, description="Accepted from LLMC; every exporter knows how it packs.")
    pack_version: Literal["gemm_pack"] | None = Field(None, description="Accepted from LLMC; the AutoAWQ layout.")
    bit4: BitLevel | None = Field(None, description="Inner level, for bit 48.")
    bit8: BitLevel | None = Field(None, description="Outer level, for bit 48.")
    w_1: WeightConfig | None = Field(None, description="First, fine level of DGQ.")
    w_2: WeightConfig | None = Field(None, description="Second, coarse level of DGQ.")

    @model_validator(mode="after")
    def _weight_rules(self) -> Self:
        blocked = self.granularity == "per_block"
        refuse_if(blocked and not self.block_size, "block_size", "missing; per_block needs it, for example 128")
        refuse_if(self.sym_mode != "restricted" and not self.symmetric, "sym_mode", "has no use if symmetric is False")
        floating = isinstance(self.bit, str)
        refuse_if(floating and self.scale_digits, "scale_digits", f"has no use with {self.bit}; it's for integers")
        split = self.bit == forms.FOUR_IN_EIGHT
        for level in ("bit4", "bit8"):
            refuse_if(split and not getattr(self, level), level, "missing; bit 48 is described by bit4 and bit8")
            refuse_if(not split and getattr(self, level), level, f"has no use with bit {self.bit}; it goes with 48")
        refuse_if(bool(self.w_1) != bool(self.w_2), "w_1", "goes together with w_2, the second level")
        return self


class StreamConfig(TensorConfig):
    """How tensors are quantized that exist only while the model runs."""

    granularity: forms.StreamGrain = Field(description="Which elements share one scale.")
    calib_algo: forms.StreamAlgo = Field("minmax", description="How ranges are found; static_* need static: True.")
    static: bool = Field(False, description="Take the ranges from the calibration text, not from each input.")

    @model_validator(mode="after")
    def _stream_rules(self) -> Self:
        refuse_if(self.bit == forms.FOUR_IN_EIGHT, "bit", "48 is not in 2..16 (it is a form of weights)")
        whole, clustered = self.granularity == "per_tensor", self.granularity == "per_cluster"
        refuse_if(self.static and not (whole or clustered), "granularity", "static: True needs per_tensor")
        refuse_if(
            clustered and not self.static, "static", "must be True: ranges of clusters come from calibration text"
        )
        further = clustered and self.calib_algo in ("static_hist", "static_moving_minmax")
        refuse_if(further, "calib_algo", f"{self.calib_algo} has no use with per_cluster; see special.metric of RPTQ")
        lost = self.calib_algo.startswith("static") and not self.static
        refuse_if(lost, "calib_algo", f"{self.calib_algo} needs static: True beside it")
        return self


class ActConfig(StreamConfig):
    """How activations, the inputs of Linears, are quantized."""

    quant_attn: bool = Field(False, description="Quantize the inputs of the attention products too.")
    quant_softmax: bool = Field(False, description="Quantize the attention probabilities too.")
    quant_act_fn: bool = Field(False, description="Quantize the output of the activation function too.")


class KvWindow(Section):
    """Which tokens of the KV cache stay as they are."""

    window_length: int | None = Field(None, ge=1, description="Latest tokens that are kept.")
    num_sink_tokens: int | None = Field(None, ge=0, description="First tokens that are kept.")


class KvCacheConfig(StreamConfig):
    """How the KV cache is quantized."""

    method: Literal["Naive", "Kivi"] = Field(description="Naive, or Kivi (keys by channel, values by token).")
    residual_length: int = Field(128, ge=1, description="Latest tokens that stay in full precision, for Kivi.")
    special: KvWindow | None = Field(None, description="Tokens that stay in full precision.")

    _together = model_validator(mode="after")(check_cache)


def check_blocks(weight: WeightConfig | None, act: ActConfig | None) -> None:
    """Weights in square blocks are multiplied by activations in groups as long as a block's side."""
    if weight and act and (block := weight.block_size):
        same = act.granularity == "per_group" and act.group_size == block
        refuse_if(not same, "act", f"weights per_block need act per_group with group_size {block}")


Tensor = TypeVar("Tensor", bound=TensorConfig)


def _off_at_16(value: Tensor) -> Tensor | None:
    return None if value.bit == 16 else value


Weight = Annotated[WeightConfig, AfterValidator(_off_at_16)] | None
Act = Annotated[ActConfig, AfterValidator(_off_at_16)] | None
KvCache = Annotated[KvCacheConfig, AfterValidator(_off_at_16)] | None


class MixSetting(Section):
    """Another scheme for some layers, or none."""

    layer_name: Annotated[forms.Names, AfterValidator(read_layers)] = Field(
        min_length=1, description="Such as down_proj or mlp.experts.*.down_proj; down_proj#0-3 for blocks 0 and 3."
    )
    do_quant: bool = Field(True, description="Whether these layers are quantized at all.")
    weight: Weight = Field(None, description="How their weights are quantized.")
    act: Act = Field(None, description="How their inputs are quantized; None leaves them, whatever quant.act says.")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        bare = self.do_quant and not self.weight
        refuse_if(bare, "weight", "missing; a setting is the whole scheme of its layers, or do_quant: False")
        check_blocks(self.weight, self.act)
        return self
