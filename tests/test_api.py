"""The names that people's scripts import, with their arguments, orders and defaults: a list, held against the code."""

import importlib
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.paths import GOLDEN_DIR
from training.snapshot import load_snapshot

GOLDEN = GOLDEN_DIR

# By module: names with their arguments. `...` stands for any default. Further arguments may follow, with defaults.
NAMES: dict[str, list[str]] = {
    "training.networks_edm2": [
        "normalize(x, dim=None, eps=1e-4)",
        "resample(x, f=[1,1], mode='keep')",
        "mp_silu(x)",
        "mp_sum(a, b, t=0.5)",
        "mp_cat(a, b, dim=1, t=0.5)",
        "MPFourier(num_channels, bandwidth=1)",
        "MPConv(in_channels, out_channels, kernel)",
        "Block(in_channels, out_channels, emb_channels, flavor='enc', resample_mode='keep', resample_filter=[1,1], "
        "attention=False, channels_per_head=64, dropout=0, res_balance=0.3, attn_balance=0.3, clip_act=256)",
        "UNet(img_resolution, img_channels, label_dim, model_channels=192, channel_mult=[1,2,3,4], "
        "channel_mult_noise=None, channel_mult_emb=None, num_blocks=3, attn_resolutions=[16,8], label_balance=0.5, "
        "concat_balance=0.5, **block_kwargs)",
        "Precond(img_resolution, img_channels, label_dim, use_fp16=True, sigma_data=0.5, logvar_channels=128, "
        "**unet_kwargs)",
        "Precond.forward(self, x, sigma, class_labels=None, force_fp32=False, return_logvar=False)",
    ],
    "training.phema": [
        "exp_to_std(exp)",
        "std_to_exp(std)",
        "power_function_response(ofs, std, len, axis=0)",
        "power_function_correlation(a_ofs, a_std, b_ofs, b_std)",
        "power_function_beta(std, t_next, t_delta)",
        "solve_posthoc_coefficients(in_ofs, in_std, out_ofs, out_std)",
        "PowerFunctionEMA(net, stds=[0.050, 0.100])",
        "PowerFunctionEMA.reset(self)",
        "PowerFunctionEMA.update(self, cur_nimg, batch_size)",
        "PowerFunctionEMA.get(self)",
        "PowerFunctionEMA.state_dict(self)",
        "PowerFunctionEMA.load_state_dict(self, state)",
        "TraditionalEMA(net, halflife_Mimg=inf, rampup_ratio=0.09)",
        "TraditionalEMA.reset(self)",
        "TraditionalEMA.update(self, cur_nimg, batch_size)",
        "TraditionalEMA.get(self)",
        "TraditionalEMA.state_dict(self)",
        "TraditionalEMA.load_state_dict(self, state)",
    ],
    "training.training_loop": [
        "EDM2Loss(P_mean=-0.4, P_std=1.0, sigma_data=0.5)",
        "EDM2Loss.__call__(self, net, images, labels)",
        "learning_rate_schedule(cur_nimg, batch_size, ref_lr=0.01, ref_batches=70e3, rampup_Mimg=10)",
    ],
    "training.encoders": [
        f"{name}.{method}"
        for name in ("Encoder", "StandardRGBEncoder", "StabilityVAEEncoder")
        for method in ("init(self, device)", "encode(self, x)", "encode_pixels(self, x)", "encode_latents(self, x)",
                       "decode(self, x)")
    ],
    "training.loss": ["EDM2Loss(P_mean=-0.4, P_std=1.0, sigma_data=0.5)"],
    "training.dataset": [
        "ImageFolderDataset(path, resolution=None, use_labels=True, max_size=None, xflip=False, random_seed=0, "
        "cache=False)",
        "ImageFolderDataset.get_label(*)",
        "ImageFolderDataset.get_details(*)",
    ],
    "generate_images": [
        "edm_sampler(net, noise, labels=None, gnet=None, num_steps=32, sigma_min=0.002, sigma_max=80, rho=7, "
        "guidance=1, S_churn=0, S_min=0, S_max=inf, S_noise=1, dtype=torch.float32, randn_like=torch.randn_like)",
        "StackedRandomGenerator(device, seeds)",
        "StackedRandomGenerator.randn(self, size, **kwargs)",
        "StackedRandomGenerator.randn_like(self, input)",
        "StackedRandomGenerator.randint(self, *args, size, **kwargs)",
        "generate_images(net, gnet=None, encoder=None, outdir=None, subdirs=False, seeds=range(16, 24), "
        "class_idx=None, max_batch_size=32, encoder_batch_size=4, verbose=True, device=..., sampler_fn=edm_sampler, "
        "**sampler_kwargs)",
        "parse_int_list(*)",
    ],
    "calculate_metrics": [
        "calculate_metrics_from_stats(stats, ref, metrics=..., verbose=...)",
        "calculate_stats_for_files(image_path, num_images=None, seed=0, max_batch_size=64, num_workers=2, "
        "prefetch_factor=2, verbose=True)",
        "calculate_stats_for_iterable(image_iter, metrics=..., verbose=True, dest_path=None, device=None)",
        "load_stats(path, verbose=True)",
        "save_stats(stats, path, verbose=True)",
        "get_detector(metric, verbose=True)",
        "parse_metric_list(*)",
        "InceptionV3Detector(weights=None)",
        "DINOv2Detector(resize_mode='torch', weights=None)",
    ],
    "reconstruct_phema": [
        "list_input_pickles(in_dir, in_prefix=None, in_std=None)",
        "reconstruct_phema(in_pkls, out_std, out_nimg=None, out_dir=None, out_prefix='phema', skip_existing=False, "
        "max_batch_size=8, verbose=True)",
        "parse_std_list(*)",
        "pkl_path(dir, prefix, nimg, std)",
        "kimg_to_nimg(kimg)",
    ],
    "count_flops": ["count_flops(net)"],
    "toy_example": [
        "gt(classes='A', device='cpu', seed=2, origin=[0.0030, 0.0325], scale=[1.3136, 1.3844])",
        "ToyModel(in_dim=2, num_layers=4, hidden_dim=64, sigma_data=0.5)",
        "ToyModel.forward(self, x, sigma=0)",
        "ToyModel.logp(self, x, sigma=0)",
        "ToyModel.pdf(self, x, sigma=0)",
        "ToyModel.score(self, x, sigma=0, graph=False)",
        "do_train(classes='A', num_layers=4, hidden_dim=64, batch_size=4<<10, total_iter=4<<10, seed=0, P_mean=-2.3, "
        "P_std=1.5, sigma_data=0.5, lr_ref=1e-2, lr_iter=512, ema_std=0.010, pkl_pattern=None, pkl_iter=256, "
        "viz_iter=32, device=...)",
        "do_sample(net, x_init, guidance=1, gnet=None, num_steps=32, sigma_min=0.002, sigma_max=5, rho=7)",
        "do_plot(net=None, guidance=1, gnet=None, elems={'gt_uncond', 'gt_outline', 'samples'}, view_x=0, view_y=0, "
        "view_size=1.6, grid_resolution=400, arrow_len=0.002, num_samples=1<<13, seed=1, sample_distance=0, "
        "sigma_max=5, device=...)",
    ],
    "training.toy.mixture": [
        "Mixture.pdf(self, x, sigma=0, max_batch_size=1<<14)",
        "Mixture.logp(self, x, sigma=0, max_batch_size=1<<14)",
        "Mixture.score(self, x, sigma=0)",
        "Mixture.sample(self, shape, sigma=0, generator=None)",
    ],
    "torch_utils.distributed": [
        "init()",
        "get_rank()",
        "get_world_size()",
        "print0(*args, **kwargs)",
        "should_stop()",
        "should_suspend()",
        "request_suspend()",
        "update_progress(cur, total)",
    ],
    "torch_utils.persistence": ["persistent_class(*)", "is_persistent(*)", "_reconstruct_persistent_obj(meta)"],
    "dnnlib": ["EasyDict", "make_cache_dir_path(*paths)"],
    "dnnlib.util": [
        "EasyDict",
        "get_obj_by_name(name)",
        "call_func_by_name(*args, func_name, **kwargs)",
        "construct_class_by_name(*args, class_name, **kwargs)",
        "format_time(seconds)",
        "open_url(url, cache_dir=None, num_attempts=10, verbose=True, return_filename=False, cache=True)",
        "make_cache_dir_path(*paths)",
    ],
}  # fmt: skip
ROWS = [(module, text) for module, texts in NAMES.items() for text in texts]


def _same(expected: Any, actual: Any) -> bool:
    if expected is ...:
        return actual is not inspect.Parameter.empty
    if isinstance(expected, list):
        return isinstance(actual, list | tuple) and list(actual) == expected
    return expected is inspect.Parameter.empty or bool(expected == actual)


def compare(expected: inspect.Signature, actual: inspect.Signature) -> list[str]:
    """In what `actual` breaks callers who know `expected`; a default where none was is no harm."""
    keywords = inspect.Parameter.VAR_KEYWORD
    wanted = [p for p in expected.parameters.values() if p.kind is not keywords]
    found = [p for p in actual.parameters.values() if p.kind is not keywords]
    problems = [f"{len(found)} arguments"] if len(found) < len(wanted) else []
    for ours, theirs in zip(found, wanted, strict=False):
        if (ours.name, ours.kind) != (theirs.name, theirs.kind):
            problems.append(f"{ours.name} in the place of {theirs.name}")
        elif not _same(theirs.default, ours.default):
            problems.append(f"{ours.name}={ours.default} in place of {theirs.default}")
    problems += [f"{p.name} must be given" for p in found[len(wanted) :] if p.default is p.empty]
    kinds = {p.kind for p in expected.parameters.values()} - {p.kind for p in actual.parameters.values()}
    return problems + [f"no {kind.description}" for kind in kinds]


def signature_of(arguments: str, module: Any) -> inspect.Signature:
    """The signature that a text such as '(a, b=1)' describes; defaults may be names of `module`."""
    names = {"inf": math.inf, "torch": torch} | vars(module)
    return inspect.signature(eval(f"lambda {arguments[1:-1]}: None", names))


@pytest.mark.parametrize(("module", "text"), ROWS)
def test_a_name_imports_from_its_place_with_its_arguments(module: str, text: str) -> None:
    place = importlib.import_module(module)
    name, bracket, arguments = text.partition("(")
    value: Any = place
    for part in name.split("."):
        value = getattr(value, part)
    assert callable(value)
    if bracket and arguments != "*)":
        assert compare(signature_of(bracket + arguments, place), inspect.signature(value)) == []


def test_the_comparison_sees_what_breaks_a_caller() -> None:
    def check(expected: str, actual: str) -> list[str]:
        return compare(signature_of(expected, math), signature_of(actual, math))

    assert check("(a, b=1)", "(a=2, b=1, c=2)") == [] == check("(a, **k)", "(a, *, b=1, **k)")
    for actual in ("(a)", "(a, c=1)", "(b=1, a=1)", "(a, b=2)", "(a, b)", "(a, *, b=1)", "(a, b=1, *, c)"):
        assert check("(a, b=1)", actual), actual
    assert check("(a, **k)", "(a)") and check("(f=[1, 1])", "(f=(1, 2))") and not check("(f=[1, 1])", "(f=(1, 1))")


def test_the_generators_and_data_sets_have_their_methods() -> None:
    generator = importlib.import_module("generate_images").StackedRandomGenerator("cpu", [1, 2])
    assert generator.randn([2, 3]).shape == (2, 3) == generator.randn_like(torch.empty(2, 3)).shape
    assert generator.randint(10, size=[2]).shape == (2,)
    dataset = importlib.import_module("training.dataset").ImageFolderDataset
    names = ("num_channels", "resolution", "label_dim", "label_shape", "has_labels", "has_onehot_labels", "get_label")
    assert all(hasattr(dataset, name) for name in (*names, "get_details", "__getitem__", "__len__"))


def test_one_process_is_the_first_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module("torch_utils.distributed")
    module.print0("a", "b", sep="-")
    assert (module.get_rank(), module.get_world_size(), capsys.readouterr().out) == (0, 1, "a-b\n")


def test_averages_are_listed_with_their_lengths_as_text() -> None:
    phema = importlib.import_module("training.phema")
    assert [suffix for _, suffix in phema.PowerFunctionEMA(torch.nn.Linear(1, 1)).get()] == ["-0.050", "-0.100"]


def test_generate_images_gives_what_its_callers_take() -> None:
    module = importlib.import_module("generate_images")
    net = load_snapshot(GOLDEN / "snapshots" / "rgb-cond-guide.pkl").net
    images = module.generate_images(net, seeds=[1, 2, 3], max_batch_size=2, device="cpu", num_steps=1)
    batches = list(images)
    assert len(images) == len(batches) == 2
    for batch in batches:
        for name in ("images", "labels", "noise", "batch_idx", "num_batches", "indices", "seeds"):
            assert hasattr(batch, name)


def test_a_seed_may_be_negative(tmp_path: Path) -> None:
    script = importlib.import_module("generate_images")
    net = GOLDEN / "snapshots" / "rgb-cond-guide.pkl"
    args = [f"--net={net}", "--seeds=-3", "--steps=1", "--device=cpu", f"--outdir={tmp_path}"]
    script.cmdline.main(args, standalone_mode=False)
    assert [path.name for path in tmp_path.iterdir()] == [f"{-3:06d}.png"]


def test_the_toy_distribution_has_its_functions() -> None:
    mixture = importlib.import_module("toy_example").gt()
    x = torch.zeros(3, 2)
    assert mixture.pdf(x).shape == mixture.logp(x).shape == (3,) and mixture.score(x).shape == (3, 2)
    assert mixture.sample([5]).shape == (5, 2)


def test_metrics_are_numbers_by_name(tmp_path: Path) -> None:
    module = importlib.import_module("calculate_metrics")
    stats = {"num_images": 9, "fid": {"mu": np.ones(2), "sigma": np.eye(2)}}
    module.save_stats(stats, tmp_path / "stats.pkl")
    again = module.load_stats(tmp_path / "stats.pkl")
    assert module.calculate_metrics_from_stats(again, stats, metrics=["fid"], verbose=False) == {
        "fid": pytest.approx(0, abs=1e-6)
    }


def test_flops_are_counted_with_a_table() -> None:
    module = importlib.import_module("count_flops")
    net = load_snapshot(GOLDEN / "snapshots" / "rgb-cond-guide.pkl").net
    params, flops, *table = module.count_flops(net)
    assert params == sum(p.numel() for p in net.parameters()) and flops > params and len(table) == 1
