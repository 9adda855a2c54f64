"""Looking inside networks and at what they would cost elsewhere."""

from aerogel.insight.calibration import (
    expected_calibration_error,
    maximum_calibration_error,
    ood_auroc,
    worst_class_accuracy,
)
from aerogel.insight.image_quality import psnr, ssim
from aerogel.insight.language import PassageNats, passage_nats, token_nats
from aerogel.insight.ranking import ndcg_at_k, rank_correlation, recall_at_k
from aerogel.insight.robustness import corruption_accuracy, fgsm_accuracy
from aerogel.insight.sat import SATConfig, SATModel, SATReport

__all__ = [
    "PassageNats",
    "SATConfig",
    "SATModel",
    "SATReport",
    "corruption_accuracy",
    "expected_calibration_error",
    "fgsm_accuracy",
    "maximum_calibration_error",
    "ndcg_at_k",
    "ood_auroc",
    "passage_nats",
    "psnr",
    "rank_correlation",
    "recall_at_k",
    "ssim",
    "token_nats",
    "worst_class_accuracy",
]
