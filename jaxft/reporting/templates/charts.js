// Shows the values of a plot beside the pointer, or by the arrow keys.
const showValues = (plot, series) => {
  const steps = [...new Map(series.flatMap((s) => s.points).map((p) => [p[0], p])).values()]
    .sort((a, b) => a[0] - b[0]);
  const nearest = (points, x) => points.reduce((best, p) =>
    !best || Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best, null);
  const add = (parent, tag, name, text) => {
    const node = document.createElement(tag);
    node.className = name;
    if (text) node.textContent = text;
    return parent.appendChild(node);
  };
  let shown = [], at = -1;
  const clear = () => { shown.forEach((node) => node.remove()); shown = []; };
  const show = (x) => {
    clear();
    const here = nearest(steps, x);
    at = steps.indexOf(here);
    const rule = add(plot, "i", "rule");
    rule.style.left = here[0] + "%";
    const tip = add(plot, "div", "tip");
    add(tip, "div", "", here[2]);
    shown = [rule, tip];
    for (const s of series) {
      const p = nearest(s.points, here[0]);
      if (!p || Math.abs(p[0] - here[0]) > 1) continue;
      const row = add(tip, "div", "");
      add(row, "i", "key c" + s.color + (s.faint ? " faint" : ""));
      add(row, "b", "", p[3]);
      row.append(s.name);
      if (p[1] === null || s.faint) continue;
      const dot = add(plot, "i", "dot c" + s.color);
      dot.style.left = p[0] + "%";
      dot.style.top = p[1] + "%";
      shown.push(dot);
    }
    tip.style[here[0] < 50 ? "left" : "right"] =
      "calc(" + (here[0] < 50 ? here[0] : 100 - here[0]) + "% + 12px)";
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(100 * (event.clientX - box.left) / box.width);
  });
  plot.addEventListener("pointerleave", clear);
  plot.addEventListener("blur", clear);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !steps.length) return;
    event.preventDefault();
    show(steps[Math.min(steps.length - 1, Math.max(0, at + move))][0]);
  });
};
document.querySelectorAll(".plot").forEach((plot) =>
  showValues(plot, JSON.parse(plot.querySelector("script").textContent)));
