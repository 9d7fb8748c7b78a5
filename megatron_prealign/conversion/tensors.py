"""The tensors of a model in Megatron-Core and Hugging Face, one entry per Megatron-Core tensor, in model order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from megatron_prealign.conversion.families import FAMILIES
from megatron_prealign.conversion.family import Family, ParamMapping, Sizes, sizes_of
from megatron_prealign.recipe import ModelSection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Entry:
    """One Megatron-Core tensor of one layer, and the Hugging Face tensors with the same values."""

    mapping: ParamMapping
    sizes: Sizes
    hf_prefix: str
    """Prefix of the Hugging Face names: that of the layer."""
    layer: int | None = None
    """Index in the stack of layers; None outside of it."""

    @property
    def key(self) -> str:
        """Name in a checkpoint, for `ShardReader` and `ShardWriter`."""
        return self.mapping.mcore_name

    @property
    def partition_dim(self) -> int | None:
        """Dimension that tensor parallelism partitions, for `ShardWriter`."""
        return self.mapping.partition_dim

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Megatron-Core tensor, the vocabulary unpadded."""
        return self.mapping.mcore_shape(self.sizes)

    @cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the Hugging Face tensors."""
        return {self.hf_prefix + name: shape for name, shape in self.mapping.hf_shapes(self.sizes).items()}

    @property
    def is_vocabulary(self) -> bool:
        """Whether dimension 0 is the vocabulary, which is padded in a checkpoint."""
        return getattr(self.mapping, "shape", ("",))[0] == "vocab"

    def to_huggingface(self, mcore: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """The Hugging Face tensors, contiguous, of an unpadded Megatron-Core tensor."""
        hf = self.mapping.to_hf(mcore, self.sizes)
        return {self.hf_prefix + name: tensor.contiguous() for name, tensor in hf.items()}

    def from_huggingface(self, hf: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """The Megatron-Core tensor, contiguous and unpadded. `hf` has at least the names of `hf_shapes`."""
        own = {name.removeprefix(self.hf_prefix): hf[name] for name in self.hf_shapes}
        return self.mapping.to_mcore(own, self.sizes).contiguous()


class TensorPlan:
    """All tensors of a model.

    Args:
        model: The recipe's section.
        vocab_size: Number of ids, without padding.
        positions: Learned positions, for models that have them; None for those of `model`.
    """

    def __init__(self, model: ModelSection, vocab_size: int, positions: int | None = None) -> None:
        self.family: Family = FAMILIES[model.family]
        self._model = model
        self._sizes = sizes_of(model, vocab_size, positions or model.max_position_embeddings or 0)
        self.entries = list(self._entries())
        """One per Megatron-Core tensor, layer by layer."""

    def _entries(self) -> Iterator[Entry]:
        for mapping in self.family.first:
            yield Entry(mapping, self._sizes, "")
        for layer in range(self._model.num_layers):
            for mapping in self.family.layer:
                yield Entry(mapping, self._sizes, self.family.layer_prefix.format(layer), layer)
        for mapping in self.family.last:
            yield Entry(mapping, self._sizes, "")
        if not self._model.share_embeddings_and_output_weights:
            yield Entry(self.family.output, self._sizes, "")

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the Hugging Face tensors, in the order of the model."""
        return {name: shape for entry in self.entries for name, shape in entry.hf_shapes.items()}

    @property
    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of the tensors in a checkpoint: layers stacked, the vocabulary unpadded."""
        layers = self._model.num_layers
        return {entry.key: entry.shape if entry.layer is None else (layers, *entry.shape) for entry in self.entries}

    @property
    def tied(self) -> dict[str, str]:
        """Hugging Face name of a tensor that files of a tied model may also contain -> the one it must equal."""
        if not self._model.share_embeddings_and_output_weights:
            return {}
        embedding = self.family.first[0]
        return {self.family.output.hf_name: next(iter(embedding.hf_shapes(self._sizes)))}

    def is_buffer(self, name: str) -> bool:
        """Whether a Hugging Face tensor of this name is a buffer and not a weight."""
        return name.endswith(self.family.buffer_suffixes) if self.family.buffer_suffixes else False
