"""The model of a run, by its options."""

from __future__ import annotations

from typing import Literal

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


def config_of(family: str, size: str, *, vocab: int, decay: str, pattern: str) -> TNLConfig | DecoderConfig:
    """The configuration of a family (`FAMILIES`) by size; `decay` is of TNL alone, and `pattern` of the others."""
    if family == "tnl":
        return TNLConfig.named(size, vocab_size=vocab, decay=decay)
    return DecoderConfig.named(family, size, vocab_size=vocab, pattern=pattern)


def model_of(config: TNLConfig | DecoderConfig) -> TNL | Decoder:
    """The model of a configuration."""
    return TNL(config) if isinstance(config, TNLConfig) else Decoder(config)
