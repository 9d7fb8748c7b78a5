"""Declarative description of a model family: its config.json fields, and how its tensors map between Megatron-Core
(`mcore`) and Hugging Face (`hf`).

The tables are in `families/`, one module each. They give shapes by the names of these dimensions:

- `vocab`: number of ids, without padding
- `positions`: number of learned positions
- `hidden`: hidden size
- `ffn`, `gated_ffn`: hidden size of the MLP, twice that
- `head_dim`: dimension of one attention head
- `query`, `kv`: all query heads together, all key (or value) heads together
- `qkv`: query, key and value together
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_prealign.recipe.model import Family as FamilyName
from megatron_prealign.recipe.model import ModelSection

if TYPE_CHECKING:
    import torch

Sizes = Mapping[str, int]
"""Name of a dimension -> its size; also `heads` and `groups`, the numbers of attention heads and query groups."""


def sizes_of(model: ModelSection, vocab_size: int, positions: int) -> Sizes:
    """Sizes of a model's dimensions, by the names used in the tables."""
    query = model.num_attention_heads * model.head_dim
    kv = model.query_groups * model.head_dim
    return {
        "vocab": vocab_size,
        "positions": positions,
        "hidden": model.hidden_size,
        "ffn": model.mlp_width,
        "gated_ffn": 2 * model.mlp_width,
        "head_dim": model.head_dim,
        "heads": model.num_attention_heads,
        "groups": model.query_groups,
        "query": query,
        "kv": kv,
        "qkv": query + 2 * kv,
    }


@dataclass(frozen=True)
class ParamMapping(ABC):
    """Maps one Megatron-Core tensor to the Hugging Face tensors with the same values, and back."""

    mcore_name: str
    """Name in a checkpoint; all layers of a stack share one."""

    @abstractmethod
    def mcore_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Shape of the Megatron-Core tensor: one layer, the vocabulary unpadded."""

    @abstractmethod
    def hf_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the Hugging Face tensors, in the order of their values in the Megatron-Core tensor."""

    @abstractmethod
    def to_hf(self, mcore: "torch.Tensor", sizes: Sizes) -> "dict[str, torch.Tensor]":
        """Name -> Hugging Face tensor; views of `mcore` where possible."""

    @abstractmethod
    def to_mcore(self, hf: "Mapping[str, torch.Tensor]", sizes: Sizes) -> "torch.Tensor":
        """The inverse of `to_hf`."""

    @property
    def partition_dim(self) -> int | None:
        """Dimension of the Megatron-Core tensor that tensor parallelism partitions; None if it is replicated."""
        return None


@dataclass(frozen=True)
class Direct(ParamMapping):
    """One tensor under two names."""

    hf_name: str
    shape: tuple[str, ...]
    """Dimensions of the Megatron-Core tensor."""
    partition_dim: int | None = None
    transposed: bool = False
    """Whether the Hugging Face tensor is input x output."""

    def mcore_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(sizes[name] for name in self.shape)

    def hf_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        shape = self.mcore_shape(sizes)
        return {self.hf_name: shape[::-1] if self.transposed else shape}

    def to_hf(self, mcore: "torch.Tensor", sizes: Sizes) -> "dict[str, torch.Tensor]":
        return {self.hf_name: mcore.t() if self.transposed else mcore}

    def to_mcore(self, hf: "Mapping[str, torch.Tensor]", sizes: Sizes) -> "torch.Tensor":
        return hf[self.hf_name].t() if self.transposed else hf[self.hf_name]


@dataclass(frozen=True)
class GatedMLP(ParamMapping):
    """The input projections of a gated MLP: two Hugging Face tensors, one in Megatron-Core with the gate first."""

    gate: str
    """Hugging Face name of the gate projection."""
    up: str
    """Hugging Face name of the up projection."""

    @property
    def partition_dim(self) -> int | None:
        return 0

    def mcore_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return sizes["gated_ffn"], sizes["hidden"]

    def hf_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {name: (sizes["ffn"], sizes["hidden"]) for name in (self.gate, self.up)}

    def to_hf(self, mcore: "torch.Tensor", sizes: Sizes) -> "dict[str, torch.Tensor]":
        gate, up = mcore.chunk(2)
        return {self.gate: gate, self.up: up}

    def to_mcore(self, hf: "Mapping[str, torch.Tensor]", sizes: Sizes) -> "torch.Tensor":
        import torch

        return torch.cat([hf[self.gate], hf[self.up]])


@dataclass(frozen=True)
class QKV(ParamMapping):
    """Query, key and value: three Hugging Face tensors, one in Megatron-Core, packed per group (the queries of a group,
    its key, its value)."""

    query: str
    """Hugging Face name of the query projection; `key` and `value` likewise."""
    key: str
    value: str
    bias: bool = False
    """Whether these are biases, which have no input dimension."""

    @property
    def partition_dim(self) -> int | None:
        return 0

    def mcore_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return sizes["qkv"], *self._input_shape(sizes)

    def hf_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        input_shape = self._input_shape(sizes)
        rows = {self.query: sizes["query"], self.key: sizes["kv"], self.value: sizes["kv"]}
        return {name: (count, *input_shape) for name, count in rows.items()}

    def to_hf(self, mcore: "torch.Tensor", sizes: Sizes) -> "dict[str, torch.Tensor]":
        return dict(zip(self.hf_shapes(sizes), split_qkv(mcore, sizes), strict=True))

    def to_mcore(self, hf: "Mapping[str, torch.Tensor]", sizes: Sizes) -> "torch.Tensor":
        return merge_qkv([hf[name] for name in (self.query, self.key, self.value)], sizes)

    def _input_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return () if self.bias else (sizes["hidden"],)


@dataclass(frozen=True)
class FusedQKV(ParamMapping):
    """Query, key and value in one tensor on both sides: packed per group in Megatron-Core; all queries, then all keys,
    then all values, and input x output, in Hugging Face (GPT-2)."""

    hf_name: str
    bias: bool = False
    """Whether this is a bias, which has no input dimension."""

    @property
    def partition_dim(self) -> int | None:
        return 0

    def mcore_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return (sizes["qkv"],) if self.bias else (sizes["qkv"], sizes["hidden"])

    def hf_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {self.hf_name: self.mcore_shape(sizes)[::-1]}

    def to_hf(self, mcore: "torch.Tensor", sizes: Sizes) -> "dict[str, torch.Tensor]":
        import torch

        fused = torch.cat(split_qkv(mcore, sizes))
        return {self.hf_name: fused if self.bias else fused.t()}

    def to_mcore(self, hf: "Mapping[str, torch.Tensor]", sizes: Sizes) -> "torch.Tensor":
        fused = hf[self.hf_name]
        fused = fused if self.bias else fused.t()
        return merge_qkv(list(fused.split([sizes["query"], sizes["kv"], sizes["kv"]])), sizes)


def split_qkv(packed: "torch.Tensor", sizes: Sizes) -> "list[torch.Tensor]":
    """Splits Megatron-Core's packed rows into query, key and value.

    Args:
        packed: `[groups * (heads / groups + 2) * head_dim, ...]`.

    Returns:
        `[heads * head_dim, ...]`, and twice `[groups * head_dim, ...]`.
    """
    groups, head_dim, rest = sizes["groups"], sizes["head_dim"], packed.shape[1:]
    by_group = packed.reshape(groups, sizes["heads"] // groups + 2, head_dim, *rest)
    parts = by_group[:, :-2], by_group[:, -2:-1], by_group[:, -1:]
    return [part.reshape(-1, *rest) for part in parts]


def merge_qkv(parts: "list[torch.Tensor]", sizes: Sizes) -> "torch.Tensor":
    """The inverse of `split_qkv`."""
    import torch

    groups, head_dim, rest = sizes["groups"], sizes["head_dim"], parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, head_dim, *rest) for part in parts], dim=1).reshape(-1, *rest)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The table of one model family."""

    name: FamilyName
    """`model.family` of a recipe."""
    title: str
    """Name in a model card."""
    model_type: str
    """`model_type` in config.json."""
    architecture: str
    """The class of transformers with the output layer."""
    base_prefix: str
    """Prefix of the tensor names; absent in files saved from the base model, without the output layer."""
    fields: Mapping[str, str]
    """Field of config.json -> field of the recipe's section `model` with the same meaning."""
    required: frozenset[str]
    """Fields that config.json must have."""
    defaults: Mapping[str, Any]
    """Defaults of transformers for missing fields."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that affect the computation -> the only supported value, which is also the default."""
    ignored: frozenset[str] = frozenset()
    """Fields of config.json that do not affect the computation of this family, in addition to those of every model."""
    rope: bool
    """Whether positions are rotary, with `rope_theta` and `rope_scaling`."""
    first: tuple[ParamMapping, ...]
    """Tensors before the layers."""
    layer: tuple[ParamMapping, ...]
    """Tensors of one layer; their Hugging Face names are relative to `layer_prefix`."""
    last: tuple[ParamMapping, ...]
    """Tensors after the layers, except the output layer."""
    output: Direct
    """The output layer, which models with tied weights do not have."""
    layer_prefix: str
    """Prefix of a layer's tensor names; `{}` is its number from 0."""
    buffer_suffixes: tuple[str, ...] = ()
    """Suffixes of the names of buffers that older files contain."""
