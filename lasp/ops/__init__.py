"""The ways to depend on tokens of other ranks, each an exact operator over the sequence.

| operator | who | what crosses |
|---|---|---|
| `linear_attention` | TNL, RetNet, Mamba-2, GLA, HGRN2 ... | a state; its map is a number, a vector or nothing |
| the same with `causal=False` | encoders | the sum of all states |
| `delta_rule` | DeltaNet, Gated DeltaNet, KDA | a state; its map is a K x K matrix |
| `elementwise_recurrence`, and `selective_scan` | RG-LRU, HGRN; Mamba-1 | a state; its map is a number a channel |
| `halo`, and on it `causal_conv`, `block_attention` | token shift, convolutions | the last W - 1 tokens |
| `softmax_attention` | the softmax layers of hybrids | keys and values of earlier ranks |
"""
