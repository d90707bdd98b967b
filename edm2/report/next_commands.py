"""Commands for the next steps after a run: continue it, sample, reconstruct another EMA length, sweep."""

import re
import shlex
from pathlib import Path

from dnnlib.parse import format_nimg
from edm2.report.figures import METRIC_PREFIX, best_point
from edm2.report.record import RunRecord
from training.snapshot import KIMG, nimg_from_name

_NAME = re.compile(rf"network-snapshot-({KIMG})-(\d+\.\d+)\.(?:pkl|safetensors)")


def commands_for(record: RunRecord) -> list[tuple[str, str]]:
    """The commands that the run's files allow, each after its purpose."""
    commands = _continue(record)
    snapshots = {path: match for path in record.snapshots if (match := _NAME.fullmatch(path.name))}
    if not snapshots:
        return commands
    best, why = _best_snapshot(record, list(snapshots))
    std, indir, sampling = snapshots[best][2], str(record.path), _sampling_words(record)
    swept = _best_std_of_sweeps(record)
    outstd = f"{swept:g}" if swept is not None else "0.150" if std != "0.150" else "0.120"
    length = "the best one of the sweep" if swept is not None else "any length works"
    kimg = max((match[1] for match in snapshots.values()), key=nimg_from_name)
    net = f"out/phema-{kimg}-{float(outstd):.3f}.pkl"
    lines = {
        f"Sample from {why}": ("generate_images.py", f"--net={best}", *sampling),
        f"Reconstruct another EMA length ({length})": (
            "reconstruct_phema.py", f"--indir={indir}", "--outdir=out", f"--outstd={outstd}",
        ),
        "Sample from the reconstructed network": ("generate_images.py", f"--net={net}", *sampling),
        "Find the best EMA length (REF: reference statistics, see calculate_metrics.py ref)": (
            "sweep.py", f"--indir={indir}", "--outstd=0.02,0.04,...,0.24", "--metrics=fd_efflite0", "--ref=REF",
            *_condition_words(record), "--num=1000", f"--json={Path(indir, 'sweep.json')}",
        ),
    }  # fmt: skip
    return commands + [(purpose, _join(*words)) for purpose, words in lines.items()]


def _continue(record: RunRecord) -> list[tuple[str, str]]:
    command = next((s["command"] for s in reversed(record.sessions) if isinstance(s.get("command"), str)), None)
    if record.checkpoint is None:
        return []
    if command is None:
        return [("Continue: repeat the run's own command", _join("train_edm2.py", f"--outdir={record.path}") + " ...")]
    if record.duration is None or record.nimg < record.duration:
        return [("Continue: the same command again", command)]
    longer = f"--duration={format_nimg(2 * record.duration)}"
    pattern = r"--duration(?:=|\s+)\S+"
    text = re.sub(pattern, longer, command) if re.search(pattern, command) else f"{command} {longer}"
    return [("Train the finished run further, here for twice as long", text)]


def _best_snapshot(record: RunRecord, snapshots: list[Path]) -> tuple[Path, str]:
    by_name = {path.name: path for path in snapshots}
    for key, name in record.stats.texts.items():
        if key.startswith(f"{METRIC_PREFIX}best_") and name in by_name:
            return by_name[name], f"the snapshot with the best {key.removeprefix(f'{METRIC_PREFIX}best_')}"
    if record.grids:
        std = record.grids[-1].about.get("ema_std")
        own = [p for p in snapshots if isinstance(std, float) and f"-{std:.3f}." in p.name]
        if own:
            return own[-1], "the newest snapshot, as in the sample grids"
    return snapshots[-1], "the newest snapshot"


def _sampling_words(record: RunRecord) -> list[str]:
    """Options of generate_images.py that repeat the sample grids if one command can, else suitable ones."""
    about = record.grids[-1].about if record.grids else {}
    classes, seeds = about.get("classes"), about.get("seeds")
    words = ["--outdir=out/images", "--grid=out/grid.png"]
    condition = _condition_words(record)
    if condition:
        return [*words, *condition, "--seeds=0-15"]
    try:
        flat = [int(seed) for row in seeds for seed in row]  # type: ignore[union-attr]
        # A file may claim any number of classes: compare lengths before listing them.
        listed = list(classes)  # type: ignore[arg-type]
        all_classes = len(listed) == about["label_dim"] and listed == list(range(len(listed)))
        words += [f"--seeds={flat[0]}-{flat[-1]}", f"--steps={int(about['steps'])}"]
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        return [*words, "--seeds=0-63"]
    return [*words, "--class=all"] if all_classes and flat else words


def _condition_words(record: RunRecord) -> list[str]:
    condition = record.options.get("condition")
    if not isinstance(condition, str):
        return []
    return ["--source=IMAGES", *(["--masks=MASKS"] if condition.startswith("inpaint") else [])]


def _best_std_of_sweeps(record: RunRecord) -> float | None:
    named = ((sweep, name) for sweep in record.sweeps for point in sweep.points for name in point.means)
    for sweep, name in named:
        return best_point(name, [point for point in sweep.points if name in point.means]).std
    return None


def _join(script: str, *words: str) -> str:
    return shlex.join(["python", script, *words])
