"""The model of a run, by its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from _files import FileError, read_object

from lasp.models import TNL, Decoder, DecoderConfig, TNLConfig
from lasp.models.mixers import MIXERS

FAMILIES = ("tnl", *MIXERS)
Size = Literal[
    "tiny",
    "385M",
    "1B",
    "7B",
    "scaling-70M",
    "scaling-160M",
    "scaling-410M",
    "scaling-1B",
    "scaling-3B",
    "scaling-7B",
]
"""The names of `lasp.models.sizes`."""
LEARNING_RATES = {
    "tiny": 2e-3,
    "70M": 1e-3,
    "160M": 6e-4,
    "385M": 6e-4,
    "410M": 6e-4,
    "1B": 4e-4,
    "3B": 3e-4,
    "7B": 3e-4,
}
"""The highest, if not given, by what a size is called behind its suite."""


# What runs are that do not say of experts.
NO_EXPERTS = {"experts": 0, "experts_per_token": 2, "attention_experts": 0, "balance": 0.01}


def config_of(
    family: str, size: str, *, vocab: int, decay: str, pattern: str, **experts: int
) -> TNLConfig | DecoderConfig:
    """The configuration of a family (`FAMILIES`) by size; `decay` is of TNL alone, the rest of the others: `pattern`,
    and `experts` and what else of them `DecoderConfig` knows."""
    if family == "tnl":
        return TNLConfig.named(size, vocab_size=vocab, decay=decay)
    return DecoderConfig.named(family, size, vocab_size=vocab, pattern=pattern, **experts)


def experts_of(options: dict[str, Any]) -> dict[str, Any]:
    """Of the options of a run, those of `config_of` about experts."""
    found = {**NO_EXPERTS, **options}
    return {name: found[name] for name in NO_EXPERTS if name != "balance"}


def model_of(config: TNLConfig | DecoderConfig) -> TNL | Decoder:
    """The model of a configuration."""
    return TNL(config) if isinstance(config, TNLConfig) else Decoder(config)


def of_run(file: Path) -> tuple[TNLConfig | DecoderConfig, dict[str, Any]]:
    """The model of a run as its run.json tells, and what else that says: `text`, a digest of what it was trained on,
    `tokenizer`, who has made its tokens, or None where that was not noted yet, and `dtype` of the arithmetic.

    Raises:
        FileError: there is no such file, or something else in it.
    """
    found = read_object(file)
    try:
        options = found["options"]
        of_model = {name: options[name] for name in ("vocab", "decay", "pattern")}
        config = config_of(options["family"], options["model"], **of_model, **experts_of(options))
        return config, {"text": found["text"], "tokenizer": found.get("tokenizer"), "dtype": options["dtype"]}
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{file} is not what a run writes: {type(error).__name__}: {error}") from error
