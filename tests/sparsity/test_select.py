"""Which parameters are chosen, by type and by name."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from aerogel.sparsity import ParamSelection, select_parameters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.norm = nn.LayerNorm((2, 8))
        self.rnn = nn.LSTM(8, 8)
        self.head = nn.Linear(8, 10)


def test_default_is_linear_and_convolution_weights():
    assert list(select_parameters(Net())) == ["conv.weight", "head.weight"]


def test_normalisation_and_biases_are_never_chosen_by_a_wildcard():
    chosen = list(select_parameters(Net(), include=("*",)))
    assert not [name for name in chosen if "norm" in name or "bias" in name]
    assert "embed.weight" in chosen
    assert "rnn.weight_hh_l0" in chosen


def test_globs_match_parameters_and_modules():
    assert list(select_parameters(Net(), include=("head",))) == ["head.weight"]
    assert list(select_parameters(Net(), exclude=("he*",))) == ["conv.weight"]


def test_types_add_embeddings_and_recurrent_weights():
    chosen = select_parameters(Net(), types=(nn.Embedding, nn.LSTM))
    assert list(chosen) == ["embed.weight", "rnn.weight_hh_l0", "rnn.weight_ih_l0"]


def test_first_and_last_can_be_skipped():
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    assert list(select_parameters(net, skip_first=True, skip_last=True)) == ["1.weight", "2.weight"]


def test_biases_come_on_request():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert list(select_parameters(net, biases=True)) == ["0.weight", "0.bias"]


def test_tied_parameters_appear_once_with_every_place():
    net = Net()
    net.head.weight = nn.Parameter(net.embed.weight.detach())
    net.embed.weight = net.head.weight
    chosen = select_parameters(net, include=("*",), exclude=("rnn", "conv"))
    assert list(chosen) == ["embed.weight"]
    assert [m for m, _ in chosen["embed.weight"].places] == [net.embed, net.head]


def test_one_parameter_under_two_names_is_refused():
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    first = select_parameters(net)["0.weight"]
    net[1].weight = net[0].weight
    second = select_parameters(nn.ModuleList([nn.Linear(1, 1), net[1]]))["1.weight"]
    with pytest.raises(ValueError, match="tied"):
        ParamSelection([first, second])


def test_parametrized_weights_keep_name_order_and_leaf():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = select_parameters(net, biases=True)
    leaf = net[0].weight
    parametrize.register_parametrization(net[0], "weight", nn.Identity())
    after = select_parameters(net, biases=True)
    assert list(after) == list(before)
    assert after["0.weight"].parameter is leaf


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_glob_that_matches_nothing_lists_the_nearest(argument):
    with pytest.raises(ValueError, match=r"haed.*nearest.*head\.weight"):
        select_parameters(Net(), **{argument: ("haed.weight",)})


def test_a_string_is_not_a_list_of_globs():
    with pytest.raises(TypeError, match="sequence"):
        select_parameters(Net(), include="head")


def test_an_empty_selection_is_refused():
    with pytest.raises(ValueError, match="no parameter selected"):
        select_parameters(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="no parameter selected"):
        select_parameters(Net(), exclude=("*.weight",))


def test_weights_are_what_the_forward_pass_sees():
    net = nn.Sequential(nn.Linear(3, 3))

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    parametrize.register_parametrization(net[0], "weight", Double())
    chosen = select_parameters(net)
    assert torch.equal(chosen.weights()["0.weight"], 2 * chosen["0.weight"].parameter.detach())
