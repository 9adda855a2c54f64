"""Searches: for networks, and for the sparse form of a given one."""

from aerogel.search.attention_spans import SpanSearch, profile_influence, validate
from aerogel.search.pareto import pareto_front
from aerogel.search.span_calibration import calibrate_spans

__all__ = ["SpanSearch", "calibrate_spans", "pareto_front", "profile_influence", "validate"]
