"""Inference: a prompt over the ranks, in segments, and then token by token, from what it has left."""

from lasp.inference.generate import Generated, TokenStream, generate, stream_tokens
from lasp.inference.library import library_inputs, unsplit
from lasp.inference.prefill import prefill
from lasp.inference.state import InferenceState

__all__ = [
    "Generated",
    "InferenceState",
    "TokenStream",
    "generate",
    "library_inputs",
    "prefill",
    "stream_tokens",
    "unsplit",
]
