"""Which modules of torch.nn mix tokens: what their class alone tells, where they cannot be asked (see trial.py).

Every module class of torch.nn stands in exactly one list, which a test holds them to: a class that is new in PyTorch
is looked at before it is trusted. The token dimension is any but the last ([B, T, D], [B, H, T, K]) unless a class has
a layout of its own, as convolutions do ([B, C, T]).
"""

from __future__ import annotations

from torch import nn

_CONTAINERS = "Container Sequential ModuleList ModuleDict ParameterList ParameterDict DataParallel"
_ELEMENTWISE = """
    CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish PReLU RReLU ReLU ReLU6
    SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Threshold
    AlphaDropout Dropout Dropout1d Dropout2d Dropout3d FeatureAlphaDropout
"""
_CHANNELS = "Bilinear Embedding LazyLinear Linear PairwiseDistance"

LOCAL = frozenset(f"{_CONTAINERS} {_ELEMENTWISE} {_CHANNELS}".split())
"""The output at a token depends on that token only."""

_MIXERS = """
    Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d LazyConv1d LazyConv2d LazyConv3d
    LazyConvTranspose1d LazyConvTranspose2d LazyConvTranspose3d Fold Unfold
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
    AvgPool1d AvgPool2d AvgPool3d FractionalMaxPool2d FractionalMaxPool3d LPPool1d LPPool2d LPPool3d
    MaxPool1d MaxPool2d MaxPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d
    BatchNorm1d BatchNorm2d BatchNorm3d LazyBatchNorm1d LazyBatchNorm2d LazyBatchNorm3d SyncBatchNorm
    InstanceNorm1d InstanceNorm2d InstanceNorm3d LazyInstanceNorm1d LazyInstanceNorm2d LazyInstanceNorm3d
    GRU GRUCell LSTM LSTMCell RNN RNNBase RNNCell RNNCellBase
    MultiheadAttention Transformer TransformerDecoder TransformerDecoderLayer TransformerEncoder TransformerEncoderLayer
    EmbeddingBag CTCLoss
    """
MIXES = frozenset(_MIXERS.split())
"""The output at a token depends on others, in all but degenerate settings (a convolution of width 1)."""

_PADDING = """
    CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d
    ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d ZeroPad1d ZeroPad2d ZeroPad3d
"""
_LOSSES = """
    AdaptiveLogSoftmaxWithLoss BCELoss BCEWithLogitsLoss CosineEmbeddingLoss CrossEntropyLoss GaussianNLLLoss
    HingeEmbeddingLoss HuberLoss KLDivLoss L1Loss LinearCrossEntropyLoss MSELoss MarginRankingLoss MultiLabelMarginLoss
    MultiLabelSoftMarginLoss MultiMarginLoss NLLLoss NLLLoss2d PoissonNLLLoss SmoothL1Loss SoftMarginLoss
    TripletMarginLoss TripletMarginWithDistanceLoss
"""  # a mean over tokens; over those of all ranks it is lasp.token_loss
_SHAPES = """
    ChannelShuffle Flatten PixelShuffle PixelUnshuffle Unflatten Upsample UpsamplingBilinear2d UpsamplingNearest2d
"""
_ALONG_A_DIMENSION = """
    CosineSimilarity CrossMapLRN2d GLU GroupNorm LayerNorm LocalResponseNorm LogSoftmax RMSNorm Softmax Softmax2d
    Softmin
"""
DEPENDS = frozenset(f"{_PADDING} {_LOSSES} {_SHAPES} {_ALONG_A_DIMENSION}".split())
"""Which it is depends on arguments, or on how the tokens lie in its input."""


def kind_of(module: nn.Module) -> str | None:
    """ "local", "mixes" or "depends", by the nearest class of torch.nn; None if that is nn.Module itself."""
    for base in type(module).__mro__:
        name = base.__name__
        if base is nn.Module or getattr(nn, name, None) is not base:
            continue
        if name in MIXES:
            return "mixes"
        return "local" if name in LOCAL or _of_last_dim(module) else "depends"
    return None


def is_of_torch(module: nn.Module) -> bool:
    """Whether its forward is PyTorch's own."""
    return getattr(nn, type(module).__name__, None) is type(module)


def has_forward_of_torch(module: nn.Module) -> bool:
    """The same, or that of a module which PyTorch puts around others, as for checkpointing."""
    if "forward" in vars(module):
        return False
    return next(c for c in type(module).__mro__ if "forward" in vars(c)).__module__.partition(".")[0] == "torch"


def _of_last_dim(module: nn.Module) -> bool:
    """Whether its arguments say that it works along the last dimension only, that of channels."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) == 1
    if isinstance(module, nn.Flatten):
        return module.start_dim >= 2 or module.start_dim in (-2, -1)
    if getattr(module, "reduction", None) == "none" and not isinstance(module, nn.CTCLoss):
        return True
    return getattr(module, "dim", None) == -1
