"""Looking inside networks and at what they would cost elsewhere."""

from aerogel.insight.sat import SATConfig, SATModel, SATReport

__all__ = ["SATConfig", "SATModel", "SATReport"]
