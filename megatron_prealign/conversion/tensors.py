"""The tensors of a model in both worlds, one entry for each of ours, in the order of the model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from megatron_prealign.conversion.families import FAMILIES
from megatron_prealign.conversion.family import Family, Sizes, Weight, sizes_of
from megatron_prealign.recipe import ModelSection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor of ours and those of theirs with the same numbers."""

    weight: Weight
    sizes: Sizes
    prefix: str
    """What stands before their names: that of the layer."""
    layer: int | None = None
    """Index in the stack of layers; None outside of it."""

    @property
    def key(self) -> str:
        """Name in a checkpoint, for `ShardReader` and `ShardWriter`."""
        return self.weight.mcore

    @property
    def split(self) -> int | None:
        """Dimension that tensor-parallel ranks share, for `ShardWriter`."""
        return self.weight.split

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of ours, one layer, the vocabulary unpadded."""
        return self.weight.mcore_shape(self.sizes)

    @cached_property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Their names and shapes."""
        return {self.prefix + name: shape for name, shape in self.weight.hf_shapes(self.sizes).items()}

    @property
    def vocabulary(self) -> bool:
        """Whether dimension 0 is the vocabulary, padded in a checkpoint."""
        return getattr(self.weight, "shape", ("",))[0] == "vocabulary"

    def to_huggingface(self, mcore: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Theirs, contiguous, from ours without padding."""
        found = self.weight.to_hf(mcore, self.sizes)
        return {self.prefix + name: tensor.contiguous() for name, tensor in found.items()}

    def from_huggingface(self, hf: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Ours, contiguous, without padding. `theirs` holds at least `names`."""
        own = {name.removeprefix(self.prefix): hf[name] for name in self.names}
        return self.weight.to_mcore(own, self.sizes).contiguous()


class TensorPlan:
    """All tensors of a model.

    Args:
        model: The recipe's section.
        vocab_size: True number of ids.
        positions: Learned positions, for models that have them; None for those of `model`.
    """

    def __init__(self, model: ModelSection, vocab_size: int, positions: int | None = None) -> None:
        self.family: Family = FAMILIES[model.family]
        self._model = model
        self._sizes = sizes_of(model, vocab_size, positions or model.max_position_embeddings or 0)
        self.entries = list(self._entries())
        """One for each tensor of ours, layer by layer."""

    def _entries(self) -> Iterator[Entry]:
        for weight in self.family.first:
            yield Entry(weight, self._sizes, "")
        for layer in range(self._model.num_layers):
            for weight in self.family.layer:
                yield Entry(weight, self._sizes, self.family.layer_name.format(layer), layer)
        for weight in self.family.last:
            yield Entry(weight, self._sizes, "")
        if not self._model.share_embeddings_and_output_weights:
            yield Entry(self.family.output, self._sizes, "")

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Their names and shapes, in the order of the model."""
        return {name: shape for entry in self.entries for name, shape in entry.names.items()}

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """Our names and shapes as they are in a checkpoint, layers stacked, the vocabulary unpadded."""
        layers = self._model.num_layers
        return {entry.key: entry.shape if entry.layer is None else (layers, *entry.shape) for entry in self.entries}

    @property
    def tied(self) -> dict[str, str]:
        """Name of a tensor that files of a tied model may hold too -> the one it must equal."""
        if not self._model.share_embeddings_and_output_weights:
            return {}
        embedding = self.family.first[0]
        return {self.family.output.hf: next(iter(embedding.hf_shapes(self._sizes)))}

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor of this name holds no weights."""
        return name.endswith(self.family.buffers) if self.family.buffers else False
