"""The probe of a run: how the loss on texts that have nothing to do with the task changes while it is trained.

Used by the report of a study, which reads what the training scripts wrote.
"""

from pathlib import Path

from pipeline.run_folder import _numbers, _read_table

COLUMNS = ["line", "kind", "target_tokens", "before", "final"]


def read_probe_losses(folder):
    """probe_losses.csv of a run as a DataFrame, one row per line of the probe: `line`, `kind`, `target_tokens`, and the
    summed loss (nats) of that line's target tokens `before` training and of the `final` checkpoint.

    Raises InputError if the file is missing or damaged.
    """
    import math

    path = Path(folder, "probe_losses.csv")
    losses = _read_table(path, COLUMNS)
    for name in COLUMNS:
        if name != "kind":
            losses[name] = _numbers(path, losses[name], 1 if name == "target_tokens" else 0, math.inf)
    return losses
