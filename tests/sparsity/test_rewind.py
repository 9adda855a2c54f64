import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from aerogel.sparsity.masks import random_masks
from aerogel.sparsity.rewind import reinitialize, rewind, shuffle_masks
from aerogel.sparsity.select import select_parameters
from aerogel.sparsity.snapshot import Snapshot


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        loss = model(torch.randn(8, 1, 6, 6, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def masks_of(model: nn.Module, density: float = 0.3):
    generator = torch.Generator().manual_seed(1)
    return random_masks(select_parameters(model), density, generator=generator)


class Times(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w * self.mask


def test_rewinding_restores_weights_biases_and_batchnorm_bit_for_bit():
    model = small_net()
    initial = copy.deepcopy(model.state_dict())
    snapshot = Snapshot.capture(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    masks = masks_of(model)
    rewind(model, snapshot, masks=masks)
    for name, value in model.state_dict().items():
        wanted = initial[name]
        if name in masks:
            wanted = torch.where(masks[name], wanted, 0.0)
        assert torch.equal(value, wanted), name


def test_a_rewound_run_repeats_itself_with_its_optimizer():
    model = small_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer)
    snapshot = Snapshot.capture(model, optimizer, step=3)
    train(model, optimizer)
    first = copy.deepcopy(model.state_dict())
    rewind(model, snapshot, what=("params", "buffers", "optimizer"), optimizer=optimizer)
    train(model, optimizer)
    assert all(torch.equal(first[n], v) for n, v in model.state_dict().items())


def test_snapshot_survives_a_file_with_optimizer_state(tmp_path):
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9))
    train(model, optimizer)
    snapshot = Snapshot.capture(model, optimizer, step=3)
    snapshot.save(tmp_path / "s.safetensors")
    loaded = Snapshot.load(tmp_path / "s.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert loaded.step == 3
    assert all(torch.equal(loaded.params[n], t) for n, t in snapshot.params.items())
    assert all(torch.equal(loaded.buffers[n], t) for n, t in snapshot.buffers.items())
    train(model, optimizer)
    first = copy.deepcopy(model.state_dict())
    rewind(model, loaded, what=("params", "buffers", "optimizer"), optimizer=optimizer)
    train(model, optimizer)
    assert all(torch.equal(first[n], v) for n, v in model.state_dict().items())


def test_damaged_or_foreign_files_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    Snapshot.capture(small_net()).save(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        Snapshot.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, str(path))
    with pytest.raises(ValueError, match="not a snapshot"):
        Snapshot.load(path)


def test_rewinding_sees_through_mask_parametrizations():
    model = small_net()
    snapshot = Snapshot.capture(model)
    parametrize.register_parametrization(model[4], "weight", Times(torch.ones(5, 64)))
    with torch.no_grad():
        model[4].parametrizations["weight"].original.zero_()
    rewind(model, snapshot)
    assert torch.equal(model[4].weight, snapshot.params["4.weight"])
    assert Snapshot.capture(model).params.keys() == snapshot.params.keys()


def test_rewind_refuses_other_architectures_and_missing_optimizers():
    model = small_net()
    snapshot = Snapshot.capture(model)
    with pytest.raises(ValueError, match=r"no parameter '1.bias'"):
        rewind(nn.Sequential(nn.Conv2d(1, 4, 3)), snapshot)
    other = small_net()
    other[4] = nn.Linear(64, 6)
    with pytest.raises(ValueError, match=r"'4.weight' has shape"):
        rewind(other, snapshot)
    with pytest.raises(ValueError, match="optimizer argument"):
        rewind(model, snapshot, what=("optimizer",))
    with pytest.raises(ValueError, match="nearest: params"):
        rewind(model, snapshot, what=("param",))
    with pytest.raises(ValueError, match="step"):
        Snapshot.capture(model, step=-1)


def test_fresh_reinitialisation_changes_values_keeps_masks_and_obeys_the_seed():
    model = small_net()
    masks = masks_of(model)
    state = torch.get_rng_state()
    draws = []
    for seed in (3, 3, 4):
        before = copy.deepcopy(model.state_dict())
        reinitialize(model, masks=masks, generator=torch.Generator().manual_seed(seed))
        draws.append(copy.deepcopy(model.state_dict()))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws[0]["4.weight"], draws[1]["4.weight"])
    assert not torch.equal(draws[0]["4.weight"], draws[2]["4.weight"])
    assert not torch.equal(before["4.bias"], draws[2]["4.bias"])
    assert torch.equal(draws[2]["4.weight"] != 0, masks["4.weight"])


def test_fresh_reinitialisation_uses_the_initialiser_given():
    model = small_net()
    reinitialize(model, initializer=lambda m: nn.init.constant_(m[4].weight, 2.0))
    assert bool((model[4].weight == 2).all())
    model[2] = nn.ParameterList([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="no reset_parameters"):
        reinitialize(model)


@pytest.mark.parametrize("mode", ["shuffle", "constant_sign"])
def test_resampling_permutes_the_initial_kept_values(mode):
    model = small_net()
    snapshot = Snapshot.capture(model)
    initial = snapshot.params["4.weight"]
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    masks = masks_of(model)
    generator = torch.Generator().manual_seed(0)
    reinitialize(model, mode, masks=masks, snapshot=snapshot, generator=generator)
    weight, mask = model[4].weight.detach(), masks["4.weight"]
    assert torch.equal(weight != 0, mask)
    before, after = initial[mask], weight[mask]
    assert not torch.equal(before, after)
    assert torch.equal(before.abs().sort().values, after.abs().sort().values)
    if mode == "constant_sign":
        assert torch.equal(before.sign(), after.sign())
    else:
        assert torch.equal(before.sort().values, after.sort().values)
    assert torch.equal(model[4].bias, snapshot.params["4.bias"])


def test_shuffled_masks_keep_counts_per_layer_or_in_all():
    masks = masks_of(small_net())
    masks["0.weight"] = torch.ones_like(masks["0.weight"])
    layerwise = shuffle_masks(masks, generator=torch.Generator().manual_seed(0))
    assert layerwise.layer_density() == masks.layer_density()
    assert not torch.equal(layerwise["4.weight"], masks["4.weight"])
    overall = shuffle_masks(masks, "global", generator=torch.Generator().manual_seed(0))
    assert overall.nnz == masks.nnz
    assert overall.layer_density() != masks.layer_density()


def test_bad_modes_masks_and_parametrized_models_are_refused():
    model = small_net()
    with pytest.raises(ValueError, match="nearest: layerwise"):
        shuffle_masks(masks_of(model), "layer")
    with pytest.raises(ValueError, match="empty"):
        shuffle_masks({})
    with pytest.raises(ValueError, match="nearest: fresh"):
        reinitialize(model, "frsh")
    with pytest.raises(ValueError, match="shape"):
        reinitialize(model, "shuffle", masks={"4.weight": torch.ones(2, 2, dtype=torch.bool)})
    parametrize.register_parametrization(model[4], "weight", Times(torch.ones(5, 64)))
    with pytest.raises(ValueError, match="finalize"):
        reinitialize(model)
