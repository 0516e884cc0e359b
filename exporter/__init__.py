"""PyTorch in, neutral graphs and artifacts out."""
