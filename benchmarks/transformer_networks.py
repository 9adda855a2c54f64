"""Whole sparse transformers against dense engines.

    python benchmarks/transformer_networks.py [NAME ...] [--explain] [--quick] [--json]
                                              [--threads N] [--check]

BERT-base and ViT-S/16 have random weights, MiniLM its own; the smallest in each linear layer of the
blocks are zero. Peers run the same network, zeros included, which none of them gains from. How
engines take turns is told in harness.py, and how whole networks are timed in networks.py.

The limit is what the multiply-adds that are left, those of attention included, would take at the
measured peak.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import harness
import networks
from aerogel import bench, data, models
from harness import Figure, Findings, Setup
from networks import ALONE, OURS, TWO_THREADS, Case

PEERS = (bench.TorchEager(), bench.TorchCompile(), bench.OnnxRuntime(), bench.OpenVino())

CASES = (
    Case("vit_s16", 1, 0.90, 1, 2.3, 3.2),
    Case("vit_s16", 1, 0.90, 4, 3.5, 5.0),
    Case("bert_base", 1, 0.90, 1, 2.3, 3.2),
    Case("bert_base", 1, 0.90, 4, 3.5, 5.0),
    Case("minilm", 32, 0.80, 4, 2.0, 2.8),
)


@dataclass(frozen=True)
class Network:
    """A transformer and the inputs it is timed on."""

    module: nn.Module
    inputs: dict[str, torch.Tensor]
    tokens: int
    layers: int
    width: int
    weights: str = "random"

    @property
    def attention_operations(self) -> int:
        """Two products of queries, keys and values in each layer."""
        batch = len(next(iter(self.inputs.values())))
        return 4 * batch * self.layers * self.tokens**2 * self.width


def vit_s16() -> Network:
    """ViT-S/16 on one image of 224 x 224, 197 tokens."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )
    images = {"pixel_values": torch.randn(1, 3, 224, 224)}
    return Network(transformers.ViTForImageClassification(config), images, 197, 12, 384)


def bert_base() -> Network:
    """BERT-base on one text of 128 tokens."""
    import transformers

    module = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    return Network(module, texts(1, 128), 128, 12, 768)


def minilm() -> Network:
    """all-MiniLM-L6-v2, pretrained, on 32 texts of 64 tokens."""
    folder = data.fetch_checkpoint("minilm")
    module = models.create_model("minilm", folder=folder)
    return Network(module, texts(32, 64), 64, 6, 384, "pretrained")


MAKERS: dict[str, Callable[[], Network]] = {
    "vit_s16": vit_s16,
    "bert_base": bert_base,
    "minilm": minilm,
}


def texts(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Token numbers without padding, and the mask that says so."""
    ids = torch.randint(1000, 30_000, (batch, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pruned_network(case: Case) -> Network:
    """Zeros in the linear layers of the blocks; patches, heads and poolers stay dense.

    Raises:
        data.FetchError: The pretrained weights cannot be had.
        ModuleNotFoundError: The package transformers is not installed.
    """
    network = MAKERS[case.model]()
    network.module.eval().requires_grad_(False)
    for name, module in network.module.named_modules():
        if isinstance(module, nn.Linear) and ".layer" in f".{name}":
            networks.remove_smallest(module.weight, case.sparsity, case.block)
    return network


def figures_of(case: Case, samples: dict[str, list[float]]) -> list[Figure]:
    """Against the peer that is fastest here, and with two threads against one."""
    name = f"{case.model}, {case.sparsity:.0%} zeros in {case.block}x1, batch {case.batch}"
    times = {
        engine: harness.ratio(seconds, samples[OURS])
        for engine, seconds in samples.items()
        if engine != OURS
    }
    alone = times.pop(ALONE, None)
    found = []
    if times:
        fastest = min(times, key=times.__getitem__)
        unit = f"x the fastest dense engine ({fastest})"
        found.append(Figure(name, times[fastest], unit, case.floor, case.aim))
    if alone is not None:
        found.append(Figure(name, alone, "x one thread", TWO_THREADS, threads=2))
    return found


def measure(setup: Setup) -> Findings:
    rows: list[dict[str, Any]] = []
    figures: list[Figure] = []
    with bench.Workspace() as workspace, torch.no_grad():
        for case in networks.wanted(CASES, setup):
            torch.manual_seed(0)
            try:
                network = pruned_network(case)
            except (data.FetchError, ModuleNotFoundError) as error:
                rows.append({"network": case.model, "engine": "all", "missing": str(error)})
                continue
            module, inputs = network.module, bench.Inputs.of(network.inputs)
            samples, missing, error = networks.samples_of(
                case.name, setup, module, inputs, PEERS, workspace
            )
            work = networks.operations(module, inputs) + network.attention_operations
            limit = 1e-9 * work / setup.roof.fma_gflops
            rows += networks.rows_of(case, network.weights, samples, limit, error)
            rows += networks.missing_rows(case.model, missing)
            figures += figures_of(case, samples)
    return Findings(networks.COLUMNS, rows, figures)


def add_options(parser: argparse.ArgumentParser) -> None:
    networks.add_options(parser, CASES)


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=3, quick_rounds=3, options=add_options))
