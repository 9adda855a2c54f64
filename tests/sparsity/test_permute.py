import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from aerogel.sparsity.oneshot import magnitude_
from aerogel.sparsity.permute import apply_permutation, invert, permutation_classes


def settle(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value of its own, so that a wrong order shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (0.5 if p.ndim == 1 else 0))
        for b in model.buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
    return model.eval()


class BasicBlock(nn.Module):
    def __init__(self, cin, cout, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(cout), nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
            if stride > 1 or cin != cout
            else nn.Identity()
        )

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 12, 2), BasicBlock(12, 12))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(12, 5)

    def forward(self, x):
        x = self.pool(self.blocks(self.stem(x)))
        return self.fc(torch.flatten(x, 1))


class SqueezeExcite(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x):
        s = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(F.silu(self.down(s))))


class InvertedResidual(nn.Module):
    def __init__(self, width, expand=3):
        super().__init__()
        hidden = width * expand
        self.body = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.Hardswish(), SqueezeExcite(hidden),
            nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x)


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.blocks = nn.Sequential(InvertedResidual(6), InvertedResidual(6))
        self.twice = nn.Conv2d(6, 12, 3, padding=1, groups=6)  # depthwise with multiplier 2
        self.head, self.fc = nn.Conv2d(12, 10, 1), nn.Linear(10 * 4 * 4, 3)

    def forward(self, x):
        x = F.max_pool2d(self.head(self.twice(self.blocks(self.stem(x)))), 2)
        return self.fc(x.view(x.size(0), -1))


class Dense(nn.Module):
    """Concatenations whose parts are also added to and split again."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.mix, self.both = nn.Conv2d(10, 10, 1), nn.Conv2d(10, 10, 3, padding=1, groups=2)
        self.norm, self.last = nn.GroupNorm(2, 10), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        both = torch.cat([a, b], dim=1)
        y = self.norm(self.both(both + self.mix(both)))
        first, second = y.split([4, 6], dim=1)
        return self.last(torch.cat([y, F.relu(second) + b], 1)) + first[:, :2].mean()


class Tokens(nn.Module):
    """Class token, positions, layer scale, torch attention, gated MLP, token mixing."""

    def __init__(self, width=8, tokens=17):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.zeros(1, tokens, width))
        self.gamma = nn.Parameter(torch.ones(width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(width, 24), nn.Linear(12, width)
        self.mix1, self.mix2 = nn.Linear(tokens, 7), nn.Linear(7, tokens)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        h = self.norm1(x)
        x = x + self.gamma * self.attn(h, h, h, need_weights=False)[0]
        a, b = self.fc1(self.norm2(x)).chunk(2, dim=-1)
        x = x + self.fc2(F.gelu(a) * b)
        x = x + self.mix2(F.gelu(self.mix1(x.permute(0, 2, 1)))).transpose(-1, -2)
        return self.head(x[:, 0])


def mlp():
    return nn.Sequential(
        nn.Linear(5, 16), nn.BatchNorm1d(16), nn.PReLU(16), nn.Dropout(0.3), nn.Linear(16, 8),
        nn.GLU(), nn.Linear(4, 2),
    )  # fmt: skip


def unet_piece():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.InstanceNorm2d(6, affine=True), nn.LeakyReLU(),
        nn.ConvTranspose2d(6, 8, 2, 2), nn.Upsample(scale_factor=2), nn.Conv2d(8, 2, 1),
    )  # fmt: skip


NETWORKS = {
    "resnet": (ResNet, (2, 3, 8, 8)),
    "mobilenet": (MobileNet, (2, 3, 16, 16)),
    "dense": (Dense, (2, 3, 6, 6)),
    "tokens": (Tokens, (2, 3, 8, 8)),
    "mlp": (mlp, (4, 5)),
    "unet": (unet_piece, (1, 3, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_permuting_every_class_keeps_the_function_and_inverts_bit_for_bit(name):
    build, shape = NETWORKS[name]
    model = settle(build())
    torch.manual_seed(1)
    x = torch.randn(shape)
    wanted, before = model(x), copy.deepcopy(model.state_dict())
    classes = permutation_classes(model, x)
    assert classes
    orders = [torch.randperm(c.size) for c in classes]
    for c, order in zip(classes, orders, strict=True):
        apply_permutation(model, c, order)
        assert torch.allclose(model(x), wanted, rtol=1e-4, atol=1e-5), c.name
    changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    assert changed
    for c, order in reversed(list(zip(classes, orders, strict=True))):
        apply_permutation(model, c, invert(order))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def classes_of(name):
    build, shape = NETWORKS[name]
    model = settle(build())
    return {c.name: c for c in permutation_classes(model, torch.randn(shape))}


def test_residuals_share_one_class_and_the_ends_are_fixed():
    classes = classes_of("resnet")
    sizes = {name: c.size for name, c in classes.items()}
    assert sizes == {
        "stem.0.weight": 8, "blocks.0.conv1.weight": 8, "blocks.1.conv1.weight": 12,
        "blocks.1.conv2.weight": 12, "blocks.2.conv1.weight": 12,
    }  # fmt: skip
    stem = classes["stem.0.weight"]
    produced = {axis.name for axis in stem.producers}
    assert produced == {"stem.0.weight", "blocks.0.conv2.weight"}
    assert {axis.name for axis in stem.consumers} == {
        "blocks.0.conv1.weight", "blocks.1.conv1.weight", "blocks.1.shortcut.0.weight",
    }  # fmt: skip
    everything = {axis.name for c in classes.values() for axis in c.axes}
    assert "fc.bias" not in everything


def test_depthwise_filters_and_excitations_follow_their_channels():
    classes = classes_of("mobilenet")
    hidden = next(c for c in classes.values() if c.size == 18)
    moved = {axis.name for axis in hidden.axes}
    assert {
        "blocks.0.body.0.weight", "blocks.0.body.3.weight", "blocks.0.body.4.running_var",
        "blocks.0.body.6.down.weight", "blocks.0.body.6.up.weight", "blocks.0.body.7.weight",
    } <= moved  # fmt: skip
    flattened = next(a for c in classes.values() for a in c.axes if a.name == "fc.weight")
    assert tuple(flattened.positions.shape) == (10, 16)


def test_concatenated_parts_and_groups_stay_apart():
    classes = classes_of("dense")
    sizes = sorted(c.size for c in classes.values())
    # 10 channels in groups of 5, cut at 4 by the split: classes respect every border.
    assert all(size <= 5 for size in sizes)


def test_attention_features_move_and_heads_do_not():
    classes = classes_of("tokens")
    width = next(c for c in classes.values() if "pos" in {a.name for a in c.axes})
    moved = {(a.name, a.dim) for a in width.axes}
    assert ("attn.in_proj_weight", 1) in moved
    assert ("attn.in_proj_weight", 0) not in moved
    assert ("attn.out_proj.weight", 0) in moved
    assert {"cls", "gamma", "norm1.weight", "norm2.weight"} <= {n for n, _ in moved}


def test_unknown_operations_pin_their_channels():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(self.b(torch.cumsum(self.a(x), -1)))

    classes = permutation_classes(settle(Odd()), torch.randn(2, 4))
    assert [c.name for c in classes] == ["b.weight"]


def test_shared_layers_join_what_goes_through_them():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.mid, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(self.mid(F.relu(self.mid(self.a(x)))))

    model = settle(Shared())
    x = torch.randn(3, 4)
    wanted = model(x)
    (one,) = permutation_classes(model, x)
    assert one.size == 6
    apply_permutation(model, one, torch.randperm(6))
    assert torch.allclose(model(x), wanted, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(2, 6), min_size=2, max_size=4),
    residual=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_stacks_survive_random_permutations(widths, residual, seed):
    torch.manual_seed(seed)

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = [3, *widths, 2]
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

        def forward(self, x):
            for i, layer in enumerate(self.layers):
                y = layer(x)
                x = F.relu(y) + (x if residual and layer.in_features == layer.out_features else 0)
                if i == 0:
                    x = torch.cat([x], -1)
            return x

    model = settle(Stack())
    x = torch.randn(2, 3)
    wanted = model(x)
    for c in permutation_classes(model, x):
        apply_permutation(model, c, torch.randperm(c.size))
    assert torch.allclose(model(x), wanted, rtol=1e-4, atol=1e-4)


def test_masks_can_be_permuted_with_their_weights():
    model = settle(mlp())
    x = torch.randn(3, 5)
    masks = magnitude_(model, 0.5)
    (first, *_) = permutation_classes(model, x)
    order = torch.randperm(first.size)
    apply_permutation(model, first, order)
    apply_permutation(masks, first, order)
    assert all(bool((model.get_parameter(n)[~m] == 0).all()) for n, m in masks.items())


def test_keyword_inputs_and_defaults_are_traced():
    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x, mask=None, scale=1.0, use=True):
            y = self.a(x) if use else x
            return self.b(y if mask is None else y * mask) * scale

    model = settle(Flagged())
    x = torch.randn(2, 4)
    assert len(permutation_classes(model, {"x": x})) == 1
    assert permutation_classes(model, (x, torch.ones(2, 6))) == []  # the mask is an end


def test_code_that_looks_at_shapes_or_makes_constants_is_traced_and_leaves_no_trace():
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            if x.dim() != 2 or x.shape[1] != self.a.in_features or len(x) < 1:
                raise ValueError("x must be (batch, 4)")
            y = self.a(x).view(x.size(0), -1) * torch.tensor(2.0)
            return self.b(y) if y.shape[-1] > 3 else y

    model = settle(Checked())
    before = set(vars(model))
    (one,) = permutation_classes(model.train(), torch.randn(2, 4))
    assert one.size == 6
    assert set(vars(model)) == before
    assert model.training
    with pytest.raises(ValueError, match="must be"):
        permutation_classes(model, torch.randn(2, 5))


def test_what_cannot_be_permuted_is_refused():
    model = settle(mlp())
    x = torch.randn(3, 5)
    classes = permutation_classes(model, x)
    for bad in ([0] * 16, list(range(15)), list(range(1, 17))):
        with pytest.raises(ValueError, match="must reorder the 16 channels"):
            apply_permutation(model, classes[0], bad)
    with pytest.raises(ValueError, match="belongs to another"):
        apply_permutation(nn.Linear(2, 2), classes[0], torch.randperm(16))
    with pytest.raises(ValueError, match="range"):
        invert([0, 0])
    with pytest.raises(ValueError, match="does not run"):
        permutation_classes(model, torch.randn(3, 6))

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"cannot be traced .*test_permute.py"):
        permutation_classes(Branching(), x)
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match="finalize"):
        permutation_classes(model, x)
