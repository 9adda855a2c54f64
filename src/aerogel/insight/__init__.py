"""Looking inside networks and at what they would cost elsewhere."""

from aerogel.insight.ranking import ndcg_at_k, rank_correlation, recall_at_k
from aerogel.insight.sat import SATConfig, SATModel, SATReport

__all__ = [
    "SATConfig",
    "SATModel",
    "SATReport",
    "ndcg_at_k",
    "rank_correlation",
    "recall_at_k",
]
