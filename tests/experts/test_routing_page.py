"""The page of a routing analysis: every layer's panels, what is missing, drawn in a browser."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.experts.analysis import (
    MEANING,
    Compared,
    DomainSize,
    LayerRouting,
    RoutingAnalysis,
    RoutingCounts,
    co_activation,
    layer_routes,
)
from deepseek.experts.routing_page import routing_page, visible
from support.chromium import Chromium, find_chromium

LAYERS = ["layers.1", "layers.2", "mtp.0.block"]


def analysis(experts: int = 6, domains: int = 2, minimum: int = 3) -> RoutingAnalysis:
    chance = np.random.default_rng(0)
    counts = RoutingCounts(LAYERS, experts, 2, domains, np.arange(10))
    for layer in LAYERS:
        for domain in range(domains):
            scores = chance.random((90, experts), np.float32) * 0.9
            scores[:, 1] -= 0.2 * domain
            chosen = np.argsort(-scores, axis=1)[:, :2]
            tokens = chance.integers(0, 12, 90)
            counts.add(domain, LayerRouting(layer, tokens, chosen, scores, scores))
    return RoutingAnalysis(
        name="runs/a/checkpoints/step_00000007",
        step=7,
        num_experts=experts,
        top_k=2,
        domains=[DomainSize(f"kind{g} <b>", "texts", 90) for g in range(domains)],
        layers=layer_routes(counts, minimum),
        minimum=minimum,
        compared=[],
        compared_tokens=0,
        token_text=lambda token: f"</script>{token} \n",
    )


def figures(page: str) -> dict[str, Any]:
    text = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    assert text
    return json.loads(text[1])


def decoded(spec: Any) -> np.ndarray:
    array = np.frombuffer(base64.b64decode(spec["bdata"]), spec["dtype"])
    return array.reshape([int(n) for n in spec["shape"].split(",")]) if "shape" in spec else array


def test_each_layer_has_its_panels() -> None:
    page = routing_page(analysis())
    for number, layer in enumerate(["All layers", *LAYERS]):
        assert f'<option value="{number}">{layer}</option>' in page
    keys = set(figures(page))
    for number in range(1, 4):
        for panel in ("co-activation", "domains", "load", "margin", "scores"):
            assert f"{panel}-{number}" in keys
    assert page.count("tokens, and the share that chose the expert") == 3
    assert page.count(MEANING) == 4, "on every tab"
    assert "⟨&lt;/script&gt;" in page and "␣⏎⟩" in page
    assert "kind0 &lt;b&gt;" in page and "<b>" not in page.split("<script")[0]


@pytest.mark.parametrize("experts", [6, 80])
def test_the_heat_map_holds_the_clustered_shares(experts: int) -> None:
    made = analysis(experts)
    drawn = figures(routing_page(made))["co-activation-2"]["data"][0]
    layer = made.layers[1]
    assert drawn["x"] == drawn["y"] == [f"expert {e}" for e in layer.order_E]
    want = 100 * layer.co_activation_EE[np.ix_(layer.order_E, layer.order_E)]
    np.fill_diagonal(want, np.nan)
    got = decoded(drawn["z"]).astype(float)
    if experts == 6:
        assert np.isnan(np.diag(got)).all()
        unit, error = 1.0, 1e-4
        assert drawn["zmax"] == pytest.approx(np.nanmax(want))
    else:
        unit = float(re.search(r"x ([\d.]+) %", drawn["hovertemplate"])[1])  # type: ignore[index]
        error = unit / 2 + 1e-9
        assert drawn["z"]["dtype"] == "u1"
        assert drawn["zmax"] * unit == pytest.approx(np.nanmax(want))
    known = np.isfinite(want)
    assert np.abs(got * unit - want)[known].max() <= error
    assert known.sum() > 20 and co_activation(np.eye(2)).tolist() == [[1, 0], [0, 1]]


def test_domain_bars_of_the_experts_that_differ_most() -> None:
    made = analysis(experts=80)
    bars = figures(routing_page(made))["domains-1"]["data"]
    shares = made.layers[0].domains_GE
    differ = np.abs(shares[0] - shares[1])
    shown = [int(e) for e in bars[0]["x"]]
    assert len(shown) == 32 and shown == sorted(shown)
    assert differ[shown].min() >= np.delete(differ, shown).max() - 1e-12
    for domain, bar in enumerate(bars):
        assert decoded(bar["y"]) == pytest.approx(100 * shares[domain, shown], rel=1e-5)


def test_saturation_over_layers_or_over_checkpoints() -> None:
    made = analysis()
    share = [[0.5, 0.6, 0.7], [0.8, 0.9, 1.0], [0.4, 0.4, 0.4], [0.1, 0.2, 0.3]]
    compared = [Compared(f"c{i}", i, share[i]) for i in range(4)]
    few = figures(routing_page(replace(made, compared=compared[:2], compared_tokens=50)))
    data = few["saturation-0"]["data"]
    assert [line["name"] for line in data] == ["step 0", "step 1"]
    assert data[1]["x"] == LAYERS and data[1]["y"] == [80, 90, 100]
    many = figures(routing_page(replace(made, compared=compared, compared_tokens=50)))
    data = many["saturation-0"]["data"]
    assert [line["name"] for line in data] == LAYERS
    assert data[2]["x"] == [f"step {i}" for i in range(4)] and data[2]["y"] == [70, 100, 40, 30]
    (level,) = many["saturation-0"]["layout"]["shapes"]
    assert level["y0"] == pytest.approx(100 * 2 / 6)


def test_what_is_missing_is_said() -> None:
    page = routing_page(analysis(domains=1, minimum=10**6))
    keys = set(figures(page))
    assert not keys & {"domains-1", "saturation-0", "favourite-lines-0"}
    assert page.count("One domain was read, so there is nothing to compare it with.") == 4
    assert "No other checkpoint was given: --against RUN" in page
    assert "No token was seen 1000000 times or more: read more with --tokens" in page


def test_experts_that_are_all_chosen() -> None:
    assert "Every eligible expert is chosen" in routing_page(analysis(experts=2))


def test_visible() -> None:
    assert visible(" a\n\t") == "␣a⏎⇥"
    assert visible("") == "(no text)"
    assert visible("\u200b\x00é") == "\\u200b\\u0000é"


def test_the_page_begins_with_the_domains() -> None:
    """A domain's share of each expert over the mean of the domains, a picture for each layer."""
    made = analysis(domains=3)
    page = routing_page(made)
    assert page.index('data-panel="domain-map"') < page.index('data-panel="layers"')
    drawn = figures(page)["domain-map-0"]
    frames = drawn["frames"]
    assert frames["names"] == LAYERS
    assert drawn["data"][0]["y"] == [domain.name for domain in made.domains]
    codes = np.frombuffer(base64.b64decode(frames["codes"]), np.uint8).reshape(3, 3, 6)
    for layer, found in zip(made.layers, codes.astype(float), strict=True):
        want = layer.domains_GE / layer.domains_GE.mean(axis=0)
        assert 2 ** (-2 + 4 * (found - 1) / 253) == pytest.approx(want.clip(0.25, 4), rel=0.006)
    differs = [np.abs(one.domains_GE - one.domains_GE.mean(axis=0)).sum() for one in made.layers]
    assert frames["first"] == int(np.argmax(differs))


def test_in_a_browser(tmp_path: Path) -> None:
    """Every layer can be chosen; nothing is asked of the network, no error, no sideways scroll."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("NO CHROMIUM: the page was not opened in a browser")
    made = replace(analysis(), compared=[Compared("c", 3, [0.5, 0.6, 0.7])], compared_tokens=9)
    path = tmp_path / "routing.html"
    path.write_text(routing_page(made))
    ready = "document.documentElement?.dataset.state === 'drawn'"
    with Chromium(executable) as browser:
        browser.look(1280, 900, "light", False)
        browser.open(path, ready)
        named = "document.querySelector('[data-panel=domain-map] output').textContent"
        drawn = "document.querySelector('[data-panel=domain-map] .plot').data[0]"
        assert browser.evaluate(named) in LAYERS
        assert browser.evaluate(f"{drawn}.customdata.length") == 2
        for width in (1280, 390):
            browser.look(width, 800, "dark" if width == 390 else "light", width == 390)
            for number in range(4):
                browser.evaluate(
                    f"(() => {{ const s = document.getElementById('tab'); s.value = '{number}';"
                    " s.dispatchEvent(new Event('change')); })()"
                )
                browser.wait(ready)
                plots = f'document.querySelectorAll(\'main[data-tab="{number}"] .plot'
                count = browser.evaluate(f"{plots}').length")
                assert count == browser.evaluate(f"{plots} .plot-container').length") == 5
                assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert browser.console == []
        assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
