"""Reference files: the published ones, ours, and what is refused."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dnnlib.errors import ConfigError
from tests.helpers.paths import GOLDEN_DIR
from training.metrics.reference import load_stats, save_stats

PUBLISHED = GOLDEN_DIR / "dataset-ref.pkl"


def stats(num=6, dims=4, **more):
    rows = np.random.default_rng(0).standard_normal((num, dims))
    moments = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}
    return {"num_images": num, "fid": moments, "fd_efflite0": moments, **more}


def assert_same(first, second):
    assert first.keys() == second.keys() and first["num_images"] == second["num_images"]
    for entry in first.keys() - {"num_images"}:
        assert first[entry].keys() == second[entry].keys()
        for key, value in first[entry].items():
            assert value.dtype == second[entry][key].dtype and np.array_equal(value, second[entry][key])


def test_the_published_layout():
    found = load_stats(PUBLISHED)
    with open(PUBLISHED, "rb") as file:
        expected = pickle.load(file)  # a file of this repository, made of plain numbers
    assert set(found) == {"num_images", "fid", "fd_dinov2"}
    assert_same(found, expected)


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_what_is_written_is_read_back(tmp_path, suffix):
    path = tmp_path / f"ref{suffix}"
    save_stats(stats(), path)
    assert_same(load_stats(path), stats())
    assert [place.name for place in tmp_path.iterdir()] == [path.name]


def test_a_pickle_of_ours_is_plain_numbers_by_the_published_names(tmp_path):
    save_stats(stats(features={"inception": np.ones((3, 4), np.float32)}), tmp_path / "ref.pkl")
    found = pickle.loads((tmp_path / "ref.pkl").read_bytes())
    assert set(found) == {"num_images", "fid", "fd_efflite0"} and type(found["fid"]["mu"]) is np.ndarray


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_the_version_that_made_statistics_is_kept(tmp_path, suffix):
    path = tmp_path / f"ref{suffix}"
    save_stats({**stats(), "made_with": {"pillow": "10.4.0"}}, path)
    assert load_stats(path)["made_with"] == {"pillow": "10.4.0"}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_are_kept_in_safetensors(tmp_path, dtype):
    rows = np.arange(12).reshape(3, 4).astype(dtype)
    path = tmp_path / "ref.safetensors"
    save_stats(stats(features={"efflite0": rows}), path)
    found = load_stats(path)["features"]["efflite0"]
    assert found.dtype == np.float32 and np.array_equal(found, rows)


def test_the_older_published_layout(tmp_path):
    entry = stats()["fid"]
    np.savez(tmp_path / "old.npz", **entry)
    found = load_stats(tmp_path / "old.npz")
    assert set(found) == {"fid"} and np.array_equal(found["fid"]["sigma"], entry["sigma"])


def test_the_format_is_told_by_the_first_bytes(tmp_path):
    (tmp_path / "ref.npz").write_bytes(PUBLISHED.read_bytes())
    assert_same(load_stats(tmp_path / "ref.npz"), load_stats(PUBLISHED))


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def spoiled(**changes):
    entry = {**stats()["fid"], **changes}
    return {"num_images": 6, "fid": {key: value for key, value in entry.items() if value is not None}}


def pickled(content):
    return pickle.dumps(content, protocol=4)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "nothing in it was run: it is cut short"),
        (b"not a reference", "damaged or cut short"),
        (PUBLISHED.read_bytes()[:-100], "it is cut short: 4608 bytes are announced where 4515 are left"),
        (pickled(Evil()), "nothing in it was run"),
        (pickled({"fid": Evil()}), "nothing in it was run"),
        (pickled([1, 2]), "it holds a list"),
        (pickled({"num_images": 5}), "it has none of fid, fd_dinov2, fd_efflite0, sfid"),
        (pickled({"fid": 3}), "its entry fid lacks mu or sigma"),
        (pickled(spoiled(sigma=None)), "its entry fid lacks mu or sigma"),
        (pickled(spoiled(mu=np.zeros(3))), r"fid.sigma has shape \[4, 4\] with a mu of 3"),
        (pickled(spoiled(mu=np.arange(4))), "fid.mu is not an array of numbers"),
        (pickled(spoiled(mu=np.full(4, np.nan))), "fid.mu holds values that are not finite"),
        (pickled(spoiled(sigma=np.triu(np.ones((4, 4))))), "fid.sigma is not a covariance"),
        (pickled(spoiled(sigma=-np.eye(4))), "fid.sigma is not a covariance"),
        (pickled({**spoiled(), "num_images": "many"}), "its number of images is 'many'"),
        (b"PK\3\4 and nothing more", "is not a readable ZIP file"),
    ],
)
def test_a_file_that_is_no_reference_is_refused_by_name(tmp_path, capsys, content, message):
    path = tmp_path / "ref.pkl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_stats(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_an_npz_bomb_is_refused_by_its_headers(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in {"mu": (1 << 14,), "sigma": (1 << 14, 1 << 14)}.items():
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", header.getvalue())
    with pytest.raises(ConfigError, match=r"bomb\.npz.*unpacks to more than 1024 MiB"):
        load_stats(tmp_path / "bomb.npz")


def test_other_archives_and_networks_are_no_references(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    with pytest.raises(ConfigError, match="holds the arrays mu and sigma"):
        load_stats(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", mu=np.array([Evil()]), sigma=np.zeros(1))
    with pytest.raises(ConfigError, match="damaged"):
        load_stats(tmp_path / "objects.npz")
    save_file({"a": np.zeros(2)}, tmp_path / "net.safetensors")
    with pytest.raises(ConfigError, match="does not say that it is an edm2-metrics-reference"):
        load_stats(tmp_path / "net.safetensors")


def test_damaged_safetensors_are_refused(tmp_path):
    path = tmp_path / "ref.safetensors"
    save_stats(stats(), path)
    assert set(load_file(path)) == {"fid.mu", "fid.sigma", "fd_efflite0.mu", "fd_efflite0.sigma"}
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ConfigError, match="damaged or cut short"):
        load_stats(path)


def test_missing_files_and_other_suffixes(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.pkl' does not exist"):
        load_stats(tmp_path / "nowhere.pkl")
    with pytest.raises(ConfigError, match=r"none of the suffixes .pkl and .safetensors"):
        save_stats(stats(), tmp_path / "ref.npz")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_stats(stats(), tmp_path / "no" / "folder" / "ref.pkl")


def rows_of(seed, num=9, dims=4):
    rows = np.random.default_rng(seed).standard_normal((num, dims))
    return rows, {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_of_the_adm_suite_has_sfid_too(tmp_path, save):
    (_, fid), (_, sfid) = rows_of(0), rows_of(1, dims=3)
    images = np.zeros((2, 4, 4, 3), np.uint8)
    save(tmp_path / "ref.npz", images, mu=fid["mu"], sigma=fid["sigma"], mu_s=sfid["mu"], sigma_s=sfid["sigma"])
    found = load_stats(tmp_path / "ref.npz")
    assert set(found) == {"fid", "sfid"}
    for name, expected in {"fid": fid, "sfid": sfid}.items():
        assert all(np.array_equal(found[name][key], expected[key]) for key in ("mu", "sigma"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_activations_in_an_npz_are_features(tmp_path, dtype):
    rows = rows_of(0)[0].astype(dtype)
    np.savez(tmp_path / "ref.npz", rows)
    found = load_stats(tmp_path / "ref.npz")
    assert found["num_images"] == 9 and np.array_equal(found["features"]["inception"], rows.astype(np.float32))
    assert np.allclose(found["fid"]["sigma"], np.cov(rows.astype(np.float64), rowvar=False))


def test_images_in_place_of_statistics_are_refused_with_the_way_out(tmp_path):
    np.savez(tmp_path / "samples.npz", np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "folder").mkdir()
    for name in ("samples.npz", "folder"):
        with pytest.raises(ConfigError, match=r"calculate_metrics\.py ref makes statistics of images"):
            load_stats(tmp_path / name)
