"""How the training rows become optimizer steps: batch size, gradient accumulation, steps of an epoch.

Used by the training script; --auto_batch_size replaces the plan by one with smaller batches.
"""

import math
from dataclasses import dataclass

from pipeline.errors import RunError


@dataclass(frozen=True)
class StepPlan:
    """The sizes of batches and steps of a run."""

    rows: int
    epochs: int
    processes: int
    batch_size: int  # examples of a forward pass in one process
    accumulation: int  # batches of an optimizer step

    @property
    def steps_per_epoch(self):
        batches = math.ceil(math.ceil(self.rows / self.batch_size) / self.processes)
        return math.ceil(batches / self.accumulation)

    @property
    def total_steps(self):
        return self.steps_per_epoch * self.epochs

    @property
    def effective_batch_size(self):
        return self.batch_size * self.accumulation * self.processes

    def with_smaller_batches(self, allowed):
        """The same steps in smaller batches, after memory ran out. Raises RunError if it is not allowed or possible."""
        if self.batch_size == 1:
            raise RunError("out of memory with --batch_size 1: give a smaller model or --max_input_len")
        if not allowed:
            raise RunError(
                f"out of memory with --batch_size {self.batch_size}: add --auto_batch_size, or lower --batch_size and"
                " raise --grad_accum_steps by the same factor"
            )
        factor = next(n for n in range(2, self.batch_size + 1) if self.batch_size % n == 0)  # 2, if it is even
        smaller = {"batch_size": self.batch_size // factor, "accumulation": self.accumulation * factor}
        return StepPlan(self.rows, self.epochs, self.processes, **smaller)
