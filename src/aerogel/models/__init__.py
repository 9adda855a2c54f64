"""Whole networks by name, with timm's interface.

model = aerogel.models.create_model("mobilenet_v1_laptop")
weights = aerogel.data.fetch_checkpoint("mobilenet_v2")
model = aerogel.models.create_model("mobilenet_v2", checkpoint_path=weights)
"""

from aerogel.models import language_model
from aerogel.models.classic import VGG, CifarResNet, ConvN, LeNet300
from aerogel.models.combiner import CombinerLM
from aerogel.models.edsr import EDSR
from aerogel.models.efficientnet import EfficientNet
from aerogel.models.mlp import MLP
from aerogel.models.mobilenet import MobileNetV1, MobileNetV2
from aerogel.models.recommend import LightGCN, MatrixFactorization, MultVAE, NeuMF, bpr_loss
from aerogel.models.registry import create_model, list_models, model_config, register_model
from aerogel.models.resnet import ResNet
from aerogel.models.routing_transformer import RoutingTransformerLM
from aerogel.models.sentence_encoder import SentenceEncoder
from aerogel.models.sparse_table import SparseEmbeddingTable
from aerogel.models.swinir import SwinIR
from aerogel.models.vision import VisionModel
from aerogel.models.vit import VisionTransformer
from aerogel.models.wave_surrogate import WaveSurrogate

__all__ = [
    "EDSR",
    "MLP",
    "VGG",
    "CifarResNet",
    "CombinerLM",
    "ConvN",
    "EfficientNet",
    "LeNet300",
    "LightGCN",
    "MatrixFactorization",
    "MobileNetV1",
    "MobileNetV2",
    "MultVAE",
    "NeuMF",
    "ResNet",
    "RoutingTransformerLM",
    "SentenceEncoder",
    "SparseEmbeddingTable",
    "SwinIR",
    "VisionModel",
    "VisionTransformer",
    "WaveSurrogate",
    "bpr_loss",
    "create_model",
    "language_model",
    "list_models",
    "model_config",
    "register_model",
]
