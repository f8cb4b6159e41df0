"""How the training rows become optimizer steps: batch size, gradient accumulation, steps of an epoch.

Used by the training script; --auto_batch_size replaces the plan by one with smaller batches.
"""

import math
from dataclasses import dataclass, replace

from pipeline.errors import InputError, RunError
from pipeline.optimizers import warmup


def plan_steps(args, rows, processes, batch_size=None):
    """The StepPlan of a run with these arguments. rows: of the training split. batch_size: that of a resumed run, which
    --auto_batch_size can have lowered. Raises InputError if the learning rate would never reach --lr."""
    batch_size = batch_size or args.batch_size
    accumulation = args.batch_size * args.grad_accum_steps // batch_size
    plan = StepPlan(rows, args.epochs, processes, batch_size, accumulation, args.max_steps)
    if args.warmup_steps >= 1 and warmup(args.warmup_steps, plan.total_steps) > plan.total_steps:
        raise InputError(f"--warmup_steps {args.warmup_steps:g}: the whole run has only {plan.total_steps} steps")
    return plan


@dataclass(frozen=True)
class StepPlan:
    """The sizes of batches and steps of a run."""

    rows: int
    given_epochs: int  # --epochs, which max_steps replaces
    processes: int
    batch_size: int  # examples of a forward pass in one process
    accumulation: int  # batches of an optimizer step
    max_steps: int | None = None  # optimizer steps of the whole run

    @property
    def steps_per_epoch(self):
        batches = math.ceil(math.ceil(self.rows / self.batch_size) / self.processes)
        return math.ceil(batches / self.accumulation)

    @property
    def epochs(self):
        """As many as max_steps needs, the last one can be a part; as in Hugging Face's trainer."""
        return math.ceil(self.max_steps / self.steps_per_epoch) if self.max_steps else self.given_epochs

    @property
    def total_steps(self):
        return self.max_steps or self.steps_per_epoch * self.given_epochs

    @property
    def effective_batch_size(self):
        return self.batch_size * self.accumulation * self.processes

    def with_smaller_batches(self, allowed):
        """The same steps in smaller batches, after memory ran out. Raises RunError if it is not allowed or possible."""
        if self.batch_size == 1:
            raise RunError(
                "out of memory with --batch_size 1: start again (--overwrite) with a smaller model or --max_input_len"
            )
        if not allowed:
            raise RunError(
                f"out of memory with --batch_size {self.batch_size}: add --auto_batch_size to --resume, or start again"
                " (--overwrite) with a lower --batch_size and --grad_accum_steps raised by the same factor"
            )
        factor = next(n for n in range(2, self.batch_size + 1) if self.batch_size % n == 0)  # 2, if it is even
        return replace(self, batch_size=self.batch_size // factor, accumulation=self.accumulation * factor)
