"""Counters of a run: what a resumed run needs besides weights, optimizer and random states."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class TrainState:
    """Counters of a run, saved in every checkpoint.

    Attributes:
        phase: Index of the current phase in the run's list.
        phase_step: Optimizer steps done in this phase.
        step: Optimizer steps done in all phases.
        tokens: Tokens consumed in all phases, words of the alignment phase included.
        phase_start_tokens: Value of `tokens` at the start of the phase.
        consumed_samples: Samples of the training blend consumed so far, the position in the blended order.
        phase_start_samples: Value of `consumed_samples` at the start of the phase.
        phase_done: Whether the phase ended before its last step because it reached its goal.
        below_floor: Whether the last measured word retrieval was below the floor of the alignment guard.
        seconds: Wall-clock seconds of training, over all resumptions.
        stop_requested: Whether a signal requested the run to save and exit. Not saved.
    """

    phase: int = 0
    phase_step: int = 0
    step: int = 0
    tokens: int = 0
    phase_start_tokens: int = 0
    consumed_samples: int = 0
    phase_start_samples: int = 0
    phase_done: bool = False
    below_floor: bool = False
    seconds: float = 0.0
    stop_requested: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `state.json`."""
        values = asdict(self)
        del values["stop_requested"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """Counters from the result of `to_dict`.

        Raises:
            ValueError: a counter is missing, unknown or of the wrong type.
        """
        kinds = {field.name: field.type for field in fields(cls) if field.name != "stop_requested"}
        if values.keys() != kinds.keys():
            different = ", ".join(sorted(values.keys() ^ kinds.keys()))
            raise ValueError(f"train_state: counters {different} are missing or unknown")
        for name, value in values.items():
            # An integral number of seconds may be written without a decimal point.
            if type(value) is not kinds[name] and not (kinds[name] is float and type(value) is int):
                raise ValueError(f"train_state.{name} is {value!r}, expected {kinds[name]}")
        return cls(**values)

    def next_phase(self) -> None:
        """Moves the counters to the start of the next phase."""
        self.phase += 1
        self.phase_step = 0
        self.phase_done = False
        self.phase_start_tokens = self.tokens
        self.phase_start_samples = self.consumed_samples
