"""Under data-parallel training every process holds the same masks."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from aerogel.models import VisionTransformer
from aerogel.pruning import GPUSQTrainer, GradualPruner
from aerogel.sparsity import Cosine, DropGrow, MaskController, random_masks, select_parameters
from processes import free_port, leave_group

STEPS = 14


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).double()


def gradual(model, optimizer):
    return GradualPruner(model, optimizer, 0.8, begin_step=1, end_step=11, frequency=2)


def dynamic(model, optimizer, growth="random"):
    selection = select_parameters(model)
    masks = random_masks(selection, 0.3, generator=torch.Generator().manual_seed(2))
    return MaskController(
        model,
        optimizer,
        selection,
        "hard",
        "uniform",
        Cosine(0.5, 0, 20, every=3),
        DropGrow(growth),
        masks=masks,
    )


def by_gradient(model, optimizer):
    return dynamic(model, optimizer, "gradient")


def train(make, rank=0, world=1):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    pruner = make(model, optimizer)
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    torch.manual_seed(rank)  # ranks differ in the global generator and in their data
    for step in range(STEPS):
        x, y = (part.chunk(world)[rank] for part in batch(step))
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x.double()), y).backward()
        pruner.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        pruner.step()
    return pruner.masks.clone(), [p.detach().clone() for p in model.parameters()]


def work(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for make in (gradual, dynamic, by_gradient):
        masks, weights = train(make, rank, 2)
        state = {**masks.state_dict(), **{f"w{i}": w for i, w in enumerate(weights)}}
        torch.save(state, f"{folder}/{make.__name__}{rank}")
    leave_group()


def test_two_processes_hold_the_masks_of_one(tmp_path):
    mp.spawn(work, args=(free_port(), str(tmp_path)), nprocs=2)
    for make in (gradual, dynamic, by_gradient):
        masks, weights = train(make)
        packed = masks.state_dict()
        for rank in range(2):
            state = torch.load(tmp_path / f"{make.__name__}{rank}", weights_only=True)
            assert all(torch.equal(state[key], value) for key, value in packed.items())
            for i, weight in enumerate(weights):
                assert torch.allclose(state[f"w{i}"], weight, atol=1e-12)


def train_integers(rank=0, world=1):
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2}
    model = VisionTransformer(8, num_classes=4, **sizes).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    trainer = GPUSQTrainer(model, optimizer, STEPS)
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64).chunk(world)[rank]
        y = torch.randint(0, 4, (8,), generator=generator).chunk(world)[rank]
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()
        trainer.step()
    factors = torch.tensor(list(trainer.objective.factors.values()))
    return {**model.state_dict(), "factors": factors}


def work_integers(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(train_integers(rank, 2), f"{folder}/integers{rank}")
    leave_group()


def test_two_processes_agree_on_ranges_and_layer_factors(tmp_path):
    mp.spawn(work_integers, args=(free_port(), str(tmp_path)), nprocs=2)
    alone = train_integers()
    first, second = (torch.load(tmp_path / f"integers{r}", weights_only=True) for r in range(2))
    assert all(torch.equal(first[name], second[name]) for name in alone)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-5)
