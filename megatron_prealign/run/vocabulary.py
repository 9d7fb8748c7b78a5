"""Number of token ids of a model, from its recipe and tokenizer. Imports no torch."""

from megatron_prealign.errors import UserError
from megatron_prealign.recipe import Recipe
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.clone import CloneTokenizer


def model_vocab_size(recipe: Recipe, tokenizer: Tokenizer) -> int:
    """Returns the vocabulary size of the model, without padding.

    Raises:
        UserError: The tokenizer has more ids than the model, or the recipe wants equal embeddings of clones and the
            vocabulary is not that of a clone tokenizer.
    """
    model = recipe.model
    size = model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {size}, expected at least {tokenizer.vocab_size}, the number of ids of "
            f"data.tokenizer {recipe.data.tokenizer}; raise it or omit it"
        )
    if model.equal_clone_embeddings and not isinstance(tokenizer, CloneTokenizer):
        raise UserError(
            f"model.equal_clone_embeddings is true, expected false with data.tokenizer {recipe.data.tokenizer}, which "
            "has no clone language; make a clone tokenizer with train-tokenizer --clone-language, or omit it"
        )
    if model.equal_clone_embeddings and size != tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {size}, expected null or {tokenizer.vocab_size} with model.equal_clone_embeddings: "
            "the second half of the ids are the clones of the first"
        )
    return size
