"""ONNX Runtime's runner on the CPU, whose tensors lie where nobody else sees them, as on a GPU."""

from typing import Any

from txopt.runtime.backends import ort


class Far(ort.Runner):
    """Inputs are sent and outputs fetched; whatever is not is missing from the result."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._on_host = False

    def tensor(self, array: Any, dtype: str | None = None) -> Any:
        return super().tensor(array.copy(), dtype)

    def view(self, value: Any) -> Any:
        return super().view(value).copy()
