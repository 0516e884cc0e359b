"""Records reference cases from PyTorch, on shapes that were not traced.

Owns what PyTorch is asked; which cases there are is case_plan.py's, what is kept of them cases.py's. Everything is drawn from
one seed, so that the same source gives the same file.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from txopt.exporter.case_plan import Plan, plans
from txopt.exporter.precision import in_float32
from txopt.exporter.source import Facts, Forward, Memory, Source
from txopt.runtime.cases import INPUT_HOLD, Case, draw_floats, log_sum_exp, sample
from txopt.runtime.errors import SourceError
from txopt.runtime.graphs import GLOBAL_MASK, memory_name

SEED = 20261123
NEW_TOKENS = 12
BEAMS = 4


def record(source: Source) -> list[Case]:
    """The cases of one source, in the order in which parity replays them.

    Computed in float32 from the weights as they are, float16 and bfloat16 included: a reference that rounds as much as what it is
    held against would double the error, and refuse artifacts that are nearer to the truth than itself.
    """
    generator = np.random.default_rng(SEED)
    with torch.no_grad(), in_float32(source):
        return [_record(source, plan, generator) for plan in plans(source.facts)[0]]


def _record(source: Source, plan: Plan, generator: np.random.Generator) -> Case:
    facts = source.facts
    inputs = _inputs(source, plan.rows, generator)
    tensors = {
        key: torch.from_numpy(value) for key, value in inputs.items()
    }  # floats are float32, as the weights are now
    if facts.kind == "encoder":
        outputs = {key: value.numpy() for key, value in source.outputs(tensors).items()}
        counts = facts.lengths(inputs).seen("T", 0)
        expected = {key: _tagged(sample(key, value, counts), key, counts) for key, value in outputs.items()}
        _check_finite(source, plan.name, inputs, expected)
        return Case(name=plan.name, inputs=inputs, tokens=np.zeros((len(plan.rows), 0), np.int64), expected=expected)
    tokens = _ids(facts, facts.vocabulary, (len(plan.rows), sum(plan.schedule)), generator)
    forward = source.forward(tensors, torch.from_numpy(tokens))
    expected = _expected(facts, forward, inputs)
    _check_finite(source, plan.name, inputs, expected)
    case = Case(name=plan.name, inputs=inputs, tokens=tokens, schedule=plan.schedule, expected=expected)
    return _with_generated(source, case, tensors) if plan.generates else case


def _expected(facts: Facts, forward: Forward, inputs: Mapping[str, Any]) -> dict[str, Any]:
    logits = forward.logits.numpy()
    with np.errstate(invalid="ignore"):  # what is not finite is refused in words, not warned of
        expected = {"logits": sample("logits", logits, ()), "log_sum_exp": log_sum_exp(logits)}
    lengths = facts.lengths(inputs)
    for index, (memory, states) in enumerate(zip(facts.memories, forward.memories, strict=True)):
        name = memory_name(index)
        expected[name] = sample(name, states.numpy(), lengths.seen(_axis(memory, states.shape[1]), states.shape[1]))
    for kind, pairs in (("self", forward.self_kv), ("cross", forward.cross_kv)):
        for layer, pair in enumerate(pairs):
            for part, value in zip(("key", "value"), pair, strict=True):
                name = f"{kind}_{part}.{layer}"
                size = value.shape[2]
                counts = lengths.seen(_axis(facts.cross_memory(layer), size), size) if kind == "cross" else ()
                expected[name] = sample(name, value.numpy(), counts)
    return expected


def _check_finite(source: Source, case: str, inputs: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises SourceError where the model itself says NaN or infinity, which no artifact can be held against."""
    for name in sorted(expected, key=_place):
        value = expected[name]
        if np.isfinite(value).all():
            continue
        found = "NaN" if np.isnan(value).any() else "inf" if (value == np.inf).any() else "-inf"
        shapes = ", ".join(f"{key} [{','.join(map(str, each.shape))}]" for key, each in inputs.items())
        raise SourceError(
            f"the model's own answers are not finite, so there is nothing to hold an artifact against: {found} in {name}, "
            f'case "{case}" ({shapes}); {_why_not_finite(source, name, value)}'
        )


def _place(name: str) -> int:
    """In the order of computation."""
    order = ("memory", "cross_", "self_", "logits")
    return next((index for index, kind in enumerate(order) if name.startswith(kind)), len(order))


def _why_not_finite(source: Source, name: str, value: Any) -> str:
    named = source.module.named_parameters()  # of a decoder without a cache in a module around it, "module"
    broken = [key.removeprefix("module.") for key, weight in named if not bool(torch.isfinite(weight).all())]
    if broken:
        return f"weights that hold NaN or infinity: {', '.join(broken)}; load or train them again"
    if name == "logits" and (value[~np.isfinite(value)] == -np.inf).all():
        ids = np.unique(np.nonzero(~np.isfinite(value))[-1])
        which = f"at id {', '.join(map(str, ids))}: " if value.shape[-1] == source.facts.vocabulary else ""
        return f"{which}leave these logits finite, and forbid ids by suppress_tokens of generate() instead"
    return (
        "all weights are finite: look for a division by zero, a logarithm of 0, a softmax of nothing but masked places, or numbers "
        "too large for their type"
    )


def _axis(memory: Memory, size: int) -> str | int:
    """The axis of a memory's length as the manifest says it: of a fixed length, the length itself."""
    return size if memory.axis is None else memory.axis


def _tagged(value: Any, name: str, counts: Sequence[int]) -> Any:
    """Token classification: what stands at padding is nobody's business."""
    if name == "logits" and value.ndim == 3:
        for row, count in zip(value, counts, strict=True):
            row[count:] = 0
    return value


def _with_generated(source: Source, case: Case, tensors: Mapping[str, Tensor]) -> Case:
    facts = source.facts
    prompt = tensors["input_ids"].shape[1] if facts.kind == "decoder" else 1
    longest = NEW_TOKENS if facts.limit is None else min(NEW_TOKENS, facts.limit - prompt)
    common: dict[str, Any] = {"max_new_tokens": longest, "do_sample": False}
    generated, options, margins, scores = {}, {}, None, None
    greedy = {**common, "num_beams": 1}
    if (found := source.generate(tensors, **greedy)) is not None:
        generated["greedy"], options["greedy"] = found.ids.numpy(), greedy
        margins = _margins(source, tensors, found.ids)
    beam = {**common, "num_beams": BEAMS}
    if (found := source.generate(tensors, **beam)) is not None:
        generated["beam"], options["beam"] = found.ids.numpy(), beam
        scores = None if found.scores is None else found.scores.numpy()
    return Case(
        name=case.name,
        inputs=case.inputs,
        tokens=case.tokens,
        schedule=case.schedule,
        expected=case.expected,
        generated=generated,
        options=options,
        margins=margins,
        scores=scores,
    )


def _margins(source: Source, tensors: Mapping[str, Tensor], ids: Tensor) -> Any:
    """How far the best logit is ahead of the second at every token of ``ids``, float32 [B,L-1]."""
    mask = None
    if source.facts.kind == "decoder":
        mask = torch.cat(
            [
                tensors["attention_mask"],
                torch.ones(len(ids), ids.shape[1] - tensors["attention_mask"].shape[1], dtype=torch.int64),
            ],
            1,
        )
    logits = source.forward(tensors, ids, mask).logits[:, :-1]
    top = logits.topk(2, dim=-1).values
    return (top[..., 0] - top[..., 1]).numpy()


def _inputs(source: Source, rows: tuple[int, ...], generator: np.random.Generator) -> dict[str, Any]:
    facts = source.facts
    if facts.kind == "decoder":
        return _prompt(facts, rows, generator)
    if facts.framing is not None:  # rows are frames; float inputs are drawn in steps of INPUT_HOLD samples
        rows = tuple(-(-facts.framing.samples(row) // INPUT_HOLD) * INPUT_HOLD for row in rows)
    inputs: dict[str, Any] = dict(_masks(facts, rows))
    given = {axis: np.any([inputs[m] for m, a in facts.masks.items() if a == axis], 0) for axis in facts.masks.values()}
    for item in facts.inputs:
        if item.name in facts.masks:
            continue
        lengths = {axis: mask.shape[1] for axis, mask in given.items()}
        shape = (
            len(rows),
            *(axis if isinstance(axis, int) else lengths.get(axis, max(rows)) for axis in item.axes[1:]),
        )
        seen = given.get(item.axes[1], np.ones(shape, np.bool_))
        if item.dtype != "int64":
            drawn = draw_floats(shape, generator)
            inputs[item.name] = drawn * seen.astype(np.float32) if "N" in item.axes else drawn
        elif (
            item.name == GLOBAL_MASK
        ):  # nothing in the first source, as generate() has it; every third token of the others
            marked = (np.arange(shape[1]) % 3 == 0) & (np.arange(len(rows)) > 0)[:, None]
            inputs[item.name] = (seen & marked).astype(np.int64)
        else:
            ids = _ids(facts, item.vocabulary or facts.source_vocabulary, shape, generator)
            inputs[item.name] = np.where(seen, ids, facts.generation.get("pad_token_id") or 0)
    return {item.name: inputs[item.name] for item in facts.inputs}


def _masks(facts: Facts, rows: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Each mask with lengths of its own, so that none can stand for another: turned by one row, and longer by one place."""
    masks = list(facts.masks.items())
    counts = []
    for index, (_, axis) in enumerate(masks):
        limit, turn = axis if isinstance(axis, int) else facts.limit_of(axis), index % len(rows)
        own = [length + index for length in (*rows[turn:], *rows[:turn])]
        counts.append([length if limit is None else min(length, limit) for length in own])
    for (name, axis), own in zip(masks, counts, strict=True):
        width = (
            axis if isinstance(axis, int) else max(max(c) for (_, a), c in zip(masks, counts, strict=True) if a == axis)
        )
        yield name, (np.arange(width) < np.array(own)[:, None]).astype(np.int64)


def _prompt(facts: Facts, rows: tuple[int, ...], generator: np.random.Generator) -> dict[str, Any]:
    """A decoder's prompt, padded on the left as transformers wants it."""
    width = max(rows)
    mask = (np.arange(width) >= width - np.array(rows)[:, None]).astype(np.int64)
    ids = _ids(facts, facts.vocabulary, mask.shape, generator)
    pad = facts.generation.get("pad_token_id") or facts.generation.get("eos_token_id") or 0
    return {"input_ids": np.where(mask == 1, ids, pad), "attention_mask": mask}


def _ids(facts: Facts, vocabulary: int, shape: tuple[int, ...], generator: np.random.Generator) -> Any:
    """Ids that mean nothing special to the model.

    Raises:
        SourceError: it has none.
    """
    named = {key: value for key, value in facts.generation.items() if key.endswith("token_id") and value is not None}
    special = {each for value in named.values() for each in (value if isinstance(value, (list, tuple)) else [value])}
    ordinary = np.setdiff1d(np.arange(vocabulary), sorted(special))
    if not len(ordinary):
        raise SourceError(
            f"all of {vocabulary} ids are special ({', '.join(f'{key} {value}' for key, value in named.items())}): expected ids that "
            "can be told apart, to record reference cases; a custom module without source_vocabulary is taken to have as many as its "
            "smallest nn.Embedding has rows"
        )
    return generator.choice(ordinary, shape).astype(np.int64)
