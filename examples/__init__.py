"""Models that go through the custom door; g2p is the one that ``txopt demo`` shows."""
