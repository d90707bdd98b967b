"""Inception-v3 of 2015-12-05: golden features, a second implementation, its resize by the formula, its weights file."""

import json
import pickle
import zlib

import pytest
import requests
import safetensors.torch
import torch
import torch.nn.functional as F

from dnnlib.download import cached_path
from dnnlib.errors import ConfigError
from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.tiny import assert_close
from training.metrics.detectors import InceptionV3Detector, inception
from training.metrics.detectors.common import file_sha256

SHAPES = json.loads((GOLDEN_DIR / "inception-tensors.json").read_text())


def stand_in_weights(salt=""):
    """A value for every tensor of the weights file, from its name; without salt those of the golden numbers."""
    tensors = {}
    for name, shape in SHAPES.items():
        r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32((salt + name).encode())))
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith("running_var"):
            tensors[name] = 1 + 0.1 * r.abs()
        elif name.endswith("running_mean"):
            tensors[name] = 0.1 * r
        elif r.ndim > 1:
            tensors[name] = r * (2 / r[0].numel()) ** 0.5
        else:
            tensors[name] = 1 + 0.1 * r if name.endswith("weight") else 0.1 * r
    return tensors


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(stand_in_weights(), path)
    return path


@pytest.fixture(scope="module")
def detector(stand_in):
    return InceptionV3Detector(weights=stand_in)


class Plain:
    """The network once more, as one function of functions, with its batch norms where they were trained."""

    def __init__(self, tensors):
        self.w = tensors

    def conv(self, name, x, stride=1, padding=0):
        w = {key: self.w[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
        return F.relu(F.batch_norm(F.conv2d(x, self.w[f"{name}.conv.weight"], None, stride, padding), **w, eps=1e-3))

    @staticmethod
    def average(x):
        inside = F.conv2d(torch.ones_like(x[:1, :1]), torch.ones([1, 1, 3, 3]), padding=1)
        return F.avg_pool2d(x, 3, 1, 1) * 9 / inside

    def a(self, m, x):
        c = self.conv
        five = c(f"{m}.branch5x5_2", c(f"{m}.branch5x5_1", x), padding=2)
        three = c(f"{m}.branch3x3dbl_2", c(f"{m}.branch3x3dbl_1", x), padding=1)
        three = c(f"{m}.branch3x3dbl_3", three, padding=1)
        return torch.cat([c(f"{m}.branch1x1", x), five, three, c(f"{m}.branch_pool", self.average(x))], 1)

    def b(self, m, x):
        c = self.conv
        double = c(f"{m}.branch3x3dbl_2", c(f"{m}.branch3x3dbl_1", x), padding=1)
        return torch.cat([c(f"{m}.branch3x3", x, 2), c(f"{m}.branch3x3dbl_3", double, 2), F.max_pool2d(x, 3, 2)], 1)

    def c(self, m, x):
        wide, tall = (0, 3), (3, 0)
        seven, double = x, x
        for i, padding in enumerate([0, wide, tall], 1):
            seven = self.conv(f"{m}.branch7x7_{i}", seven, padding=padding)
        for i, padding in enumerate([0, tall, wide, tall, wide], 1):
            double = self.conv(f"{m}.branch7x7dbl_{i}", double, padding=padding)
        pool = self.conv(f"{m}.branch_pool", self.average(x))
        return torch.cat([self.conv(f"{m}.branch1x1", x), seven, double, pool], 1)

    def d(self, m, x):
        seven = x
        for i, padding in enumerate([0, (0, 3), (3, 0)], 1):
            seven = self.conv(f"{m}.branch7x7x3_{i}", seven, padding=padding)
        three = self.conv(f"{m}.branch3x3_2", self.conv(f"{m}.branch3x3_1", x), 2)
        return torch.cat([three, self.conv(f"{m}.branch7x7x3_4", seven, 2), F.max_pool2d(x, 3, 2)], 1)

    def e(self, m, x, pool):
        c, wide, tall = self.conv, (0, 1), (1, 0)
        one = c(f"{m}.branch3x3_1", x)
        double = c(f"{m}.branch3x3dbl_2", c(f"{m}.branch3x3dbl_1", x), padding=1)
        parts = [c(f"{m}.branch1x1", x)]
        parts += [c(f"{m}.branch3x3_2a", one, padding=wide), c(f"{m}.branch3x3_2b", one, padding=tall)]
        parts += [c(f"{m}.branch3x3dbl_3a", double, padding=wide), c(f"{m}.branch3x3dbl_3b", double, padding=tall)]
        return torch.cat([*parts, c(f"{m}.branch_pool", pool(x))], 1)

    def __call__(self, x):
        x = self.conv("Conv2d_2a_3x3", self.conv("Conv2d_1a_3x3", x, 2))
        x = F.max_pool2d(self.conv("Conv2d_2b_3x3", x, padding=1), 3, 2)
        x = F.max_pool2d(self.conv("Conv2d_4a_3x3", self.conv("Conv2d_3b_1x1", x)), 3, 2)
        x = self.b("Mixed_6a", self.a("Mixed_5d", self.a("Mixed_5c", self.a("Mixed_5b", x))))
        x = self.c("Mixed_6c", self.c("Mixed_6b", x))
        spatial = self.conv("Mixed_6d.branch1x1", x)[:, :7].reshape(len(x), -1)
        x = self.d("Mixed_7a", self.c("Mixed_6e", self.c("Mixed_6d", x)))
        x = self.e("Mixed_7c", self.e("Mixed_7b", x, self.average), lambda x: F.max_pool2d(x, 3, 1, 1))
        features = x.flatten(2).mean(2)
        return features, features @ self.w["fc.weight"].T, spatial


def test_the_networks_tensors_are_those_of_the_published_file():
    with torch.device("meta"):
        net = inception.InceptionV3()
    assert {name: list(value.shape) for name, value in net.state_dict().items()} == SHAPES


@pytest.mark.parametrize("case", ["noise64", "smooth32", "smooth299", "smooth512"])
def test_features_and_logits_are_the_golden_ones(case, detector, golden):
    tensors, _ = golden("inception.safetensors")
    outputs = detector.outputs(tensors[f"{case}.images"])
    assert_close(outputs.features, tensors[f"{case}.features"], 1e-4)
    assert_close(outputs.logits, tensors[f"{case}.logits_unbiased"], 1e-4)
    assert (outputs.features - tensors[f"{case}.features"]).abs().max() < 1e-4
    assert torch.equal(detector(tensors[f"{case}.images"]), outputs.features)


def test_it_agrees_with_a_plain_implementation_on_other_weights(tmp_path):
    tensors = stand_in_weights("other ")
    torch.save(tensors, tmp_path / "weights.pth")
    images = torch.randint(0, 256, [2, 3, 299, 299], dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    outputs = InceptionV3Detector(weights=tmp_path / "weights.pth").outputs(images)
    features, logits, spatial = Plain(tensors)((images.float() - 128) / 128)
    assert outputs.spatial.shape == (2, 7 * 17 * 17)
    assert_close(outputs.features, features, 1e-5)
    assert_close(outputs.logits, logits, 1e-5)
    assert_close(outputs.spatial, spatial, 1e-5)


def test_the_resize_is_the_golden_one(golden):
    tensors, _ = golden("inception.safetensors")
    resized = inception.resize_tf1(tensors["resize.in"], 299)
    assert (resized[:, :, ::13, ::13] - tensors["resize.out"]).abs().max() < 1e-4


@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 11), (11, 9, 4), (6, 3, 6), (1, 2, 3), (46, 23, 299)])
def test_the_resize_is_the_formula(height, width, size):
    image = torch.randint(0, 256, [height, width], generator=torch.Generator().manual_seed(2)).tolist()
    expected = torch.empty(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            # Exact: source coordinate = output index * input size / output size.
            y, dy = divmod(i * height, size)
            x, dx = divmod(j * width, size)
            below, right = min(y + 1, height - 1), min(x + 1, width - 1)
            top = image[y][x] * (size - dx) + image[y][right] * dx
            bottom = image[below][x] * (size - dx) + image[below][right] * dx
            expected[i, j] = (top * (size - dy) + bottom * dy) / size**2
    resized = inception.resize_tf1(torch.tensor(image, dtype=torch.uint8).expand(1, 1, height, width), size)
    assert (resized[0, 0] - expected).abs().max() < 1e-4


def test_an_image_of_the_networks_size_is_left_as_it_is():
    image = torch.randint(0, 256, [1, 3, 299, 299], dtype=torch.uint8)
    assert torch.equal(inception.resize_tf1(image, 299), image.float())


def test_safetensors_work_as_well(tmp_path, detector):
    safetensors.torch.save_file(stand_in_weights(), tmp_path / "weights.safetensors")
    images = torch.randint(0, 256, [1, 3, 32, 32], dtype=torch.uint8)
    assert torch.equal(InceptionV3Detector(str(tmp_path / "weights.safetensors"))(images), detector(images))


def test_a_file_is_the_published_one_by_its_digest(stand_in, detector, monkeypatch):
    assert not detector.published
    monkeypatch.setattr(inception, "DIGEST", file_sha256(stand_in)[:8])
    assert InceptionV3Detector(stand_in).published


def test_a_download_that_is_not_what_it_should_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    path = cached_path(inception.URL)
    path.parent.mkdir()
    path.write_bytes(b"an error page, say")
    assert InceptionV3Detector.has_weights()
    with pytest.raises(ConfigError, match=r"its SHA-256 digest begins with .* in place of 6726825d"):
        InceptionV3Detector()


def test_without_a_connection_the_error_says_which_file_from_where_and_where_to_put_it(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise requests.ConnectionError("no route")

    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("requests.Session.request", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert not InceptionV3Detector.has_weights()
    with pytest.raises(ConfigError) as error:
        InceptionV3Detector()
    for part in (
        "Inception-v3",
        inception.URL,
        "no route",
        str(cached_path(inception.URL)),
        "--inception-weights=FILE",
    ):
        assert part in str(error.value)


def test_a_path_without_a_file_is_named_with_the_option(tmp_path):
    with pytest.raises(ConfigError, match=r"--inception-weights: '.*nothing\.pth' does not exist; it is the file at"):
        InceptionV3Detector(tmp_path / "nothing.pth")


def test_weights_of_something_else_are_refused(tmp_path):
    path = tmp_path / "weights.pth"

    def refusal(content):
        torch.save(content, path)
        with pytest.raises(ConfigError) as error:
            InceptionV3Detector(path)
        return str(error.value)

    weights = stand_in_weights()
    shorter = {name: value for name, value in weights.items() if name != "Mixed_6c.branch1x1.conv.weight"}
    assert "Mixed_6c.branch1x1.conv.weight is missing" in refusal(shorter)
    assert "AuxLogits.fc.bias is unknown" in refusal(weights | {"AuxLogits.fc.bias": torch.zeros(3)})
    assert "fc.bias has shape [1000], not [1008]" in refusal(weights | {"fc.bias": torch.zeros(1000)})
    assert "does not hold tensors by name" in refusal([torch.zeros(3)])
    assert "does not hold tensors by name" in refusal({"epoch": 3})


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_nothing_in_a_weights_file_is_executed(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"fc.weight": Bomb()}, protocol=2))
    with pytest.raises(ConfigError, match="damaged, or holds more than tensors"):
        InceptionV3Detector(path)
    path.write_bytes(b"not a file of weights")
    with pytest.raises(ConfigError, match="damaged"):
        InceptionV3Detector(path)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"not a file of weights")
    with pytest.raises(ConfigError, match=r"damaged or not a \.safetensors file"):
        InceptionV3Detector(path)
