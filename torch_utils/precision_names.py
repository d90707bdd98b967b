"""The names of number formats, which options offer without importing torch."""

from typing import Literal, get_args

# Arithmetic of large matrix products and convolutions: float32; float32 with factors rounded to TF32 on GPUs that have
# it; float16 on CUDA devices and float32 elsewhere; bfloat16.
Precision = Literal["fp32", "tf32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
AUTO = "auto"  # an option's value for `torch_utils.precision.fastest_precision`, which replaces it at once
