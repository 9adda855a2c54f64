"""One plain training loop on Accelerate, resumable at any moment with the same result.

config = aerogel.train.TrainConfig(epochs=3, lr=0.1, augment="standard")
history = aerogel.train.fit(model, dataset, config, resume_dir="run/dense")
aerogel.train.evaluate(model, dataset)
"""

from aerogel.train.config import TrainConfig
from aerogel.train.evaluate import evaluate, perplexity
from aerogel.train.features import FeatureMatch
from aerogel.train.history import History, Progress, zero_fraction
from aerogel.train.loop import fit, make_optimizer
from aerogel.train.losses import embedding_loss, logit_loss, training_loss
from aerogel.train.run import Callback, Run, Stepper
from aerogel.train.sparse_layers import SparseConv2d, SparseLayer, SparseLinear
from aerogel.train.sparse_model import (
    dense_gradients,
    find_sparse_layers,
    sparse_training,
    to_dense,
    update_masks,
)
from aerogel.train.sync_batchnorm import synchronized_batch_norm

__all__ = [
    "Callback",
    "FeatureMatch",
    "History",
    "Progress",
    "Run",
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
    "Stepper",
    "TrainConfig",
    "dense_gradients",
    "embedding_loss",
    "evaluate",
    "find_sparse_layers",
    "fit",
    "logit_loss",
    "make_optimizer",
    "perplexity",
    "sparse_training",
    "synchronized_batch_norm",
    "to_dense",
    "training_loss",
    "update_masks",
    "zero_fraction",
]
