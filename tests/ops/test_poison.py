"""The tests of this folder run with poisoned memory: what is never written is seen."""

import pytest
import torch

MAKERS = {
    "empty": lambda dtype: torch.empty(3, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(3, dtype=dtype)),
    "empty_strided": lambda dtype: torch.empty_strided((3,), (2,), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(1, dtype=dtype).new_empty(3),
    "new_empty_strided": lambda dtype: torch.zeros(1, dtype=dtype).new_empty_strided((3,), (2,)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_fresh_memory_holds_what_no_result_may_hold(make):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert make(dtype).isnan().all()
    assert (make(torch.int64) == 2**63 - 1).all()
    assert (make(torch.int32) == 2**31 - 1).all()
    assert make(torch.bool).all()
    assert torch.empty(2, requires_grad=True).isnan().all()


@pytest.mark.unpoisoned(reason="shows that the mark works")
def test_marked_tests_are_left_alone():
    assert "poison" not in torch.empty.__qualname__
    assert "poison" not in torch.Tensor.new_empty.__qualname__
