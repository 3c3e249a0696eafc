"""The model of a run, by its options."""

from __future__ import annotations

from lasp.models import TNL, Decoder, DecoderConfig, TNLConfig
from lasp.models.mixers import MIXERS

FAMILIES = ("tnl", *MIXERS)


def config_of(family: str, size: str, *, vocab: int, decay: str, pattern: str) -> TNLConfig | DecoderConfig:
    """The configuration of a family (`FAMILIES`) by size; `decay` is of TNL alone, and `pattern` of the others."""
    if family == "tnl":
        return TNLConfig.named(size, vocab_size=vocab, decay=decay)
    return DecoderConfig.named(family, size, vocab_size=vocab, pattern=pattern)


def model_of(config: TNLConfig | DecoderConfig) -> TNL | Decoder:
    """The model of a configuration."""
    return TNL(config) if isinstance(config, TNLConfig) else Decoder(config)
