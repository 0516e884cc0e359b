"""A .onnx file read without its weights, which stay where they are: in the file.

A model of a gigabyte, read whole, costs two before anything is done to it: its bytes, and what protobuf makes of them. Here the file
is walked in protobuf's wire format, and the raw data of every large tensor is left out and named as external data, whose file is this
one. Source: protobuf's encoding guide; the field numbers of onnx.proto.

Owns nothing but the encoding: whether what comes out is a model is the parser's to say.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

LARGE = 1 << 16  # bytes of one tensor

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14  # fields of a TensorProto
_EXTERNAL = 1

# Messages that may hold a tensor somewhere: which of their fields are such messages again.
_INSIDE = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}


def skeleton(path: Path) -> bytes:
    """The file's bytes, but for the raw data of tensors of LARGE bytes or more.

    Raises:
        ValueError: the bytes are no protobuf message, or end within one. OSError: the file cannot be read.
    """
    if path.stat().st_size < LARGE:
        return path.read_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        return b"".join(_without_weights(whole, 0, len(whole), "model", path.name))


def _without_weights(whole: mmap.mmap, start: int, end: int, kind: str, name: str) -> Iterator[bytes]:
    """The message of ``kind`` between two places of the file, in pieces."""
    for tag, wire, head, body, after in _fields(whole, start, end):
        inner = _INSIDE[kind].get(tag) if wire == _BYTES else None
        if inner is None or after - body < LARGE:
            yield whole[head:after]
            continue
        pieces = (
            _tensor(whole, body, after, name)
            if inner == "tensor"
            else _without_weights(whole, body, after, inner, name)
        )
        content = b"".join(pieces)
        yield _varint(tag << 3 | _BYTES) + _varint(len(content)) + content


def _tensor(whole: mmap.mmap, start: int, end: int, name: str) -> Iterator[bytes]:
    for tag, wire, head, body, after in _fields(whole, start, end):
        if tag == _RAW_DATA and wire == _BYTES and after - body >= LARGE:
            for key, value in (("location", name), ("offset", str(body)), ("length", str(after - body))):
                entry = _text(1, key) + _text(2, value)
                yield _varint(_EXTERNAL_DATA << 3 | _BYTES) + _varint(len(entry)) + entry
            yield _varint(_DATA_LOCATION << 3 | _VARINT) + _varint(_EXTERNAL)
        else:
            yield whole[head:after]


def _fields(whole: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(field number, wire type, where the field begins, where its content begins, where it ends) of a message's fields."""
    place = start
    while place < end:
        head = place
        key, place = _number(whole, place, end)
        tag, wire = key >> 3, key & 7
        if wire == _BYTES:
            size, body = _number(whole, place, end)
            place = body + size
        elif wire == _VARINT:
            body = place
            _, place = _number(whole, place, end)
        elif wire in _FIXED:
            body, place = place, place + _FIXED[wire]
        else:
            raise ValueError(f"wire type {wire} at byte {head}")
        if place > end:
            raise ValueError(f"the field at byte {head} ends behind its message")
        yield tag, wire, head, body, place


def _number(whole: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    """A varint, and where it ends."""
    value = shift = 0
    while place < end and shift < 64:
        byte = whole[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ValueError(f"a number that does not end at byte {place}")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _text(tag: int, text: str) -> bytes:
    content = text.encode()
    return _varint(tag << 3 | _BYTES) + _varint(len(content)) + content
