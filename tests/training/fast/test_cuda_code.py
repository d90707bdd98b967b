"""The CUDA code generated for training blocks, with what makes it slow or not repeatable absent.

It needs the package triton and no GPU. The blocks are those of img512-S, for 64 images in float16. The bounds on
launches and bytes are what the code needs today.
"""

import importlib.util
from typing import NamedTuple

import pytest

from tests.helpers.cuda_code import Code, Sort, generated
from training.run.run_network import COMPILE_OPTIONS

NUM_IMAGES = 64


class Bound(NamedTuple):
    """The most kernels launched by a pass, and the most GB read and written."""

    launches: int
    gigabytes: float


# Of the forward and the backward pass. The first two have every part of a block; the others run in `make faults`.
BOUNDS: dict[Sort, tuple[Bound, Bound]] = {
    Sort(384, 384, 64, "dec", "up", False): (Bound(5, 2.04), Bound(9, 2.88)),
    Sort(384, 576, 16, "enc", "keep", True): (Bound(10, 0.68), Bound(17, 1.25)),
    Sort(192, 192, 32, "enc", "down", False): (Bound(5, 0.40), Bound(10, 0.54)),
    Sort(192, 192, 64, "enc", "keep", False): (Bound(5, 1.17), Bound(9, 1.58)),
    Sort(960, 576, 16, "dec", "keep", True): (Bound(10, 0.76), Bound(17, 1.41)),
    Sort(576, 384, 32, "dec", "keep", False): (Bound(6, 0.82), Bound(10, 1.21)),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(slice(2), marks=pytest.mark.slow), pytest.param(slice(2, None), marks=pytest.mark.faults)],
    ids=["two", "others"],
)
def code(request: pytest.FixtureRequest) -> dict[Sort, tuple[Code, Code]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    sorts = list(BOUNDS)[request.param]
    return dict(zip(sorts, generated(sorts, num_images=NUM_IMAGES, options=COMPILE_OPTIONS), strict=True))


def test_gradients_are_sums_in_a_fixed_order(code):
    assert not [sort for sort, passes in code.items() if any("tl.atomic" in each.source for each in passes)]


def test_activations_and_weights_in_half_precision_are_channels_last(code):
    for sort, passes in code.items():
        vectors = (NUM_IMAGES, sort.out_channels // 64, sort.side**2, 64)  # of attention, in [N, heads, S, d]
        for each in passes:
            found = [(b.shape, b.stride) for b in each.buffers.values() if b.dtype == "float16"] + each.checked_strides
            images = [(shape, stride) for shape, stride in found if len(shape) == 4 and shape != vectors]
            assert len(images) > 5, sort
            assert not [image for image in images if image[1][1] != 1], sort
            assert all(stride[3] == 1 for shape, stride in found if shape == vectors), sort


def test_no_weight_is_kept_in_float32_for_the_backward_pass(code):
    for sort, (forward, _) in code.items():
        kept = [forward.buffers[name] for name in forward.returned if name in forward.buffers]
        assert kept
        large = [b for b in kept if b.dtype == "float32" and b.numel >= sort.out_channels**2]
        assert not large


def test_launches_and_bytes_are_no_more_than_today(code):
    for sort, passes in code.items():
        for each, bound in zip(passes, BOUNDS[sort], strict=True):
            assert each.launches <= bound.launches, sort
            assert each.nbytes / 1e9 <= bound.gigabytes, sort
            assert len(each.libraries) <= 9 and "mm" not in each.libraries, sort
