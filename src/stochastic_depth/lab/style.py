"""The colours and fonts of every figure, in light and in dark.

Figures are drawn in the light colours. On a page, style sheets replace these by the dark ones, so
that one drawing serves both themes, and print. The five colours of series differ in lightness too,
for readers who do not distinguish hues.
"""

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1c2024",
    "muted": "#5b6470",
    "grid": "#e6e4df",
    "umber": "#8a6d3b",
    "blue": "#1f6feb",
    "magenta": "#b3307a",
    "teal": "#0b6e69",
    "violet": "#6e4fbf",
}
DARK = {
    "paper": "#14171c",
    "ink": "#e8e6e1",
    "muted": "#a3abb6",
    "grid": "#2d333b",
    "umber": "#d2ab6a",
    "blue": "#74b0ff",
    "magenta": "#f08bc4",
    "teal": "#4fc9c0",
    "violet": "#bca6ff",
}

CONSTANT_COLOUR = LIGHT["umber"]
STOCHASTIC = tuple(LIGHT[name] for name in ("blue", "magenta", "teal", "violet"))
"""Colours of stochastic depth and its variants."""

HEAT = ("#eef4fd", "#b9d3f8", "#6ea4ef", "#2f6fd0", "#123f86")
"""The colours of a heat map, from low to high values."""

FONT = "Arial, Liberation Sans, Helvetica, sans-serif"
"""Fonts with the same widths, because the layout of a drawing depends on the widths."""

CONFIG = {
    "background": None,
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "domain": False,
        "ticks": False,
        "gridColor": LIGHT["grid"],
        "labelColor": LIGHT["muted"],
        "labelFontSize": 11,
        "labelPadding": 6,
        "titleColor": LIGHT["muted"],
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 8,
    },
    "axisX": {
        "domain": True,
        "domainColor": LIGHT["muted"],
        "grid": False,
        "tickColor": LIGHT["muted"],
        "ticks": True,
        "tickSize": 4,
    },
    "concat": {"spacing": 28},
    "header": {"labelColor": LIGHT["ink"], "titleColor": LIGHT["muted"]},
    "legend": {
        "direction": "horizontal",
        "labelColor": LIGHT["ink"],
        "labelFontSize": 12,
        "labelLimit": 320,
        "orient": "top",
        "symbolSize": 120,
        "symbolStrokeWidth": 3,
        "title": None,
    },
    "title": {
        "anchor": "start",
        "color": LIGHT["ink"],
        "fontSize": 13,
        "fontWeight": 600,
        "frame": "group",
        "offset": 12,
        "subtitleColor": LIGHT["muted"],
        "subtitleFontSize": 12,
        "subtitlePadding": 6,
    },
}
"""The configuration of Vega-Lite."""


def style_sheet() -> str:
    """CSS: the palettes of both themes as custom properties, and figures that use them."""
    light, dark = (
        "".join(f"--{name}:{colour};" for name, colour in palette.items())
        for palette in (LIGHT, DARK)
    )
    figures = "".join(
        f'svg [{what}="{colour}"]{{{what}:var(--{name})}}'
        for name, colour in LIGHT.items()
        for what in ("fill", "stroke")
    )
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{figures}"
    )
