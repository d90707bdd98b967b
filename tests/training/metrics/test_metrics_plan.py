"""Names of metrics, which of them can be had, and how results are put."""

import json
import re

import pytest

from dnnlib.errors import ConfigError
from edm2.options import metrics as cli_metrics
from tests.helpers.stand_in_detector import StandInDetector
from torch_utils.distributed import World
from training.metrics import available as plan_module
from training.metrics import results as report
from training.metrics.available import Plan, plan_metrics, plan_reference
from training.metrics.detectors import DETECTORS as MADE
from training.metrics.distances import Score
from training.metrics.metric_table import DEFAULT, DETECTORS, METRICS, best_of, compact_names, parse_metrics

MOMENTS = {"mu": None, "sigma": None}


class Rows:
    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """The detectors that were asked for: stand-ins."""
    asked = []

    def make_detector(name, device, weights=None):
        asked.append((name, weights))
        if weights == "missing":
            raise ConfigError(f"the weights of {name} are missing")
        return StandInDetector(name)

    monkeypatch.setattr(plan_module, "make_detector", make_detector)
    for name, cls in MADE.items():
        monkeypatch.setattr(cls, "has_weights", lambda name=name: name == "efflite0")
    return asked


def test_the_names():
    assert {"fid", "fd_dinov2", "fd_efflite0", "sfid", "is", "kid_inception", "coverage5_dinov2"} <= set(METRICS)
    assert set(DETECTORS) == set(MADE)
    assert cli_metrics.metrics_option(lambda: None).__click_params__[0].default == ",".join(DEFAULT)
    assert parse_metrics("fid, is,fid") == parse_metrics(["fid", "is"]) == ["fid", "is"]
    assert parse_metrics("all") == list(METRICS)
    # What is no FID is not called so.
    assert not [name for name, metric in METRICS.items() if "fid" in name and metric.detector != "inception"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("fidd", "unknown metric 'fidd'; .* such as .*fid"),
        (" ,", "no metric is named"),
        ("fid,all", "unknown metric 'all'"),
    ],
)
def test_other_names_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_metrics(text)


def test_what_the_reference_lacks_is_skipped_and_its_detector_is_not_made(made):
    plan = plan_metrics(DEFAULT, {"fid": MOMENTS}, device="cpu", weights={"inception": "here.pth"})
    assert plan.metrics == ["fid"] and made == [("inception", "here.pth")]
    assert plan.skipped == {"fd_dinov2": "the reference lacks it"}
    assert report.notes(plan.skipped, plan.detectors) == ["Skipped fd_dinov2: the reference lacks it"]


def test_features_are_needed_for_kid_and_neighbours(made):
    names = "fid,kid_inception,precision3_inception,recall5_inception"
    plan = plan_metrics(names, {"fid": MOMENTS}, device="cpu")
    assert plan.metrics == ["fid"] and "--features=N" in plan.skipped["kid_inception"]
    reference = {"fid": MOMENTS, "features": {"inception": Rows(5)}}
    plan = plan_metrics(names, reference, device="cpu")
    assert plan.metrics == ["fid", "kid_inception", "precision3_inception"] and len(made) == 2
    assert plan.skipped == {"recall5_inception": "the reference keeps 5 features, and 6 are needed"}


def test_nothing_left_is_an_error_that_says_why(made):
    with pytest.raises(ConfigError, match="none of the metrics can be computed: fid: the reference lacks it"):
        plan_metrics("fid", {"fd_efflite0": MOMENTS}, device="cpu")
    with pytest.raises(ConfigError, match=r"fid: there is no reference; fd_dinov2: there is no reference$"):
        plan_metrics(DEFAULT, None, device="cpu")
    assert made == []


def test_inception_score_needs_no_reference(made):
    assert plan_metrics("is", None, device="cpu").metrics == ["is"]


def test_missing_weights_are_an_error_by_name_and_skipped_among_all(made):
    reference = {"fid": MOMENTS, "fd_efflite0": MOMENTS}
    with pytest.raises(ConfigError, match="the weights of inception are missing"):
        plan_metrics("fid", reference, device="cpu", weights={"inception": "missing"})
    made.clear()
    plan = plan_metrics("all", reference, device="cpu")
    assert plan.metrics == ["fd_efflite0"] and [name for name, _ in made] == ["efflite0"]
    assert "not on this machine" in plan.skipped["fid"] and "not on this machine" in plan.skipped["is"]
    plan = plan_metrics("all", reference, device="cpu", weights={"inception": "here.pth"})
    assert plan.metrics == ["fid", "fd_efflite0", "is"]


def test_a_reference_is_planned_without_one(made):
    plan = plan_reference("fid,is,kid_efflite0", keep_features=False, device="cpu")
    assert plan.metrics == ["fid"] and set(plan.skipped) == {"is", "kid_efflite0"}
    assert plan_reference("fid,kid_efflite0", keep_features=True, device="cpu").metrics == ["fid", "kid_efflite0"]


RUNS = [{"fid": Score(value=value), "kid_inception": Score(value=value / 1e4, error=1e-5)} for value in (3.0, 2.0, 4.0)]


def test_repeated_values_are_summed_up():
    summary = report.summarize(RUNS)["fid"]
    assert (summary.values, summary.minimum, summary.mean, summary.std) == ([3.0, 2.0, 4.0], 2.0, 3.0, 1.0)
    assert report.summarize(RUNS[:1])["fid"].std is None


def test_the_table():
    lines = report.table(report.summarize(RUNS), num_images=100, wanted=100)
    assert [re.split(r"  +", line) for line in lines] == [
        ["metric", "images", "value", "minimum", "mean ± std"],
        ["fid", "100", "3.0000", "2.0000", "4.0000", "2.0000", "3.0000 ± 1.0000"],
        ["kid_inception", "100", "0.0003 ± 1e-05", "0.0002 ± 1e-05", "0.0004 ± 1e-05", "0.0002", "0.0003 ± 0.0001"],
    ]
    assert lines[0].index("mean") == lines[1].index("3.0000 ± 1") == lines[2].index("0.0003 ± 0.0001")
    single = report.table(report.summarize(RUNS[:1]), num_images=100, wanted=100)
    assert single[0].split() == ["metric", "images", "value"] and len(single) == 3


def test_fewer_images_than_wanted_are_marked_in_table_and_record():
    summaries = report.summarize(RUNS)
    lines = report.table(summaries, num_images=100, wanted=50000)
    assert " 100* " in lines[1] and lines[-1].startswith("* fewer than the 50000 that were asked for: not comparable")
    plan = Plan(metrics=["fid"], detectors={"inception": StandInDetector()}, skipped={"is": "x"})
    for num_images, fewer in ((100, True), (50000, False)):
        request = report.Request(command="calc", num_images=num_images, wanted=50000, ref=None, facts=dict)
        record = report.result_record(summaries, plan, world=World(), request=request)
        assert record["fewer_images_than_wanted"] is fewer


def test_a_record_is_strict_json(tmp_path):
    report.write_json(
        tmp_path / "a.json", {"S_max": float("inf"), "interval": (0.1, 2.0), "path": tmp_path, "x": [1.5]}
    )
    text = (tmp_path / "a.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found == {"S_max": "inf", "interval": [0.1, 2.0], "path": str(tmp_path), "x": [1.5]}


def test_digests_of_files_and_folders(tmp_path):
    import hashlib

    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "1.png").write_bytes(b"one")
    (folder / "a.png").write_bytes(b"two")
    digests = [hashlib.sha256(data).hexdigest() for data in (b"two", b"one")]
    expected = hashlib.sha256(f"{digests[0]}  a.png\n{digests[1]}  b/1.png\n".encode()).hexdigest()
    assert report.described_file(folder) == {"path": str(folder), "sha256": expected}
    assert report.described_file(folder / "a.png")["sha256"] == digests[0]
    (folder / "a.png").rename(folder / "c.png")
    assert report.folder_sha256(folder) != expected


def test_weights_that_are_not_the_published_ones_are_told():
    detector = StandInDetector()
    detector.published = False
    (line,) = report.notes({}, {"inception": detector})
    assert "is not the published weights file of inception" in line


@pytest.mark.parametrize(
    "name, best", [("fid", 2.0), ("kid_dinov2", 2.0), ("is", 9.0), ("recall3_dinov2", 9.0), ("of_another_version", 2.0)]
)
def test_the_best_value_is_the_finite_one_that_the_metric_prefers(name, best):
    assert best_of(name, [float("nan"), 3.0, 2.0, float("inf"), 9.0, float("-inf")], float) == best
    assert best_of(name, [float("nan")], float) is None
    assert best_of(name, [(1, 5.0), (2, 5.0)], lambda item: item[1]) == (1, 5.0)


def test_names_that_differ_in_kind_and_neighbors_only_are_shown_as_a_pattern():
    manifold = "{precision,recall,density,coverage}{3,5}_dinov2"
    names = [name for name, metric in METRICS.items() if metric.detector == "dinov2"]
    assert compact_names(names) == ["fd_dinov2", "kid_dinov2", manifold]
    assert compact_names(["recall3_dinov2", "density3_dinov2", "recall5_inception"]) == [
        "{recall,density}3_dinov2",
        "recall5_inception",
    ]
    assert compact_names(["recall3_dinov2", "density5_dinov2"]) == ["recall3_dinov2", "density5_dinov2"]
