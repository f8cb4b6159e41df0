"""The devices of a run: its Accelerator, its precision, several processes, and a model that is sharded over GPUs.

Used by the training script; accelerate does the work.
"""

import copy
import os

import torch
from accelerate import Accelerator, PartialState, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin

from pipeline.errors import InputError
from pipeline.memory import memory_for
from pipeline.t5 import LABEL_PAD


def is_first_process():
    """Whether this is the process that prints; to be asked before there is an Accelerator."""
    return os.environ.get("RANK", "0") == "0"


def make_accelerator(args):
    """The run's Accelerator. Raises InputError for arguments that its devices or processes cannot run with."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.auto_batch_size and processes > 1:
        raise InputError("--auto_batch_size works with one process only: if one of several runs out of memory, all end")
    plugin = sharding(args.precision)
    if plugin and args.optim == "adafactor":  # transformers' keeps its state unsharded
        raise InputError("--optim adafactor cannot be used for sharded training: use adamw")
    if plugin and getattr(args, "use_dora", False):  # peft computes with whole matrices
        raise InputError("--use_dora cannot be used for sharded training: omit it")
    accelerator = Accelerator(
        cpu=processes > 1 and not torch.cuda.is_available(),  # without this, accelerate does not connect them
        fsdp_plugin=plugin,
        mixed_precision=choose_precision(args.precision),
        gradient_accumulation_steps=args.grad_accum_steps,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.save_dir,
    )
    if plugin and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate uses the plugin on GPUs only. FSDP2 works on CPUs as well, where it can be tested.
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    # cuDNN's attention, which torch prefers on some GPUs, is compiled for each length, and a search has a new length at
    # each token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return accelerator


def choose_precision(precision):
    """accelerate's name for --precision. Raises InputError for fp16 without a GPU."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--precision fp16 needs a CUDA GPU: use fp32 or bf16")
    if precision == "auto":
        native_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native_bf16 else "fp32"  # never fp16: T5's activations overflow it
    return "no" if precision == "fp32" else precision


def bf16_on_cpu(accelerator):
    """Whether the CPU computes matrix products in bfloat16, by autocast."""
    return accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu"


def device_name(device):
    """The name of a torch.device, as run.json records it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def reset_peak_vram(device):
    """Start to measure `peak_vram_mb` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_vram_mb(device):
    """The largest memory (MB) of a GPU that torch has allocated since `reset_peak_vram`; 0.0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def counted_batches(loader, done, accelerator):
    """(batch, number of target tokens that count in it) for the batches of an epoch after the first `done`.

    So that every process has the same number of whole batches, accelerate fills up the last ones with examples of the
    first ones. Those are not trained on twice: their targets do not count.
    """
    per_batch = loader.total_batch_size // accelerator.num_processes
    for number, batch in enumerate(skip_first_batches(loader, done) if done else loader, start=done):
        before = (number * accelerator.num_processes + accelerator.process_index) * per_batch
        new = max(0, len(loader.dataset) - before)
        batch["labels"][max(new, 1) :] = LABEL_PAD  # one must remain: the mean over no token is not a number
        yield batch, (batch["labels"] != LABEL_PAD).sum() * (new > 0)


# -------------------------------------------------------------------------------------------------------- sharding


def sharding(precision):
    """accelerate's plugin for FSDP2 if the config of `accelerate launch` asks for sharding, else None.

    Raises InputError for what cannot be combined with it.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise InputError("accelerate's config shards with FSDP1: set fsdp_version 2, as benchmarks/fsdp2.yaml does")
    if precision == "fp16":
        raise InputError("--precision fp16 cannot be used for sharded training: use bf16 or fp32")
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=MixedPrecisionPolicy(),  # float32 weights and gradients, and autocast, as without shards
        state_dict_type="FULL_STATE_DICT",  # of last/: the other type would be read by unpickling it
        cpu_ram_efficient_loading=False,  # else only the first process would evaluate a model that has its weights
    )


def hollow_copy(model, device):
    """A copy of the model without weights, which takes no memory. Weights that are shared are shared in it too.

    `fill` puts the weights of the sharded model into it for an evaluation: an ordinary model, whose passes the
    processes need not make together.
    """
    nothing = torch.empty(0, device=device)
    return copy.deepcopy(model, {id(p): torch.nn.Parameter(nothing, p.requires_grad) for p in model.parameters()})


def fill(hollow, model):
    """Put all weights of the sharded model into its hollow copy. Every process must call this."""
    for whole, shard in zip(hollow.parameters(), model.parameters(), strict=True):
        whole.data = shard.detach().full_tensor().to(whole.device)


def whole_model(model, hollow, accelerator):
    """A prepared model as an ordinary one with all its weights, to be evaluated. Every process must call this.

    hollow: None, or the hollow copy of a sharded model; `empty` releases its weights afterwards.
    """
    if hollow:
        with memory_for("all weights on each device, as the evaluation needs them: give a smaller model"):
            fill(hollow, model)
    return hollow or accelerator.unwrap_model(model)


def empty(hollow):
    """Release the weights that `fill` put there. hollow: None if the model is not sharded."""
    for whole in hollow.parameters() if hollow else ():
        whole.data = whole.new_empty(0)
