"""What a table of a family says: its fields in config.json, its tensors, and how each lies here and there.

The tables themselves are in `families/`, one module each. A table names shapes by these dimensions:

| name | size |
|---|---|
| vocabulary | ids, without padding |
| positions | learned positions |
| hidden | width of the residual stream |
| width | width of the MLP |
| channels | channels of one head |
| query, key | channels of all query heads, of all key heads |
| packed | query, key and value together |
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


def sizes_of(model: ModelSection, vocab_size: int, positions: int) -> Sizes:
    """The dimensions of a model by their names in the tables."""
    query = model.num_attention_heads * model.head_dim
    key = model.query_groups * model.head_dim
    return {
        "vocabulary": vocab_size,
        "positions": positions,
        "hidden": model.hidden_size,
        "width": model.mlp_width,
        "twice the width": 2 * model.mlp_width,
        "channels": model.head_dim,
        "heads": model.num_attention_heads,
        "groups": model.query_groups,
        "query": query,
        "key": key,
        "packed": query + 2 * key,
    }


@dataclass(frozen=True)
class Weight(ABC):
    """A tensor of ours and those of theirs that hold the same numbers."""

    mcore: str
    """Name in a checkpoint; the layers of a stack share one."""

    @abstractmethod
    def mcore_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Of one layer, the vocabulary unpadded."""

    @abstractmethod
    def hf_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of the numbers in ours."""

    @abstractmethod
    def to_hf(self, mcore: "torch.Tensor", sizes: Sizes) -> "dict[str, torch.Tensor]":
        """Views of `ours` where that can be."""

    @abstractmethod
    def to_mcore(self, hf: "Mapping[str, torch.Tensor]", sizes: Sizes) -> "torch.Tensor":
        """The inverse of `to_hf`."""

    @property
    def split(self) -> int | None:
        """Our dimension that tensor-parallel ranks share; None if each has the whole."""
        return None


@dataclass(frozen=True)
class Direct(Weight):
    """The same tensor under two names; `transposed` if theirs is input x output."""

    hf: str
    shape: tuple[str, ...]
    """Of ours."""
    shared: int | None = None
    """`split`."""
    transposed: bool = False

    @property
    def split(self) -> int | None:
        return self.shared

    def mcore_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(sizes[name] for name in self.shape)

    def hf_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        shape = self.mcore_shape(sizes)
        return {self.hf: shape[::-1] if self.transposed else shape}

    def to_hf(self, mcore: "torch.Tensor", sizes: Sizes) -> "dict[str, torch.Tensor]":
        return {self.hf: mcore.t() if self.transposed else mcore}

    def to_mcore(self, hf: "Mapping[str, torch.Tensor]", sizes: Sizes) -> "torch.Tensor":
        return hf[self.hf].t() if self.transposed else hf[self.hf]


@dataclass(frozen=True)
class GatedMLP(Weight):
    """The two inputs of a gated MLP: here one tensor, gate first, there two."""

    gate: str
    up: str

    @property
    def split(self) -> int | None:
        return 0

    def mcore_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return sizes["twice the width"], sizes["hidden"]

    def hf_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {name: (sizes["width"], sizes["hidden"]) for name in (self.gate, self.up)}

    def to_hf(self, mcore: "torch.Tensor", sizes: Sizes) -> "dict[str, torch.Tensor]":
        gate, up = mcore.chunk(2)
        return {self.gate: gate, self.up: up}

    def to_mcore(self, hf: "Mapping[str, torch.Tensor]", sizes: Sizes) -> "torch.Tensor":
        import torch

        return torch.cat([hf[self.gate], hf[self.up]])


@dataclass(frozen=True)
class QKV(Weight):
    """Query, key and value: here one tensor, packed group by group (the queries of a group, its key, its value), there
    three, each of all heads."""

    query: str
    key: str
    value: str
    bias: bool = False
    """A bias has no dimension of the input."""

    @property
    def split(self) -> int | None:
        return 0

    def mcore_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return sizes["packed"], *self._input(sizes)

    def hf_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        inputs = self._input(sizes)
        rows = {self.query: sizes["query"], self.key: sizes["key"], self.value: sizes["key"]}
        return {name: (count, *inputs) for name, count in rows.items()}

    def to_hf(self, mcore: "torch.Tensor", sizes: Sizes) -> "dict[str, torch.Tensor]":
        return dict(zip(self.hf_shapes(sizes), unpack(mcore, sizes), strict=True))

    def to_mcore(self, hf: "Mapping[str, torch.Tensor]", sizes: Sizes) -> "torch.Tensor":
        return pack([hf[name] for name in (self.query, self.key, self.value)], sizes)

    def _input(self, sizes: Sizes) -> tuple[int, ...]:
        return () if self.bias else (sizes["hidden"],)


@dataclass(frozen=True)
class FusedQKV(Weight):
    """Query, key and value: here packed group by group, there one tensor too, all queries first; theirs is input x
    output (GPT-2)."""

    hf: str
    bias: bool = False
    """A bias has no dimension of the input."""

    @property
    def split(self) -> int | None:
        return 0

    def mcore_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return (sizes["packed"],) if self.bias else (sizes["packed"], sizes["hidden"])

    def hf_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {self.hf: self.mcore_shape(sizes)[::-1]}

    def to_hf(self, mcore: "torch.Tensor", sizes: Sizes) -> "dict[str, torch.Tensor]":
        import torch

        joined = torch.cat(unpack(mcore, sizes))
        return {self.hf: joined if self.bias else joined.t()}

    def to_mcore(self, hf: "Mapping[str, torch.Tensor]", sizes: Sizes) -> "torch.Tensor":
        joined = hf[self.hf]
        joined = joined if self.bias else joined.t()
        return pack(list(joined.split([sizes["query"], sizes["key"], sizes["key"]])), sizes)


def unpack(packed: "torch.Tensor", sizes: Sizes) -> "list[torch.Tensor]":
    """Query, key and value from Megatron-Core's packed rows.

    Args:
        packed: `[groups * (heads / groups + 2) * channels, ...]`.

    Returns:
        `[heads * channels, ...]`, and twice `[groups * channels, ...]`.
    """
    groups, channels, rest = sizes["groups"], sizes["channels"], packed.shape[1:]
    by_group = packed.reshape(groups, sizes["heads"] // groups + 2, channels, *rest)
    parts = by_group[:, :-2], by_group[:, -2:-1], by_group[:, -1:]
    return [part.reshape(-1, *rest) for part in parts]


def pack(parts: "list[torch.Tensor]", sizes: Sizes) -> "torch.Tensor":
    """The inverse of `unpack`."""
    import torch

    groups, channels, rest = sizes["groups"], sizes["channels"], parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, channels, *rest) for part in parts], dim=1).reshape(-1, *rest)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The table of one family."""

    name: FamilyName
    """`model.family` of a recipe."""
    model_type: str
    """Of config.json."""
    architecture: str
    """The class of transformers with the output layer."""
    base: str
    """What stands before the tensors' names, and is missing in files written without the output layer."""
    fields: Mapping[str, str]
    """Field of config.json -> field of the recipe's section `model`, both with the same meaning."""
    needed: frozenset[str]
    """Fields of config.json that must be there."""
    defaults: Mapping[str, Any]
    """What transformers takes for a field that is not there."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that change the maths -> the only value that is built in, which is also the default."""
    ignored: frozenset[str] = frozenset()
    """Fields of config.json that say nothing about the maths of this family, beside those of every model."""
    rope: bool
    """Rotary positions, with `rope_theta` and `rope_scaling`."""
    first: tuple[Weight, ...]
    """Tensors before the layers."""
    layer: tuple[Weight, ...]
    """Tensors of one layer; their names begin behind `layer_name`."""
    last: tuple[Weight, ...]
    """Tensors behind the layers, but for the output layer."""
    output: Direct
    """The output layer, which models with tied weights do not have."""
    layer_name: str
    """What stands before a layer's tensors, `{}` for its number from 0."""
    buffers: tuple[str, ...] = ()
    """Endings of names that hold no weights: older files have them."""
