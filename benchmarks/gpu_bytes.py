"""What a decode step must read of memory, whoever computes it: the floor that a bandwidth sets.

Every weight of the decoder that a product, a norm or a sum reads, once; the filled places of the self-attention cache, and the
cross-attention cache whole. Of tables that are only looked up, a step reads a few rows: nothing. Activations stay in caches.
"""

import math

from txopt.exporter.attempt import graphs_of
from txopt.runtime.artifact import Artifact
from txopt.runtime.graphs import SOURCE_AXES

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def step_bytes(artifact: Artifact, batch: int, source: int, filled: int) -> int:
    """Bytes of one step of ``batch`` rows, with ``filled`` places in the self-attention cache and sources as long as ``source``."""
    spec, cache = artifact.manifest.graphs["decoder"], artifact.manifest.cache
    assert cache is not None, "a decoder has one"
    graph = graphs_of(artifact)["decoder"].graph
    weights = sum(
        value.const_value.nbytes
        for value in graph.initializers.values()
        if value.const_value is not None and any(user.op_type != "Gather" for user, _ in value.uses())
    )
    places = 2 * cache.layers * cache.heads * cache.head_size * _BYTES[cache.dtype]
    cross = 0
    for item in spec.inputs:
        if item.name.startswith("cross_"):
            _, *axes = (source if axis in SOURCE_AXES else axis for axis in item.axes)
            cross += math.prod(map(int, axes)) * _BYTES[item.dtype]
    return weights + batch * (places * filled + cross)
