"""How far apart two computations of one number may lie in the tests, and why: one constant for each kind of number.

All are absolute, in the unit of what is compared; where a comparison has a relative part too, the larger one counts.
Processors and BLAS kernels add up in other orders (AVX2 eight numbers at once, AVX-512 sixteen), so no figure is that
of one machine. ``pytest.approx`` without arguments (1e-6 relative, 1e-12 absolute) is for arithmetic of Python's
floats alone: counts, shares, seconds.
"""

LOGITS = 1e-4
"""Float32 logits of size 1 to 15 from two programs (ours, mlx-lm, PyTorch) or from merged weights: sums of some
hundred products in other orders, layer after layer. 2e-5 is what is seen; a wrong mask or scale moves them by 0.01."""

CLOSE_LOGITS = 1e-5
"""Float32 logits around 4 from one program, with the same weights up to a rounding or with the same rows in another
pass. 1e-6 is what is seen."""

FLOAT32 = 1e-6
"""Float32 numbers below 8 that a few products make, as a merged weight or a rotated key: some units in the last
place of 2**-24, relative to 4."""

LOSSES = 1e-5
"""Float32 means of log-probabilities of size 3 to 8, and gradients of them for tensors whose own are around 0.1:
20 units in the last place."""

FLOAT64 = 1e-12
"""Float64 sums of some hundred numbers around 1, each with a rounding of 1e-16."""
