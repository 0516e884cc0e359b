"""In which order rows are copied within one buffer, so that none is read after it was overwritten.

Owns that order. It knows nothing of memory: a row is a number.
"""

from collections.abc import Iterator, Sequence

SPARE = -1  # a row beside the buffer


def moves(rows: Sequence[int], sources: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Copies (to, from) that let row ``rows[i]`` hold what row ``sources[i]`` held before the first of them.

    A row is written once nobody is left who reads it. Where rows wait for each other in a ring, one of them goes to SPARE first,
    and is read from there.
    """
    waiting = {row: source for row, source in zip(rows, sources, strict=True) if row != source}
    readers: dict[int, int] = {}
    for source in waiting.values():
        readers[source] = readers.get(source, 0) + 1
    free = [row for row in waiting if row not in readers]
    while waiting:
        if not free:
            row = next(iter(waiting))
            yield SPARE, row
            reader = next(other for other, source in waiting.items() if source == row)
            waiting[reader] = SPARE
            free.append(row)
        row = free.pop()
        source = waiting.pop(row)
        yield row, source
        if source in readers:
            readers[source] -= 1
            if not readers[source] and source in waiting:
                free.append(source)
