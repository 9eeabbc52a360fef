"""How a report looks: on a phone and on a wide page, in light and in dark, on paper; no font, script or picture from elsewhere."""

CSS = """
:root { color-scheme: light dark; --page: #fbfaf7; --card: #ffffff; --ink: #1c1f23; --soft: #5b6470; --line: #e3e1da;
  --accent: #1864ab; --much: #6aaee6; --calm: #e6eff6; --bad: #f08c4a; --good: #2b8a3e; --wrong: #c92a2a; --none: #eeece6; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e8e6e1; --soft: #9aa4af;
  --line: #30363c; --accent: #74b9f2; --much: #2a6fb0; --calm: #1f3040; --bad: #b4481a; --good: #69db7c; --wrong: #ff8787;
  --none: #272b30; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: clamp(26px, 6vw, 40px); line-height: 1.15; margin: 4px 0 10px; overflow-wrap: anywhere; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 0 0 6px; }
p { margin: 0 0 12px; max-width: 68ch; }
.eyebrow { font-size: 13px; color: var(--soft); margin: 0; }
.lede { font-size: 18px; }
.soft, caption, figcaption { color: var(--soft); font-size: 14px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px; margin: 16px 0; }
.badge { display: inline-block; border-radius: 99px; padding: 2px 12px; font-size: 14px; font-weight: 600;
  border: 1.5px solid currentColor; }
.ok { color: var(--good); } .no { color: var(--wrong); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(152px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; }
.tile b { display: block; white-space: nowrap; font-size: 25px; line-height: 1.2; font-variant-numeric: tabular-nums;
  letter-spacing: -.01em; }
.tile span { font-size: 13px; color: var(--soft); }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; margin: 8px -4px; padding: 0 4px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; padding: 6px 12px 6px 0; vertical-align: bottom; }
td { padding: 6px 12px 6px 0; border-top: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.name { font: 13px ui-monospace, Menlo, Consolas, monospace; min-width: 150px; }
table.heat { width: auto; min-width: min(100%, 560px); border-spacing: 2px; border-collapse: separate; table-layout: auto; }
table.heat td { border: 0; border-radius: 4px; padding: 5px 6px; text-align: center; font-size: 12px; min-width: 38px; }
table.heat th { padding: 2px 4px; font-size: 12px; text-align: center; vertical-align: bottom; line-height: 1.2; }
table.heat tbody th { position: sticky; left: 0; background: var(--card); text-align: right;
  vertical-align: middle; padding-right: 8px; }
table.heat td.none { background: var(--none); color: var(--soft); }
table.dense td { padding: 0; height: 12px; min-width: 3px; border-radius: 1px; }
table.dense { border-spacing: 1px; }
.legend { display: flex; align-items: center; gap: 8px; font-size: 13px; color: var(--soft); margin-top: 8px; flex-wrap: wrap; }
.legend i { width: 120px; height: 12px; border-radius: 6px; background: linear-gradient(90deg, var(--from), var(--to)); }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 140px; border-bottom: 1px solid var(--line); margin-top: 12px; }
.bars i { flex: 1; background: var(--accent); border-radius: 3px 3px 0 0; min-height: 1px; }
.ticks { display: flex; gap: 2px; font-size: 12px; color: var(--soft); }
.ticks span { flex: 1; text-align: center; white-space: nowrap; overflow: visible; width: 0; }
.stack { display: flex; height: 22px; border-radius: 6px; overflow: hidden; gap: 2px; margin: 12px 0 8px; }
.stack i:nth-child(4n+1), .key:nth-child(4n+1)::before { background: #1864ab; }
.stack i:nth-child(4n+2), .key:nth-child(4n+2)::before { background: #f08c4a; }
.stack i:nth-child(4n+3), .key:nth-child(4n+3)::before { background: #5c940d; }
.stack i:nth-child(4n+4), .key:nth-child(4n+4)::before { background: #9c36b5; }
.keys { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; }
.key::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px; }
pre { background: var(--none); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font: 13px/1.5 ui-monospace, Menlo,
  Consolas, monospace; margin: 6px 0 12px; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
ul { padding-left: 20px; margin: 8px 0; } li { overflow-wrap: break-word; margin: 6px 0; }
dl { display: grid; grid-template-columns: minmax(110px, 170px) 1fr; gap: 6px 16px; margin: 8px 0 0; font-size: 15px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 520px) { main { padding: 20px 12px 40px; } section { padding: 16px 14px; } .tiles { gap: 8px;
  grid-template-columns: 1fr 1fr; } .tile { padding: 12px; } .tile b { font-size: 21px; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; } table.heat td { padding: 5px 2px; min-width: 34px; } table.dense td { padding: 0; min-width: 3px; } }
@media print { section, .tile { break-inside: avoid; } body { background: #fff; } }
"""
