"""The orders in which rows go through a head, one file each, and which one a call takes.

    plan            products a row   taken
    forward_only    1                no gradient is asked for
    frozen          2                the head is frozen (float16: `kept`, with 3)
    kept            3 to 4           a trainable head: 3 for the rows that the budget holds
    pair_groups     3 (one pair longer than the budget: 3 or 4)
                                     pairs with a loss, a trainable head, more rows than the budget
                                     holds, and one upstream gradient for all pairs
    columns         4                memory_budget="least"
    filtered        1 + 3 rho        filter_eps; frozen 1 + 2 rho
    vocab_parallel  as kept          the head is in parts on several ranks

A new plan is a file, its row in PLANS, and its line in `plan_name`.
"""

import torch
from torch import Tensor

from treg.ops.call import Batch, Call
from treg.ops.head import Tiles
from treg.ops.head.memory import tile_rows
from treg.ops.head.selection import BLIND
from treg.ops.plans.base import Plan
from treg.ops.plans.columns import Columns
from treg.ops.plans.filtered import Filtered
from treg.ops.plans.forward_only import ForwardOnly
from treg.ops.plans.frozen import Frozen
from treg.ops.plans.kept import Kept
from treg.ops.plans.pair_groups import PairGroups

# `vocab_parallel` is not here: it carries a process group, and so is made for its call.
PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (ForwardOnly(), Frozen(), Kept(), PairGroups(), Columns(), Filtered())
}
NAMES = tuple(PLANS)


def choose_plan(call: Call, tiles: Tiles, rows: int) -> Plan:
    """The plan of a call, from what is fixed in a run and from shapes alone.

    rows: N, ignored ones included.
    """
    capacity = tile_rows(tiles, call.budget, stash=True, outputs=call.outputs)
    return PLANS[plan_name(call, capacity, rows)]


def note_of(plan: Plan, batch: Batch) -> Tensor:
    """What a forward notes for its backward beside tensors: the plan, and `RowSelection.note`; one
    int64 on the CPU.
    """
    note = (batch.rows.note - BLIND) * len(PLANS) + NAMES.index(plan.name)
    return torch.scalar_tensor(note, dtype=torch.int64, device="cpu")


def read_note(note: Tensor) -> tuple[Plan, int]:
    """The plan, and `RowSelection.note`."""
    rows, number = divmod(int(note.item()), len(PLANS))
    return PLANS[NAMES[number]], rows + BLIND


def fake_note() -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def plan_name(call: Call, capacity: int, rows: int) -> str:
    """The same as a table. capacity: rows whose stash the budget holds."""
    half = call.dtype == torch.float16
    if not any(call.needs):
        return "forward_only"
    if call.filter_eps is not None:
        return "filtered"
    if not call.needs.trained and not half:
        return "frozen"
    if call.least:
        return "columns"
    if call.loss and call.summed and call.needs.trained and not half and rows > capacity:
        return "pair_groups"
    return "kept"
