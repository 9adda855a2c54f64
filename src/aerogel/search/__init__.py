"""Searches: for networks, and for the sparse form of a given one."""

from aerogel.search.attention_spans import SpanSearch, profile_influence, validate
from aerogel.search.pareto import pareto_front

__all__ = ["SpanSearch", "pareto_front", "profile_influence", "validate"]
