"""The Triton implementation of `kl_tiles.Passes`: one kernel over finished products."""

from torch import Tensor

from treg.ops.head.head import Head, on_device
from treg.ops.head.memory import ROW_MULTIPLE


class TritonPasses:
    fixed_bytes = 0
    row_multiple = ROW_MULTIPLE

    def __init__(self, head: Head, ref_head: Head, *, reverse: bool):
        from treg_kernels.tiles import Scalars

        self.head, self.reverse = head, reverse
        self._bias, self._ref_bias = (
            None if x.bias is None else x.bias.contiguous() for x in (head, ref_head)
        )
        self._scalars, self._ref_scalars = (
            Scalars.of(x.logit_scale, x.softcap, x.temperature) for x in (head, ref_head)
        )

    def scores(
        self, a: Tensor, ref_a: Tensor, target: Tensor | None, stashes: list[Tensor]
    ) -> dict[str, Tensor]:
        return self._launch(a, ref_a, target, stashes=stashes)

    def gradient(
        self,
        a: Tensor,
        ref_a: Tensor,
        target: Tensor | None,
        coefs: tuple[Tensor, Tensor | None],
        out: Tensor,
    ) -> None:
        self._launch(a, ref_a, target, stashes=[], coefs=coefs, out=out)

    def combine(
        self, stashes: list[Tensor], coefs: tuple[Tensor, Tensor | None], out: Tensor
    ) -> None:
        from treg_kernels.kl import stash_sum

        with on_device(out):
            stash_sum(stashes, _contiguous(coefs), out)

    def _launch(self, a, ref_a, target, *, stashes, coefs=None, out=None) -> dict[str, Tensor]:
        from treg_kernels.kl import kl_rows

        with on_device(a):
            return kl_rows(
                a,
                ref_a,
                self._bias,
                self._ref_bias,
                self._scalars,
                self._ref_scalars,
                None if target is None else target.contiguous(),
                self.head.ignore_index,
                reverse=self.reverse,
                stashes=stashes,
                coefs=None if coefs is None else _contiguous(coefs),
                out=out,
            )


def _contiguous(coefs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return coefs[0].contiguous(), None if coefs[1] is None else coefs[1].contiguous()
