"""The style sheet of the report: light and dark, narrow and wide, screen and paper."""

STYLE = (
    """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1c1e21; --soft: #5b636d; --rule: #d9dde2; --panel: #f5f6f8;
  --c0: #1768ac; --c1: #c2410c; --c2: #1b7f4b; --c3: #8b3fa0; --c4: #9a6b00; --c5: #c01f5b;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181c; --ink: #e4e7eb; --soft: #9aa4af; --rule: #333a42; --panel: #1e2329;
    --c0: #6db3f2; --c1: #f59a5c; --c2: #5fcf94; --c3: #cf95e3; --c4: #e0b34d; --c5: #f47ba5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.6rem 1.2rem 3rem; max-width: 84rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 var(--sans); -webkit-text-size-adjust: 100%; overflow-wrap: anywhere;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; padding-top: .7rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { margin: .3rem 0; }
.soft, figcaption p, .note { color: var(--soft); }
.small { font-size: .85rem; }
.notes { border-left: 3px solid var(--c1); padding: .2rem .8rem; margin: 1rem 0; }
.progress { height: 6px; border-radius: 3px; background: var(--rule); margin: .9rem 0 1.1rem; overflow: hidden; }
.progress div { height: 100%; background: var(--c0); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .6rem; margin: 0; }
.tiles div { background: var(--panel); border-radius: 6px; padding: .6rem .8rem; }
.tiles dt { color: var(--soft); font-size: .82rem; }
.tiles dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }
.tiles dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: 1.2rem 1.4rem; }
figure { margin: 0; min-width: 0; }
figure h3 { margin: 0 0 .1rem; font-size: .95rem; }
figure h3 small { font-weight: 400; color: var(--soft); }
figure .broad { display: none; }
@media (min-width: 51rem) {
  .charts .span { grid-column: span 2; }
  .charts .narrow { display: none; }
  .charts .broad { display: block; }
}
figcaption { font-size: .85rem; }
.legend {
  display: flex; flex-wrap: wrap; gap: 0 1rem; margin: .1rem 0 0; padding: 0; list-style: none; font-size: .85rem;
}
.legend svg { width: 1.6rem; height: .6rem; vertical-align: middle; margin-right: .35rem; }
figure svg[role] { display: block; width: 100%; height: auto; }
svg text { font: 11.5px var(--sans); fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; fill: none; }
svg .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
svg .line, svg .pale { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .pale { stroke-width: 1; opacity: .4; }
svg .band { stroke: none; opacity: .18; }
svg .dot { stroke: none; }
svg .ring { fill: var(--page); stroke-width: 1.5; }
svg .hidden { fill: transparent; stroke: none; }
svg .best { fill: none; stroke: var(--ink); stroke-width: 1.3; }
"""
    + "".join(
        f"svg .line.c{i}, svg .pale.c{i}, svg .ring.c{i} {{ stroke: var(--c{i}); }}"
        f" svg .band.c{i}, svg .dot.c{i} {{ fill: var(--c{i}); }}\n"
        for i in range(6)
    )
    + """
svg .line.c1, svg .line.c4 { stroke-dasharray: 7 3; }
svg .line.c2, svg .line.c5 { stroke-dasharray: 2 3; }
svg .line.solid { stroke-dasharray: none; }
img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; background: #fff; border-radius: 3px; }
img.smooth { image-rendering: auto; }
.two { display: flex; flex-wrap: wrap; gap: 1.4rem 2.4rem; }
.times { display: flex; font-size: .75rem; color: var(--soft); max-width: 100%; margin-bottom: .2rem; }
.times span { flex: 1; text-align: center; min-width: 0; }
.earlier { display: flex; gap: .8rem; overflow-x: auto; padding-bottom: .5rem; scroll-snap-type: x proximity; }
.earlier figure { flex: none; width: min(19rem, 70vw); scroll-snap-align: start; }
.earlier img { width: 100%; }
pre {
  margin: .2rem 0 .9rem; padding: .6rem .8rem; background: var(--panel); border-radius: 6px;
  font: .82rem/1.5 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere;
}
.word { display: inline-block; max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; color: var(--soft); white-space: nowrap; }
td[data-head] { border-bottom: 0; padding-bottom: 0; }
.command td { font: .82rem/1.5 var(--mono); padding-top: .1rem; padding-bottom: .6rem; }
.options { columns: 19rem auto; column-gap: 2.4rem; }
.options div { display: flex; gap: 1rem; border-bottom: 1px solid var(--rule); padding: .18rem 0; break-inside: avoid; }
.options dt { flex: none; max-width: 55%; color: var(--soft); }
.options dd { margin: 0 0 0 auto; text-align: right; font-family: var(--mono); font-size: .85em; }
.wide { overflow-x: auto; }
.wide table { min-width: 34rem; }
footer { margin-top: 2.4rem; padding-top: .7rem; border-top: 1px solid var(--rule); }
@media (max-width: 40rem) {
  body { padding: 1rem .8rem 2rem; }
  h1 { font-size: 1.3rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .wide table, .wide tbody, .wide tr, .wide td { display: block; min-width: 0; width: 100%; }
  .wide thead { display: none; }
  .wide .command { padding-bottom: .5rem; margin-bottom: .5rem; border-bottom: 1px solid var(--rule); }
  .wide td { border: 0; padding: .1rem 0; }
  .wide td[data-head]::before {
    content: attr(data-head); display: inline-block; min-width: 6rem; margin-right: .6rem; color: var(--soft);
  }
}
@media print {
  :root {
    color-scheme: light;
    --page: #ffffff; --ink: #000000; --soft: #444444; --rule: #c8c8c8; --panel: #f3f3f3;
    --c0: #1768ac; --c1: #c2410c; --c2: #1b7f4b; --c3: #8b3fa0; --c4: #9a6b00; --c5: #c01f5b;
  }
  @page { margin: 14mm; }
  body { padding: 0; max-width: none; font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .charts { grid-template-columns: 1fr 1fr; }
  .charts .span { grid-column: span 2; }
  .charts .narrow { display: none; }
  .charts .broad { display: block; }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  figure, .tiles div, pre, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .two { flex-wrap: nowrap; gap: 1.2rem; }
  .two figure { flex: 1; }
  .earlier { flex-wrap: wrap; overflow: visible; }
  .earlier figure { width: 30%; }
}
"""
)
