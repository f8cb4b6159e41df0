"""The memory that training takes: an estimate before the first step, and one line where memory runs out.

The estimate runs a training step on the largest batch with a copy of the model that has shapes but no memory, and
counts what is alive at each moment.
"""

import copy
import weakref
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.errors import RunError, reason
from pipeline.packing import Packed
from pipeline.t5 import can_be_packed, packed_rows, target_logits, use_gradient_checkpointing

HEAP_GAPS = 0.5  # heap fragmentation on a CPU, as a share of the activations (0.1 to 0.9 of them were measured)


class LiveBytes(TorchDispatchMode):
    """Within this context, count the bytes that operations allocate and that are still in use.

    weights: tensors that existed before; their gradients are counted separately. `peak` is the largest number of bytes
    at one moment, `peak_gradients` how many of those were gradients of the weights.
    """

    def __init__(self, weights):
        super().__init__()
        self.weights, self.now, self.peak, self.peak_gradients = weights, 0, 0, 0
        self.known = weakref.WeakSet(weight.untyped_storage() for weight in weights)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:  # a view shares the storage of another tensor
                self.known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return made

    def _add(self, count):
        self.now += count
        if self.now > self.peak:
            gradients = [weight.grad for weight in self.weights if weight.grad is not None]
            self.peak, self.peak_gradients = self.now, sum(gradient.nbytes for gradient in gradients)


def largest_batch(model, data, batches, packed):
    """The batch (a list of positions) of an epoch with which a training step takes most memory.

    model: a T5 model or a PeftModel. data: a TweetQADataset with labels. batches: lists of positions in it. packed:
    whether a step computes no padding.
    """
    # What is kept for each token: the outputs of every matrix on its side of the model, and behind the output layer the
    # loss with two tensors of its size.
    head = {module for module in model.get_output_embeddings().modules() if isinstance(module, torch.nn.Linear)}
    encoder = {module for module in model.get_encoder().modules() if isinstance(module, torch.nn.Linear)}
    decoder = {module for module in model.modules() if isinstance(module, torch.nn.Linear)} - encoder - head
    of_prompt, of_target = (sum(matrix.out_features for matrix in side) for side in (encoder, decoder))

    def size(batch):
        lengths = [[len(ids[index]) for index in batch] for ids in (data.input_ids, data.labels)]
        prompt, target = (sum(each) if packed else len(batch) * max(each) for each in lengths)
        return prompt * of_prompt + target * (of_target + 3 * model.config.vocab_size)

    return max(batches, key=size)


def training_memory(model, batch, device, make_optimizer, *, autocast=nullcontext, accumulate=False):
    """The bytes that training takes at its peak: {"weights", "gradients", "optimizer", "activations"}.

    model: as it will be trained, with adapter, dropout and gradient checkpointing, on the CPU. batch: its largest one,
    as the collate function makes it. device: the one to train on. make_optimizer: a function from a model to the
    optimizer of its trainable weights. autocast: the context manager of mixed precision. accumulate: whether a step has
    several batches, so that gradients are held during its forward passes.

    The steps are made with a copy of the model whose tensors have shape, type and device but no memory, and what is
    alive at each moment is counted: no formula has to know what the model or the optimizer keeps. It takes a second or
    two, whatever the size, and draws no random number. Not counted is the process itself, see `memory_of`.
    """

    def without_memory(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    def shapes_of(side):
        return {n: without_memory(value) for n, value in vars(side).items() if isinstance(value, torch.Tensor)}

    rows = packed_rows(model, batch) if device.type == "cpu" else None
    with FakeTensorMode():
        twins = {id(buffer): without_memory(buffer) for buffer in model.buffers()}
        for weight in model.parameters():
            twins[id(weight)] = torch.nn.Parameter(without_memory(weight), weight.requires_grad)
        twin = copy.deepcopy(model, twins).train()  # deepcopy takes the twins for copies that it has already made
        if any(getattr(module, "gradient_checkpointing", False) for module in twin.modules()):
            use_gradient_checkpointing(twin, preserve_rng_state=False)  # there is none to preserve
        given = {name: without_memory(batch[name]) for name in ("input_ids", "attention_mask", "labels")}
        if rows is not None:
            rows = Packed(*(replace(side, **shapes_of(side)) for side in (rows.sources, rows.targets)))
        weights = list(twin.parameters())
        with LiveBytes(weights + list(twin.buffers())) as live:
            for _ in range(2 if accumulate else 1):
                with autocast():
                    loss = F.cross_entropy(*target_logits(twin, given, rows))
                loss.backward()
                del loss
        kept = _optimizer_bytes(make_optimizer(twin))
    return {
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": live.peak_gradients,
        "optimizer": kept,
        "activations": live.peak - live.peak_gradients,
    }


def _optimizer_bytes(optimizer):
    """The bytes of an optimizer's state once it has made a step with its weights' gradients, such as Adam's moments."""
    with suppress(DataDependentOutputException):  # an optimizer that reads a value has made its state before that
        optimizer.step()
    # Single numbers, such as a step count for each weight, are left out.
    tensors = tree_leaves([list(state.values()) for state in optimizer.state.values()])
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.ndim)


def memory_of(device):
    """(bytes that this process has on the device, bytes that it can have there at most, with what is free now).

    On CUDA the first is what torch has allocated, as `peak VRAM` counts it; elsewhere the process's resident memory.
    """
    if device.type == "cuda":
        reserved, free = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[0]
        return torch.cuda.memory_allocated(device), reserved + free
    import psutil

    process = psutil.Process().memory_info()
    limits = [process.rss + psutil.virtual_memory().available, *cgroup_limits(process.rss)]
    with suppress(ImportError):  # Windows
        import resource

        addresses, _ = resource.getrlimit(resource.RLIMIT_AS)  # ulimit -v
        if addresses != resource.RLIM_INFINITY:
            limits.append(process.rss + max(0, addresses - process.vms))
    return process.rss, min(limits)


def cgroup_limits(held, root=Path("/")):
    """The bytes that this process can have at most by each memory limit of a job or container it runs in.

    held: the bytes that it has. root: where the file system is, for tests. Reads cgroup v2 and v1, see
    https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html.
    """

    def read(path):
        with suppress(OSError):
            return path.read_text(encoding="ascii").strip()
        return ""

    limits = []
    for line in read(root / "proc/self/cgroup").splitlines():
        number, controllers, group = line.split(":", 2)
        if number == "0":
            mount, most, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "file"
        elif "memory" in controllers.split(","):
            mount, most, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_cache"
        else:
            continue
        inner = Path(group.lstrip("/"))
        for folder in (mount / parent for parent in (inner, *inner.parents)):  # a limit holds for what is below it
            limit = read(folder / most)
            if limit.isdigit() and int(limit) < 2**60:  # v1 writes a huge number for no limit, v2 "max"
                statistics = dict(row.split() for row in read(folder / "memory.stat").splitlines())
                others = int(read(folder / used) or 0) - int(statistics.get(cache, 0)) - held
                limits.append(int(limit) - max(0, others))
    return limits


def estimate_memory(model, loader, accelerator, make_optimizer, checkpointing):
    """Print the memory that training will take at its peak, and what to lower if there is not as much.

    model: as it will be trained, still on the CPU. loader: the training DataLoader, not prepared yet. make_optimizer:
    see `training_memory`. checkpointing: whether --gradient_checkpointing is given. Returns MB, to be compared with the
    measured peak, or None if it cannot be estimated.
    """
    say, device = accelerator.on_main_process(print), accelerator.device
    if device.type == "cpu":
        device = torch.device("cpu")  # with several processes it is cpu:0, which is the same device
    positions = list(loader.sampler)
    batches = [positions[i : i + loader.batch_size] for i in range(0, len(positions), loader.batch_size)]
    packed = device.type == "cpu" and can_be_packed(model)
    largest = [loader.dataset[index] for index in largest_batch(model, loader.dataset, batches, packed)]
    try:
        parts = training_memory(
            model,
            loader.collate_fn(largest),
            device,
            make_optimizer,
            autocast=accelerator.autocast,
            accumulate=accelerator.gradient_accumulation_steps > 1,
        )
    except Exception as error:  # a model may do what torch cannot do without memory: the run continues without it
        say(f"note: memory is not estimated ({reason(error)})")
        return None
    if device.type == "cpu":
        parts["heap fragmentation"] = int(HEAP_GAPS * parts["activations"])
        for weight in model.parameters():  # each page of 4 kB is read from the file when it is first used
            weight.detach().flatten()[::1024].sum()
    held, there_is = memory_of(device)
    # On the CPU the process already has the weights.
    parts["process overhead"] = max(0, held - parts["weights"]) if device.type == "cpu" else held
    for line in memory_lines(parts, there_is, checkpointing):
        say(line)
    return round(sum(parts.values()) / 2**20)  # as it is printed


def memory_lines(parts, there_is, checkpointing):
    """The lines about memory: the sum of `parts` ({name: bytes}), and a warning if it exceeds `there_is` bytes.

    checkpointing: whether --gradient_checkpointing is given already.
    """
    peak = sum(parts.values())
    shares = ", ".join(f"{name} {part / 2**20:,.0f}" for name, part in parts.items())
    yield f"memory: about {peak / 2**20:,.0f} MB at the peak ({shares}) of {there_is / 2**20:,.0f} MB"
    if peak > there_is:
        add = "" if checkpointing else " add --gradient_checkpointing,"
        yield (
            "warning: training may run out of memory: lower --batch_size and raise --grad_accum_steps by the same"
            f" factor,{add} or lower --max_input_len"
        )


def is_out_of_memory(error):
    """Whether an exception says that memory ran out, of a GPU or of the computer."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    # What a GPU says where not torch, but CUDA or cuBLAS could not allocate.
    return any(text in str(error) for text in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))


@contextmanager
def memory_for(flags):
    """Raise RunError where memory runs out; `flags` says with which arguments, and which to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"out of memory with {flags}") from None


def free_memory(accelerator):
    """Release the accelerator's references to an unused model, and the memory of that model on the device."""
    from accelerate.utils.memory import clear_device_cache

    accelerator.free_memory()
    clear_device_cache(garbage_collection=True)  # the accelerator's references are gone only now
