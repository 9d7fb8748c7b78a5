"""The recipe: all sections, and the checks across sections."""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_prealign.recipe.alignment import AlignmentSection
from megatron_prealign.recipe.alignment_guard import AlignmentGuardSection
from megatron_prealign.recipe.alignment_watch import AlignmentWatchSection
from megatron_prealign.recipe.checkpoint import CheckpointSection
from megatron_prealign.recipe.checks import require, require_finite
from megatron_prealign.recipe.code_switch import CodeSwitchSection
from megatron_prealign.recipe.data import DataSection
from megatron_prealign.recipe.dictionary import DictionarySection
from megatron_prealign.recipe.logging import LoggingSection
from megatron_prealign.recipe.model import ModelSection
from megatron_prealign.recipe.optimizer import OptimizerSection
from megatron_prealign.recipe.parallel import ParallelSection
from megatron_prealign.recipe.phases import ALIGNMENT, LANGUAGE_MODEL, PhasePlan
from megatron_prealign.recipe.training import TrainingSection


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Configuration of a run: everything needed to repeat it."""

    model: ModelSection
    """Architecture of the GPT model."""
    data: DataSection
    """Training and validation data."""
    optimizer: OptimizerSection
    """AdamW and its learning-rate schedule."""
    training: TrainingSection
    """Length, batch sizes, precision and evaluation."""
    logging: LoggingSection
    """Run directory, logs and metrics."""
    parallel: ParallelSection = ParallelSection()
    """Layout over devices."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Saving, retention and resuming."""
    dictionary: DictionarySection | None = None
    """Word table; required by alignment, code_switch and alignment_watch."""
    alignment: AlignmentSection | None = None
    """Alignment phase before language-model training; null disables it."""
    alignment_guard: AlignmentGuardSection | None = None
    """Steps of language-model training that also train on dictionary words; null disables it."""
    code_switch: CodeSwitchSection | None = None
    """Code-switching during language-model training; null disables it."""
    alignment_watch: AlignmentWatchSection | None = None
    """Word retrieval and cosine similarity measured during training; null disables it."""

    def __post_init__(self) -> None:
        require_finite(self)
        self._check_layout()
        self._check_schedules()
        self._check_features()
        self._check_profile()

    def _check_layout(self) -> None:
        model, parallel = self.model, self.parallel
        tensor, pipeline, chunks = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.model_chunks,
        )
        for field, value in (
            ("model.num_attention_heads", model.num_attention_heads),
            ("model.num_query_groups", model.query_groups),
            ("model.ffn_hidden_size", model.mlp_width),
        ):
            require(value % tensor == 0, field, value, f"a multiple of parallel.tensor_model_parallel_size ({tensor})")
        require(
            model.num_layers % (pipeline * chunks) == 0,
            "model.num_layers",
            model.num_layers,
            f"a multiple of parallel.pipeline_model_parallel_size x virtual_pipeline_model_parallel_size "
            f"({pipeline} x {chunks} = {pipeline * chunks})",
        )
        blocks, recomputed = model.num_layers // (pipeline * chunks), model.recompute_num_layers
        require(
            model.recompute_granularity != "full" or blocks % recomputed == 0,
            "model.recompute_num_layers",
            recomputed,
            f"a divisor of the {blocks} blocks of a model chunk (model.num_layers / (pipeline_model_parallel_size x "
            "virtual_pipeline_model_parallel_size))",
        )
        if parallel.sequence_parallel:
            require(
                self.data.seq_length % tensor == 0,
                "data.seq_length",
                self.data.seq_length,
                f"a multiple of parallel.tensor_model_parallel_size ({tensor}) when parallel.sequence_parallel is true",
            )
        require(
            model.max_position_embeddings is None or model.max_position_embeddings >= self.data.seq_length,
            "model.max_position_embeddings",
            model.max_position_embeddings,
            f"at least data.seq_length ({self.data.seq_length})",
        )
        require(
            model.sliding_window is None or model.sliding_window >= self.data.seq_length,
            "data.seq_length",
            self.data.seq_length,
            f"at most model.sliding_window ({model.sliding_window}): windowed attention is not supported",
        )
        require(
            self.training.global_batch_size % self.training.micro_batch_size == 0,
            "training.global_batch_size",
            self.training.global_batch_size,
            f"a multiple of training.micro_batch_size ({self.training.micro_batch_size})",
        )

    def _check_schedules(self) -> None:
        phases = [("optimizer", self.optimizer.lr_warmup_iters, "training", self.training.train_iters)]
        if self.alignment is not None:
            phases.append(("alignment", self.alignment.lr_warmup_iters, "alignment", self.alignment.train_iters))
        for section, warmup, phase, steps in phases:
            require(
                # With a token budget, the number of steps is not known here; a phase without steps is skipped.
                warmup == 0 or not steps or warmup < steps,
                f"{section}.lr_warmup_iters",
                warmup,
                f"less than {phase}.train_iters ({steps}), or the peak learning rate is never reached",
            )

    def _check_features(self) -> None:
        for name in ("alignment", "code_switch", "alignment_watch"):
            require(
                getattr(self, name) is None or self.dictionary is not None,
                name,
                "set",
                "null, or a dictionary section that sets dictionary.table",
            )
        if self.code_switch is not None:
            self.code_switch.check_lookahead(self.data.seq_length)
        require(
            self.alignment_watch is None
            or self.alignment_watch.groups != "held_out"
            or (self.dictionary is not None and self.dictionary.held_out_fraction > 0),
            "alignment_watch.groups",
            "held_out",
            "trained if dictionary.held_out_fraction is 0",
        )
        require(
            self.alignment_guard is None or self.alignment is not None,
            "alignment_guard",
            "set",
            "null, or an alignment section with the settings for its words",
        )
        require(
            self.alignment_guard is None or self.alignment_guard.floor is None or self.alignment_watch is not None,
            "alignment_guard.floor",
            "set",
            "null, or an alignment_watch section to measure the P@1 that is compared with the floor",
        )
        if self.alignment is not None:
            self._check_alignment(self.alignment)

    def _check_profile(self) -> None:
        training, profiled = self.training, self.logging.profile_steps
        steps = sum(phase.train_iters or 0 for phase in self.phases)
        if training.train_tokens is not None:
            # An upper limit: words count, too.
            steps += training.train_tokens // (training.global_batch_size * self.data.seq_length)
        require(
            profiled is None or profiled[1] <= steps,
            "logging.profile_steps",
            profiled,
            f"steps up to {steps}, the last one of the run",
        )

    def _check_alignment(self, section: AlignmentSection) -> None:
        section.layer_weights(self.model.num_layers)
        guard, steps = self.alignment_guard, self.training.train_iters
        require(
            section.train_iters > 0 or guard is not None,
            "alignment.train_iters",
            0,
            "a positive number, or an alignment_guard section that uses the other fields",
        )
        require(
            guard is None or steps is None or guard.interval <= steps,
            "alignment_guard.interval",
            "" if guard is None else guard.interval,
            f"at most training.train_iters ({steps}), or no step has words",
        )
        require(
            section.stop_at_p_at_1 is None or self.training.eval_interval is not None,
            "alignment.stop_at_p_at_1",
            section.stop_at_p_at_1,
            "null, or training.eval_interval set: evaluations measure P@1",
        )
        require(
            section.freeze == "none" or self.model.num_layers > 1,
            "alignment.freeze",
            section.freeze,
            "none if model.num_layers is 1: a single block has no halves",
        )
        require(
            section.max_word_tokens <= self.max_word_tokens,
            "alignment.max_word_tokens",
            section.max_word_tokens,
            f"at most {self.max_word_tokens}, the number of positions of the model (model.max_position_embeddings or "
            "data.seq_length)",
        )
        batch, micro_batch = section.lm_global_batch_size, self.alignment_micro_batch_size
        require(
            batch % micro_batch == 0,
            "alignment.lm_global_batch_size",
            batch,
            f"a multiple of {micro_batch} (alignment.lm_micro_batch_size, or training.micro_batch_size if it is null)",
        )
        tokens = self.training.train_tokens
        needed = (section.train_iters * batch + self.training.global_batch_size) * self.data.seq_length
        require(
            tokens is None or tokens >= needed,
            "training.train_tokens",
            tokens,
            f"at least {needed}: alignment.train_iters x alignment.lm_global_batch_size x data.seq_length, plus one "
            "step of training.global_batch_size x data.seq_length",
        )

    def check_world_size(self, world_size: int) -> int:
        """Checks that `world_size` ranks can run the recipe and returns the data-parallel size.

        Raises:
            RecipeValueError: the world size or a batch size is not divisible as required.
        """
        require(world_size > 0, "world size", world_size, "a positive number")
        model_parallel = self.parallel.model_parallel_size
        require(
            world_size % model_parallel == 0,
            "world size",
            world_size,
            f"a multiple of parallel.tensor_model_parallel_size x pipeline_model_parallel_size ({model_parallel}); "
            "change --nproc-per-node or the parallel section",
        )
        data_parallel = world_size // model_parallel
        micro_batch = self.training.micro_batch_size
        batches = [("training.global_batch_size", self.training.global_batch_size, micro_batch)]
        if self.alignment is not None:
            batch = self.alignment.lm_global_batch_size
            batches.append(("alignment.lm_global_batch_size", batch, self.alignment_micro_batch_size))
        for field, value, per_rank in batches:
            require(
                value % (per_rank * data_parallel) == 0,
                field,
                value,
                f"a multiple of {'micro batch size x ' if per_rank > 1 else ''}data-parallel size "
                f"({per_rank} x {data_parallel} = {per_rank * data_parallel}) at world size {world_size}",
            )
        if self.alignment is not None:
            self._check_words(self.alignment, data_parallel, world_size)
        return data_parallel

    def _check_words(self, section: AlignmentSection, data_parallel: int, world_size: int) -> None:
        """Checks that the words of a step divide evenly over the ranks of a stage and over micro batches."""
        tensor = self.parallel.tensor_model_parallel_size
        words = section.words_per_step
        require(
            words % (data_parallel * tensor) == 0,
            "alignment.words_per_step",
            words,
            f"a multiple of data-parallel size x tensor_model_parallel_size ({data_parallel} x {tensor} = "
            f"{data_parallel * tensor}) at world size {world_size}",
        )
        size = section.word_micro_batch_size
        words_per_rank = words // data_parallel
        require(
            size is None or (words_per_rank % size == 0 and size % tensor == 0),
            "alignment.word_micro_batch_size",
            size,
            f"null or a divisor of the {words_per_rank} words of a data-parallel rank (alignment.words_per_step / "
            f"{data_parallel}) that is a multiple of tensor_model_parallel_size ({tensor})",
        )

    @property
    def phases(self) -> list[PhasePlan]:
        """Phases of the run in order: alignment (unless disabled or without steps), then language-model training."""
        plans = [PhasePlan(LANGUAGE_MODEL, self.training.train_iters, self.training.global_batch_size)]
        if self.alignment is not None and self.alignment.train_iters:
            plans.insert(0, PhasePlan(ALIGNMENT, self.alignment.train_iters, self.alignment.lm_global_batch_size))
        return plans

    @property
    def max_word_tokens(self) -> int | float:
        """Maximum number of tokens per word that the model has positions for; infinite without learned positions."""
        if self.model.is_rotary:
            return math.inf
        return self.model.max_position_embeddings or self.data.seq_length

    @property
    def alignment_micro_batch_size(self) -> int:
        """Samples of the training blend per forward pass of the alignment phase."""
        size = self.alignment.lm_micro_batch_size if self.alignment is not None else None
        return size or self.training.micro_batch_size

    @property
    def checkpoint_dir(self) -> Path:
        return Path(self.checkpoint.directory or Path(self.logging.run_dir) / "checkpoints")

    @property
    def cache_dir(self) -> Path:
        return Path(self.data.cache or Path(self.logging.run_dir) / "cache")
