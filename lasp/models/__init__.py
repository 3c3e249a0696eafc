"""Models as single-device code: no rank, no group. `lasp.parallelize` splits their sequence from outside."""

from lasp.models.decoder import Decoder, DecoderConfig
from lasp.models.linear_transformer import LinearTransformer, LinearTransformerConfig
from lasp.models.tnl import TNL, TNLConfig

__all__ = ["TNL", "Decoder", "DecoderConfig", "LinearTransformer", "LinearTransformerConfig", "TNLConfig"]
