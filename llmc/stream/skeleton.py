"""A model without weights, into which transformers' own conversion loads one unit at a time.

``transformers.core_model_loading`` is internal to transformers: this is the only file that knows it, and the tests
compare what it loads with ``from_pretrained``, tensor for tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from ..errors import CheckpointError, ModelError
from ..models import BlockSelection, Images
from ..models.experts import HostMemory, LinearExperts
from .empty import auto_class, empty_model, without_memory
from .memory import unheaped

EMBED, HEAD = "embed", "head"


def block_unit(index: int) -> str:
    """Name of the unit of block ``index``."""
    return f"block-{index}"


@dataclass(frozen=True)
class Anatomy:
    """What a checkpoint of an architecture holds, by the checkpoint's own names.

    Attributes:
        shapes: of every tensor.
        classes: class of the module that a ``.weight`` belongs to, by the module's name; the matrices of a mixture's
            experts, which Transformers keeps in one tensor, count as ``Linear``.
        tied: tensors that needn't be there, since others hold their values.
        prefix: what names may begin with, or leave out.
        modules: the model's own names of its modules, which a checkpoint's may differ from.
    """

    shapes: Mapping[str, tuple[int, ...]]
    classes: Mapping[str, str]
    tied: frozenset[str]
    prefix: str
    modules: frozenset[str]


def anatomy(folder: Path, names: Collection[str] = ()) -> Anatomy:
    """What a checkpoint with this ``config.json`` holds before anything is quantized. No code of its own is run.

    Args:
        folder: of the checkpoint.
        names: of its tensors: an encoder has had several spellings, and its names are told in the one that is there.

    Raises:
        CheckpointError: Transformers doesn't understand it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.__dict__.pop("quantization_config", None)
        with without_memory():
            model: Any = auto_class(config).from_config(config)
    except Exception as problem:  # configurations and models of any family, each with errors of its own
        raise CheckpointError(
            f"{folder}/config.json can't be used: {problem}", "is it a causal language model?"
        ) from problem
    state = model.state_dict()
    own = {id(tensor): name for name, tensor in state.items()}
    stored = revert_weight_conversion(model, state)
    if auto_class(config) is AutoModelForImageTextToText:
        spelled = _spelled(model, state, names)
        stored = {spelled.get(own.get(id(tensor), name), name): tensor for name, tensor in stored.items()}
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
    modules = frozenset(name for name, _ in model.named_modules())
    return Anatomy(shapes, classes, tied, f"{model.base_model_prefix}.", modules)


def _spelled(model: Any, state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, str]:
    """The names in a checkpoint of the model's parameters, by their own; a quantized weight's is told by its parts."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    found: dict[str, str] = {}
    for name in names:
        for candidate in (name, f"{name.rpartition('.')[0]}.weight"):
            renamed, _ = rename_source_key(candidate, renamings, [], model.base_model_prefix, dict(state))
            if renamed in state:
                found.setdefault(renamed, candidate)
                break
    return found


@dataclass(frozen=True)
class ExpertPattern:
    """The checkpoint's names of a mixture's matrices that Transformers merges while it loads them.

    Attributes:
        names: how they end, with the expert's number as a group, and the Linear that each is.
    """

    names: tuple[tuple[re.Pattern[str], str], ...]

    @classmethod
    def of(cls, entry: WeightConverter) -> ExpertPattern | None:
        """That of one of Transformers' conversions; None if it does something else."""
        target = entry.target_patterns[0].rpartition(".")[2] if len(entry.target_patterns) == 1 else ""
        linears = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(target, ())
        sources = [source for source in entry.source_patterns if ".*." in source]
        if len(sources) != len(entry.source_patterns) or len(sources) != len(linears):
            return None
        patterns = (re.compile(re.escape(source).replace(r"\*", r"(\d+)") + "$") for source in sources)
        return cls(tuple(zip(patterns, linears, strict=True)))

    def renamed(self, name: str) -> str | None:
        """The name of the Linear's parameter; None if the pattern isn't about it."""
        for pattern, linear in self.names:
            if found := pattern.search(name):
                return f"{name[: found.end(1)]}.{linear}.weight"
        return None


class Skeleton:
    """The model on the meta device (buffers are real), in an explicit computing dtype.

    Attributes:
        model: the transformers model.
        path: the adapter's path of the blocks.
        blocks: its blocks, as found there.
        images: how it reads images; None: it doesn't.
        is_encoder: whether the blocks are those of an encoder; nothing of what is behind them is in a unit then.
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
        images: Images | None = None,
    ) -> None:
        own = images is not None
        self.model: Any = empty_model(config, dtype, trust_remote_code=trust_remote_code, images=own)
        self._experts = [name for name, module in self.model.named_modules() if isinstance(module, LinearExperts)]
        self.images, self.is_encoder = images, False
        wrong = [name for name, p in self.model.named_parameters() if p.is_floating_point() and p.dtype != dtype]
        if wrong:
            raise ModelError(f"parameter {wrong[0]} insists on another dtype than {dtype}", "set model.torch_dtype")
        self._device = device
        self._home: HostMemory | None = None
        for module in self.model.modules():
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self.path = blocks
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
        merged = [entry for entry in map(ExpertPattern.of, converters) if entry] if self._experts else []
        converters = [entry for entry in converters if ExpertPattern.of(entry) is None or not self._experts]
        state = self.model.state_dict()
        for name in names:
            renamed, converted = rename_source_key(name, renamings, converters, self.model.base_model_prefix, state)
            renamed = next((found for entry in merged if (found := entry.renamed(renamed))), renamed)
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
        experts = {name for name in tensors if self._of_expert(self.parameter_of.get(name, name))}
        for name in experts:
            self._place(name, tensors[name])
        tensors = {name: tensor for name, tensor in tensors.items() if name not in experts}
        if not tensors:
            return
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

    def keep_experts(self, home: HostMemory) -> None:
        """Load experts to where they are to be while nobody needs them."""
        self._home = home
        for path in self._experts:
            experts = self.model.get_submodule(path)
            if isinstance(experts, LinearExperts):
                experts.home = home

    def _of_expert(self, parameter: str) -> bool:
        """Whether it's a parameter that Transformers doesn't know, since it keeps all experts' in one."""
        return any(parameter.startswith(f"{path}.") for path in self._experts)

    def _place(self, name: str, tensor: Tensor) -> None:
        owner, _, leaf = self.parameter_of[name].rpartition(".")
        module = self.model.get_submodule(owner)
        expected = module._parameters[leaf]
        if expected is None or expected.shape != tensor.shape:
            raise CheckpointError(
                f"{name}: the shape doesn't fit config.json", "do config.json and the weights belong together?"
            )
        placed = tensor.to(self.model.dtype)
        placed = placed.to(self._device) if self._home is None else self._home.store(placed)
        module._parameters[leaf] = nn.Parameter(placed, requires_grad=False)

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
        """The modules that own the parameters of a unit, but for those that hold the blocks too."""
        owners = {self.parameter_of[name].rpartition(".")[0] for name in self.units[unit]}
        return [self.model.get_submodule(owner) for owner in sorted(owners) if not self.path.startswith(f"{owner}.")]

    def selection(self, dropped: frozenset[int] = frozenset()) -> BlockSelection:
        """The blocks without some."""
        return BlockSelection(len(self.blocks), self.path, dropped, self._stored_path())

    def _stored_path(self) -> str | None:
        """The path of the blocks in the checkpoint; None if its names don't end like the model's."""
        name = next(iter(self.units[block_unit(0)]), "")
        inside = self.parameter_of[name].removeprefix(self.path) if name else ""
        return name.removesuffix(inside) if inside and name.endswith(inside) else None

    def tie(self) -> None:
        """Share the loaded embedding with the head again, where the model ties them."""
        self.model.tie_weights()
