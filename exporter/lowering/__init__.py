"""From the neutral graph to what one engine runs best: one file per target."""
