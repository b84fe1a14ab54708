"""Masks of layers: doc-relative, exact areas, and refusals of the configuration."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from dist_attn.config_masks import LayerMaskConfig
from dist_attn.errors import ConfigError
from dist_attn.layout import make_layout
from dist_attn.masks.layers import document_mask, layer_rules, mean_area
from dist_attn.planner.cluster import local_cluster
from dist_attn.planner.cost import CostModel
from dist_attn.planner.mask_picture import mask_figure
from dist_attn.planner.shape import ModelShape

S2 = {"kind": "s2", "block_tokens": 4, "local_blocks": 2, "stride_blocks": 3}
RULES = [
    {"kind": "causal"},
    {"kind": "window", "window_tokens": 5},
    {"kind": "window", "window_tokens": 3, "sink_tokens": 2},
    S2,
    S2 | {"dense_heads": [1]},
    {"kind": "streaming_heads", "window_tokens": 4, "dense_heads": [0, 3], "sink_tokens": 1},
    {"kind": "window_per_head", "head_windows": [1, 2, 9, 100]},
]


def expected(rule: LayerMaskConfig, n: int, head: int) -> np.ndarray:
    """The mask of one document, written down element by element."""
    allowed = np.zeros((n, n), bool)
    for q in range(n):
        for k in range(q + 1):
            near = k > q - (rule.window_tokens or 0) or k < rule.sink_tokens
            if rule.kind == "window_per_head":
                near = k > q - rule.head_windows[head] or k < rule.sink_tokens
            if rule.kind == "s2":
                b = rule.block_tokens
                near = q // b - k // b < rule.local_blocks
                near = near or (k // b) % rule.stride_blocks == (head // 2) % rule.stride_blocks
            dense = rule.kind == "causal" or head in (rule.dense_heads or [])
            allowed[q, k] = dense or near
    return allowed


@pytest.mark.parametrize("settings", RULES, ids=lambda r: "-".join(map(str, r.values())))
def test_a_document_sees_the_same_wherever_it_is_packed(settings: dict) -> None:
    rule = LayerMaskConfig(**settings)
    lengths = (7, 30, 0, 1, 13)
    cu = np.concatenate([[0], np.cumsum(lengths)])
    mask = document_mask(rule, cu, num_heads=4, num_kv_heads=2)
    for head in range(4):
        whole = np.zeros((cu[-1], cu[-1]), bool)
        for start, n in zip(cu, lengths, strict=False):
            whole[start : start + n, start : start + n] = expected(rule, n, head)
        assert np.array_equal(mask.materialize(int(cu[-1]), head), whole)
        assert mask.area(int(cu[-1]), head) == whole.sum()


SINKS = {"kind": "window", "window_tokens": 8, "sink_tokens": 2}


@pytest.mark.parametrize(
    ("entries", "kinds"),
    [
        # HHST: sparse layers with dense ones between.
        ([S2, {"kind": "causal", "layers": "1::4"}], "s2 causal s2 s2 s2 causal"),
        # LongGen: the middle third full; the others window and sinks, or strided blocks.
        ([SINKS, {"kind": "causal", "layers": "2:4"}], "window window causal causal window window"),
        ([S2, {"kind": "causal", "layers": "2:4"}], "s2 s2 causal causal s2 s2"),
        # MASFormer: full attention in the last layers alone.
        (
            [SINKS | {"sink_tokens": 0}, {"kind": "causal", "layers": "-1:"}],
            "window window window window window causal",
        ),
    ],
)
def test_recipes_of_layers(entries: list[dict], kinds: str) -> None:
    rules = layer_rules([LayerMaskConfig(**e) for e in entries], 6, 4, 2)
    assert rules is not None
    assert [rules.rules[r].kind for r in rules.of_layer] == kinds.split()
    for r in rules.distinct:
        mask, config = rules.mask(r, [0, 40]), rules.rules[r]
        for head in range(4):
            assert np.array_equal(mask.materialize(40, head), expected(config, 40, head))


def test_areas_are_counted() -> None:
    configs = [LayerMaskConfig(**S2), LayerMaskConfig(layers="::2", kind="causal")]
    rules = layer_rules(configs, 3, 4, 2)
    assert [rules.rules[r].kind for r in rules.of_layer] == ["causal", "s2", "causal"]
    lengths, areas = mean_area(rules, longest=100)
    assert lengths[-1] == 100
    n = lengths[5]
    sparse = np.mean([expected(configs[0], n, head).sum() for head in range(4)])
    assert areas[5] == pytest.approx((2 * n * (n + 1) / 2 + sparse) / 3)
    assert layer_rules([], 3, 4, 2) is None
    assert layer_rules([configs[0], LayerMaskConfig(kind="causal")], 3, 4, 2) is None
    assert mean_area(None, 100) == ((), ())


def test_the_cost_of_a_length_between_counted_ones() -> None:
    rules = layer_rules([LayerMaskConfig(**S2)], 1, 4, 2)
    cluster = local_cluster(2, ["cpu"] * 2, 2)
    shape = ModelShape(64, 176, 1, 4, 2, 16, 257)
    dense = CostModel.derive(shape, cluster, 2)
    sparse = CostModel.derive(shape, cluster, 2, areas=mean_area(rules, 500))
    for n in (7, 16, 100, 333, 500, 700):
        mask = document_mask(rules.rules[0], [0, n], 4, 2)
        exact = mask.total_area(n, 4) / 4
        pairs = [float(c.pairs(np.array([n]))[0]) for c in (dense, sparse)]
        assert pairs[1] == pytest.approx(exact, rel=0.04)
        assert pairs[0] == n * (n + 1) / 2
    assert pairs[1] < 0.5 * pairs[0]
    assert dense.fingerprint() != sparse.fingerprint()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "window"}, "lacks window_tokens"),
        ({"kind": "causal", "window_tokens": 3}, "takes no window_tokens"),
        ({"kind": "s2", "block_tokens": 4}, "lacks local_blocks, stride_blocks"),
        ({"kind": "causal", "layers": "three"}, "a slice such as"),
        ({"kind": "causal", "layers": "::0"}, "a slice such as"),
    ],
)
def test_incomplete_rules(settings: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        LayerMaskConfig(**settings)


def test_layers_and_heads_of_another_model() -> None:
    with pytest.raises(ConfigError, match=r"attention\.masks\.0: layers \[5\] of a model of 3"):
        layer_rules([LayerMaskConfig(kind="causal", layers=[5])], 3, 4, 2)
    with pytest.raises(ConfigError, match=r"dense_heads \[4\] of a model of 4 heads"):
        layer_rules([LayerMaskConfig(**S2, dense_heads=[4])], 3, 4, 2)
    with pytest.raises(ConfigError, match="one window for each of 4 heads, got 1"):
        layer_rules([LayerMaskConfig(kind="window_per_head", head_windows=[3])], 3, 4, 2)


def test_the_picture_has_a_panel_for_each_rule() -> None:
    rules = layer_rules([LayerMaskConfig(**S2, layers="1:")], 6, 4, 2)
    figure = mask_figure(rules)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["causal: 1 of 6 layers\n0", "s2: 5 of 6 layers\n1-5"]
    drawn = figure.axes[1].images[0].get_array()
    exact = np.mean([expected(rules.rules[1], 72, head) for head in range(4)], axis=0)
    assert np.array_equal(drawn, exact)


@pytest.mark.parametrize("cp_size", [4, 8])
def test_a_balanced_layout_evens_out_what_all_layers_compute(cp_size: int) -> None:
    """A window, S2 and plain layers over documents with a long tail, among them a very long one."""
    configs = [
        LayerMaskConfig(kind="window", layers=":4", window_tokens=300, sink_tokens=4),
        LayerMaskConfig(kind="s2", layers="4:7", block_tokens=32, local_blocks=4, stride_blocks=4),
    ]
    rules = layer_rules(configs, 8, 8, 4)
    assert rules is not None
    lengths = np.random.default_rng(3).lognormal(5.5, 1.4, 60).astype(int) + 1
    cu = np.concatenate([[0], np.cumsum([*lengths, 20_000])])
    every = np.arange(cu[-1])
    areas = rules.row_areas(cu, every)
    # Counted by hand at a few queries.
    for q in (0, 5000, int(cu[-1]) - 1):
        seen = 0
        for layer in range(8):
            mask = rules.mask(rules.of_layer[layer], cu)
            seen += sum(int(mask.allows(np.array([q]), every, h).sum()) for h in range(8))
        assert areas[q] == seen
    layouts = {
        "balanced": make_layout("balanced", cu, cp_size, chunk_areas=rules.chunk_areas(cu)),
        "contiguous": make_layout("contiguous", cu, cp_size),
    }
    worst = {
        kind: max(areas[x.positions(r)].sum() for r in range(cp_size)) * cp_size / areas.sum()
        for kind, x in layouts.items()
    }
    assert worst["balanced"] < 1.05
    assert worst["contiguous"] > 1.2
