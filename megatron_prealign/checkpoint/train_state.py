"""Where a run stands: everything a resumed run must know besides weights, optimizer and random states."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class TrainState:
    """Counters of a run. Passed in wherever they are needed; saved in every checkpoint.

    Attributes:
        phase: number of the current phase in the run's list.
        phase_step: optimizer steps done in this phase.
        step: optimizer steps done in all phases.
        tokens: tokens consumed in all phases, words of the alignment phase included.
        phase_start_tokens: value of `tokens` when the phase began.
        consumed_samples: rows of the training blend consumed so far, the position in the blended order.
        phase_start_samples: value of `consumed_samples` when the phase began.
        phase_done: the phase ended before its last step (it reached its goal).
        below_floor: word retrieval was last measured below the floor of the alignment guard.
        seconds: wall-clock seconds of training, over all resumptions.
        stop_requested: a signal asked the run to save and end. Not saved.
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
        values = asdict(self)
        del values["stop_requested"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """The counters that `to_dict` gave.

        Raises:
            ValueError: one is missing, unknown or not a number.
        """
        kinds = {field.name: field.type for field in fields(cls) if field.name != "stop_requested"}
        if values.keys() != kinds.keys():
            different = ", ".join(sorted(values.keys() ^ kinds.keys()))
            raise ValueError(f"train_state does not hold the counters of a run: {different} missing or unknown")
        for name, value in values.items():
            # A whole number of seconds may be written without a point.
            if type(value) is not kinds[name] and not (kinds[name] is float and type(value) is int):
                raise ValueError(f"train_state.{name} is {value!r}, expected {kinds[name]}")
        return cls(**values)

    def next_phase(self) -> None:
        """Moves the counters to the beginning of the next phase."""
        self.phase += 1
        self.phase_step = 0
        self.phase_done = False
        self.phase_start_tokens = self.tokens
        self.phase_start_samples = self.consumed_samples
