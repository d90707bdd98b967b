"""What all detectors share, on the one whose weights are here: images in, the same features in whatever batches."""

import pytest
import torch
import torch.nn.functional as F

from dnnlib.errors import ConfigError
from tests.helpers.tiny import assert_close
from training.metrics.detectors import DETECTORS, Detector, make_detector
from training.metrics.detectors.common import ConvNorm, DetectorOutput, fold_batch_norms


@pytest.fixture(scope="module")
def detector():
    return make_detector("efflite0", "cpu")


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, [11, 3, 40, 32], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_detectors_are_known_by_their_names(detector):
    assert list(DETECTORS) == ["inception", "dinov2", "efflite0"]
    assert all(cls.name == name and issubclass(cls, Detector) for name, cls in DETECTORS.items())
    assert isinstance(detector, DETECTORS["efflite0"])
    with pytest.raises(ConfigError, match="unknown detector 'clip'; choose from inception, dinov2, efflite0"):
        make_detector("clip", "cpu")


def test_a_call_gives_the_features_of_outputs(detector, images):
    outputs = detector.outputs(images)
    assert isinstance(outputs, DetectorOutput)
    assert outputs.features.shape == (11, detector.num_features) and outputs.features.dtype == torch.float32
    assert torch.equal(detector(images), outputs.features)
    assert outputs.logits.shape == (11, 1000)


def test_grey_images_are_repeated_to_three_channels(detector, images):
    assert torch.equal(detector(images[:, :1]), detector(images[:, :1].repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("channels", [2, 4])
def test_images_with_alpha_are_put_on_white(detector, images, channels):
    colors, alpha = images[:4, : channels - 1], images[4:8, :1]
    on_white = torch.round((colors.double() * alpha + 255 * (255 - alpha.double())) / 255).to(torch.uint8)
    assert torch.equal(detector(torch.cat([colors, alpha], dim=1)), detector(on_white))


def test_images_of_several_sizes_are_measured_as_each_alone(detector, images):
    mixed = [images[0], images[1, :, :9, :5], images[2, :1], images[3]]
    alone = torch.cat([detector(image[None]) for image in mixed])
    assert torch.allclose(detector(mixed), alone, rtol=1e-4, atol=1e-5)


def test_images_of_another_number_of_channels_are_refused(detector):
    with pytest.raises(ConfigError, match="these have 8: latents must"):
        detector(torch.zeros([2, 8, 8, 8], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("shape", "dtype"), [([2, 3, 8, 8], torch.float32), ([3, 8, 8], torch.uint8), ([2, 3, 0, 8], torch.uint8)]
)
def test_what_is_no_batch_of_images_is_refused(detector, shape, dtype):
    with pytest.raises(ConfigError, match=r"the efflite0 detector takes uint8 images \[N, 3, H, W\]; given are"):
        detector(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 11])
def test_an_image_does_not_depend_on_its_batch_or_its_place_there(detector, images, batch):
    """To the last bit, on the CPU with one number of threads; so statistics don't depend on the batch size either."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(batch))
    shuffled = torch.cat([detector(part) for part in images[order].split(batch)])
    assert torch.equal(shuffled, detector(images)[order])


def test_no_images_give_no_features(detector):
    outputs = detector.outputs(torch.zeros([0, 3, 8, 8], dtype=torch.uint8))
    assert outputs.features.shape == (0, 1280) and outputs.logits.shape == (0, 1000)


def test_a_detector_leaves_random_state_gradients_and_switches_alone(images):
    state, cudnn = torch.get_rng_state(), torch.backends.cudnn.allow_tf32
    features = make_detector("efflite0", "cpu")(images[:1])
    assert torch.equal(state, torch.get_rng_state())
    assert not features.requires_grad and not features.is_inference() and torch.is_grad_enabled()
    assert torch.backends.cudnn.allow_tf32 == cudnn


def test_a_folded_batch_norm_changes_nothing_but_rounding():
    torch.manual_seed(0)
    net = torch.nn.Sequential(ConvNorm(6, 8, (3, 1), stride=2, padding=(1, 0), groups=2), ConvNorm(8, 4, (1, 1)))
    net[1].activation = None
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for name in ("weight", "bias", "running_mean"):
                torch.nn.init.normal_(getattr(module, name))
            torch.nn.init.uniform_(module.running_var, 1e-4, 2)  # down to where eps = 1e-3 matters
    net.eval().requires_grad_(False)
    x = torch.randn(2, 6, 9, 9)
    expected = net(x)
    fold_batch_norms(net)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    assert_close(net(x), expected, 1e-5)
    assert F.relu(expected).ne(expected).any()  # the second layer has no activation


@pytest.mark.gpu
def test_a_gpu_gives_the_same_features(detector, images):
    on_gpu = make_detector("efflite0", "cuda")
    assert on_gpu(images).device.type == "cuda"
    assert_close(on_gpu(images).cpu(), detector(images), 1e-3)
    single = torch.cat([on_gpu(part) for part in images.split(1)])
    assert torch.equal(single, on_gpu(images))
