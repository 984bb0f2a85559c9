"""One training step of one rank out of many, without any other rank and without numbers.

The step runs on fake tensors, which have a shape only, in torch's fake process group. Each
collective operation is counted with its bytes, and each tensor that the backward pass needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transom.base.errors import expect, notice
from transom.checkpoints.files.location import find_model
from transom.checkpoints.load import open_weights
from transom.checkpoints.state import meta_model
from transom.config.parallel_args import ParallelArgs
from transom.data.batch import Batch
from transom.distributed.mesh import Meshes
from transom.distributed.parallelize import parallelize
from transom.distributed.ranks import Ranks
from transom.models.llm import LLM
from transom.planning.tables import byte_words, counted
from transom.training.config import TrainArgs
from transom.training.loop.blocks import arrange_blocks
from transom.training.losses.balance import router_losses
from transom.training.losses.cross_entropy import head_loss
from transom.training.optim.optimizers import build_optimizer

CPU = torch.device("cpu")
# How the names of torch begin, without `_`, and what is printed for them.
OPERATIONS = {
    "allgather": "all-gather",
    "allreduce": "all-reduce",
    "alltoall": "all-to-all",
    "reducescatter": "reduce-scatter",
    "recv": "receive",
}
# Of what a collective sends per rank, as a multiple of (ranks - 1) / ranks of its larger tensor.
ROUNDS = {"all-reduce": 2.0}


@dataclass(frozen=True)
class Rehearsal:
    """What one rank does in a step.

    Attributes:
        args: The degrees of parallelism.
        memory: Bytes by what they are for.
        collectives: (calls, bytes that the rank sends) of a step by (group, operation).
        tokens: Tokens of a step over all ranks.
    """

    args: ParallelArgs
    memory: dict[str, int]
    collectives: dict[tuple[str, str], tuple[int, int]]
    tokens: int


def rehearse(args: TrainArgs, world_size: int) -> Rehearsal:
    """Take one step as rank 0 of `world_size` ranks.

    It runs on the CPU in seconds, whatever the size of the model. No other process group may exist.

    Args:
        args: The config of the run. Its data are not read.
        world_size: The number of ranks.

    Raises:
        RequestError: If the model, the batch or the objective cannot be divided in this way.
    """
    expect(world_size >= 1, "--rehearse", world_size, "1 rank or more")
    model = _meta_model(args).train()
    parallel = args.parallel.resolved(world_size)
    expect(parallel.pipeline == 1, "parallel.pipeline", parallel.pipeline, "1 with --rehearse")
    args.check_ranks(parallel, model.args)
    args.check_model(model.args)
    shares, size = parallel.rows * args.accumulate, args.data.rows_per_step
    expected = f"a multiple of ranks with own rows x accumulate = {shares}"
    expect(size % shares == 0, "data.batch_size", size, expected)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        meshes = Meshes.make(parallel, "cpu")
        parallelize(model, meshes)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            arrange_blocks(model, checkpointing=args.activation_checkpoint)
            memory, collectives = _step(args, model, meshes, size // shares)
        return Rehearsal(parallel, memory, collectives, size * args.data.seq_len)
    finally:
        dist.destroy_process_group()


def _meta_model(args: TrainArgs) -> LLM:
    """Return the model of a config on the meta device, with its adapters and frozen weights."""
    if args.base is None:
        return meta_model(args.model_args(vocab_size=None))
    folder, finetune = find_model(args.base).model, args.finetune
    if finetune is None:
        return open_weights(folder, "float32")[0]
    from transom.training.finetune.weights import choose_weights

    lora = finetune.method == "lora"
    keep = finetune.keep_quantized if lora and finetune.quantize is None else False
    dtype = "bfloat16" if lora and args.dtype != "float32" else "float32"
    model, _ = open_weights(folder, dtype, keep_quantized=keep)
    choose_weights(model, finetune, args.seed, new_tokens=bool(finetune.new_tokens))
    if finetune.objective != "sft":
        notice(f"finetune.objective: {finetune.objective} is rehearsed as sft")
    return model


def _step(
    args: TrainArgs, model: LLM, meshes: Meshes, rows: int
) -> tuple[dict[str, int], dict[tuple[str, str], tuple[int, int]]]:
    """Run the micro-batches of one step, and return its memory and collectives."""
    ranks = Ranks(0, meshes.args.world_size, CPU, meshes)
    optimizers = build_optimizer(model, args.optimizer, device_type="cpu")
    states = sum(local_bytes(state) for state in optimizers.state_tensors().values())
    weights = list(model.parameters())
    count = Counted(meshes)
    saved = Saved(model)
    tokens = torch.zeros(rows, args.data.seq_len, dtype=torch.int64)
    dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
    with count:
        for _ in range(args.accumulate):
            micro = ranks.cut(Batch(tokens, tokens, sizes=((args.data.seq_len,),) * rows))
            cast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
            with cast, saved.counting(), ranks.gathering(model):
                output = model(replace(micro.inputs(), logits="none"))
            with cast:
                loss = head_loss(model, output.hidden_BTD, micro.targets, args.loss_chunk)
                if output.router and model.args.moe_args is not None:
                    loss = loss + router_losses(output.router, model.args.moe_args).weighted
            loss.backward()
        ranks.sum_gradients(weights)
    memory = {
        "weights": sum(map(local_bytes, weights)),
        "gradients": sum(local_bytes(one) for one in weights if one.requires_grad),
        "optimizer": states,
        "weights gathered for two blocks": 2 * saved.largest_block,
        "activations of a micro-batch": saved.bytes,
    }
    return memory, count.found


def local_bytes(tensor: Tensor) -> int:
    """Return the bytes of this rank's part of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


class Counted(TorchDispatchMode):
    """Counts the collective operations inside the context.

    Attributes:
        found: (calls, bytes that the rank sends) by (group, operation).
    """

    def __init__(self, meshes: Meshes) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], tuple[int, int]] = {}
        named = {**meshes.groups}
        for mesh in (meshes.dense, meshes.experts):
            names = () if mesh is None else mesh.mesh_dim_names or ()
            named |= {name: mesh[name] for name in names if mesh is not None}
        self._names = {one.get_group().group_name: name for name, one in named.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace not in ("c10d", "_c10d_functional") or "wait" in func._opname:
            return out
        group = next(found for one in tree_leaves(args) if (found := self._group(one)) is not None)
        tensors = [one for one in tree_leaves((args, out)) if isinstance(one, Tensor)]
        size = max((one.nbytes for one in tensors), default=0)
        name = func._opname.replace("_", "")
        known = (ours for begin, ours in OPERATIONS.items() if name.startswith(begin))
        operation = next(known, name)
        rounds = ROUNDS.get(operation, 1.0) * (group.size() - 1) / group.size()
        key = self._names.get(group.group_name, "all"), operation
        calls, total = self.found.get(key, (0, 0))
        self.found[key] = calls + 1, total + int(size * rounds)
        return out

    def _group(self, argument: Any) -> dist.ProcessGroup | None:
        """Return the process group that an argument of an operation stands for, if any."""
        if isinstance(argument, str) and argument in self._names:
            name: Any = argument
            return dist.distributed_c10d._resolve_process_group(name)
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return dist.ProcessGroup.unbox(argument)
        return None


class Saved:
    """Counts what forward keeps for the backward pass, without the weights.

    Attributes:
        bytes: Bytes of the distinct tensors of the last call.
        largest_block: Bytes of the weights of the largest block after they were gathered.
    """

    def __init__(self, model: LLM) -> None:
        self.bytes = self.largest_block = 0
        self._weights: set[int] = set()
        for module in model.modules():
            module.register_forward_pre_hook(self._note)
        for block in model.layers:
            block.register_forward_pre_hook(self._measure)

    def _note(self, module: nn.Module, inputs: Any) -> None:
        """Remember the storages of weights, which FSDP has gathered before."""
        self._weights.update(map(storage_of, module.parameters(recurse=False)))

    def _measure(self, block: nn.Module, inputs: Any) -> None:
        size = sum(local_bytes(one) for one in block.parameters())
        self.largest_block = max(self.largest_block, size)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside the context."""
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[storage_of(tensor)] = _storage(tensor).nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self.bytes = sum(size for key, size in seen.items() if key not in self._weights)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def storage_of(tensor: Tensor) -> int:
    """Return a number that tensors with the same memory share."""
    return _storage(tensor)._cdata


def lines(found: Rehearsal) -> list[str]:
    """Return a rehearsal as lines of text."""
    total = sum(found.memory.values())
    given = found.args.describe() or "alone"
    ranks = counted(found.args.world_size, "rank")
    rows = [f"{ranks}: {given}", f"memory of rank 0: {byte_words(total)}"]
    rows += [f"  {name}: {byte_words(size)}" for name, size in found.memory.items()]
    sent = sum(size for _, size in found.collectives.values())
    rows.append(f"sent by rank 0 in a step of {found.tokens:,} tokens: {byte_words(sent)}")
    for (group, operation), (calls, size) in sorted(found.collectives.items()):
        rows.append(f"  {group}: {operation} x {calls}, {byte_words(size)}")
    return rows
