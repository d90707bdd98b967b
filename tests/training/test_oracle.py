"""The plain reference implementation against numbers of the published one, and against closed forms."""

import json
import math

import pytest
import torch

from tests.helpers import oracle


def assert_close(actual, expected, tolerance, name=""):
    """Equal to `tolerance` relative to the largest expected entry."""
    assert actual.shape == expected.shape, name
    error = (actual - expected).abs().max().item()
    largest = expected.abs().max().item()
    assert error <= tolerance * largest, f"{name}: off by {error:.2e}, largest entry {largest:.2e}"


@pytest.mark.parametrize(
    ("key", "compute"),
    [
        ("normalize_all", lambda t: oracle.normalize(t["x"])),
        ("normalize_dim1", lambda t: oracle.normalize(t["x"], dim=1)),
        ("resample_down", lambda t: oracle.resample(t["x"], "down")),
        ("resample_up", lambda t: oracle.resample(t["x"], "up")),
        ("mp_silu", lambda t: oracle.mp_silu(t["x"])),
        *[(f"mp_sum_{b}", lambda t, b=b: oracle.mp_sum(t["x"], t["b"], b)) for b in (0.3, 0.5, 0.8)],
        *[(f"mp_cat_{b}", lambda t, b=b: oracle.mp_cat(t["x"], t["c"], b)) for b in (0.3, 0.5, 0.8)],
    ],
)
def test_primitives_equal_the_published_ones(golden, key, compute):
    tensors, _ = golden("primitives.safetensors")
    assert_close(compute(tensors), tensors[key], 1e-6, key)


def test_fourier_features_equal_the_published_ones(golden):
    tensors, _ = golden("primitives.safetensors")
    layer = oracle.PlainFourier(16)
    layer.load_state_dict({"freqs": tensors["fourier_freqs"], "phases": tensors["fourier_phases"]})
    assert_close(layer(tensors["fourier_in"]), tensors["fourier_out"], 1e-6)


def test_the_convolution_and_its_weight_equal_the_published_ones(golden):
    tensors, _ = golden("primitives.safetensors")
    layer = oracle.PlainConv(6, 12, (3, 3))
    layer.load_state_dict({"weight": tensors["mpconv_weight"]})
    assert_close(layer.eval()(tensors["x"], gain=0.7), tensors["mpconv_eval_out"], 1e-6)
    assert torch.equal(layer.weight, tensors["mpconv_weight"])
    out = layer.train()(tensors["x"], gain=0.7)
    assert_close(out, tensors["mpconv_train_out"], 1e-6)
    assert_close(layer.weight.detach(), tensors["mpconv_weight_after_train_forward"], 1e-6)
    out.square().sum().backward()
    assert_close(layer.weight.grad, tensors["mpconv_weight_grad"], 1e-5)


def test_the_fully_connected_layer_equals_the_published_one(golden):
    tensors, _ = golden("primitives.safetensors")
    layer = oracle.PlainConv(6, 12).eval()
    layer.load_state_dict({"weight": tensors["mplinear_weight"]})
    assert_close(layer(tensors["mplinear_in"]), tensors["mplinear_out"], 1e-6)


def load_precond(golden, name):
    tensors, metadata = golden(f"precond-{name}.safetensors")
    net = oracle.PlainPrecond(**json.loads(metadata["config"]))
    net.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    return net, tensors, metadata


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_network_outputs_equal_the_published_ones(golden, name):
    net, tensors, _ = load_precond(golden, name)
    net.eval()
    x, sigma, labels = tensors["in.x"], tensors["in.sigma"], tensors.get("in.class_labels")
    with torch.no_grad():
        denoised, logvar = net.with_logvar(x, sigma, labels)
        assert_close(denoised, tensors["out.D_x"], 1e-4)
        assert_close(logvar, tensors["out.logvar"], 1e-4)
        assert_close(net(x, 1.5, labels), tensors["out.D_x_scalar_sigma"], 1e-4)
        if labels is not None:
            assert_close(net(x, sigma), tensors["out.D_x_no_labels"], 1e-4)


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_loss_and_gradients_equal_the_published_ones(golden, name):
    net, tensors, metadata = load_precond(golden, name)
    images = tensors["loss.images"]
    loss = oracle.plain_loss(
        net.train(),
        images,
        tensors.get("in.class_labels"),
        tensors["loss.rnd_normal"],
        tensors["loss.noise_unit"],
        P_mean=float(metadata["P_mean"]),
        P_std=float(metadata["P_std"]),
    )
    assert_close(loss.detach(), tensors["loss.per_element"], 1e-4)
    (loss.sum() / len(images)).backward()
    grads = {f"grad.{key}": param.grad for key, param in net.named_parameters()}
    assert grads.keys() == {key for key in tensors if key.startswith("grad.")}
    for key, grad in grads.items():
        assert_close(grad, tensors[key], 1e-4, key)


@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_initial_weights_come_from_the_random_stream_in_the_published_order(golden, name):
    tensors, metadata = golden(f"precond-{name}.safetensors")
    torch.manual_seed(int(metadata["init_seed"]))
    net = oracle.PlainPrecond(**json.loads(metadata["config"]))
    for key, value in net.state_dict().items():
        if value.ndim:
            # Not bitwise: processors and versions of PyTorch differ in the last digit of a normal draw.
            assert_close(value, tensors[f"state.{key}"], 1e-5, key)
        else:
            assert value == 0, key


def test_a_short_run_ends_at_the_published_weights_and_averages(golden):
    tensors, metadata = golden("train-run.safetensors")
    net = oracle.PlainPrecond(**json.loads(metadata["config"]))
    net.load_state_dict({k.removeprefix("init."): v for k, v in tensors.items() if k.startswith("init.")})
    lr_options = {key: float(value) for key, value in (pair.split("=") for pair in metadata["lr"].split())}
    beta1, beta2 = (float(beta) for beta in metadata["betas"].split(","))
    trainer = oracle.PlainTrainer(net, int(metadata["batch_size"]), lr_options, (beta1, beta2))
    for step, (loss, lr) in enumerate(zip(json.loads(metadata["losses"]), json.loads(metadata["lrs"]), strict=True)):
        assert oracle.plain_learning_rate(trainer.nimg, trainer.batch_size, **lr_options) == pytest.approx(lr, rel=1e-9)
        batch = [tensors[f"step{step}.{key}"] for key in ("images", "labels", "rnd_normal", "noise_unit")]
        assert trainer.step(*batch) == pytest.approx(loss, rel=1e-3)
    results = {"final": net.state_dict(), **{f"ema-{std:.3f}": trainer.ema.averages[std] for std in (0.05, 0.1)}}
    for prefix, result in results.items():
        keys = [key for key in tensors if key.startswith(f"{prefix}.")]
        assert len(keys) > 30
        for key in keys:
            name = key.removeprefix(f"{prefix}.")
            if name in result or prefix == "final":  # averages hold parameters, not buffers
                assert_close(result[name], tensors[key], 1e-3, key)


def test_adam_equals_that_of_torch():
    torch.manual_seed(0)
    plain, other = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    other.load_state_dict(plain.state_dict())
    ours, theirs = oracle.PlainAdam(plain), torch.optim.Adam(other.parameters(), lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    for _ in range(5):
        x = torch.randn(7, 5)
        plain(x).square().sum().backward()
        ours.step(lr=0.1)
        theirs.zero_grad()
        other(x).square().sum().backward()
        theirs.step()
    assert_close(plain.weight.detach(), other.weight.detach(), 1e-5)


def test_a_gradient_that_is_not_finite_moves_nothing():
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[math.inf, math.nan]])
    oracle.PlainAdam(layer).step(lr=1.0)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_exponent_gives_back_its_width(std):
    gamma = oracle.plain_exponent(std)
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(std, rel=1e-9)


def test_an_average_weighs_the_past_by_its_power_function():
    layer = torch.nn.Linear(1, 1, bias=False)
    ema = oracle.PlainEMA(layer, [0.1])
    num_steps = 400
    for step in range(1, num_steps + 1):
        layer.weight.data.fill_(step / num_steps)
        ema.update(step, 1)
    # The mean of t over the profile t**gamma on (0, 1).
    gamma = oracle.plain_exponent(0.1)
    assert ema.averages[0.1]["weight"].item() == pytest.approx((gamma + 1) / (gamma + 2), abs=2 / num_steps)


def gaussian_denoiser(x, sigma):
    """The exact denoiser of data that is normal with standard deviation 0.5."""
    return x * 0.25 / (0.25 + sigma**2)


def test_sampling_a_gaussian_follows_its_exact_ode_to_second_order():
    noise = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    exact = noise * 80 * 0.5 / math.sqrt(80**2 + 0.25)
    sampled = [oracle.plain_heun_sampler(gaussian_denoiser, noise, num_steps=n) for n in (16, 32, 64)]
    errors = [(images - exact).abs().max().item() for images in sampled]
    assert errors[0] / errors[1] > 3.9
    assert errors[1] / errors[2] > 3.9
    assert errors[2] < 0.005


def test_churn_replaces_the_noise_and_keeps_the_spread():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 200, 200, generator=generator)
    images = oracle.plain_heun_sampler(
        gaussian_denoiser,
        noise,
        num_steps=256,
        S_churn=40,
        randn_like=lambda x: torch.randn(x.shape, generator=generator),
    )
    assert images.std().item() == pytest.approx(0.5, rel=0.01)
    # Without churn the image of a Gaussian is its noise, scaled.
    assert abs(torch.corrcoef(torch.stack([images.flatten(), noise.flatten()]))[0, 1].item()) < 0.03


@pytest.mark.parametrize(
    "case", ["plain_32", "heun_8", "guid_cond", "guid_uncond", "guid_below_1", "range", "churn", "two_steps"]
)
def test_samples_equal_the_published_ones(golden, case):
    tensors, metadata = golden("sampler.safetensors")

    def network(name, config):
        net = oracle.PlainPrecond(**json.loads(metadata[config])).eval()
        net.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
        return net

    options = json.loads(metadata["cases"])[case]
    guides = {None: None, "c": ("gnet_cond", "config"), "u": ("gnet_uncond", "config_gnet_uncond")}
    guide = guides[options.pop("gnet", None)]
    denoise = oracle.plain_guided(
        network("net", "config"), guide and network(*guide), tensors["in.labels"], options.pop("guidance", 1)
    )
    generators = [torch.Generator().manual_seed(seed) for seed in json.loads(metadata["churn_seeds"])]

    def randn_like(x):
        return torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators])

    images = oracle.plain_heun_sampler(denoise, tensors["in.noise"], randn_like=randn_like, **options)
    assert_close(images, tensors[f"out.{case}"], 1e-3)


def test_guidance_extrapolates_away_from_the_guide():
    def main(x, sigma, labels):
        return 2 * x + labels

    def guide(x, sigma, labels):
        return x

    x, labels = torch.ones(1, 1, 2, 2), torch.tensor(3.0)
    assert torch.equal(oracle.plain_guided(main, guide, labels, 1.5)(x, torch.tensor(1.0)), torch.full_like(x, 7))
    assert torch.equal(oracle.plain_guided(main, None, labels, 1.5)(x, torch.tensor(1.0)), torch.full_like(x, 5))
