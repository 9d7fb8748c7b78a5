"""Warns when language-model training erases what the alignment phase has learned."""

import logging

from megatron_prealign.evaluation.plots import layer_names
from megatron_prealign.evaluation.retrieval import Retrieval
from megatron_prealign.recipe import ALIGNMENT, Recipe
from megatron_prealign.runtime.log import warn_on_rank_zero

logger = logging.getLogger(__name__)

LOST = 0.5
"""Fraction of P@1 that is lost when a warning is due. In runs like the demo's, blocks end at P@1 0.29 to 0.48 without a
guard and at 0.85 or more with one."""
# P@1 below this at the end of the alignment phase is too little to lose.
_LEAST = 0.1


class ErasureWarning:
    """Compares word retrieval in language-model training with that at the end of the alignment phase; warns once."""

    def __init__(self) -> None:
        self._aligned: Retrieval | None = None
        self._warned = False

    def remember(self, retrieval: Retrieval) -> None:
        """Notes what a resumed run had measured last in its alignment phase."""
        self._aligned = retrieval

    def check(self, recipe: Recipe, phase: str, where: str, retrieval: Retrieval) -> None:
        """Notes a measurement of the alignment phase; warns if one of a later phase has lost half of its P@1.

        Args:
            phase: Name of the current phase.
            where: Position in the run, for the message.
        """
        if phase == ALIGNMENT:
            self._aligned = retrieval
        elif self._aligned is not None and not self._warned:
            self._warn(recipe, where, self._aligned, retrieval)

    def _warn(self, recipe: Recipe, where: str, aligned: Retrieval, retrieval: Retrieval) -> None:
        kept = [
            (now / before, before, now, layer, direction)
            for direction, metrics in aligned.items()
            for layer, (before, now) in enumerate(
                zip(metrics["p_at_1"], retrieval.get(direction, {}).get("p_at_1", []), strict=False)
            )
            if before >= _LEAST
        ]
        if not kept or min(kept)[0] > 1 - LOST:
            return
        self._warned = True
        _, before, now, layer, direction = min(kept)
        guard = recipe.alignment_guard
        advice = "alignment_guard keeps it" if guard is None else "lower alignment_guard.interval or optimizer.lr"
        warn_on_rank_zero(
            logger,
            "WARNING: at %s word retrieval %s at layer %s has fallen to P@1 %.2f, from %.2f at the end of the "
            "alignment phase; %s (docs/alignment.md)",
            where,
            direction,
            # The embedding output is emb and the output embedding out, as in the report.
            layer_names(len(aligned[direction]["p_at_1"]))[layer],
            now,
            before,
            advice,
        )
