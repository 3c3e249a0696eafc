"""Shapes of models by name, of TNL and of every family of `Decoder`: layers, width, heads, width of the gated unit.

"385M", "1B" and "7B" are OpenNLPLab's released TNLs (the 7B's gated unit is not published, and is that of
"scaling-7B"). "scaling-70M" to "scaling-7B" are the six sizes in which TNL, HGRN2, cosFormer2 and LLaMA were compared
("Scaling Laws for Linear Complexity Language Models", arXiv 2406.16690, table 7). "tiny" is for demonstrations on CPUs.
"""

SIZES: dict[str, tuple[int, int, int, int]] = {
    "tiny": (4, 128, 4, 384),
    "385M": (24, 1024, 8, 2816),
    "1B": (16, 2048, 16, 5632),
    "7B": (30, 4096, 32, 11008),
    "scaling-70M": (6, 512, 4, 1536),
    "scaling-160M": (12, 768, 6, 2048),
    "scaling-410M": (25, 1024, 8, 2816),
    "scaling-1B": (32, 1536, 16, 5632),
    "scaling-3B": (35, 2560, 20, 6912),
    "scaling-7B": (32, 4096, 32, 11008),
}
