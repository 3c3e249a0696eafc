"""Models as single-device code: no rank, no group. `lasp.parallelize` splits their sequence from outside."""

from lasp.models.decoder import Decoder, DecoderConfig, experts_from_dense
from lasp.models.linear_transformer import LinearTransformer, LinearTransformerConfig
from lasp.models.tnl import TNL, TNLConfig

__all__ = [
    "TNL",
    "Decoder",
    "DecoderConfig",
    "LinearTransformer",
    "LinearTransformerConfig",
    "TNLConfig",
    "experts_from_dense",
]
