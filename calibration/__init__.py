"""Data in, ranges and quantized graphs out."""
