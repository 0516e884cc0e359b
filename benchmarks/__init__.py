"""Measurements: what an artifact costs and what it gains, against named peers in one run, outputs checked before a time counts."""
