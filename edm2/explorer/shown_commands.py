"""The command lines that make what an explorer shows."""

from collections.abc import Sequence
from pathlib import PurePath

from dnnlib.invocation import quoted
from edm2.explorer.grids import BATCH
from edm2.explorer.networks import Networks
from edm2.explorer.run_snapshots import RunSnapshots, is_run_folder
from edm2.explorer.setting import Setting
from training.sampling.request import SamplingRequest

_DEFAULT_BATCH = 32  # of generate_images.py


def commands_for(
    setting: Setting, networks: Networks, *, given_device: str | None = None, batch: int = BATCH, outdir: str = "out"
) -> list[str]:
    """What to type for the pictures of `setting`: generate_images.py, after reconstruct_phema.py where the network's
    EMA length is not stored.

    Several images come as one contact sheet, a single one as a file named after its seed. `given_device`: the --device
    that the user gave; `batch`: images at once, on which the last digits depend on a GPU.
    """
    lines = []
    net = setting.net
    if is_run_folder(setting.net) and setting.ema is not None:
        run = RunSnapshots.read(setting.net)
        stored = run.stored(setting.ema)
        if stored is None:
            lines.append(_reconstruct(run, setting.ema, outdir))
            stored = str(PurePath(outdir, f"phema-{run.kimg:07d}-{setting.ema:.3f}.pkl"))
        net = stored
    count = setting.num_images
    last = setting.first_seed + count - 1
    words = [f"--net={net}", *_guiding(setting.request()), f"--solver={setting.solver}", f"--steps={setting.num_steps}"]
    words.append(f"--seeds={setting.first_seed}" + (f"-{last}" if count > 1 else ""))
    if setting.class_idx is not None:
        words.append(f"--class={setting.class_idx}")
    if networks.precision is not None:
        words.append(f"--precision={networks.precision}")
    if given_device is not None:
        words.append(f"--device={given_device}")
    if count > batch and batch != _DEFAULT_BATCH:
        words.append(f"--batch={batch}")
    words.append(f"--grid={PurePath(outdir, 'grid.png')}" if count > 1 else f"--outdir={outdir}")
    lines.append(quoted(["python", "generate_images.py", *words]))
    return lines


def _reconstruct(run: RunSnapshots, ema: float, outdir: str) -> str:
    words = [f"--indir={run.path}"]
    if run.prefix is not None:
        words.append(f"--inprefix={run.prefix}")
    words += [f"--outkimg={run.kimg}", f"--outdir={outdir}", f"--outstd={ema:.3f}"]
    return quoted(["python", "reconstruct_phema.py", *words])


def _guiding(request: SamplingRequest) -> Sequence[str]:
    """Options of guidance; none where no step is guided."""
    if not request.gnets:
        return []
    words = [*(f"--gnet={guide}" for guide in request.gnets), f"--guidance={_number(request.guidance)}"]
    if request.interval is not None:
        words.append(f"--interval={','.join(_number(level) for level in request.interval)}")
    return words


def _number(value: float) -> str:
    """As short as reads back the same."""
    return repr(float(value)).removesuffix(".0")
