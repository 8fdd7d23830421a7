"""One of two ranks of test_fuse.py: a fused model in other people's training loops.

`fused.py LOOP...` with LOOP = ddp, fsdp2, accelerate or zero3 trains a small SD3 model of
diffusers for three steps, as it is and fused; rank 0 prints the losses of both as a line of JSON.
"""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_fuse import drawn, normal, sd3

import etude
from etude.core.distributed import local_caches

STEPS, LR = 3, 0.05
Step = Callable[[dict, Tensor], Tensor]


def loss_of(model: nn.Module, inputs: dict, target: Tensor) -> Tensor:
    return (model(**inputs, return_dict=False)[0] - target).square().mean()


def ddp(model: nn.Module) -> Step:
    wrapped = nn.parallel.DistributedDataParallel(model)
    return plain_step(wrapped, torch.optim.SGD(wrapped.parameters(), lr=LR))


def fsdp2(model: nn.Module) -> Step:
    from torch.distributed.fsdp import fully_shard

    for block in model.transformer_blocks:
        fully_shard(block)
    fully_shard(model)
    return plain_step(model, torch.optim.SGD(model.parameters(), lr=LR))


def accelerate(model: nn.Module) -> Step:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR))
    return plain_step(wrapped, optimizer, accelerator.backward)


def zero3(model: nn.Module) -> Step:
    """Parameters are gathered by hooks on the modules that own them: a fused one must keep them."""
    local_caches()  # where set-up has built DeepSpeed's communication operator
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(inputs: dict, target: Tensor) -> Tensor:
        loss = loss_of(engine, inputs, target)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, backward=Tensor.backward
) -> Step:
    def step(inputs: dict, target: Tensor) -> Tensor:
        loss = loss_of(model, inputs, target)
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def losses(make_step: Callable[[nn.Module], Step], model: nn.Module, inputs: dict) -> list[float]:
    step, found = make_step(model), []
    for i in range(STEPS):
        target = normal(3, 4, 8, 8, seed=10 * i + dist.get_rank())
        loss = step(inputs, target)
        dist.all_reduce(loss)
        found.append(float(loss))
    return found


def main() -> None:
    dist.init_process_group("gloo")
    loops = {"ddp": ddp, "fsdp2": fsdp2, "accelerate": accelerate, "zero3": zero3}
    for name in sys.argv[1:]:
        model, inputs = sd3()
        drawn(model)
        fused = copy.deepcopy(model)
        etude.fuse(fused)
        found = {
            "loop": name,
            "plain": losses(loops[name], model, inputs),
            "fused": losses(loops[name], fused, inputs),
        }
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
