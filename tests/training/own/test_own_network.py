"""Networks of the user's own through the command lines: trained, continued, reconstructed, sampled and measured."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import calculate_metrics
import dnnlib.cli
import generate_images
import reconstruct_phema
import training.metrics.detectors
from dnnlib.errors import ConfigError
from tests.helpers.own_parts import examples, in_folder_of_examples
from tests.helpers.ranks import run_ranks
from tests.helpers.stand_in_detector import StandInDetector
from tests.helpers.tiny import assert_same_state, write_dataset
from tests.helpers.train_command import run
from torch_utils.checkpoints import read_checkpoint
from training.fast.prepare import PrepareNetwork
from training.metrics import available
from training.own.own_network import OwnNetwork, build_own_network
from training.snapshot import load_snapshot

SHORT = ["--preset=edm2-img64-s", "--device=cpu", "--rampup=0", "--lr=0.001", "--batch=8", "--duration=32"]
FILES = ["--snapshot=16", "--checkpoint=16", "--status=8"]

# A whole denoiser with its own uncertainty, dropout, a tied, a frozen and an unused weight: forty lines of trouble.
DENOISER = """
import torch
from torch import nn


class Denoiser(nn.Module):
    sigma_data = 0.7

    def __init__(self, img_resolution, img_channels, label_dim, *, width=4):
        super().__init__()
        self.first = nn.Conv2d(img_channels + 1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width, track_running_stats=False)
        self.register_buffer("scale", torch.full([], 0.5))
        self.register_buffer("steps", torch.arange(3), persistent=False)
        self.middle = nn.ModuleList([nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)])
        self.middle[1].weight = self.middle[0].weight
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Conv2d(width, img_channels, 3, padding=1)
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)
        self.unused = nn.Linear(2, 2)
        self.logvar = nn.Parameter(torch.zeros([]))

    def forward(self, x, sigma, class_labels=None, return_logvar=False):
        assert sigma.shape == (len(x), 1, 1, 1) and self.steps.tolist() == [0, 1, 2]
        h = torch.cat([x / (1 + sigma), sigma.log().expand(-1, -1, *x.shape[2:])], dim=1)
        h = self.norm(self.first(h)) * self.frozen[:, None, None]
        for layer in self.middle:
            h = torch.relu(layer(self.dropout(h)))
        denoised = x / (1 + sigma**2) + self.scale * self.last(h)
        return (denoised, self.logvar.expand(len(x), 1, 1, 1)) if return_logvar else denoised
"""
NETWORKS = {
    "dit": ["--network=dit:DiT", "--network-args=width=16,depth=2"],
    "unet2d": ["--network=unet2d:UNet2D", "--network-args=width=8"],
    "denoiser": ["--network=own_denoiser:Denoiser", "--network-args=width=6"],
}


@pytest.fixture(autouse=True)
def folder(tmp_path):
    """The current folder, with the examples of the page, the denoiser and a data set."""
    (tmp_path / "own_denoiser.py").write_text(DENOISER)
    write_dataset(tmp_path / "data.zip")
    with in_folder_of_examples(tmp_path):
        yield tmp_path


def train(outdir: str, *args: str) -> None:
    assert run(f"--outdir={outdir}", "--data=data.zip", *SHORT, *FILES, *args) == 0


def command(script, *args: str) -> int:
    try:
        dnnlib.cli.main(script.cmdline, list(args))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def require_same_files(one: str, two: str) -> None:
    stored = [
        {path.name: load_file(path) for path in sorted(Path(each).glob("*-0.*.safetensors"))} for each in (one, two)
    ]
    assert len(stored[0]) == 4
    assert_same_state(*stored)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_with_an_own_network_continues_to_the_bit(name, monkeypatch, capsys):
    if name == "unet2d":
        pytest.importorskip("diffusers")
    args = [*NETWORKS[name], "--batch-gpu=4", "--label-dropout=0.1"]
    train("whole", *args, "--monitor")
    train("parts", *args, "--slice=16")
    train("parts", *args)
    require_same_files("whole", "parts")
    one, two = (read_checkpoint(Path(each, "training-state-0000000.032.pt")) for each in ("whole", "parts"))
    for data in (one, two):
        data.pop("stats"), data.pop("run")
    assert_same_state(one, two)
    assert "Monitor/gradients/norm" in Path("whole/stats.jsonl").read_text()

    # The same file sampled, reconstructed and measured.
    network = NETWORKS[name][0]
    net = "--net=whole/network-snapshot-0000000.032-0.050.safetensors"
    options = [net, network, "--steps=2", "--device=cpu"]
    assert command(generate_images, *options, "--outdir=out", "--seeds=0-3", "--gnet=self", "--guidance=2") == 0
    assert len(list(Path("out").glob("*.png"))) == 4
    recon = ["--indir=whole", "--outdir=ema", "--outstd=0.05,0.07", network]
    assert command(reconstruct_phema, *recon) == 0
    again = load_snapshot("ema/phema-0000000.032-0.050.safetensors", own_networks=[network.partition("=")[2]])
    stored = load_snapshot(net.partition("=")[2], own_networks=[network.partition("=")[2]])
    for key, value in stored.net.state_dict().items():
        assert torch.allclose(value.float(), again.net.state_dict()[key].float(), atol=2e-3), key
    for module in (training.metrics.detectors, available):
        monkeypatch.setattr(module, "make_detector", lambda name, device, weights=None: StandInDetector(name))
    reference = ["ref", "--data=data.zip", "--dest=ref.safetensors", "--metrics=fid", "--workers=0", "--device=cpu"]
    assert command(calculate_metrics, *reference) == 0
    assert command(calculate_metrics, "gen", *options, "--ref=ref.safetensors", "--metrics=fid", "--num=6") == 0
    capsys.readouterr()


def test_metrics_and_grids_while_training(monkeypatch):
    for module in (training.metrics.detectors, available):
        monkeypatch.setattr(module, "make_detector", lambda name, device, weights=None: StandInDetector(name))
    assert command(calculate_metrics, "ref", "--data=data.zip", "--dest=ref.safetensors", "--metrics=fid",
                   "--workers=0", "--device=cpu") == 0  # fmt: skip
    seen = ["--metrics=fid", "--metrics-ref=ref.safetensors", "--metrics-num=6", "--metrics-steps=2", "--samples=2",
            "--samples-steps=2"]  # fmt: skip
    train("plain", *NETWORKS["denoiser"])
    train("seen", *NETWORKS["denoiser"], *seen)
    lines = [json.loads(line) for line in Path("seen/stats.jsonl").read_text().splitlines()]
    assert lines[-1]["Metrics/fid-0.050"] > 0 and list(Path("seen").glob("samples-*.png"))
    require_same_files("plain", "seen")


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--shard=True"], ["--batch-gpu=2"]], ids=["fsdp2", "accumulation"])
def test_two_processes_train_as_one(options):
    train("one", *NETWORKS["dit"], "--ema-stds=0.05")
    args = ["--data=data.zip", *SHORT, *FILES, *NETWORKS["dit"], "--ema-stds=0.05", *options, "--outdir=two"]
    run_ranks("train_edm2.py", *args, "--slice=16")
    run_ranks("train_edm2.py", *args)
    one, two = (load_snapshot(f"{each}/network-snapshot-0000000.032-0.050.safetensors", own_networks=["dit:DiT"])
                for each in ("one", "two"))  # fmt: skip
    for key, value in one.net.state_dict().items():
        assert torch.allclose(value.float(), two.net.state_dict()[key].float(), atol=3e-3), key


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--shard=True"], []], ids=["fsdp2", "ddp"])
def test_tied_frozen_and_unused_weights_in_two_processes(options):
    run_ranks("train_edm2.py", "--outdir=two", "--data=data.zip", *SHORT, *FILES, *NETWORKS["denoiser"], *options)
    net = load_snapshot(
        "two/network-snapshot-0000000.032-0.100.safetensors", own_networks=["own_denoiser:Denoiser"]
    ).net
    assert torch.equal(net.model.frozen.float(), torch.ones(6))
    assert torch.equal(net.model.middle[0].weight, net.model.middle[1].weight)


def test_the_shape_of_a_raw_network_is_the_papers_preconditioning():
    net = build_own_network(
        "dit:DiT", {"img_resolution": 8, "img_channels": 3, "label_dim": 3, "width": 16, "depth": 1}
    )
    net.model.forward = lambda x, noise, labels: x * 2 + noise.reshape(-1, 1, 1, 1)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 4.0]).reshape(-1, 1, 1, 1)
    total = (sigma**2 + 0.25).sqrt()
    expected = 0.25 / total**2 * x + sigma * 0.5 / total * (2 * x / total + sigma.log() / 4)
    assert torch.allclose(net(x, sigma.flatten()), expected, atol=1e-5)
    denoised, logvar = net(x, 0.3, return_logvar=True)
    assert denoised.shape == x.shape and logvar.shape == (2, 1, 1, 1)


def test_float16_weights_and_other_formats_give_nearly_the_same_images():
    arguments = {"img_resolution": 8, "img_channels": 3, "label_dim": 3, "width": 6}
    net = build_own_network("own_denoiser:Denoiser", arguments).eval().requires_grad_(False)
    x, labels = torch.randn(4, 3, 8, 8), torch.eye(4, 3)
    expected = net(x, 1.0, labels)
    for precision, tolerance in ((None, 2e-3), ("bf16", 3e-2)):
        prepared = PrepareNetwork(precision=precision)(net.half(), torch.device("cpu"))
        assert torch.allclose(prepared(x, 1.0, labels), expected, atol=tolerance)
    assert torch.allclose(net(x, 1.0, labels), expected, atol=2e-3)  # without being prepared
    assert next(net.parameters()).dtype == torch.float16


def test_the_header_names_the_class_which_only_the_user_imports(capsys, monkeypatch):
    train("run", *NETWORKS["dit"])
    path = "run/network-snapshot-0000000.032-0.050.safetensors"
    with safe_open(path, framework="pt") as file:
        network = json.loads(file.metadata()["network"])
    size = {"img_resolution": 8, "img_channels": 3, "label_dim": 3}
    assert network == {"class": "dit:DiT", "arguments": {**size, "width": 16, "depth": 2}}
    capsys.readouterr()
    for script, *args in ((generate_images, f"--net={path}", "--outdir=out"),
                          (reconstruct_phema, "--indir=run", "--outdir=out", "--outstd=0.07")):  # fmt: skip
        assert command(script, *args) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("Error: run/network-snapshot-") and "type --network=dit:DiT" in error
    with pytest.raises(ConfigError, match="--network=dit:DiT"):
        load_snapshot(path, own_networks=["unet2d:UNet2D"])
    Path("moved.py").write_text(examples()["dit.py"])
    assert isinstance(load_snapshot(path, own_networks=["moved:DiT"]).net, OwnNetwork)
    train("more", *NETWORKS["dit"], f"--init={path}")
    assert not Path("out").exists()


WRONG = {
    "no module": ("nowhere:Net", "", "has no module 'nowhere'"),
    "no name": ("own:Nett", "class Net: pass", "did you mean own:Net?"),
    "not a name": ("own", "", "write module:Name"),
    "a path": ("./own.py:Net", "", "write module:Name"),
    "raises on import": ("own:Net", "1 / 0", "importing it raises ZeroDivisionError"),
    "ends the program": ("own:Net", "raise SystemExit(3)", "importing it raises SystemExit: 3"),
    "needs another module": ("own:Net", "import no_such_module", "No module named 'no_such_module'"),
    "not a module": ("own:Net", "class Net:\n    def __init__(self, *args, depth): pass", "not a torch.nn.Module"),
    "missing argument": ("own:Net", "forward(self, x)", "takes 2 positional arguments but 4 were given"),
    "one argument too many": ("own:Net", "forward(self, x, noise, labels, text)", "missing 1 required positional"),
    "unknown argument": ("own:Net", "__init__(self, *args, depht=1)", "unexpected keyword argument 'depth'"),
    "raises in forward": ("own:Net", "raise RuntimeError('broken')", "raises RuntimeError: broken"),
    "wrong shape": ("own:Net", "return self.conv(x)[:, :, ::2]", "returns the shape [2, 3, 4, 8]"),
    "one image": ("own:Net", "return self.conv(x)[:1]", "returns the shape [1, 3, 8, 8]"),
    "wrong dtype": ("own:Net", "return self.conv(x).double()", "returns torch.float64, not torch.float32"),
    "half": ("own:Net", "return self.conv(x).half()", "returns torch.float16, not torch.float32"),
    "not a tensor": ("own:Net", "return (self.conv(x),)", "returns a tuple, not a tensor"),
    "no gradients": ("own:Net", "return self.conv(x).detach()", "a result without gradients"),
    "integer buffer": ("own:Net", "self.register_buffer('ids', torch.arange(3))", "ids is torch.int64"),
}
TEMPLATE = """
import torch
class Net(torch.nn.Module):
    def {init}:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        {buffer}
    def {forward}:
        {body}
"""


def wrong_file(text: str) -> str:
    """A file with a network that is wrong in what `text` says; another text is the file itself."""
    parts = {"init": "__init__(self, *args, depth=1)", "buffer": "pass", "body": "return self.conv(x)",
             "forward": "forward(self, x, noise_labels, class_labels=None)"}  # fmt: skip
    if "SystemExit" in text:
        return text
    for key, start in (("init", "__init__"), ("forward", "forward("), ("body", "return"), ("body", "raise"),
                       ("buffer", "self.")):  # fmt: skip
        if text.startswith(start):
            return TEMPLATE.format(**{**parts, key: text})
    return text


@pytest.mark.parametrize("case", WRONG)
def test_a_network_that_does_not_fit_ends_in_one_line(case, folder, capsys):
    name, text, expected = WRONG[case]
    (folder / "own.py").write_text(wrong_file(text))
    assert run("--outdir=run", "--data=data.zip", *SHORT, f"--network={name}", "--network-args=depth=2") == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0] and f"--network={name}" in lines[0], captured.err
    assert "docs/extending.md" in lines[0] and not Path("run").exists()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--network-args=depth=2"], "--network-args needs --network=module:Class"),
        (["--network=dit:DiT", "--channels=8"], "--channels is for our network"),
        (["--network=dit:DiT", "--format=pkl"], "use --format=safetensors"),
        (["--network=dit:DiT", "--recompute=True"], "--recompute"),
        (["--network=dit:DiT", "--preset=small"], "--preset=small"),
        (["--network=dit:DiT", "--network-args=depth"], "key=value"),
        (["--network=dit:DiT", "--network-args=depth=2,depth=3"], "two values for depth"),
    ],
)
def test_options_that_do_not_go_with_an_own_network(args, expected, capsys):
    assert run("--outdir=run", "--data=data.zip", *SHORT, *args) == 2
    assert expected in capsys.readouterr().err and not Path("run").exists()
