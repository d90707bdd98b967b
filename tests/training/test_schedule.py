"""The learning rate against published numbers and the plain oracle."""

import json

import pytest

from tests.helpers import oracle
from tests.helpers.paths import GOLDEN_DIR
from training.schedule import learning_rate_schedule

CASES = json.loads((GOLDEN_DIR / "numbers.json").read_text(encoding="utf-8"))["learning_rate"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['cur_nimg']}-{case['batch_size']}")
def test_learning_rates_equal_the_published_ones(case):
    expected = case.pop("lr")
    assert learning_rate_schedule(**case) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("nimg", [0, 1, 8, 5_000, 10**7, 2**31])
@pytest.mark.parametrize("options", [{}, {"ref_batches": 0}, {"rampup_Mimg": 0}, {"ref_lr": 0.3, "ref_batches": 3}])
def test_learning_rates_equal_the_oracle(nimg, options):
    expected = oracle.plain_learning_rate(nimg, 8, **options)
    assert learning_rate_schedule(nimg, 8, **options) == pytest.approx(expected, rel=1e-12)
