"""torch.compile keeps attention in one graph, for changing contexts, with the same gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dist_attn.attention import AttentionContext, attend_with_context
from dist_attn.layout import make_layout
from dist_attn.masks import Causal, Documents, Window
from tests.attention_cases import Case, world_group
from tests.ranks import run_ranks

CASES = [Case((13, 8)), Case((5, 20, 4)), Case((30,))]


class Layer(nn.Module):
    """Projections around attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: dict[str, Tensor], context: AttentionContext) -> Tensor:
        return self.o(attend_with_context(self.q(x["q"]), x["k"], x["v"], context).relu())


def gradients(layer: nn.Module, case: Case, strategy: str, windowed: bool) -> list[Tensor]:
    inner_size = 2 if "+" in strategy else None
    group = world_group(inner_size)
    layout = make_layout("zigzag", case.cu_seqlens, group.cp_size)
    mask = Causal() & Documents(case.cu_seqlens)
    mask = mask & Window(4, 0) if windowed else mask
    context = AttentionContext(mask, layout, group, strategy, num_padding=2)
    x = {n: t[layout.positions(group.cp_rank)] for n, t in case.tensors().items()}
    x = {n: torch.cat([t, t.new_ones(2, *t.shape[1:])]) for n, t in x.items()}
    x = {n: t.requires_grad_() for n, t in x.items()}
    layer.zero_grad()
    out = layer(x, context)
    out.square().sum().backward()
    return [
        out.detach(),
        *(x[n].grad for n in "qkv"),
        *(p.grad.clone() for p in layer.parameters()),
    ]


def compile_and_compare(strategy: str, windowed: bool) -> int:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = Layer()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for case in CASES:
        want = gradients(layer, case, strategy, windowed)
        got = gradients(compiled, case, strategy, windowed)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    return counter.frame_count


@pytest.mark.parametrize(
    ("strategy", "cp_size", "windowed"),
    [
        ("local", 1, False),
        pytest.param("ring", 2, False, marks=pytest.mark.slow),
        pytest.param("ulysses", 2, True, marks=pytest.mark.slow),
        ("ulysses+ring", 4, False),
        pytest.param("ulysses+ulysses", 4, True, marks=pytest.mark.slow),
        pytest.param("ring+gather", 4, False, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_layer(strategy, cp_size, windowed):
    for compilations in run_ranks(compile_and_compare, cp_size, strategy, windowed):
        # Once for given sizes, and again for any.
        assert compilations <= 3
