"""The configuration as typed, frozen sections: every key, its type, and every rule about values.

The keys are LLMC's. What may be written in several ways has one form here (see `legacy`), so that the rest of the
program never meets a lone eval, bit 16, a group size of -1 or a range of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from llmc.config import legacy
from llmc.config.rules import check_cache, check_evaluation
from llmc.config.suggest import refuse_if


class Section(BaseModel):
    """What all sections share: unknown keys refused, no silent conversion of types, no change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def defaults(cls) -> Self:
        """The section that is meant if none is written."""
        return cls.model_validate({})


class BaseConfig(Section):
    """The run itself: seed, device and memory."""

    seed: int = Field(42, ge=0, description="Seed of every random choice.")
    device: legacy.Device = Field("auto", description="Where to compute: auto, cpu, cuda or cuda:N.")
    host_memory_gb: float | None = Field(None, gt=0, description="Activations above it are memory-mapped; None: auto.")
    checkpoint_every: int = Field(5, ge=1, description="Activations are saved every so many blocks, to resume from.")
    threads: int | None = Field(None, ge=1, description="Number of CPU threads; None leaves the choice to torch.")
    forward: Literal["auto", "staged", "replay"] = Field("auto", description="Forwards of a block: one, or a second.")


class ModelConfig(Section):
    """The checkpoint to compress."""

    type: legacy.Family = Field("auto", description="Model family by its LLMC name; auto finds it from the checkpoint.")
    path: str = Field(min_length=1, description="Folder of the checkpoint, or its name on the Hugging Face hub.")
    torch_dtype: legacy.DType = Field("auto", description="Data type to compute in; auto takes the checkpoint's.")
    tokenizer_mode: Literal["fast", "slow"] = Field("fast", description="Which tokenizer implementation to load.")
    trust_remote_code: bool = Field(False, description="Allow Python code that comes with the checkpoint to run.")


class CalibConfig(Section):
    """The text that the statistics are taken from."""

    name: legacy.CalibName = Field(description="Which data set; text is a local .txt, .jsonl, .parquet file or folder.")
    path: str | None = Field(None, description="Where the data set lies.")
    download: bool = Field(False, description="Fetch the data set from the Hugging Face hub.")
    n_samples: int = Field(128, ge=1, description="Number of samples.")
    bs: int = Field(1, description="Samples in one batch; -1 puts all of them in one.")
    seq_len: int | None = Field(None, ge=2, description="Tokens in one sample.")
    preproc: legacy.Preproc | None = Field(None, description="How samples are cut from the text.")
    seed: int = Field(42, ge=0, description="Seed of the choice of samples.")
    padding: bool = Field(False, description="Pad the samples on the left instead of cutting them to one length.")
    apply_chat_template: bool = Field(False, description="Wrap every sample in the model's chat template.")
    add_answer: bool = Field(False, description="Append the answer to each question.")
    text_field: str | None = Field(None, description="Field of jsonl or parquet rows with the text; None means text.")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        local = self.name in ("text", "custom_txt", "custom_mm")
        whole = self.preproc == "original_txt"
        refuse_if(self.bs < 1 and self.bs != -1, "bs", f"{self.bs} is neither -1 (all in one batch) nor at least 1")
        refuse_if(local and not self.path, "path", f"missing; name {self.name!r} reads a local file or folder")
        refuse_if(whole and self.seq_len, "seq_len", f"{self.seq_len} has no use with preproc original_txt")
        if not self.padding and self.name != "custom_mm":
            refuse_if(not self.preproc, "preproc", "missing; how samples are cut, for example txt_general_preproc")
            refuse_if(not whole and not self.seq_len, "seq_len", f"missing; preproc {self.preproc} needs it")
        return self


class EvalConfig(Section):
    """One evaluation: what to measure, on which text, and at which stages of the run."""

    eval_pos: legacy.EvalPositions = Field(description="Stages to evaluate; an empty list for none.")
    type: legacy.EvalType = Field("ppl", description="What to measure.")
    name: str = Field(description="Which data set; text is a local .txt, .jsonl, .parquet file or folder.")
    path: str | None = Field(None, description="Where the data set lies.")
    download: bool = Field(False, description="Fetch the data set from the Hugging Face hub.")
    bs: int = Field(1, ge=1, description="Sequences in one forward pass.")
    seq_len: int | None = Field(None, ge=2, description="Tokens in one window.")
    num_chunks: int | None = Field(None, ge=1, description="Evaluate only the first so many windows.")
    protocol: Literal["gptq", "gptq_old"] = Field("gptq", description="How the text is joined and cut into windows.")
    text_field: str | None = Field(None, description="Field of jsonl or parquet rows with the text; None means text.")
    inference_per_block: bool = Field(False, description="Accepted from LLMC; evaluation always streams the blocks.")
    num_samples: int | None = Field(None, ge=1, description="Samples for decode_ppl.")
    num_eval_tokens: int | None = Field(None, ge=2, description="Tokens of each sample for decode_ppl; None: seq_len.")
    apply_chat_template: bool = Field(False, description="Wrap every sample in the model's chat template.")
    max_new_tokens: int = Field(32, ge=1, description="Tokens to generate for generate_only.")
    res_path: str | None = Field(None, description="Where evaluations of code write their answers.")
    format_tabs: bool = Field(False, description="Replace tabs by spaces in generated code.")
    instruction: str | None = Field(None, description="Instruction put before each code task.")
    add_chat_temp: bool = Field(False, description="Wrap every code task in the model's chat template.")
    num_workers: int = Field(8, ge=0, description="Processes that load data for acc.")
    statistics: bool = Field(False, description="Report statistics of vqa.")
    tasks: legacy.Names = Field((), description="Names of evaluation tasks.")

    _together = model_validator(mode="after")(check_evaluation)


class TensorConfig(Section):
    """How one kind of tensor is quantized: what weights, activations and the KV cache share."""

    bit: legacy.Bit = Field(description="Bits, 2..16 (16 means off), or e4m3, e5m2, e2m1, mxfp4, mxfp8, nvfp4.")
    quant_type: Literal["int-quant", "float-quant"] = Field("int-quant", description="Kind of grid; follows from bit.")
    symmetric: bool = Field(description="Whether the grid is symmetric around zero and so has no zero point.")
    granularity: str = Field(description="Which elements share one scale.")
    group_size: legacy.GroupSize = Field(None, description="Elements in a group, for per_group.")
    head_num: int | None = Field(None, ge=1, description="Number of heads, for per_head.")
    calib_algo: str = Field("minmax", description="How ranges are found.")
    mse_b_num: int = Field(1, ge=1, description="Portions in which the mse search handles the rows, to save memory.")
    maxshrink: float = Field(0.8, gt=0, le=1, description="Largest fraction by which the mse search shrinks a range.")
    mse_grid: int = Field(100, ge=1, description="Steps of the mse search over the whole range.")
    bins: int = Field(2048, ge=2, description="Bins of the histogram for static_hist.")
    ste: bool = Field(False, description="Pass gradients straight through the rounding.")
    ste_all: bool = Field(False, description="Pass gradients straight through the whole quantizer.")
    round_zp: bool = Field(True, description="Round the zero point to a whole number.")
    int_range: legacy.Range | None = Field(None, description="Smallest and largest integer code; None: all.")
    float_range: legacy.Range | None = Field(None, description="Smallest and largest value of the float grid.")
    use_qtorch: bool = Field(False, description="Accepted from LLMC; float grids are always those of the hardware.")
    scale_dtype: legacy.ScaleDType = Field("auto", description="Data type of stored scales; auto takes the model's.")

    _complete = model_validator(mode="before")(legacy.complete_tensor)

    @model_validator(mode="after")
    def _tensor_rules(self) -> Self:
        size, grain, codes, floating = self.group_size, self.granularity, self.int_range, isinstance(self.bit, str)
        mixed = (self.quant_type == "float-quant") != floating
        refuse_if(mixed, "quant_type", f"{self.quant_type} doesn't go with bit {self.bit}")
        refuse_if(floating and not self.symmetric, "symmetric", f"{self.bit} has no zero point; set it to True")
        fixed = legacy.MICRO_GROUPS.get(str(self.bit), size)
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
    group_size: legacy.GroupSize = Field(None, ge=1, description="Elements in a group, for per_group.")
    scales_bit: int = Field(8, ge=2, le=16, description="Bits of the integer scales.")
    scales_symmetric: bool = Field(True, description="Whether the integer scales are symmetric around zero.")
    zeros_bit: int = Field(8, ge=2, le=16, description="Bits of the integer zero points.")
    zeros_symmetric: bool = Field(True, description="Whether the integer zero points are symmetric around zero.")
    int_range: legacy.Range | None = Field(None, description="Smallest and largest integer code; None: all.")


class WeightConfig(TensorConfig):
    """How weights are quantized."""

    granularity: legacy.WeightGrain = Field(description="Which weights share one scale.")
    block_size: int | None = Field(None, ge=1, description="Side of the square blocks, for per_block.")
    calib_algo: Literal["minmax", "mse", "learnable", "hqq"] = Field("minmax", description="How ranges are found.")
    sym_mode: Literal["restricted", "full", "gptq"] = Field("restricted", description="Convention of symmetric grids.")
    lp_norm: float = Field(0.7, gt=0, description="Norm of the error for calib_algo hqq.")
    beta: float = Field(10.0, gt=0, description="Initial penalty for calib_algo hqq.")
    kappa: float = Field(1.01, gt=0, description="Growth of the penalty for calib_algo hqq.")
    iters: int = Field(20, ge=1, description="Iterations for calib_algo hqq.")
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
        split = self.bit == legacy.FOUR_IN_EIGHT
        for level in ("bit4", "bit8"):
            refuse_if(split and not getattr(self, level), level, "missing; bit 48 is described by bit4 and bit8")
            refuse_if(not split and getattr(self, level), level, f"has no use with bit {self.bit}; it goes with 48")
        refuse_if(bool(self.w_1) != bool(self.w_2), "w_1", "goes together with w_2, the second level")
        return self


class StreamConfig(TensorConfig):
    """How tensors are quantized that exist only while the model runs."""

    granularity: legacy.StreamGrain = Field(description="Which elements share one scale.")
    calib_algo: legacy.StreamAlgo = Field("minmax", description="How ranges are found; static_* need static: True.")
    static: bool = Field(False, description="Take the ranges from the calibration text, not from each input.")

    @model_validator(mode="after")
    def _stream_rules(self) -> Self:
        refuse_if(self.bit == legacy.FOUR_IN_EIGHT, "bit", "48 is not in 2..16 (it is a form of weights)")
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


Tensor = TypeVar("Tensor", bound=TensorConfig)


def _off_at_16(value: Tensor) -> Tensor | None:
    return None if value.bit == 16 else value


Weight = Annotated[WeightConfig, AfterValidator(_off_at_16)] | None
Act = Annotated[ActConfig, AfterValidator(_off_at_16)] | None
KvCache = Annotated[KvCacheConfig, AfterValidator(_off_at_16)] | None


class MixSetting(Section):
    """Another scheme for some layers, or none."""

    layer_name: legacy.Names = Field(min_length=1, description="Such as down_proj; down_proj#0-3 for blocks 0 and 3.")
    do_quant: bool = Field(True, description="Whether these layers are quantized at all.")
    weight: Weight = Field(None, description="How their weights are quantized.")
    act: Act = Field(None, description="How their inputs are quantized.")


class MethodSection(Section):
    """A section whose method has options of its own; `load_config` resolves the raw `special` to typed `options`."""

    special: legacy.Options = Field({}, description="Options of the method; keyed by method if there are several.")
    _options: Mapping[str, BaseModel] = PrivateAttr(default_factory=dict)

    @property
    def options(self) -> Mapping[str, BaseModel]:
        """The options of each method by its name; empty if the methods were not known when the file was read."""
        return self._options

    def with_options(self, options: Mapping[str, BaseModel]) -> Self:
        """A copy that holds the resolved options."""
        copy = self.model_copy()
        copy._options = dict(options)
        return copy


class QuantConfig(MethodSection):
    """What is quantized, and by which methods."""

    method: legacy.Names = Field(min_length=1, description="The methods, applied in this order in one pass.")
    weight: Weight = Field(None, description="How weights are quantized; None leaves them.")
    act: Act = Field(None, description="How activations are quantized; None leaves them.")
    kvcache: KvCache = Field(None, description="How the KV cache is quantized; None leaves it.")
    mix_bits: dict[str, MixSetting] = Field({}, description="Named settings for layers that get another scheme.")
    quant_out: bool | None = Field(None, description="Feed each block compressed outputs; None: as the method has it.")
    tp: int = Field(1, ge=1, description="Tensor-parallel shards that scales are computed for.")
    token_reduction: legacy.Options | None = Field(None, description="Accepted from LLMC: reduction of visual tokens.")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        twice = [name for name in self.method if self.method.count(name) > 1]
        refuse_if(twice, "method", f"{twice[:1]} stands there twice")
        refuse_if(self.tp > 1, "tp", f"{self.tp}: tensor-parallel scales are not supported yet")
        if self.weight and self.act and (block := self.weight.block_size):
            same = self.act.granularity == "per_group" and self.act.group_size == block
            refuse_if(not same, "act", f"weights per_block need act per_group with group_size {block}")
        return self


class SparseWeight(Section):
    """How much is pruned."""

    sparsity: float | None = Field(None, ge=0, lt=1, description="Fraction of the weights that become zero.")
    pattern: legacy.ZeroPattern | None = Field(None, description='Such as "2:4", zeros in each run; None: anywhere.')
    n_prune_layers: int | None = Field(None, ge=1, description="Number of blocks that ShortGPT removes.")


class SparseKvCache(KvWindow):
    """How the KV cache is thinned out."""

    method: Literal["ShadowKV", "SinkKV"] = Field(description="Which method.")
    replace_attn: bool = Field(False, description="Whether the attention is replaced too.")


class SparseConfig(MethodSection):
    """What is pruned, and by which method."""

    method: legacy.Pruner = Field(description="The method.")
    weight: SparseWeight = Field(default_factory=SparseWeight.defaults, description="How much is pruned.")
    sparsity_out: bool | None = Field(None, description="Feed each block pruned outputs; None: as the method has it.")
    kvcache: SparseKvCache | None = Field(None, description="How the KV cache is thinned out.")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        wanted = {"ShortGPT": "n_prune_layers", "Dense": None, "TokenReduction": None}.get(self.method, "sparsity")
        given = {key for key, value in self.weight if value is not None and (key, wanted) != ("pattern", "sparsity")}
        refuse_if(wanted and given != {wanted}, "weight", f"{self.method} needs {wanted} here, and nothing else")
        refuse_if(told := legacy.pattern_conflict(self.weight.pattern, self.weight.sparsity), "weight", told)
        return self


class IgnoredLayers(Section):
    """Layers that stay as they are."""

    block_ids: legacy.BlockIds = Field((), description="Numbers, or ranges such as 0-3; limits layer_names.")
    layer_names: legacy.Names = Field((), description="Names within a block; limited to block_ids, if given.")
    special_names: legacy.Names = Field((), description="Full names of further layers.")


class TrtllmConfig(Section):
    """How a TensorRT-LLM engine is divided."""

    tp_size: int = Field(1, ge=1, description="Tensor-parallel size.")
    pp_size: int = Field(1, ge=1, description="Pipeline-parallel size.")


class SaveConfig(Section):
    """What is written where."""

    save_path: str | None = Field(None, description="Folder that gets one subfolder for each thing saved.")
    on_existing: Literal["fail", "overwrite", "resume"] | None = Field(None, description="What if it is occupied.")
    save_trans: bool = Field(False, description="Save the transformed model in its original precision.")
    save_fake: bool = Field(False, description="Save the fake-quantized model.")
    save_vllm: bool = Field(False, description="Save for vLLM.")
    save_sgl: bool = Field(False, description="Save for SGLang.")
    save_lightllm: bool = Field(False, description="Save for LightLLM.")
    save_autoawq: bool = Field(False, description="Save for AutoAWQ.")
    save_autogptq: bool = Field(False, description="Save for AutoGPTQ and GPTQModel.")
    save_mlcllm: bool = Field(False, description="Save for MLC-LLM.")
    save_trtllm: bool = Field(False, description="Save for TensorRT-LLM.")
    save_llamacpp: bool = Field(False, description="Save for llama.cpp.")
    trtllm_cfg: TrtllmConfig | None = Field(None, description="How the TensorRT-LLM engine is divided.")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        wanted = next((name for name, value in self if value is True), None)
        refuse_if(wanted and not self.save_path, "save_path", f"missing; {wanted} needs a folder to write to")
        return self


class OpenCompassConfig(Section):
    """An evaluation by OpenCompass after the run."""

    cfg_path: str = Field(description="Configuration file of OpenCompass.")
    output_path: str = Field(description="Where OpenCompass writes its results.")


class Config(Section):
    """A whole run."""

    base: legacy.OrDefault[BaseConfig] = Field(default_factory=BaseConfig.defaults, description="The run itself.")
    model: ModelConfig = Field(description="The checkpoint to compress.")
    calib: CalibConfig | None = Field(None, description="The calibration text; None for methods that need no data.")
    eval: Annotated[tuple[EvalConfig, ...], BeforeValidator(legacy.evals)] = Field((), description="What to measure.")
    quant: QuantConfig | None = Field(None, description="What is quantized, and by which methods.")
    sparse: SparseConfig | None = Field(None, description="What is pruned, and by which method.")
    ignored_layers: legacy.OrDefault[IgnoredLayers] = Field(
        default_factory=IgnoredLayers.defaults, description="Layers that stay as they are."
    )
    save: legacy.OrDefault[SaveConfig] = Field(default_factory=SaveConfig.defaults, description="What is written.")
    opencompass: OpenCompassConfig | None = Field(None, description="An evaluation by OpenCompass after the run.")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        refuse_if(self.opencompass and not self.save.save_trans, "opencompass", "needs save.save_trans: True")
        compressed = {position for one in self.eval for position in one.eval_pos} - {"pretrain"}
        bare = compressed and not (self.quant or self.sparse)
        refuse_if(bare, "eval", f"{min(compressed, default='')} needs a section quant or sparse")
        return self
