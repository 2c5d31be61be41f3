"""The tests of this folder run with poisoned memory: what is never written is seen."""

import poison
import pytest
import torch
from torch._dynamo import trace_rules

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


@pytest.mark.unpoisoned(reason="poisons twice itself")
def test_a_compiled_function_may_allocate_in_every_test():
    """torch.compile's table of PyTorch's functions is emptied by `init_process_group`, and filled
    again by the next compilation.
    """
    trace_rules.clear_lru_cache()
    for _ in range(2):
        with pytest.MonkeyPatch.context() as monkeypatch:
            poison.install(monkeypatch)
            compiled = torch.compile(lambda: torch.empty(3) + 1, backend="eager", fullgraph=True)
            assert compiled().isnan().all()
        torch._dynamo.reset()
