"""No gradient is asked for: one matrix product a row."""

from treg.ops.call import Batch
from treg.ops.head.gradients import Gradients
from treg.ops.head.memory import check_budget
from treg.ops.plans.base import Saved, ScoredFirst, Scores, score_rows


class ForwardOnly(ScoredFirst):
    """z = h W^T, and nothing else."""

    name = "forward_only"
    saved_names = ()

    def saved(self, batch: Batch) -> Saved:
        return {}

    def forward(self, batch: Batch) -> tuple[Scores, Saved]:
        outputs = batch.call.outputs
        check_budget(batch.tiles, batch.call.budget, stash=False, outputs=outputs)
        scores = score_rows(batch, outputs)
        del scores["norm"]
        return scores, {}

    def gradients(self, batch, coef, saved) -> Gradients:
        return Gradients(None, None, None)
