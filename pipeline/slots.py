"""What each of several runs at the same time gets of the machine: a GPU, or a share of the cores. `study.py` uses it.

torch is not imported here: a process that only starts others needs no memory on a GPU.
"""

import os
import shutil
import subprocess


def environment_of_jobs(jobs):
    """Environment variables for each job, besides those of this process: a separate GPU if there are several, or its
    share of the cores if there is none. A single job gets no variables."""
    gpus = visible_gpus() if jobs > 1 else []
    if len(gpus) > 1:
        return [{"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} for slot in range(jobs)]
    if gpus or jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{}] * jobs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{"OMP_NUM_THREADS": str(max(1, cores // jobs))}] * jobs


def visible_gpus():
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(asked, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return listed.stdout.split() if listed.returncode == 0 else []
