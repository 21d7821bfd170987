from __future__ import annotations

import pytest
import torch

from mipo_lite.bench_gpu import context_table, largest_that_fits, run_gpu_bench, speed_table
from mipo_lite.errors import UserError


@pytest.mark.parametrize("limit", [0, 250, 251, 4_000, 29_999, 30_000, 99_999])
def test_largest_that_fits(limit):
    assert largest_that_fits(lambda n: n <= limit, 30_000) == min(limit // 250 * 250, 30_000)


def test_rows_out_of_memory_stay_in_the_tables():
    ours = {"seconds": 2.0, "memory_bytes": 5e9}
    rows = [
        {
            "shape": "a",
            "context": 1000,
            "trl": {"seconds": 9.0, "memory_bytes": 2e10},
            "ours": ours,
        },
        {"shape": "a", "context": 12_000, "trl": None, "ours": ours},
    ]
    table = speed_table(rows).splitlines()
    assert table[2] == "| a | 1,000 | 9.00 | 2.00 | 4.5x | 20.0 | 5.0 |"
    assert table[3] == "| a | 12,000 | OOM | 2.00 |  | OOM | 5.0 |"
    fits = context_table([{"shape": "a", "card_gb": 6, "trl": 0, "ours": 3000}])
    assert fits.splitlines()[2] == "| a | 6 | OOM | 3,000 |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(UserError, match="no CUDA GPU"):
        run_gpu_bench()
