"""Runs artifacts with numpy and one engine; it knows neither PyTorch nor any model family."""
