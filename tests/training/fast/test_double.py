"""Nearest up-sampling in the form for the compiler, against the plain form."""

import pytest
import torch
import torch.nn.functional as F

from training.fast.ops import double


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_has_the_pixels_and_the_gradient_of_nearest_interpolation(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    plain = F.interpolate(x, scale_factor=2, mode="nearest")
    up = torch.randn_like(plain)
    operations = []

    def backend(graph, example_inputs):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    ours = torch.compile(double, fullgraph=True, backend=backend)(x)
    assert not any("interpolate" in operation for operation in operations)  # its compiled gradient is atomic additions
    assert torch.equal(ours, plain) and torch.equal(double(x), plain)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    gradient, expected = (torch.autograd.grad(y, x, up)[0] for y in (ours, plain))
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    rounding = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(gradient, expected, rtol=rounding, atol=rounding)
