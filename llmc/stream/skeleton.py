"""A model without weights, into which transformers' own conversion loads one unit at a time.

``transformers.core_model_loading`` is internal to transformers: this is the only file that knows it, and the tests
compare what it loads with ``from_pretrained``, tensor for tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from ..errors import CheckpointError, ModelError
from .memory import unheaped

EMBED, HEAD = "embed", "head"


def block_unit(index: int) -> str:
    """Name of the unit of block ``index``."""
    return f"block-{index}"


def load_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        CheckpointError: ``config.json`` isn't understood, or asks for remote code without consent.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as problem:
        raise CheckpointError(f"{folder}/config.json can't be used: {problem}", "check model.path") from problem
    if not isinstance(config, PretrainedConfig):
        raise CheckpointError(f"{folder}/config.json isn't a model's configuration", "check model.path")
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{folder} is already quantized ({config.quantization_config.get('quant_method', 'unknown method')})",
            "give the original, unquantized checkpoint as model.path",
        )
    return config


@dataclass(frozen=True)
class Anatomy:
    """What a checkpoint of an architecture holds, by the checkpoint's own names.

    Attributes:
        shapes: of every tensor.
        classes: class of the module that a ``.weight`` belongs to, by the module's name; the matrices of a mixture's
            experts, which Transformers keeps in one tensor, count as ``Linear``.
        tied: tensors that needn't be there, since others hold their values.
        prefix: what names may begin with, or leave out.
    """

    shapes: Mapping[str, tuple[int, ...]]
    classes: Mapping[str, str]
    tied: frozenset[str]
    prefix: str


def anatomy(folder: Path) -> Anatomy:
    """What a checkpoint with this ``config.json`` holds before anything is quantized. No code of its own is run.

    Raises:
        CheckpointError: Transformers doesn't understand it.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        config.__dict__.pop("quantization_config", None)
        auto: Any = AutoModelForCausalLM
        with unheaped(), init_empty_weights(include_buffers=False):
            model: Any = auto.from_config(config)
    except Exception as problem:  # configurations and models of any family, each with errors of its own
        raise CheckpointError(
            f"{folder}/config.json can't be used: {problem}", "is it a causal language model?"
        ) from problem
    state = model.state_dict()
    own = {id(tensor): name for name, tensor in state.items()}
    stored = revert_weight_conversion(model, state)
    renamed = {own[id(tensor)]: name for name, tensor in stored.items() if id(tensor) in own}
    classes = {
        renamed[f"{name}.weight"].removesuffix(".weight"): "Linear"
        if isinstance(module, nn.Linear)
        else type(module).__name__
        for name, module in model.named_modules()
        if f"{name}.weight" in renamed
    }
    split = {name for name, tensor in stored.items() if id(tensor) not in own and tensor.ndim == 2}
    classes |= {name.removesuffix(".weight"): "Linear" for name in split if name.endswith(".weight")}
    tied = frozenset(renamed[name] for name in getattr(model, "all_tied_weights_keys", None) or {} if name in renamed)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    return Anatomy(shapes, classes, tied, f"{model.base_model_prefix}.")


def empty_model(config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """A causal language model in eval mode, its parameters on the meta device, its buffers real.

    Raises:
        ModelError: Transformers has no causal language model for the configuration, or its code fails to make it.
    """
    logging: Any = transformers_logging  # parts of it have no annotations
    logging.disable_progress_bar()
    auto: Any = AutoModelForCausalLM  # from_config has no annotations
    if config.is_encoder_decoder:
        raise ModelError(
            f"'{config.model_type}' is an encoder-decoder, and llmc compresses decoder-only language models",
            "give a causal language model",
        )
    try:
        # Each parameter is made before it's taken away again: as many holes in the heap as the model is large.
        with unheaped(), init_empty_weights(include_buffers=False):
            model: Any = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as problem:  # configurations and models of any family, each with errors of its own
        raise ModelError(
            f"Transformers can't make a causal language model of this config.json: {_first_line(problem)}",
            "is it one? a model with code of its own needs model.trust_remote_code: True",
        ) from problem
    return model.eval()


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0] or type(problem).__name__


class Skeleton:
    """The model on the meta device (buffers are real), in an explicit computing dtype.

    Attributes:
        model: the transformers model.
        blocks: its blocks, as found at the adapter's path.
        units: checkpoint names of each unit's tensors.
        parameter_of: from checkpoint name to the model's parameter name.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        names: Iterable[str],
        *,
        blocks: str,
        head: tuple[str, ...],
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
    ) -> None:
        self.model: Any = empty_model(config, dtype, trust_remote_code=trust_remote_code)
        wrong = [name for name, p in self.model.named_parameters() if p.is_floating_point() and p.dtype != dtype]
        if wrong:
            raise ModelError(f"parameter {wrong[0]} insists on another dtype than {dtype}", "set model.torch_dtype")
        self._device = device
        for module in self.model.modules():
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self.blocks: nn.ModuleList = self.model.get_submodule(blocks)
        self.units: dict[str, list[str]] = {EMBED: [], HEAD: []}
        self.units |= {block_unit(index): [] for index in range(len(self.blocks))}
        self.parameter_of: dict[str, str] = {}
        self._assign(list(names), f"{blocks}.", head)
        self._keep_tied()

    def _assign(self, names: list[str], prefix: str, head: tuple[str, ...]) -> None:
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state = self.model.state_dict()
        for name in names:
            renamed, converted = rename_source_key(name, renamings, converters, self.model.base_model_prefix, state)
            if converted is not None:
                raise ModelError(
                    f"{name}: the checkpoint's layout of this tensor is merged while loading, which isn't supported",
                    "this architecture needs an adapter that splits it",
                )
            if renamed not in state:
                continue  # a leftover that the model doesn't have, such as an old rotary buffer
            self.parameter_of[name] = renamed
            if renamed.startswith(prefix):
                index = int(renamed[len(prefix) :].split(".")[0])
                self.units[block_unit(index)].append(name)
            else:
                behind = any(renamed.startswith(f"{module}.") for module in head)
                self.units[HEAD if behind else EMBED].append(name)
        missing = sorted(set(state) - set(self.parameter_of.values()) - set(self.tied()) - self._buffers())
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"the checkpoint has no tensor {missing[0]}{more}", "is the download complete?")

    def _buffers(self) -> set[str]:
        return {name for name, _ in self.model.named_buffers()}

    def tied(self) -> dict[str, str]:
        """Parameters that the model shares with others, and with which, where its configuration ties them."""
        tied = getattr(self.model, "all_tied_weights_keys", None)
        return dict(tied) if isinstance(tied, Mapping) else {}

    def _keep_tied(self) -> None:
        stored = set(self.parameter_of.values())
        self.tied_head = any(name not in stored and source in stored for name, source in self.tied().items())

    @unheaped()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Convert and place checkpoint tensors. They take the skeleton's dtype, whatever theirs.

        Raises:
            CheckpointError: a shape or name doesn't fit the configuration.
        """
        mapping: Any = get_model_conversion_mapping(self.model)  # annotated more loosely than what takes it
        info, _ = convert_and_load_state_dict_in_model(
            self.model,
            dict(tensors),
            LoadStateDictConfig(
                weight_mapping=mapping,
                device_map={"": self._device},
                dtype=self.model.dtype,
            ),
        )
        if info.mismatched_keys:
            name = sorted(str(key) for key in info.mismatched_keys)[0]
            raise CheckpointError(
                f"{name}: the shape doesn't fit config.json", "do config.json and the weights belong together?"
            )
        problems = [*info.unexpected_keys, *info.conversion_errors, *info.error_msgs]
        if problems:
            raise CheckpointError(f"transformers could not load {problems[0]}", "is the checkpoint complete?")

    def release(self, module: nn.Module) -> None:
        """Put a module's parameters back to the meta device."""
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def release_unit(self, unit: str) -> None:
        """The same for the embedding or the head."""
        for name in self.units[unit]:
            owner, _, leaf = self.parameter_of[name].rpartition(".")
            module = self.model.get_submodule(owner)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(module._parameters[leaf].to("meta"), requires_grad=False)

    def modules_of(self, unit: str) -> list[nn.Module]:
        """The modules that own the parameters of a unit."""
        owners = {self.parameter_of[name].rpartition(".")[0] for name in self.units[unit]}
        return [self.model.get_submodule(owner) for owner in sorted(owners)]

    def tie(self) -> None:
        """Share the loaded embedding with the head again, where the model ties them."""
        self.model.tie_weights()
