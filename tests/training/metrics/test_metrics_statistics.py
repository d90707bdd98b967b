"""Statistics over batches and processes: exact values, a large common offset, and one pass through the detectors."""

import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from dnnlib.errors import ConfigError
from tests.helpers.ranks import run_members
from tests.helpers.stand_in_detector import NUM_FEATURES, StandInDetector, images
from torch_utils.distributed import World
from torch_utils.processes.dealing import split_batches
from training.dataset.image_set import ImageSetBatch
from training.metrics import statistics
from training.metrics.evaluate import StatsPass, compute_scores, evaluate_images
from training.metrics.metric_table import METRICS
from training.metrics.reference import load_stats
from training.metrics.statistics import Moments, Rows

ALL_INCEPTION = [name for name, metric in METRICS.items() if metric.detector == "inception"]


def exact_moments(rows):
    """Mean and covariance of whole numbers, without any rounding before the end."""
    columns = [[Fraction(int(value)) for value in column] for column in rows.T]
    means = [sum(column) / len(column) for column in columns]
    centred = [[value - mean for value in column] for column, mean in zip(columns, means, strict=True)]
    covariance = [
        [float(sum(p * q for p, q in zip(a, b, strict=True)) / (len(a) - 1)) for b in centred] for a in centred
    ]
    return np.array([float(mean) for mean in means]), np.array(covariance)


def gathered(parts):
    moments = Moments()
    for part in parts:
        moments.add(part)
    return moments.merge(World())


@pytest.mark.parametrize("offset", [0, 10**9])
@pytest.mark.parametrize("sizes", [[90], [1] * 90, [64, 26], [0, 7, 0, 83]])
def test_moments_are_exact_with_a_large_common_offset_and_any_batch_size(offset, sizes):
    rows = np.random.default_rng(0).integers(-50, 50, (90, 5)) + offset
    count, mean, covariance = gathered(torch.from_numpy(rows).double().split(sizes))
    expected_mean, expected_covariance = exact_moments(rows)
    assert count == 90
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-14, atol=1e-12)
    np.testing.assert_allclose(covariance, expected_covariance, rtol=1e-10, atol=1e-10)
    # The textbook formula, for comparison, loses everything to the offset.
    textbook = (rows.T.astype(float) @ rows - 90 * np.outer(expected_mean, expected_mean)) / 89
    assert (np.abs(textbook - expected_covariance).max() > 1) == bool(offset)


def test_float32_rows_are_summed_in_float64():
    rows = torch.randn([500, 3], generator=torch.Generator().manual_seed(0)) + 1000
    _, mean, covariance = gathered(rows.split(64))
    np.testing.assert_allclose(covariance, np.cov(rows.numpy().astype(np.float64), rowvar=False), rtol=1e-10)
    np.testing.assert_allclose(mean, rows.numpy().astype(np.float64).mean(0), rtol=1e-14)


def test_rows_come_back_in_the_order_of_their_keys():
    rows = Rows()
    rows.add(np.array([5, 2]), torch.tensor([[5.0], [2.0]]))
    rows.add(np.array([], dtype=np.int64), torch.zeros([0, 1]))
    rows.add(np.array([3]), torch.tensor([[3.0]], dtype=torch.float64))
    assert rows.merge(World()).tolist() == [[2.0], [3.0], [5.0]]
    assert Rows().merge(World()).size == 0


def dealt(all_images, batch, world):
    return [all_images[torch.from_numpy(part)] for part in split_batches(len(all_images), batch, world)]


def run_pass(batches, world=None, **options):
    detectors = {"inception": StandInDetector()}
    steps = list(StatsPass(batches, metrics=ALL_INCEPTION, detectors=detectors, world=world or World(), **options))
    assert [step.stats is None for step in steps] == [True] * (len(steps) - 1) + [False]
    return steps[-1].stats


def assert_same_stats(stats, expected):
    assert stats.keys() == expected.keys() and stats["num_images"] == expected["num_images"]
    for entry in ("fid", "sfid"):
        for key in ("mu", "sigma"):
            largest = np.abs(expected[entry][key]).max()
            np.testing.assert_allclose(stats[entry][key], expected[entry][key], rtol=0, atol=1e-10 * largest)
    for layer in ("features", "logits"):
        assert np.array_equal(stats[layer]["inception"], expected[layer]["inception"])


def test_the_pass_gives_the_statistics_of_all_images_and_their_features_in_order():
    everything = images(50)
    stats = run_pass([everything])
    features = StandInDetector()(everything).numpy()
    assert stats["num_images"] == 50 and np.array_equal(stats["features"]["inception"], features)
    np.testing.assert_allclose(stats["fid"]["sigma"], np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9)
    spatial = StandInDetector().outputs(everything).spatial.double().numpy()
    np.testing.assert_allclose(stats["sfid"]["sigma"], np.cov(spatial, rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(stats["sfid"]["mu"], spatial.mean(0), rtol=1e-12)
    assert stats["logits"]["inception"].shape == (50, 20)


@pytest.mark.parametrize("batch", [1, 7, 49])
def test_the_batch_size_does_not_matter(batch):
    everything = images(50)
    assert_same_stats(run_pass(dealt(everything, batch, World())), run_pass([everything]))


def _member(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    world = World(rank=rank, size=2)
    everything = images(51)
    expected = run_pass([everything])
    for batch in (1, 8, 64):
        assert_same_stats(run_pass(dealt(everything, batch, world), world), expected)
    # One process without any image.
    assert_same_stats(run_pass([everything] if rank == 1 else [], world), expected)
    reference = run_pass([images(40, seed=1)])
    detectors = {"inception": StandInDetector()}
    options = dict(metrics=ALL_INCEPTION, detectors=detectors, reference=reference)
    scores = evaluate_images(dealt(everything, 8, world), **options, world=world)
    alone = evaluate_images([everything], **options, world=World())
    for name, score in alone.items():
        assert scores[name].value == pytest.approx(score.value, rel=1e-9), name
    with pytest.raises(ConfigError, match="the reference lacks it"):
        evaluate_images(dealt(everything, 8, world), **{**options, "reference": {}}, world=world)
    world.close()
    Path(folder, f"done{rank}").touch()


def test_two_processes_give_what_one_gives_at_any_batch_size(tmp_path):
    run_members(_member, str(tmp_path))
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


def test_scores_draw_from_no_global_generator():
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    reference = run_pass([images(30, seed=1)])
    evaluate_images(
        [images(30)],
        metrics=ALL_INCEPTION,
        detectors={"inception": StandInDetector()},
        reference=reference,
        world=World(),
    )
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_chosen_features_are_kept_and_written(tmp_path):
    everything = images(20)
    dest = tmp_path / "stats.safetensors"
    parts = [np.arange(6, 20), np.arange(6)]
    batches = [ImageSetBatch(images=everything[torch.from_numpy(part)], indices=part) for part in parts]
    detectors = {"inception": StandInDetector()}
    work = StatsPass(
        batches, metrics=["fid"], detectors=detectors, world=World(), keep_features=np.array([2, 4, 11]), dest=dest
    )
    assert len(work) == 2
    stats = [step.stats for step in work][-1]
    kept = StandInDetector()(everything).numpy()[[2, 4, 11]]
    assert np.array_equal(stats["features"]["inception"], kept)
    assert np.array_equal(load_stats(dest)["features"]["inception"], kept)


def test_a_single_image_has_no_statistics():
    with pytest.raises(ConfigError, match="1 images cannot be measured"):
        run_pass([images(1)])


def test_the_scores_tell_images_that_are_alike_from_others():
    reference = run_pass([images(200, seed=1)])
    parts = images(200), images(200) // 3  # as varied, and of low contrast
    near, far = (compute_scores(run_pass([part]), reference, ALL_INCEPTION) for part in parts)
    for name in ("fid", "sfid", "kid_inception"):
        assert near[name].value < far[name].value / 3
    for name in ("recall3_inception", "recall5_inception", "coverage3_inception", "coverage5_inception"):
        assert near[name].value > far[name].value + 0.2
    assert near["kid_inception"].error > 0 and near["fid"].error is None
    assert StandInDetector().num_features == NUM_FEATURES


def test_rows_are_exchanged_in_pieces_of_bounded_size(monkeypatch: pytest.MonkeyPatch):
    """Three processes: one has more pieces than the others, and one has nothing."""
    monkeypatch.setattr(statistics, "_PIECE_BYTES", 4 * 5 * 2)  # two rows
    values = torch.arange(35.0).view(7, 5)
    shares = [Rows(), Rows(), Rows()]
    shares[0].add(np.array([6, 0, 3]), values[[6, 0, 3]])
    shares[0].add(np.array([2, 5]), values[[2, 5]])
    shares[2].add(np.array([4, 1]), values[[4, 1]])
    results: list[list[Any]] = [[] for _ in shares]  # what each process of the others has sent so far
    barrier, largest = threading.Barrier(3), []

    class Thread(World):
        def all_gather_objects(self, value):
            if isinstance(value, tuple):
                largest.append(len(value[1]))
            results[self.rank] = value
            barrier.wait(60)
            gathered = list(results)
            barrier.wait(60)
            return gathered

    with ThreadPoolExecutor(3) as pool:
        merged = list(pool.map(lambda rank: shares[rank].merge(Thread(rank=rank, size=3)), range(3)))
    assert max(largest) == 2
    for rows in merged:
        np.testing.assert_array_equal(rows, values.numpy())
