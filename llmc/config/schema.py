"""The configuration as typed, frozen sections: every key, its type, and every rule about values.

The keys are LLMC's. What may be written in several ways has one form here (see `forms`), so that the rest of the
program never meets a lone eval, bit 16, a group size of -1 or a range of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, model_validator

from llmc.config import forms
from llmc.config.budget import BudgetConfig, candidate_weights
from llmc.config.reporting import ReportConfig
from llmc.config.rules import check_encoder, check_evaluation, check_images, check_written
from llmc.config.section import Section
from llmc.config.suggest import refuse_if
from llmc.config.tensors import Act, KvCache, KvWindow, MixSetting, Weight, check_blocks


class BaseConfig(Section):
    """The run itself: seed, device and memory."""

    seed: int = Field(42, ge=0, description="Seed of every random choice.")
    device: forms.Device = Field("auto", description="Where to compute: auto, cpu, cuda or cuda:N.")
    host_memory_gb: float | None = Field(None, gt=0, description="Activations above it are memory-mapped; None: auto.")
    checkpoint_every: int = Field(5, ge=1, description="Activations are saved every so many blocks, to resume from.")
    threads: int | None = Field(None, ge=1, description="Number of CPU threads; None leaves the choice to torch.")
    experts: Literal["auto", "device", "host"] = Field(
        "auto",
        description="Where a mixture's experts are while nobody needs them; auto: on the host, if a block would take "
        "more than half of the device's free memory.",
    )
    forward: Literal["auto", "staged", "replay"] = Field("auto", description="Forwards of a block: one, or a second.")


class ModelConfig(Section):
    """The checkpoint to compress."""

    type: forms.Family = Field("auto", description="Model family by its LLMC name; auto finds it from the checkpoint.")
    path: str = Field(min_length=1, description="Folder of the checkpoint, or its name on the Hugging Face hub.")
    torch_dtype: forms.DType = Field("auto", description="Data type to compute in; auto takes the checkpoint's.")
    tokenizer_mode: Literal["fast", "slow"] = Field("fast", description="Which tokenizer implementation to load.")
    trust_remote_code: bool = Field(False, description="Allow Python code that comes with the checkpoint to run.")


class CalibConfig(Section):
    """The text that the statistics are taken from."""

    name: forms.CalibName = Field(
        description="Which data set; mix is wikitext2, ptb and c4 together; text is a local .txt, .jsonl, .parquet "
        "file or folder; custom_mm a folder with images and samples.json."
    )
    path: str | None = Field(None, description="Where the data set lies.")
    download: bool = Field(False, description="Fetch the data set from the Hugging Face hub.")
    n_samples: int = Field(128, ge=1, description="Number of samples.")
    bs: int = Field(1, description="Samples in one batch; -1 puts all of them in one.")
    seq_len: int | None = Field(None, ge=2, description="Tokens in one sample.")
    preproc: forms.Preproc | None = Field(None, description="How samples are cut from the text.")
    seed: int = Field(42, ge=0, description="Seed of the choice of samples.")
    moe: Literal["routed", "all_tokens"] = Field(
        "routed",
        description="Which tokens calibrate the experts of a mixture: those routed to each, or all for every expert.",
    )
    moe_min_tokens: int | None = Field(
        None,
        ge=0,
        description="An expert that fewer tokens reach takes the statistics of all experts of its layer; None: an "
        "eighth of its input channels.",
    )
    padding: bool = Field(False, description="Pad the samples on the left instead of cutting them to one length.")
    apply_chat_template: bool = Field(False, description="Wrap every sample in the model's chat template.")
    add_answer: bool = Field(False, description="With images: append the answer to each question.")
    text_field: str | None = Field(None, description="Field of jsonl or parquet rows with the text; None means text.")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        local = self.name in ("text", "custom_txt", "custom_mm")
        whole = self.preproc == "original_txt"
        refuse_if(self.bs < 1 and self.bs != -1, "bs", f"{self.bs} is neither -1 (all in one batch) nor at least 1")
        refuse_if(local and not self.path, "path", f"missing; name {self.name!r} reads a local file or folder")
        made = self.preproc and self.name == "custom_mm"
        refuse_if(
            made, "preproc", f"{self.preproc} has no use with name custom_mm: the model's processor makes samples"
        )
        refuse_if(whole and self.seq_len, "seq_len", f"{self.seq_len} has no use with preproc original_txt")
        mixed = self.name == "mix"
        refuse_if(mixed != (self.preproc == "mix_gptq"), "preproc", "mix_gptq and name mix go together")
        refuse_if(mixed and self.n_samples % 3, "n_samples", f"{self.n_samples} isn't a multiple of 3, the sets of mix")
        if not self.padding and self.name != "custom_mm":
            refuse_if(not self.preproc, "preproc", "missing; how samples are cut, for example txt_general_preproc")
            refuse_if(not whole and not self.seq_len, "seq_len", f"missing; preproc {self.preproc} needs it")
        return self


class EvalConfig(Section):
    """One evaluation: what to measure, on which text, and at which stages of the run."""

    eval_pos: forms.EvalPositions = Field(description="Stages to evaluate; an empty list for none.")
    type: forms.EvalType = Field("ppl", description="What to measure; a list measures all of it on the same text.")
    name: str = Field("", description="Which data set; text is a local .txt, .jsonl, .parquet file or folder.")
    path: str | None = Field(
        None, description="Where the data set lies; for lm_eval a folder with task files; for generate_only prompts."
    )
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
    tasks: forms.Names = Field((), description="For lm_eval: names of its tasks and groups, or of those in path.")
    num_fewshot: int | None = Field(
        None, ge=0, description="For lm_eval: examples in a prompt; None: as a task has it."
    )
    limit: int | float | None = Field(
        None, gt=0, description="For lm_eval: only the first so many documents of a task; below 1, such a share."
    )
    server: str | None = Field(
        None, description="For lm_eval: an OpenAI-compatible server to ask, such as http://127.0.0.1:8000/v1."
    )
    server_model: str | None = Field(None, description="The model's name on the server; None: the only one it has.")
    confirm_run_unsafe_code: bool = Field(False, description="For lm_eval: let tasks run code that the model wrote.")

    _together = model_validator(mode="after")(check_evaluation)


class MethodSection(Section):
    """A section whose method has options of its own; `load_config` resolves the raw `special` to typed `options`."""

    special: forms.Options = Field({}, description="Options of the method; keyed by method if there are several.")
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

    method: forms.Names = Field(description="The methods, applied in this order in one pass.")
    weight: Weight = Field(None, description="How weights are quantized; None leaves them.")
    act: Act = Field(None, description="How activations are quantized; None leaves them.")
    kvcache: KvCache = Field(None, description="How the KV cache is quantized; None leaves it.")
    mix_bits: dict[str, MixSetting] = Field({}, description="Named settings for layers that get another scheme.")
    bit_budget: BudgetConfig | None = Field(
        None, description="Bits out of which each layer's scheme is chosen; written in mix_bits."
    )
    quant_out: bool | None = Field(None, description="Feed each block compressed outputs; None: as the method has it.")
    tp: int = Field(1, ge=1, description="Tensor-parallel shards that scales are computed for.")
    token_reduction: forms.Options | None = Field(None, description="Accepted from LLMC: reduction of visual tokens.")
    vision: QuantConfig | None = Field(
        None, description="How the image encoder is quantized, by the same keys; None leaves it."
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        refuse_if(not self.method and self.vision is None, "method", "empty; at least one entry is needed")
        check_encoder(self.vision)
        twice = [name for name in self.method if self.method.count(name) > 1]
        refuse_if(twice, "method", f"{twice[:1]} stands there twice")
        refuse_if(self.tp > 1, "tp", f"{self.tp}: tensor-parallel scales are not supported yet")
        check_blocks(self.weight, self.act)
        refuse_if(self.bit_budget and not self.weight, "weight", "missing; mix_bits.budget varies its bits")
        if self.bit_budget and self.weight:
            candidate_weights(self.weight, self.bit_budget.candidates)
        return self


class SparseWeight(Section):
    """How much is pruned."""

    sparsity: float | None = Field(None, ge=0, lt=1, description="Fraction of the weights that become zero.")
    pattern: forms.ZeroPattern | None = Field(None, description='Such as "2:4", zeros in each run; None: anywhere.')
    n_prune_layers: int | None = Field(None, ge=1, description="Number of blocks that ShortGPT removes.")


class SparseKvCache(KvWindow):
    """How the KV cache is thinned out."""

    method: Literal["ShadowKV", "SinkKV"] = Field(description="Which method.")
    replace_attn: bool = Field(False, description="Whether the attention is replaced too.")


class SparseConfig(MethodSection):
    """What is pruned, and by which method."""

    method: forms.Pruner = Field(description="The method.")
    weight: SparseWeight = Field(default_factory=SparseWeight.defaults, description="How much is pruned.")
    sparsity_out: bool | None = Field(None, description="Feed each block pruned outputs; None: as the method has it.")
    kvcache: SparseKvCache | None = Field(None, description="How the KV cache is thinned out.")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        wanted = {"ShortGPT": "n_prune_layers", "Dense": None, "TokenReduction": None}.get(self.method, "sparsity")
        given = {key for key, value in self.weight if value is not None and (key, wanted) != ("pattern", "sparsity")}
        refuse_if(wanted and given != {wanted}, "weight", f"{self.method} needs {wanted} here, and nothing else")
        idle = self.method == "ShortGPT" and self.sparsity_out
        refuse_if(idle, "sparsity_out", "has no use with ShortGPT, which surveys the original model; leave it out")
        refuse_if(told := forms.pattern_conflict(self.weight.pattern, self.weight.sparsity), "weight", told)
        return self


class IgnoredLayers(Section):
    """Layers that stay as they are."""

    block_ids: forms.BlockIds = Field((), description="Numbers, or ranges such as 0-3; limits layer_names.")
    layer_names: forms.Names = Field((), description="Names within a block; limited to block_ids, if given.")
    special_names: forms.Names = Field((), description="Full names of further layers.")


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
    save_llamacpp: bool = Field(False, description="Save for llama.cpp: one GGUF file.")
    save_imatrix: bool = Field(False, description="Save how large inputs are, for llama.cpp's llama-quantize.")
    trtllm_cfg: TrtllmConfig | None = Field(None, description="Refused: TensorRT-LLM has no engines any more.")

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

    base: forms.OrDefault[BaseConfig] = Field(default_factory=BaseConfig.defaults, description="The run itself.")
    model: ModelConfig = Field(description="The checkpoint to compress.")
    calib: CalibConfig | None = Field(None, description="The calibration text; None for methods that need no data.")
    eval: Annotated[tuple[EvalConfig, ...], BeforeValidator(forms.evals)] = Field((), description="What to measure.")
    quant: QuantConfig | None = Field(None, description="What is quantized, and by which methods.")
    sparse: SparseConfig | None = Field(None, description="What is pruned, and by which method.")
    ignored_layers: forms.OrDefault[IgnoredLayers] = Field(
        default_factory=IgnoredLayers.defaults, description="Layers that stay as they are."
    )
    save: forms.OrDefault[SaveConfig] = Field(default_factory=SaveConfig.defaults, description="What is written.")
    report: forms.OrDefault[ReportConfig] = Field(
        default_factory=ReportConfig.defaults, description="What is told of the run."
    )
    opencompass: OpenCompassConfig | None = Field(None, description="An evaluation by OpenCompass after the run.")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        refuse_if(self.opencompass and not self.save.save_trans, "opencompass", "needs save.save_trans: True")
        compressed = {position for one in self.eval for position in one.eval_pos} - {"pretrain"}
        bare = compressed and not (self.quant or self.sparse)
        refuse_if(bare, "eval", f"{min(compressed, default='')} needs a section quant or sparse")
        check_written(self)
        check_images(self)
        return self
