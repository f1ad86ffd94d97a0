"""The page of ``deepseek experts``: all layers in lines, and each layer by itself.

E experts, G domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek.experts.analysis import (
    MEANING,
    Histogram,
    LayerRoutes,
    RoutingAnalysis,
    summary,
)
from deepseek.monitoring.load_metrics import utilisation
from deepseek.monitoring.report.page import Page, Tab
from deepseek.monitoring.report.panel import (
    COLORS,
    Figure,
    Panel,
    Section,
    bars,
    figure,
    frames,
    heat,
    level,
    packed,
    ratio_codes,
    table,
)
from deepseek.monitoring.report.run_panels import Card

OCTAVES = 2
"""The colours of the domains end at 2 ** -2 and 2 ** 2."""
EXACT_EXPERTS = 64
"""Up to so many, the heat map holds its values; of more, one byte each."""
MOST_BARS = 32
"""Experts that are named on an axis, and drawn as bars; of more, those that differ most."""
ONE_DOMAIN = (
    "One domain was read, so there is nothing to compare it with. Give --data more than once, such "
    "as --data code=src --data prose=books.txt."
)
_MARKS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def routing_page(analysis: RoutingAnalysis) -> str:
    """One self-contained HTML page.

    Raises:
        UserError: plotly is not installed.
    """
    tabs = [_overview(analysis)]
    tabs += [_layer_tab(analysis, layer) for layer in analysis.layers]
    return Page(f"routing of step {analysis.step}", tabs).whole()


# -- all layers --


def _overview(analysis: RoutingAnalysis) -> Tab:
    read = ", ".join(f"{d.name} ({d.tokens:,} tokens of {d.source})" for d in analysis.domains)
    cards = [
        Card("checkpoint", f"step {analysis.step:,}", analysis.name),
        Card("experts", str(analysis.num_experts), f"{analysis.top_k} chosen per token"),
        Card(
            "tokens read",
            f"{analysis.num_tokens:,}",
            "1 domain" if len(analysis.domains) == 1 else f"{len(analysis.domains)} domains",
        ),
        Card("by chance", f"{analysis.chance:.1%}", "of the tokens choose any one expert"),
    ]
    panels = [
        _domain_map(analysis),
        Panel(
            "layers",
            "Every layer",
            "Closest experts i, j: the largest share of i's tokens that also chose j. Token's "
            "favourite: of the occurrences of a frequent token, the mean share that chose the "
            "expert it prefers. Choose a layer at the top of the page to see it by itself.",
            body=_layer_table(analysis),
            wide=True,
        ),
        _load_lines(analysis),
        _margin_lines(analysis),
        _favourite_lines(analysis),
        _saturation(analysis),
    ]
    sections = [Section("all", "All layers", panels)]
    return Tab("All layers", sections, f"Read: {read}", cards=cards, notes=[MEANING])


def _domain_map(analysis: RoutingAnalysis) -> Panel:
    title = "Which experts the domains choose"
    if len(analysis.domains) < 2:
        return Panel("domain-map", title, missing=ONE_DOMAIN, wide=True)
    share_LGE = np.array([layer.domains_GE for layer in analysis.layers])
    overall_LE = np.nanmean(share_LGE, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_LGE = share_LGE / np.where(overall_LE > 0, overall_LE, np.nan)[:, None]
    count = analysis.num_experts
    ends = [f"1/{2**OCTAVES}", "1/2", "1", "2", f"{2**OCTAVES}"]
    trace = heat(
        "@diverging",
        "times as often as all domains",
        -OCTAVES,
        OCTAVES,
        "expert %{x}, %{y}: %{customdata:.3g} times as often as all domains",
        y=[domain.name for domain in analysis.domains],
        ticks={"tickvals": list(range(-OCTAVES, OCTAVES + 1)), "ticktext": ends},
    )
    drawn = figure(
        [trace],
        "expert",
        "domain",
        int(min(560, 150 + 28 * len(analysis.domains))),
        {"autorange": "reversed", "type": "category", "showgrid": False},
        xaxis={"showgrid": False, "range": [-0.5, count - 0.5]},
        hovermode="closest",
    )
    names = [layer.name for layer in analysis.layers]
    drawn["frames"] = frames(names, ratio_codes(ratio_LGE, OCTAVES), -OCTAVES, OCTAVES, -OCTAVES)
    # The layer whose domains differ most comes first.
    differs_L = np.nansum(np.abs(share_LGE - overall_LE[:, None]), axis=(1, 2))
    drawn["frames"]["first"] = int(differs_L.argmax())
    return Panel(
        "domain-map",
        title,
        "How often a domain's tokens choose an expert, over the mean of the domains; the slider "
        "goes through the layers and begins with the one whose domains differ most. White: the "
        "expert is blind to the domain. Empty: no token chose it.",
        drawn,
        wide=True,
    )


def _layer_table(analysis: RoutingAnalysis) -> str:
    several = len(analysis.domains) > 1
    columns = ["layer", "max / mean", "CV", "dead", "margin p50", "closest experts", "favourite"]
    columns += ["most particular domain"] if several else []
    rows = []
    for layer in analysis.layers:
        one, two, together = layer.closest
        row = [
            layer.name,
            f"{layer.max_violation + 1:.2f}",
            f"{layer.variation:.2f}",
            str(layer.dead),
            _number(layer.margin.quantile(0.5)),
            f"{one}, {two}: {together:.1%}",
            "-" if layer.top_share is None else f"{layer.top_share:.1%}",
        ]
        if several:
            domain, expert, above = layer.most_particular
            row.append(
                f"{analysis.domains[domain].name}: expert {expert}, {100 * above:+.1f} points"
            )
        rows.append(row)
    return table(columns, rows, "l r r r r l r" + (" l" if several else ""))


def _load_lines(analysis: RoutingAnalysis) -> Panel:
    return Panel(
        "load-lines",
        "Load",
        "Of each layer's experts, over all domains. Balanced: max / mean is 1, and CV is 0.",
        _over_layers(
            analysis,
            {
                "max / mean": [layer.max_violation + 1 for layer in analysis.layers],
                "CV (sigma / mean)": [layer.variation for layer in analysis.layers],
            },
            "ratio",
        ),
    )


def _margin_lines(analysis: RoutingAnalysis) -> Panel:
    quantiles = {"p95": 0.95, "median": 0.5, "p5": 0.05}
    return Panel(
        "margin-lines",
        "Router margin",
        "Score of the last expert chosen less that of the first one left out, over tokens. Small "
        "margins: small changes reroute many tokens.",
        _over_layers(
            analysis,
            {
                name: [layer.margin.quantile(share) for layer in analysis.layers]
                for name, share in quantiles.items()
            },
            "score",
        ),
    )


def _favourite_lines(analysis: RoutingAnalysis) -> Panel:
    title = "Vocabulary specialisation"
    if all(layer.top_share is None for layer in analysis.layers):
        return Panel("favourite-lines", title, missing=_too_rare(analysis))
    drawn = _over_layers(
        analysis,
        {"favourite": [_percent(layer.top_share) for layer in analysis.layers]},
        "% of the occurrences",
    )
    level(drawn, 100 * analysis.chance)
    return Panel(
        "favourite-lines",
        title,
        f"Of the occurrences of a token (seen {analysis.minimum} times or more), the share that "
        "chose the expert it prefers; mean over tokens. The dotted line is chance, K / N; counting "
        "few occurrences gives somewhat more.",
        drawn,
    )


def _saturation(analysis: RoutingAnalysis) -> Panel:
    title = "Router saturation"
    if not analysis.compared:
        why = "No other checkpoint was given: --against RUN compares with every other one of a run."
        return Panel("saturation", title, missing=why)
    layers = [layer.name for layer in analysis.layers]
    shares = 100 * np.array([other.share_L for other in analysis.compared])
    steps = [f"step {other.step}" for other in analysis.compared]
    if len(steps) > len(layers):
        names, rows, places, label = layers, shares.T, steps, "compared checkpoint"
    else:
        names, rows, places, label = steps, shares, layers, "layer"
    drawn = _lines(dict(zip(names, rows.tolist(), strict=True)), places, label, "% the same")
    drawn["layout"]["yaxis"]["range"] = [0, 101]
    level(drawn, 100 * analysis.chance)
    return Panel(
        "saturation",
        title,
        f"Share of the chosen experts that the other checkpoint chooses too, for the same "
        f"{analysis.compared_tokens:,} tokens. The dotted line is chance, K / N.",
        drawn,
    )


# -- one layer --


def _layer_tab(analysis: RoutingAnalysis, layer: LayerRoutes) -> Tab:
    panels = [
        _co_activation(analysis, layer),
        _domains(analysis, layer),
        _load(analysis, layer),
        _histogram(
            "margin",
            "Router margin",
            layer.margin,
            "score",
            "Last score chosen less the first one left out, per token; with the bias.",
        ),
        _histogram(
            "scores",
            "Scores",
            layer.scores,
            "score",
            "Of every expert for every token, without the bias.",
            layer.best,
        ),
        _tokens(analysis, layer),
    ]
    return Tab(
        layer.name,
        [Section("layer", "Routing", panels)],
        f"step {analysis.step}, {analysis.num_tokens:,} tokens",
        notes=[MEANING],
    )


def _co_activation(analysis: RoutingAnalysis, layer: LayerRoutes) -> Panel:
    order = layer.order_E
    share = 100 * layer.co_activation_EE[np.ix_(order, order)]
    np.fill_diagonal(share, np.nan)
    highest = float(np.nanmax(share, initial=0.0)) or 1.0
    names = [f"expert {e}" for e in order]
    cells: dict[str, Any] = {"x": names, "y": names, "z": packed(share)}
    hover, precision = "of the tokens of %{y}, %{z:.1f} % chose %{x}", ""
    if len(order) > EXACT_EXPERTS:
        unit = next(unit for unit in (0.1, 0.2, 0.4) if highest <= 250 * unit)
        cells["z"] = packed(np.rint(np.nan_to_num(share) / unit).astype(np.uint8))
        texts = [f"{tick:.1f}" for tick in np.linspace(0, highest, 5)]
        highest /= unit
        cells["ticks"] = {"tickvals": np.linspace(0, highest, 5).tolist(), "ticktext": texts}
        hover = f"%{{y}} with %{{x}}: %{{z}} x {unit} %"
        precision = f" Values are rounded to {unit} %."
    trace = heat("@sequential", "% of the row's tokens", 0, highest, hover, **cells)
    hidden = {"showgrid": False, "type": "category"}
    if len(order) > MOST_BARS:
        hidden |= {"showticklabels": False, "ticks": ""}
    chance = 100 * (analysis.top_k - 1) / max(1, analysis.num_experts - 1)
    return Panel(
        "co-activation",
        "Co-activation",
        "Of the tokens that chose the expert of the row, the share that also chose that of the "
        f"column, over all pairs; {chance:.1f} % if experts were chosen independently and evenly. "
        "Experts are ordered by clustering, so that those chosen together stand together. The "
        f"diagonal and experts never chosen are left empty.{precision}",
        figure(
            [trace],
            "also chosen",
            "chosen",
            520,
            hidden | {"autorange": "reversed"},
            xaxis=dict(hidden),
            hovermode="closest",
        ),
        wide=True,
    )


def _domains(analysis: RoutingAnalysis, layer: LayerRoutes) -> Panel:
    title = "Domain specialisation"
    if len(analysis.domains) < 2:
        return Panel("domains", title, missing=ONE_DOMAIN, wide=True)
    share_GE = 100 * layer.domains_GE
    spread_E = share_GE.max(axis=0) - share_GE.min(axis=0)
    shown = np.sort(np.argsort(-spread_E, kind="stable")[:MOST_BARS])
    count = share_GE.shape[1]
    those = f" The {len(shown)} of {count} experts whose domains differ most are drawn."
    names = [str(expert) for expert in shown]
    data = [
        bars(
            names, share_GE[number, shown], domain.name, COLORS[number % len(COLORS)], "%{y:.1f} %"
        )
        for number, domain in enumerate(analysis.domains)
    ]
    drawn = figure(
        data, "expert", "% of the domain's tokens", 340, barmode="group", xaxis={"type": "category"}
    )
    return Panel(
        "domains",
        title,
        "Of the tokens of each domain, the share that chose the expert. The dotted line is K / N, "
        "where every expert would be if the router were balanced and blind to the domain."
        + (those if len(shown) < count else ""),
        level(drawn, 100 * analysis.chance),
        wide=True,
    )


def _load(analysis: RoutingAnalysis, layer: LayerRoutes) -> Panel:
    share_E = utilisation(layer.tokens_E)
    hover = "%{y:.3g} of a fair share, %{customdata} tokens<extra></extra>"
    tokens = packed(layer.tokens_E)
    data = [bars(np.arange(len(share_E)), share_E, "load", "@0", hover, customdata=tokens)]
    drawn = figure(data, "expert", "load / mean", showlegend=False)
    return Panel(
        "load",
        "Load of the experts",
        f"Tokens of each expert over the mean; MaxVio {layer.max_violation:.2f}, CV "
        f"{layer.variation:.2f}, {layer.dead} without a token.",
        level(drawn, 1.0),
        wide=True,
    )


def _histogram(
    key: str, title: str, values: Histogram, label: str, note: str, best: Histogram | None = None
) -> Panel:
    drawn = []
    for name, histogram in (("all", values), ("highest of a token", best)):
        if histogram is None or histogram.mean is None:
            continue
        found = summary(histogram)
        counts = np.array(found["counts"], np.float64)
        edges = np.arange(len(counts) + 1) / len(counts) * found["upper"]
        color, share = "@0/0.75" if name == "all" else "@1/0.6", 100 * counts / counts.sum()
        hover, width = "%{y:.1f} % near %{x:.3g}", float(edges[1])
        drawn.append(bars((edges[:-1] + edges[1:]) / 2, share, name, color, hover, width=width))
    if not drawn:
        return Panel(key, title, missing="Every eligible expert is chosen, so nothing is left out.")
    note += f" Mean {values.mean:.3g}, median {_number(values.quantile(0.5))}."
    more = figure(drawn, label, "% of all", 260, barmode="overlay", showlegend=best is not None)
    return Panel(key, title, note, more)


def _tokens(analysis: RoutingAnalysis, layer: LayerRoutes) -> Panel:
    title = "Tokens of the experts"
    if not any(layer.tokens):
        return Panel("tokens", title, missing=_too_rare(analysis), wide=True)
    load_E = utilisation(layer.tokens_E)
    rows = [
        [
            str(expert),
            f"{load_E[expert]:.2f}",
            ", ".join(f"⟨{visible(analysis.token_text(t.token))}⟩ {t.share:.0%}" for t in tokens)
            or "-",
        ]
        for expert, tokens in enumerate(layer.tokens)
    ]
    return Panel(
        "tokens",
        title,
        "For each expert the tokens of whose occurrences the largest share chose it, among those "
        f"seen {analysis.minimum} times or more. ␣ is a space, ⏎ a new line. An expert that takes "
        "most tokens of all kinds has high shares too: see its load.",
        body=table(
            ["expert", "load / mean", "tokens, and the share that chose the expert"], rows, "r r l"
        ),
        wide=True,
    )


def visible(text: str) -> str:
    """A token's text with its white space in signs; nothing else becomes invisible either."""
    marked = text.translate(_MARKS)
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in marked)
    return shown or "(no text)"


# -- figures --


def _over_layers(
    analysis: RoutingAnalysis, lines: dict[str, list[float | None]], label: str
) -> Figure:
    return _lines(lines, [layer.name for layer in analysis.layers], "layer", label)


def _lines(lines: dict[str, list[float | None]], places: Sequence[str], x: str, y: str) -> Figure:
    """Lines over named places, with marks: there may be one place only."""
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": list(places),
            "y": [value if value is None else round(value, 5) for value in values],
            "line": {"color": COLORS[number % len(COLORS)], "width": 1.6},
            "marker": {"size": 5},
            "hovertemplate": "%{y:.4g}",
        }
        for number, (name, values) in enumerate(lines.items())
    ]
    return figure(data, x, y, yaxis={"rangemode": "tozero"}, xaxis={"type": "category"})


def _too_rare(analysis: RoutingAnalysis) -> str:
    return (
        f"No token was seen {analysis.minimum} times or more: read more with --tokens, or lower "
        "--minimum."
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
