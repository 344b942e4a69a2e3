"""What is measured, and the difference that each row may have: written down here before it is measured."""

from __future__ import annotations

from dataclasses import dataclass

V4, NARROW, FOLDER = "a DeepSeek-V4", "weights in FP4 or FP8", "a folder of safetensors"
"""What a row can need of a model."""


@dataclass(frozen=True)
class Row:
    """A way to compute a model, and what it may cost.

    dtype: of activations and of weights that are not codes. weights: ``"wide"``, expanded to BF16, which holds FP4 and
    FP8 exactly; ``"packed"``, as they are stored, by `flagops.load`; or what `flagops convert --to` makes of them.
    backend: of the kernels; ``""`` replaces nothing, None leaves the choice to flagops. activations, numerics: as of
    `flagops.load` and `flagops.patch`. allowed: nats a token by which its loss may differ, either way, and at most the
    KL divergence, which is its expected loss where the reference is the truth. needs: of the model. asked: measured
    only where it is named.
    """

    name: str
    about: str
    allowed: float
    why: str
    dtype: str = "float32"
    weights: str = "wide"
    backend: str | None = ""
    activations: str = "none"
    numerics: str = "transformers"
    needs: frozenset[str] = frozenset()
    asked: bool = False


REFERENCE = Row("reference", "transformers, float32, expanded weights, nothing replaced", 0.0, "it is the reference")

ORDER = 1e-5
_ORDER = (
    "the same numbers, summed in another order: roundings of 2^-24 move a logit by some 1e-5, either way, and their "
    "mean by less; a router or an indexer that decides a tie otherwise is in the standard error"
)
BF16 = 0.005
_BF16 = (
    "eight bits of every activation: logits about 10 move by some 2^-8 of themselves a few times, 0.05 to 0.1, and the "
    "mean loss by half the square of that"
)
FP8 = 0.02
_FP8 = (
    "activations in e4m3, off by up to 2^-4 of themselves and 2.6 % on average; sums of 128 and more average them, so "
    "that logits move by 0.1 to 0.2, and the loss by half the square"
)
OFFICIAL = 0.02
_OFFICIAL = (
    "keys and entries in e4m3, as much as activations in FP8; the indexer compares in FP4, and takes another entry "
    "where two score alike"
)
INT8 = 0.02
_INT8 = (
    "weights and activations off by up to 1/254 of the largest of their row, which is as much as FP8 on average and "
    "more for what is small beside an outlier"
)
W4A8 = 0.1
_W4A8 = (
    "weights off by up to 1/15 of the largest of 32, 9 % on average, on a grid that nothing was trained for; "
    "activations as in INT8"
)

ROWS = (
    Row("numba", "its kernels, float32", ORDER, _ORDER, backend="numba"),
    Row("torch", "its kernels, float32", ORDER, _ORDER, backend="torch"),
    Row("triton", "its kernels, float32", ORDER, _ORDER, backend="triton", asked=True),
    Row("bf16", "transformers, bfloat16, as converted to BF16", BF16, _BF16, "bfloat16"),
    Row("numba-bf16", "numba's kernels, bfloat16", BF16, _BF16, "bfloat16", backend="numba"),
    Row("torch-bf16", "torch's kernels, bfloat16", BF16, _BF16, "bfloat16", backend="torch"),
    Row(
        "official", "the inference code's numerics, float32", OFFICIAL, _OFFICIAL,
        backend=None, numerics="official", needs=frozenset({V4}),
    ),
    Row(
        "packed", "FP4 and FP8 as stored, float32", ORDER, _ORDER,
        weights="packed", backend=None, needs=frozenset({NARROW}),
    ),
    Row(
        "packed-fp8", "as stored, activations in FP8, float32", FP8, _FP8,
        weights="packed", backend=None, activations="fp8", needs=frozenset({NARROW}),
    ),
    Row(
        "packed-official", "as stored, FP8, official numerics, bfloat16", BF16 + FP8 + OFFICIAL,
        "the three together, as DeepSeek's inference code serves it",
        "bfloat16", "packed", None, "fp8", "official", frozenset({V4, NARROW}),
    ),
    Row(
        "fp8", "FP4 recoded to FP8, float32", ORDER, f"recoded without loss; {_ORDER}",
        weights="fp8", backend=None, needs=frozenset({V4, NARROW}),
    ),
    Row("int8", "W8A8, products of float32", INT8, _INT8, weights="int8", needs=frozenset({FOLDER})),
    Row("w4a8", "INT4 in groups of 32, A8, float32", W4A8, _W4A8, weights="w4a8", needs=frozenset({FOLDER})),
)  # fmt: skip
