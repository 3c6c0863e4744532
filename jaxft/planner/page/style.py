"""The style of a page of plans, beside that of all pages."""

STYLE = """
:root { --block: .77; --depth: .115; --over: #d5281d; }
@media (prefers-color-scheme: dark) { :root { --block: .64; --depth: .115; --over: #ff6a5e; } }
h2.plan { margin-top: 3.2rem; padding-top: 1.4rem; border-top: 2px solid var(--axis);
  font-size: 1.4rem; overflow-wrap: anywhere; }
h3.part { margin: 2.2rem 0 .7rem; font-size: 1.08rem; font-weight: 650; color: var(--ink); }
h3.part + p.dim { max-width: 62rem; }
h4 { margin: 1.1rem 0 .45rem; font-size: .84rem; font-weight: 500; color: var(--second); }
.card > h4:first-child { margin-top: 0; }
.estimate { margin-left: .5em; padding: .1em .55em; border-radius: 99px; background: var(--tint);
  color: var(--second); font-size: .72rem; font-weight: 500; vertical-align: .15em; }
.tile.bad strong, .remark.bad { color: var(--bad); }
.remark { margin: 1rem 0 0; padding: .75rem 1.15rem; border-left: 4px solid var(--axis);
  background: var(--surface); color: var(--second); }
.remark b { color: var(--ink); }
.card { padding: 1.1rem 1.15rem; background: var(--surface); border-radius: 12px;
  box-shadow: 0 0 0 1px var(--grid); break-inside: avoid; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td small { color: var(--muted); } .compared small { white-space: nowrap; }
.ranked td:nth-child(2) { min-width: 19rem; } .compared td:nth-child(4) { min-width: 11rem; }
.compared td, .compared th { padding-right: 1rem; } .compared td:first-child { min-width: 7rem; }
.remedies td:first-child { min-width: 11rem; } .remedies td:nth-child(2) { min-width: 17rem; }
.config td:first-child { white-space: nowrap; } .config td:nth-child(2) { min-width: 17em;
  overflow-wrap: anywhere; }
a { color: inherit; text-decoration-color: var(--axis); }
footer { margin-top: 2.6rem; font-size: .82rem; }
.held { margin: .7rem 0 0; font-size: .84rem; color: var(--second); }
.row { display: grid; grid-template-columns: 5.4em minmax(0, 1fr); align-items: center; }
.row > b { font-size: .78rem; font-weight: 500; color: var(--second); }
.k { --h: 0; background: oklch(var(--block) var(--depth) var(--h)); font-style: normal;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.k-parameters, .k-matmul, .k-compute { --h: 255; } .k-ici { --h: 50; } .k-dcn { --h: 350; }
.k-optimizer, .k-attention { --h: 305; }
.k-program { --h: 205; } .k-batch { --h: 340; } .k-gradients { --h: 45; }
.k-activations, .k-memory { --h: 160; } .k-logits { --h: 10; } .k-weights { --h: 92; }
.k-temporaries, .k-padding, .k-copy, .k-host { background: oklch(var(--block) .025 85); }
.k-all-gather { --h: 92; } .k-reduce-scatter { --h: 50; } .k-all-reduce { --h: 350; }
.k-all-to-all, .k-ragged-all-to-all { --h: 205; } .k-collective-permute { --h: 130; }
.k-sparsecore { --h: 190; }
.wait { background: repeating-linear-gradient(135deg, var(--over) 0 2px, transparent 2px 5px);
  box-shadow: inset 0 0 0 1px var(--over); }
.k u { display: block; padding: 0 .4em; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; text-decoration: none; font-size: 11px; color: #000c; }
.wait u { margin-left: 4px; border-radius: 3px; background: var(--surface); color: var(--ink); }
.bar { position: relative; display: flex; height: 34px; overflow: hidden; border-radius: 5px;
  background: var(--grid); }
.bar > .k { flex: none; border-right: 1px solid var(--surface); }
.bar > .left { flex: none; background: var(--grid); }
.bar > .over { position: absolute; top: 0; bottom: 0; border: 2px solid var(--over);
  background: repeating-linear-gradient(135deg, var(--over) 0 2px, transparent 2px 7px); }
.bar.host { height: 22px; margin-top: .6rem; } .bar.host u { line-height: 22px; }
.bar.cut > .k { border-right: 4px dotted var(--surface); }
.limit { position: relative; height: 1.5em; font-size: .78rem; color: var(--second); }
.limit span { position: absolute; padding-right: .4em; border-right: 2px solid var(--ink);
  white-space: nowrap; line-height: 1.5em; }
.limit em { font-style: normal; color: var(--bad); }
.keys { display: flex; flex-wrap: wrap; gap: .15rem 1.3rem; font-size: .84rem;
  color: var(--muted); font-variant-numeric: tabular-nums; }
.keys > span { white-space: nowrap; } .keys b { color: var(--ink); font-weight: 600; }
.keys i { display: inline-block; width: .85em; height: .85em; margin-right: .45em;
  border-radius: 3px; vertical-align: -.08em; }
.bar + .keys { margin-top: .6rem; }
.lanes { padding-bottom: .3rem; } .lanes .row { align-items: baseline; padding: .1rem 0; }
.track { margin-top: 1.5rem; overflow-x: auto; } .track h4 { margin-top: 0; }
.track .wide { min-width: 620px; }
.lane { position: relative; height: 17px; margin: 2px 0; background: var(--grid); }
.lane.core { height: 46px; }
.lane > * { position: absolute; top: 0; bottom: 0; min-width: 1px; overflow: hidden; }
.lane > .k:hover, .loop:hover { outline: 2px solid var(--ink); z-index: 1; }
.lane > .k { display: flex; align-items: center; } .lane > .k u { line-height: 1.5; }
.lane > .k + .k { box-shadow: -1px 0 var(--surface); }
.lane > .wait { box-shadow: inset 0 0 0 1px var(--over) !important; }
.loop { display: flex; flex-direction: column-reverse; box-shadow: inset 0 0 0 1px var(--muted); }
.loop > .k { flex: none; }
.names { position: relative; height: 1.6em; font-size: .78rem; color: var(--second); }
.names span { position: absolute; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  padding-left: .35em; border-left: 1px solid var(--muted); line-height: 1.6em; }
.axis { position: relative; height: 1.5em; font-size: 11px; color: var(--muted);
  font-variant-numeric: tabular-nums; }
.axis span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.axis span:first-child { transform: none; }
.terms .row { padding: .1rem 0; }
.term { display: flex; align-items: center; gap: .6em; font-size: .84rem; padding-right: 8.5em;
  font-variant-numeric: tabular-nums; }
.term i { flex: none; height: 14px; min-width: 1px; border-radius: 3px; background: var(--c0); }
.term span { white-space: nowrap; } .term small { color: var(--muted); }
svg.mesh { max-width: 100%; height: auto; display: block; }
svg.mesh rect { fill: oklch(var(--block) var(--depth) var(--h)); stroke: var(--surface); }
svg.mesh rect:hover { stroke: var(--ink); stroke-width: 2; }
svg.pareto { display: block; width: 100%; min-width: 680px; padding: .8rem 1rem .4rem; }
.pareto text { font-size: 11.5px; fill: var(--muted); } .pareto .x { text-anchor: middle; }
.pareto .y { text-anchor: end; } .pareto .rank { fill: var(--ink); font-weight: 600;
  stroke: var(--surface); stroke-width: 3px; paint-order: stroke; pointer-events: none; }
.pareto .grid { stroke: var(--grid); } .pareto path { fill: none; }
.pareto path.limit { stroke: var(--over); stroke-dasharray: 5 3; stroke-width: 1.5; }
.pareto text.limit { fill: var(--over); text-anchor: middle; }
.pareto .front { stroke: var(--c0); stroke-width: 2; stroke-linejoin: round; }
.dot { stroke: var(--surface); stroke-width: 1.5; }
.dot.compiled { fill: var(--c0); } .dot.compiled.over { fill: var(--over); }
.dot.estimated { fill: none; stroke: var(--c0); pointer-events: all; opacity: .75; }
.dot.estimated.over { stroke: var(--over); }
.dot:hover { stroke: var(--ink); }
@media (max-width: 720px) { .row { grid-template-columns: 4.4em minmax(0, 1fr); }
  .keys { gap: .15rem .9rem; } .lane > .k u { font-size: 10px; } }
"""
