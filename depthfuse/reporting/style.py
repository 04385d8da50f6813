"""How pages and figures look: the colours, in light and dark, and the style sheet."""

from __future__ import annotations

# {name: (on light ground, on dark ground)}. Figures are drawn with the first; in a page each becomes the custom
# property of its name. So no two of the first may be equal. Text reaches a contrast of 4.5 on both grounds.
COLOURS = {
    "ground": ("#f7f8f9", "#101316"),
    "surface": ("#ffffff", "#181c20"),
    "raised": ("#f0f2f4", "#22272d"),
    "ink": ("#1a1f25", "#e9ecef"),
    "muted": ("#59636e", "#9aa5b1"),
    "line": ("#dde1e6", "#313840"),
    "before": ("#7d8894", "#818c98"),
    "after": ("#0f766e", "#3ec6b8"),
    "merged": ("#2b62c9", "#7fa9f5"),
    "reduced": ("#7a4fc2", "#b79af0"),
    "dropped": ("#a84d08", "#f0a35e"),
    "good": ("#18783e", "#5bc98a"),
    "bad": ("#b3261e", "#f2867f"),
    "other1": ("#9c2a6b", "#e88bbd"),
    "other2": ("#5f6b12", "#bcc75a"),
    "other3": ("#0a6f9c", "#62bfe8"),
}
# Of lines and bars that stand side by side, in this order.
SERIES = ("after", "merged", "dropped", "reduced", "other1", "other2", "other3", "before", "ink", "muted")


def light(name: str) -> str:
    """A colour on light ground, as #rrggbb."""
    return COLOURS[name][0]


def series(index: int) -> str:
    """The colour of the index-th line or bar, on light ground."""
    return light(SERIES[index % len(SERIES)])


def style_sheet() -> str:
    """The CSS of every page."""
    palettes = [
        "".join(f"--{name}:{colours[ground]};" for name, colours in COLOURS.items()) for ground in (0, 1)
    ]
    return (
        f":root{{color-scheme:light dark;{palettes[0]}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{palettes[1]}}}}}\n"
        f"{_RULES}"
    )


_RULES = """
:root{--sans:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-padding-top:1rem}
body{margin:0;background:var(--ground);color:var(--ink);font:1rem/1.55 var(--sans);overflow-wrap:anywhere}
main,header.top,footer{max-width:68rem;margin:0 auto;padding:0 1.25rem}
header.top{padding-top:2.5rem}
.eyebrow{margin:0;color:var(--after);font-size:.8125rem;font-weight:600;letter-spacing:.06em;text-transform:uppercase}
h1{margin:.25rem 0 .5rem;font-size:clamp(1.6rem,1.2rem + 2vw,2.4rem);line-height:1.15;letter-spacing:-.02em}
h2{margin:0 0 .75rem;font-size:1.3rem;line-height:1.25;letter-spacing:-.01em}
h3{margin:1.75rem 0 .5rem;font-size:1rem;line-height:1.3}
p{margin:0 0 .75rem;max-width:46rem}
.lead{color:var(--muted)}
.note{color:var(--muted);font-size:.875rem}
a{color:var(--merged);text-underline-offset:.15em}
:focus-visible{outline:2px solid var(--merged);outline-offset:2px}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;margin:1.25rem 0 0;padding:0;list-style:none;font-size:.9rem}
section{margin:1.5rem 0;padding:1.5rem;background:var(--surface);border:1px solid var(--line);border-radius:.75rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11.25rem,1fr));gap:.75rem;margin:1.5rem 0;padding:0;
list-style:none}
.tiles li{padding:1rem 1.1rem;background:var(--surface);border:1px solid var(--line);border-radius:.75rem}
.tiles .name{display:block;color:var(--muted);font-size:.8125rem}
.tiles .value{display:block;margin:.15rem 0;font-size:1.6rem;font-weight:650;line-height:1.2;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.tiles .about{display:block;color:var(--muted);font-size:.8125rem;line-height:1.4}
.tiles .main{border-color:var(--after)}
.tiles .main .value{color:var(--after)}
.badge{display:inline-block;padding:.1rem .6rem;border:1px solid;border-radius:1rem;font-size:.8125rem;font-weight:600}
.good{color:var(--good)}
.bad{color:var(--bad)}
.scroll{overflow-x:auto;margin:0 0 1rem;border:1px solid var(--line);border-radius:.5rem}
table{width:100%;border-collapse:collapse;font-size:.875rem;line-height:1.4}
caption{padding:.5rem .75rem;color:var(--muted);font-size:.8125rem;text-align:left}
th,td{padding:.45rem .75rem;border-top:1px solid var(--line);text-align:left;vertical-align:top;overflow-wrap:normal}
thead th{border-top:0;background:var(--raised);font-weight:600;white-space:nowrap}
caption+thead th{border-top:1px solid var(--line)}
tbody th{font-weight:500}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
tr.strong>*{font-weight:650;color:var(--after)}
td.bars{min-width:8rem}
.bar{display:block;height:.6rem;margin:.35rem 0;border-radius:.15rem;background:var(--after)}
code,pre{font-family:var(--mono);font-size:.8125rem}
pre{margin:0 0 1rem;padding:.85rem 1rem;overflow-x:auto;background:var(--raised);border-radius:.5rem;line-height:1.5}
details{margin:0 0 1rem}
summary{margin-bottom:.5rem;color:var(--merged);cursor:pointer;font-size:.9rem}
section>:last-child,.figures>*>:last-child{margin-bottom:0}
.figures{display:grid;align-items:start;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));
gap:1.25rem 1.5rem}
figure{margin:0 0 1rem;min-width:0}
figure svg{display:block;width:100%;max-width:36rem;height:auto}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figcaption{margin-top:.35rem;color:var(--muted);font-size:.8125rem;line-height:1.45}
dl.facts{display:grid;grid-template-columns:minmax(6rem,max-content) minmax(0,1fr);gap:.3rem 1.25rem;margin:0 0 1rem;
font-size:.9rem}
dl.facts dt{color:var(--muted)}
dl.facts dd{margin:0;min-width:0}
ol.net{display:grid;grid-template-columns:repeat(auto-fill,minmax(7.25rem,1fr));gap:1rem .6rem;margin:0 0 1rem;
padding:0;list-style:none;font-size:.8125rem;line-height:1.3}
ol.net li{display:flex;flex-direction:column;min-width:0}
ol.net .path{flex:1;margin-bottom:.3rem;font-family:var(--mono);font-size:.75rem}
ol.net .was{height:2.3rem;border:1px solid var(--before);border-radius:.35rem;
background:repeating-linear-gradient(var(--raised) 0 .42rem,var(--line) .42rem .5rem)}
ol.net .then{height:.8rem;margin:0 auto;border-left:2px solid var(--line)}
ol.net .is{display:flex;align-items:center;justify-content:center;min-height:2.3rem;padding:.25rem .4rem;
border:1px solid;border-radius:.35rem;font-weight:600;text-align:center}
ol.net .saved{margin-top:.25rem;color:var(--muted);font-size:.75rem;text-align:center;font-variant-numeric:tabular-nums}
.is.kept{color:var(--muted);border-color:var(--before);
background:repeating-linear-gradient(transparent 0 .42rem,var(--line) .42rem .5rem)}
.is.kept>span{padding:0 .3rem;background:var(--surface)}
.is.merged{color:var(--surface);background:var(--merged);border-color:var(--merged)}
.is.reduced{color:var(--surface);background:var(--reduced);border-color:var(--reduced)}
.is.dropped{color:var(--dropped);border-style:dashed}
ul.key{display:flex;flex-wrap:wrap;gap:.4rem 1.25rem;margin:0 0 1.25rem;padding:0;list-style:none;font-size:.875rem}
ul.key .swatch{display:inline-block;width:1.1rem;height:.8rem;min-height:0;margin-right:.45rem;padding:0;
border:1px solid;border-radius:.2rem;vertical-align:-.05rem}
ul.stages{display:flex;flex-wrap:wrap;gap:.4rem;margin:0 0 1rem;padding:0;list-style:none;font-size:.875rem}
ul.stages li{padding:.15rem .7rem;border:1px dashed var(--before);border-radius:1rem;color:var(--muted)}
ul.stages .done{border:1px solid var(--good);color:var(--good)}
footer{padding-top:.5rem;padding-bottom:3rem;color:var(--muted);font-size:.8125rem}
@media (max-width:40rem){
main,header.top,footer{padding-left:.9rem;padding-right:.9rem}
header.top{padding-top:1.5rem}
section{padding:1.1rem .9rem;margin:1rem 0}
.tiles{grid-template-columns:1fr 1fr;gap:.6rem}
.tiles li{padding:.75rem .8rem}
.tiles .main{grid-column:1/-1}
.tiles .value{font-size:1.35rem}
.tiles .main .value{font-size:1.9rem}
dl.facts{grid-template-columns:minmax(0,8.5rem) minmax(0,1fr);gap:.3rem .75rem;font-size:.8125rem}
ol.net{grid-template-columns:repeat(auto-fill,minmax(5.6rem,1fr))}
}
@media print{body{background:#fff}section{break-inside:avoid}nav{display:none}}
"""
