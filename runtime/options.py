"""How to generate: transformers' GenerationConfig names, defaults and meanings (transformers 5), checked once.

Owns names, defaults, ranges and contradictions. It knows neither a model nor a prompt: lengths are resolved in
generate.py, and what an option does to scores is in processors.py and sampling.py.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from txopt.runtime.converters import Converter, convert, flag, integer, number, several
from txopt.runtime.errors import UsageError, explain

LENGTHS = ("max_length", "max_new_tokens")
COLDEST = 1e-30  # temperature: float32 ends at 3e38, so scores up to 3e8 stay finite
MOST_BEAMS = 4096  # each keeps a cache of its own; nobody searches wider, and memory ends sooner


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """One generate() call's options; lists become tuples, and a single end-of-sequence id becomes a tuple of one.

    Fields are transformers' except ``seed`` (of numpy's Generator, for sampling; None: not reproducible) and
    ``clip_length`` (a length beyond the model's positions is shortened rather than refused: nobody asked for it by
    hand).

    As in transformers: ``max_new_tokens`` beats ``max_length`` and ``min_new_tokens`` beats ``min_length``; without
        either length 20 new tokens are made; temperature, top_k, ... matter only with ``do_sample=True``; ``top_k`` is
        50 unless set (0: off).

    Errors:
        UsageError: values out of range and options that contradict each other, all of them listed.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None

    do_sample: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    early_stopping: bool | str = False
    length_penalty: float = 1.0

    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None

    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0

    seed: int | None = None
    clip_length: bool = False

    def __post_init__(self) -> None:
        values, problems = _checked({field.name: getattr(self, field.name) for field in fields(self)})
        if problems:
            raise UsageError(explain("generation options that cannot work:", problems))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def merge(cls, defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> "GenerationOptions":
        """A model's ``defaults`` (a GenerationConfig's dict), a call's ``overrides`` on top; None is unset in both.

        Names in ``defaults`` that belong to nobody here are left alone: checkpoints keep facts for their front end
        there (``lang_to_id``, ...). In ``overrides`` they are errors. Options of transformers that would change the ids
        and that txopt lacks are errors in both, unless set to what does nothing; those that cannot change ids
        (``use_cache``) do nothing.

        Errors:
            UsageError: unknown names with close matches, unsupported options, and everything that the constructor
                refuses.
        """
        names = [field.name for field in fields(cls)]
        given = {name: value for name, value in overrides.items() if value is not None}
        problems = [_unknown(name, names) for name in given if name not in {*names, *NO_EFFECT, *UNSUPPORTED}]
        merged = {name: value for name, value in defaults.items() if value is not None} | given
        problems += [
            f"{name}={merged[name]!r} is an option of transformers that txopt does not support: leave it out"
            for name, neutral in UNSUPPORTED.items()
            if name in merged and merged[name] not in neutral
        ]
        known = {name: value for name, value in merged.items() if name in names}
        known.setdefault("clip_length", not any(name in given for name in LENGTHS))
        if problems:
            problems += _checked({field.name: field.default for field in fields(cls)} | known)[1]
            raise UsageError(explain("generation options that cannot work:", problems))
        return cls(**known)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids, none if the model has none."""
        return _as_tuple(self.eos_token_id)

    @property
    def forced_eos_ids(self) -> tuple[int, ...]:
        """The ids that ``forced_eos_token_id`` names."""
        return _as_tuple(self.forced_eos_token_id)

    @property
    def padding(self) -> int | None:
        """What follows a finished sequence: ``pad_token_id``, else the first end-of-sequence id."""
        return self.pad_token_id if self.pad_token_id is not None else next(iter(self.eos_ids), None)


# Options of transformers that change ids and that txopt lacks, with the values that do nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (),
    "sequence_bias": (),
    "speculation_type": (),
    "stop_strings": (),
    "token_healing": (False,),
    "top_h": (),
    "use_mtp": (False,),
    "watermarking_config": (),
}

# Options of transformers that cannot change ids: taken and dropped, so that a whole GenerationConfig can be given.
NO_EFFECT = frozenset(
    [
        "assistant_confidence_threshold",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "is_assistant",
        "low_memory",
        "max_cache_len",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "prefill_chunk_size",
        "return_dict_in_generate",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
        "_from_model_config",
    ]
)


def _unknown(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names)
    return f"{name} is no generation option" + (f": did you mean {' or '.join(close)}?" if close else "")


def _as_tuple(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def _early_stopping(value: Any) -> bool | str:
    if value == "never":
        return "never"
    try:
        return flag(value)
    except ValueError:
        raise ValueError("True, False or 'never'") from None


def _id_or_ids(minimum: int | None) -> Converter:
    expected = "a token id or a list of them" + ("" if minimum is None else f", each at least {minimum}")
    tokens = several(integer(minimum), expected)

    def convert(value: Any) -> tuple[int, ...] | None:
        return tokens(value if hasattr(value, "__iter__") else (value,)) or None

    return convert


def _decay(value: Any) -> tuple[int, float]:
    try:
        start, factor = value
        return integer()(start), _finite(factor)
    except (TypeError, ValueError):
        raise ValueError("(start index, decay factor)") from None


_finite = number("a finite number", lambda number: number == number and abs(number) != float("inf"))
_positive = number("a number above 0", lambda number: 0 < number < float("inf"))
_share = number("a number from 0 to 1", lambda number: 0 <= number <= 1)
_cutoff = number("a number from 0 to 1, 1 excluded", lambda number: 0 <= number < 1)
_count, _natural, _token = integer(1), integer(0), integer(0)
_ids = several(integer(), "a list of token ids")

_CONVERTERS: dict[str, Converter] = {
    "max_length": _count,
    "max_new_tokens": _count,
    "min_length": _natural,
    "min_new_tokens": _natural,
    "do_sample": flag,
    "num_beams": integer(1, MOST_BEAMS),
    "num_return_sequences": _count,
    "early_stopping": _early_stopping,
    "length_penalty": _finite,
    "bos_token_id": integer(),
    "decoder_start_token_id": _token,
    "pad_token_id": integer(),
    "eos_token_id": _id_or_ids(None),  # as in transformers, a negative one never comes
    "forced_bos_token_id": _token,
    "forced_eos_token_id": _id_or_ids(0),
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "bad_words_ids": several(several(_token, "", least=1), "a list of lists of token ids, none empty", least=1),
    "repetition_penalty": _positive,
    "encoder_repetition_penalty": _positive,
    "no_repeat_ngram_size": _natural,
    "encoder_no_repeat_ngram_size": _natural,
    "exponential_decay_length_penalty": _decay,
    "remove_invalid_values": flag,
    "renormalize_logits": flag,
    "temperature": number("a number, at least 0", lambda number: 0 <= number < float("inf")),
    "top_k": _natural,
    "top_p": _share,
    "min_p": _share,
    "typical_p": number("a number above 0, at most 1", lambda number: 0 < number <= 1),
    "epsilon_cutoff": _cutoff,
    "eta_cutoff": _cutoff,
    "seed": integer(0, largest=None),
    "clip_length": flag,
}


def _checked(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values converted, and everything that is wrong with them."""
    # None is the default of those that may be unset, and never a value of the others.
    optional = [name for name in values if getattr(GenerationOptions, name) is None]
    converted, problems = convert(values, _CONVERTERS, optional)
    return converted, problems or _contradictions(converted)


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    problems = []
    beams, returned = values["num_beams"], values["num_return_sequences"]
    if beams == 1 and returned > 1 and not values["do_sample"]:
        problems.append(
            f"num_return_sequences={returned} needs do_sample=True or num_beams of at least {returned}: "
            "greedy search gives one"
        )
    if 1 < beams < returned:
        problems.append(f"num_return_sequences={returned} is more than num_beams={beams}")
    if values["do_sample"] and (temperature := values["temperature"]) < COLDEST:
        problems.append(
            f"temperature={temperature:.3g} cannot be sampled with: scores divided by less than {COLDEST:g} are infinite; "
            "set do_sample=False for greedy search"
        )
    suppressed = set(values["suppress_tokens"] or ())
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = set(_as_tuple(values[name]))
        if forced and forced <= suppressed:
            problems.append(f"{name}={sorted(forced)} is also in suppress_tokens: no token would be left")
    if values["exponential_decay_length_penalty"] is not None and values["eos_token_id"] is None:
        problems.append("exponential_decay_length_penalty needs eos_token_id")
    return problems
