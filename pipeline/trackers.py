"""Experiment trackers, for --report_to: TensorBoard, wandb and trackio, through accelerate.

The training script starts and ends the tracking; the loop logs one dict per step and per epoch.
"""

import io
import shlex
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from pipeline.arguments import as_typed
from pipeline.errors import InputError, RunError, reason
from pipeline.run_folder import PLOTS


def check_tracker(name):
    """Raise InputError unless --report_to's tracker is installed and, for wandb, somebody is logged in."""
    if name == "none":
        return
    from accelerate.tracking import get_available_trackers

    if name not in map(str, get_available_trackers()):
        raise InputError(f"--report_to {name} needs a library that is not installed: pip install {name}")
    if name == "wandb":
        import wandb

        settings = wandb.setup(wandb.Settings(silent=True)).settings
        if settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise InputError(
                "--report_to wandb: you are not logged in; run `wandb login` first, or set WANDB_MODE=offline"
            )


def begin_tracking(folder, accelerator, start, state):
    """Start to log to the accelerator's tracker, or continue after the step of `state` in a resumed run.

    start: what `describe_run` says of the run. state: the LoopState.

    TensorBoard writes to FOLDER/tensorboard; in a resumed run it hides what was logged after that step. wandb writes to
    FOLDER/wandb and continues under the same id; its server ignores steps that it already has. trackio continues its
    last run with the folder's name. A step that is done again appears twice in trackio, and in wandb's offline files.

    Returns the command or address that shows it; None without a tracker and in all processes but the main one. Raises
    RunError.
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        return None
    tracker, name, step = str(accelerator.log_with[0]), Path(folder).absolute().name, state.step
    config = {"method": start["method"], **start["args"]}
    config = {key: value if isinstance(value, int | float) else as_typed(value) for key, value in config.items()}
    options = {}
    if tracker == "tensorboard" and step:
        options, config = {"purge_step": step + 1}, None  # it already has the arguments
    elif tracker == "wandb":
        import wandb

        settings = wandb.Settings(silent=True, console="off", reinit="finish_previous")
        # With the batch size: a run that --auto_batch_size restarts counts its steps from 1 again.
        run_id = f"{start['run_id']}-{state.batch_size}"
        options = {"name": name, "dir": str(folder), "id": run_id, "resume": "allow", "settings": settings}
    elif tracker == "trackio":
        options = {"name": name, "resume": "allow" if step else "never", "embed": False}
    with _reporting(accelerator):
        # TensorBoard's folder is named after the project.
        project = "tensorboard" if tracker == "tensorboard" else "tweet_qa"
        accelerator.init_trackers(project, config, {tracker: options})
    if tracker == "tensorboard":
        return f"tensorboard --logdir {shlex.quote(str(folder))}"
    if tracker == "trackio":
        return f"trackio show --project {project}"
    return accelerator.trackers[0].run.url or f"wandb sync {shlex.quote(str(folder))}/wandb/*"


def report(accelerator, part, values, step):
    """Log a row {name: number or None} as PART/NAME at this step, if there is a tracker. Raises RunError."""
    if accelerator.trackers and values:
        with _reporting(accelerator):
            accelerator.log(
                {f"{part}/{name}": value for name, value in values.items() if value is not None and name != "step"},
                step,
            )


def report_results(folder, accelerator, record):
    """Log the final metrics and, if the tracker takes images, the plots; then end the tracking. Raises RunError."""
    for tracker in accelerator.trackers:
        for part in ("final", "holdout", "test"):
            metrics = record.get(part, {})
            report(accelerator, part, metrics.get("metrics", metrics), record["steps"])
        if hasattr(tracker, "log_images"):
            import numpy as np
            from PIL import Image

            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            for path in (Path(folder, f"{name}.png") for name in PLOTS):
                if path.exists():
                    with _reporting(accelerator):
                        image = np.asarray(Image.open(path).convert("RGB"))
                        tracker.log_images({path.stem: image[None]}, step=record["steps"], **layout)
    end_tracking(accelerator)


def end_tracking(accelerator):
    """Let the tracker write what is left. Raises RunError."""
    while accelerator.trackers:
        with _reporting(accelerator):
            tracker = accelerator.trackers.pop()
            tracker.finish()
            if tracker.name == "trackio":  # else it ends the run a second time, and prints that, when Python exits
                import trackio

                trackio.finish()


@contextmanager
def _reporting(accelerator):
    """Hide what the tracker prints; raise RunError if it fails."""
    try:
        with redirect_stdout(io.StringIO()):
            yield
    except Exception as error:  # each tracker has its own
        raise RunError(
            f"--report_to {accelerator.log_with[0]} failed ({reason(error)}); --report_to none runs without a tracker"
        ) from None
