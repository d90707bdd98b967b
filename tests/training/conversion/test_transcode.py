"""Pixels through a real, tiny VAE and back: data sets, training on them, generation."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import tqdm
from click.testing import CliRunner

import dataset_tool
import dnnlib.cli
import train_edm2
from dnnlib.errors import ConfigError
from tests.helpers.killed import killed_at_replace, needs_sigkill
from tests.helpers.ranks import run_ranks
from torch_utils.distributed import World
from training.conversion import transcode
from training.conversion.transcode import Transcoding, own_encoder
from training.dataset import ImageFolderDataset
from training.dataset.latents import LatentStatistics, encoder_of, read_encoder, vae_encoder, vae_geometry
from training.encoders import StabilityVAEEncoder
from training.images.png import PLAIN, encode_png
from training.sampling.generation import generate_images
from training.snapshot import load_snapshot

diffusers = pytest.importorskip("diffusers")

RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A folder with an AutoencoderKL of 3 latent channels at a quarter of the size."""
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=3,
            norm_num_groups=4,
            sample_size=32,
        )
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def images(tmp_path):
    """Twenty images of 32x32 in three classes."""
    names = [f"00000/img{i:08d}.png" for i in range(20)]
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            pixels = RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = PIL.Image.fromarray(pixels).resize((32, 32), PIL.Image.Resampling.BICUBIC)
            with archive.open(name, "w") as file:
                image.save(file, "png")
        archive.writestr("dataset.json", json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names)]}))
    return path


def run(*args):
    result = CliRunner().invoke(dataset_tool.cmdline, [str(arg) for arg in args], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def through_the_vae(folder, pixels):
    """Mean and standard deviation of the latents of uint8 [N, 3, H, W], by diffusers itself."""
    model = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(pixels).float() / 255).latent_dist
    return torch.cat([latents.mean, latents.std], dim=1).numpy()


def test_geometry_of_a_vae_without_its_weights(vae, tmp_path):
    geometry = vae_geometry(vae)
    assert (geometry.channels, geometry.downscale, geometry.resolution(32)) == (3, 4, 8)
    with pytest.raises(ConfigError, match="30x30 do not divide"):
        geometry.resolution(30)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        vae_geometry(str(tmp_path / "nowhere"))
    published = vae_geometry("stabilityai/sd-vae-ft-mse")  # known by heart: needs no connection
    assert (published.channels, published.downscale) == (4, 8)


def test_a_folder_that_holds_no_sound_vae(vae, images, tmp_path):
    folder = Path(shutil.copytree(vae, tmp_path / "bad"))
    config = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"latent_channels": 5}, "cannot be loaded.*size mismatch"),
        (None, "has no entry 'latent"),
    ]:
        text = json.dumps({} if change is None else {**config, **change})
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            run("encode", "--source", images, "--dest", tmp_path / "z.zip", "--model-url", folder)
        assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"bad", "images.zip"}


def test_encode_writes_what_the_vae_says_and_what_training_needs_to_know(vae, images, tmp_path):
    output = run("encode", "--source", images, "--dest", tmp_path / "z.zip", "--model-url", vae, "--batch=4")
    assert "20 images" in output and not (tmp_path / "z.zip.partial").exists()
    source, latents = ImageFolderDataset(images), ImageFolderDataset(tmp_path / "z.zip")
    assert latents.holds_latents and latents.image_shape == (6, 8, 8) and latents.label_dim == 3
    raw, labels = latents.read_batch(range(20))
    pixels, expected_labels = source.read_batch(range(20))
    assert np.array_equal(labels, expected_labels)
    assert np.allclose(raw, through_the_vae(vae, pixels), atol=1e-5)
    encoder = encoder_of(latents)
    assert isinstance(encoder, StabilityVAEEncoder) and encoder.vae_name == vae
    # Samples of the latents, scaled by the measured statistics: mean 0 and deviation one half in every channel.
    eps = torch.randn(2000, *raw.shape[1:], generator=torch.Generator().manual_seed(0))[:, :3]
    final = encoder.encode_latents(torch.from_numpy(raw).repeat(100, 1, 1, 1), eps)
    assert torch.allclose(final.mean((0, 2, 3)), torch.zeros(3), atol=0.01)
    assert torch.allclose(final.std((0, 2, 3)), torch.full([3], 0.5), atol=0.01)


def test_decode_reads_what_encode_wrote(vae, images, tmp_path):
    run("encode", "--source", images, "--dest", tmp_path / "z", "--model-url", vae, "--grid", tmp_path / "g.png")
    run("decode", "--source", tmp_path / "z", "--dest", tmp_path / "p.zip", "--grid", tmp_path / "h.png")
    source, decoded = ImageFolderDataset(images), ImageFolderDataset(tmp_path / "p.zip")
    assert decoded.image_shape == (3, 32, 32)
    model = diffusers.AutoencoderKL.from_pretrained(vae).eval()
    raw = ImageFolderDataset(tmp_path / "z").read_batch(range(20))[0]
    with torch.no_grad():
        expected = model.decode(torch.from_numpy(raw[:, :3])).sample.clamp(0, 1).numpy() * 255
    pixels, labels = decoded.read_batch(range(20))
    assert np.abs(pixels - expected).max() < 1.01
    assert np.array_equal(labels, source.read_batch(range(20))[1])
    with PIL.Image.open(tmp_path / "g.png") as sheet:  # pairs: as it was, as it came back
        tiles = np.asarray(sheet)
    assert np.array_equal(tiles[2:34, 2:34], source[0][0].transpose(1, 2, 0))
    # Decoded in another batch, whose size moves the last digits.
    assert np.abs(tiles[2:34, 36:68].astype(int) - pixels[0].transpose(1, 2, 0)).max() <= 1


def encoded(source, dest, vae, *, world=None, num_shards=None):
    dataset = ImageFolderDataset(source)
    encoder = vae_encoder(dataset, vae, batch_size=2)
    work = Transcoding(
        dataset,
        dest,
        encoder,
        source_path=source,
        world=world or World(),
        to_latents=True,
        measure=True,
        num_shards=num_shards,
    )
    return work


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(transcode, "_CHUNK_IMAGES", 4)


def test_interrupted_work_is_taken_up_again(vae, images, tmp_path, monkeypatch, small_chunks):
    list(encoded(images, tmp_path / "whole.zip", vae))
    work = encoded(images, tmp_path / "z.zip", vae)
    steps = iter(work)
    for _ in range(3):
        next(steps)
    steps.close()
    assert not (tmp_path / "z.zip").exists() and len(list(work.workdir.glob("*.npy"))) == 3
    computed = []
    original = Transcoding._compute
    monkeypatch.setattr(Transcoding, "_compute", lambda self, chunk: computed.append(chunk) or original(self, chunk))
    assert sum(step.num_images for step in encoded(images, tmp_path / "z.zip", vae)) == 20
    assert [chunk.start for chunk in computed] == [12, 16]
    assert (tmp_path / "z.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


def test_an_interrupted_command_says_where_its_work_is(vae, images, tmp_path, monkeypatch, small_chunks, capsys):
    dest = tmp_path / "z.zip"
    words = ["encode", f"--source={images}", f"--dest={dest}", f"--model-url={vae}", "--batch=4", "--device=cpu"]

    def stop(self, n):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(tqdm.tqdm, "update", stop)
        dnnlib.cli.main(dataset_tool.cmdline, words, interrupted=dataset_tool.INTERRUPTED)
    assert "in the folder DEST.partial, and the same command continues from there.\n" in capsys.readouterr().err
    assert not dest.exists() and len(list((tmp_path / "z.zip.partial").glob("*.npy"))) == 1
    dataset_tool.cmdline.main(words, standalone_mode=False)
    out, err = capsys.readouterr()
    assert out.endswith(f"{dest}: 20 images\n") and not (tmp_path / "z.zip.partial").exists()
    assert f"Next: python train_edm2.py --outdir=training-runs/NAME --data={dest} --dry-run\n" in err
    dataset_tool.cmdline.main(["decode", f"--source={dest}", f"--dest={tmp_path / 'd.zip'}"], standalone_mode=False)
    assert f"Next: python dataset_tool.py inspect {tmp_path / 'd.zip'} --grid=sheet.png\n" in capsys.readouterr().err


@needs_sigkill
def test_killed_work_is_taken_up_again_and_leaves_nothing(vae, images, tmp_path, small_chunks):
    """Killed at a chunk, then at the finished file, before it has its name."""
    list(encoded(images, tmp_path / "whole.zip", vae))
    before = {path.name for path in tmp_path.iterdir()}
    dest = tmp_path / "z.zip"
    code = f"""
from tests.training.conversion.test_transcode import encoded, transcode
transcode._CHUNK_IMAGES = 4
list(encoded(Path({str(images)!r}), Path({str(dest)!r}), {vae!r}))
"""
    killed_at_replace(4, code)  # the request and two chunks are there
    assert len(list((tmp_path / "z.zip.partial").glob("0*.npy"))) == 2 and not dest.exists()
    killed_at_replace(4, code)  # after the other three
    assert len(list((tmp_path / "z.zip.partial").glob("0*.npy"))) == 5 and not dest.exists()
    assert any(path.suffix == ".tmp" for path in tmp_path.iterdir())
    list(encoded(images, dest, vae))
    assert dest.read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == before | {"z.zip"}


@pytest.mark.parametrize("name", ["z.zip", "z"])
def test_skip_existing_knows_its_own_results(vae, images, tmp_path, name, monkeypatch):
    dest = tmp_path / name
    command = ["encode", "--source", images, "--dest", dest, "--model-url", vae, "--batch=4", "--skip-existing"]
    assert "there already" not in run(*command)
    monkeypatch.setattr(Transcoding, "_compute", None)
    moved = images.rename(tmp_path / "elsewhere.zip")  # the place of the source does not matter
    command[2] = moved
    assert f"{dest}: 20 images, there already" in run(*command)
    hint = "add --overwrite" if name == "z.zip" else "remove it"
    with pytest.raises(ConfigError, match=rf"made from another source or with other options.*{hint}"):
        run(*command, "--max-images=8")
    with pytest.raises(ConfigError, match=r"exists already|is not empty"):
        run(*command[:-1])


def test_a_folder_that_was_left_half_moved_is_written_again(vae, images, tmp_path, small_chunks):
    dest = tmp_path / "z"
    steps = iter(encoded(images, dest, vae))
    next(steps)
    steps.close()
    (dest / "00000").mkdir(parents=True)
    (dest / "00000" / "img-mean-std-00000000.npy").write_bytes(b"half")
    (dest / ".0123456789ab.tmp").mkdir()
    list(encoded(images, dest, vae))
    assert sorted(path.name for path in dest.iterdir()) == ["00000", "dataset.json"]
    assert len(ImageFolderDataset(dest)) == 20
    steps = iter(encoded(images, tmp_path / "y", vae))
    next(steps)
    steps.close()
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="does not say what it was made from"):
        encoded(images, tmp_path / "y", vae)


def test_interrupted_while_shards_are_put_together(vae, images, tmp_path, monkeypatch, small_chunks):
    list(encoded(images, tmp_path / "whole.zip", vae, num_shards=3))
    real = transcode.writing

    def fails(parts, *args):
        if parts[0].number == 1:
            raise OSError(28, "No space left on device")
        return real(parts, *args)

    monkeypatch.setattr(transcode, "writing", fails)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        list(encoded(images, tmp_path / "z.zip", vae, num_shards=3))
    monkeypatch.setattr(transcode, "writing", real)
    list(encoded(images, tmp_path / "z.zip", vae, num_shards=3))
    for number in range(3):
        name = f"-{number:05d}.zip"
        assert (tmp_path / f"z{name}").read_bytes() == (tmp_path / f"whole{name}").read_bytes()
    raw = ImageFolderDataset(tmp_path / "z.zip").read_batch(range(20))[0]
    list(encoded(images, tmp_path / "one.zip", vae))
    assert np.array_equal(raw, ImageFolderDataset(tmp_path / "one.zip").read_batch(range(20))[0])


def test_other_work_in_progress_is_left_alone(vae, images, tmp_path, small_chunks):
    steps = iter(encoded(images, tmp_path / "z.zip", vae))
    next(steps)
    steps.close()
    with pytest.raises(ConfigError, match=r"z\.zip\.partial holds the unfinished work of another command"):
        run("encode", "--source", images, "--dest", tmp_path / "z.zip", "--model-url", vae, "--max-images=5")


def test_a_source_that_changed_is_another_one(vae, images, tmp_path, small_chunks):
    steps = iter(encoded(images, tmp_path / "z.zip", vae))
    next(steps)
    steps.close()
    source = ImageFolderDataset(images)
    names = [f"00000/img{i:08d}.png" for i in range(20)]
    with zipfile.ZipFile(tmp_path / "new.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, encode_png(255 - source[i][0], compression=PLAIN))
    os.replace(tmp_path / "new.zip", images)
    with pytest.raises(ConfigError, match="unfinished work of another command"):
        list(encoded(images, tmp_path / "z.zip", vae))


def test_decoding_differently_is_other_work(vae, images, tmp_path, small_chunks):
    run("encode", "--source", images, "--dest", tmp_path / "z.zip", "--model-url", vae)
    shutil.copytree(vae, tmp_path / "other")

    def work(**kwargs):
        latents = ImageFolderDataset(tmp_path / "z.zip")
        encoder = own_encoder(latents, kwargs.get("vae"), batch=kwargs.get("batch", 2))
        place = {"source_path": tmp_path / "z.zip", "world": World()}
        return Transcoding(latents, tmp_path / "p.zip", encoder, to_latents=False, **place)

    steps = iter(work())
    next(steps)
    steps.close()
    for change in ({"batch": 3}, {"vae": str(tmp_path / "other")}):
        with pytest.raises(ConfigError, match="unfinished work of another command"):
            list(work(**change))
    assert sum(step.num_images for step in work()) == 20


def test_encoding_in_another_precision_is_other_work(vae, images, tmp_path, small_chunks):
    dataset = ImageFolderDataset(images)

    def work(**precision):
        encoder = vae_encoder(dataset, vae, batch_size=4).with_encoder(**precision)
        place = {"source_path": images, "world": World()}
        return Transcoding(dataset, tmp_path / "z.zip", encoder, to_latents=True, **place)

    steps = iter(work())
    next(steps)
    steps.close()
    with pytest.raises(ConfigError, match="unfinished work of another command"):
        list(work(tf32=False))
    assert sum(step.num_images for step in work(tf32=True)) == 20


def test_on_a_cpu_the_encoders_precision_changes_no_byte(vae, images, tmp_path):
    for name, words in (("a", []), ("b", ["--encoder-precision=fp32"]), ("c", ["--encoder-precision=tf32"])):
        run("encode", "--source", images, "--dest", tmp_path / f"{name}.zip", "--model-url", vae, *words)
    pixels = [ImageFolderDataset(tmp_path / f"{name}.zip").read_batch(range(20))[0] for name in "abc"]
    assert np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])


@pytest.mark.parametrize(
    ("device", "num", "to_latents", "compiled"),
    [
        ("cuda", 10**6, True, (True, False)),
        ("cuda", 10**6, False, (False, True)),
        ("cuda", 1000, True, (False, False)),
        ("cpu", 10**6, True, (False, False)),
    ],
)
def test_the_vae_is_compiled_for_many_images_on_a_gpu(vae, monkeypatch, device, num, to_latents, compiled):
    monkeypatch.setattr(transcode, "missing_compiler", lambda device: None)
    monkeypatch.setattr(transcode, "keep_compiled_code", lambda: None)
    told = []
    world = World(device=torch.device(device))
    encoder = StabilityVAEEncoder(vae).with_encoder(tf32=False)
    made = transcode.compiled_for(encoder, num, world, to_latents=to_latents, announce=told.append)
    assert (made._encoder_compile, made._decoder_compile) == compiled and not made._encoder_tf32
    assert len(told) == any(compiled)


def test_fewer_shards_than_before_remain(vae, images, tmp_path):
    command = ["encode", "--source", images, "--dest", tmp_path / "z.zip", "--model-url", vae]
    run(*command, "--shards=4")
    run(*command, "--shards=2", "--overwrite")
    assert len(list(tmp_path.glob("z-*.zip"))) == 2
    assert len(ImageFolderDataset(tmp_path / "z.zip")) == 20


def test_a_source_does_not_overwrite_itself(vae, images, tmp_path):
    images.rename(tmp_path / "p-00000.zip")
    with pytest.raises(ConfigError, match=r"p-00000\.zip is part of --source"):
        run(
            *("encode", "--source", tmp_path / "p-*.zip", "--dest", tmp_path / "p.zip", "--model-url", vae),
            *("--shards=1", "--overwrite"),
        )


def test_a_local_vae_is_found_from_elsewhere(vae, images, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(vae).parent)
    run("encode", "--source", images, "--dest", tmp_path / "z.zip", "--model-url", Path(vae).name)
    monkeypatch.chdir(tmp_path)
    run("decode", "--source", "z.zip", "--dest", "p.zip")
    assert encoder_of(ImageFolderDataset(tmp_path / "z.zip")).vae_name == vae


def test_an_early_mistake_leaves_nothing_behind(vae, tmp_path):
    image = encode_png(np.zeros((3, 32, 32), np.uint8), compression=PLAIN)
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("0.png", image)
        archive.writestr("1.png", image[:300] + image[400:])
    with pytest.raises(ConfigError, match=r"1\.png is damaged"):
        run("encode", "--source", tmp_path / "p.zip", "--dest", tmp_path / "z.zip", "--model-url", vae)
    assert [path.name for path in tmp_path.iterdir()] == ["p.zip"]


def test_the_names_of_classes_come_along(vae, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        PIL.Image.new("RGB", (32, 32)).save(tmp_path / "photos" / name / "1.png")
    run("convert", "--source", tmp_path / "photos", "--dest", tmp_path / "p.zip", "--workers=1")
    run("encode", "--source", tmp_path / "p.zip", "--dest", tmp_path / "z.zip", "--model-url", vae, "--shards=2")
    run("decode", "--source", tmp_path / "z.zip", "--dest", tmp_path / "d.zip")
    for name in ("p", "z", "d"):
        assert ImageFolderDataset(tmp_path / f"{name}.zip").class_names == ["cat", "dog"]


def test_damaged_work_is_computed_again(vae, images, tmp_path, small_chunks):
    work = encoded(images, tmp_path / "z.zip", vae)
    steps = iter(work)
    for _ in range(2):
        next(steps)
    steps.close()
    (work.workdir / "00000001.npy").write_bytes(b"half")
    with pytest.raises(ConfigError, match="the same command computes it again"):
        list(encoded(images, tmp_path / "z.zip", vae))
    assert sum(step.num_images for step in encoded(images, tmp_path / "z.zip", vae)) == 20


@pytest.mark.slow
def test_two_processes_write_what_one_writes(vae, images, tmp_path):
    command = ["encode", f"--source={images}", f"--model-url={vae}", "--batch=4", "--device=cpu", "--shards=2"]
    run(*command, "--dest", tmp_path / "one.zip")
    run_ranks("dataset_tool.py", *command, f"--dest={tmp_path / 'two.zip'}")
    for number in range(2):
        first, second = (tmp_path / f"{name}-{number:05d}.zip" for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()


TINY = ["--channels=8", "--channel-mult=1,2", "--num-blocks=1", "--attn-resolutions=4", "--batch=4", "--duration=12"]
TINY += ["--status=4", "--snapshot=12", "--checkpoint=8", "--device=cpu"]


def train(*args):
    result = CliRunner().invoke(train_edm2.train_edm2, [*map(str, args), *TINY], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_encode_train_generate_decode(vae, images, tmp_path):
    run("encode", "--source", images, "--dest", tmp_path / "z.zip", "--model-url", vae)
    train("--data", tmp_path / "z.zip", "--outdir", tmp_path / "run")
    snapshot = load_snapshot(tmp_path / "run" / "network-snapshot-0000000.012-0.100.pkl")
    assert (snapshot.net.img_resolution, snapshot.net.img_channels) == (8, 3)
    assert snapshot.encoder.vae_name == vae
    assert snapshot.encoder.scale == encoder_of(ImageFolderDataset(tmp_path / "z.zip")).scale
    (batch,) = generate_images(net=snapshot.net, encoder=snapshot.encoder, seeds=range(3), num_steps=4, device="cpu")
    assert batch.images.shape == (3, 3, 32, 32) and batch.images.dtype == torch.uint8


def test_training_encodes_pixels_as_it_goes(vae, images, tmp_path, monkeypatch):
    """From the same statistics, a run that encodes on the fly learns what one on encoded data learns."""
    run("encode", "--source", images, "--dest", tmp_path / "z.zip", "--model-url", vae)
    train("--data", tmp_path / "z.zip", "--outdir", tmp_path / "stored")
    precisions = []
    load = StabilityVAEEncoder.init

    def noted(encoder, device):
        precisions.append(encoder._encoder_tf32)
        load(encoder, device)

    monkeypatch.setattr(StabilityVAEEncoder, "init", noted)
    options = ["--encode-on-the-fly", "--encoder-precision=fp32", "--model-url", vae]
    train("--data", images, "--outdir", tmp_path / "exact", *options)
    assert precisions and set(precisions) == {False}  # while the statistics are measured, too
    monkeypatch.undo()
    output = train("--data", images, "--outdir", tmp_path / "fly", "--encode-on-the-fly", "--model-url", vae)
    assert f"8x8, 3 channels by {vae}" in output
    nets = []
    for name in ("stored", "fly"):
        snapshot = load_snapshot(tmp_path / name / "network-snapshot-0000000.012-0.100.pkl")
        assert snapshot.encoder.vae_name == vae
        nets.append(snapshot.net.state_dict())
    for name, value in nets[0].items():
        assert torch.allclose(value.float(), nets[1][name].float(), atol=2e-3), name
    # Measured once: a run that continues finds the statistics in its folder.
    text = (tmp_path / "fly" / "encoder.json").read_text()
    assert read_encoder(json.loads(text), "").vae_name == vae
    (tmp_path / "fly" / "encoder.json").write_text(text)
    (tmp_path / "fly" / "network-snapshot-0000000.012-0.100.pkl").unlink()
    train("--data", images, "--outdir", tmp_path / "fly", "--encode-on-the-fly", "--model-url", vae)
    assert (tmp_path / "fly" / "encoder.json").read_text() == text


def test_a_vae_that_overflows_is_named(vae, images, tmp_path, monkeypatch):
    monkeypatch.setattr(StabilityVAEEncoder, "encode_pixels", lambda self, x: torch.full([len(x), 6, 8, 8], torch.nan))
    with pytest.raises(ConfigError, match="makes numbers that are not finite"):
        run("encode", "--source", images, "--dest", tmp_path / "z.zip", "--model-url", vae)
    assert not (tmp_path / "z.zip").exists()


def test_statistics_add_up_whatever_the_batches():
    raw = RNG.standard_normal((10, 4, 3, 3)) * 2 + 5
    raw[:, 2:] = np.abs(raw[:, 2:])
    statistics = LatentStatistics()
    for part in np.array_split(raw, 3):
        statistics.add(part)
    mean, std = raw[:, :2], raw[:, 2:]
    assert np.allclose(statistics.mean, mean.mean((0, 2, 3)))
    assert np.allclose(statistics.std, np.sqrt(mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3))))


def test_bad_input_ends_in_one_line_and_writes_nothing(vae, images, tmp_path):
    run("encode", "--source", images, "--dest", tmp_path / "z.zip", "--model-url", vae)
    odd, four = tmp_path / "odd.zip", "stabilityai/sd-vae-ft-mse"
    with zipfile.ZipFile(odd, "w") as archive:
        archive.writestr("0.png", encode_png(np.zeros((3, 24, 24), np.uint8), compression=PLAIN))
    before = sorted(tmp_path.rglob("*"))
    for args, message in [
        (["encode", "--source", tmp_path / "z.zip", "--dest", tmp_path / "y.zip"], "holds latents already"),
        (["decode", "--source", images, "--dest", tmp_path / "y.zip"], "holds images, not latents"),
        (["encode", "--source", images, "--dest", tmp_path / "z.zip", "--model-url", vae], "exists already"),
        (["encode", "--source", images, "--dest", images, "--model-url", vae], "lies inside of"),
        (
            ["encode", "--source", images, "--dest", tmp_path / "y.zip", "--model-url", tmp_path / "no"],
            "cannot be loaded",
        ),
        (["encode", "--source", images, "--dest", tmp_path / "y", "--shards=2", "--model-url", vae], "ZIP files"),
        (
            ["decode", "--source", tmp_path / "z.zip", "--dest", tmp_path / "y.zip", "--model-url", four],
            "4 latent channels",
        ),
        (
            ["encode", "--source", odd, "--dest", tmp_path / "y.zip", "--model-url", vae],
            "24x24, not a power of two",
        ),
        (
            ["encode", "--source", images, "--dest", tmp_path / "y.zip", "--model-url", vae, "--pixel-min=2"],
            "below 1",
        ),
        (["encode", "--source", tmp_path / "no.zip", "--dest", tmp_path / "y.zip"], "does not exist"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run(*args)
    for args, message in [
        (["--data", tmp_path / "z.zip", "--encode-on-the-fly"], "holds latents already"),
        (["--data", odd, "--cond=False"], "24x24, not a power of two"),
        (["--data", images, "--model-url", vae], "needs --encode-on-the-fly"),
        (["--data", images, "--encoder-precision=fp32"], "--encoder-precision=fp32 needs --encode-on-the-fly"),
    ]:
        with pytest.raises(ConfigError, match=message):
            train("--outdir", tmp_path / "run", *args)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"class": "StandardRGBEncoder", "arguments": {}}, "makes no latents"),
        ({"class": "os.system", "arguments": {}}, "no known encoder"),
        ({"class": "StabilityVAEEncoder"}, "no known encoder"),
        ({"class": "StabilityVAEEncoder", "arguments": {"raw_mean": [1.0], "raw_std": []}}, "no known encoder"),
    ],
)
def test_an_encoder_that_is_none(entry, message):
    with pytest.raises(ConfigError, match=message):
        read_encoder(entry, "dataset.json")
