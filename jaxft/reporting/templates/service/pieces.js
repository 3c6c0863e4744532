// What several views are made of.

const count = (value) => value === null || value === undefined ? "–"
  : value.toLocaleString("en-US");
const plural = (value, noun) => count(value) + " " + noun + (value === 1 ? "" : "s");
const number = (value, digits = 4) => typeof value === "number"
  ? String(+value.toPrecision(digits)) : "–";
const percent = (value) => typeof value === "number" ? (100 * value).toFixed(1) + " %" : "–";

const size = (bytes) => {
  let value = bytes, unit = "bytes";
  for (const next of ["KiB", "MiB", "GiB", "TiB"]) {
    if (value < 1024) break;
    value /= 1024;
    unit = next;
  }
  return (unit === "bytes" ? value : value.toFixed(1)) + " " + unit;
};

const duration = (seconds) => {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return whole + " s";
  if (whole < 3600) return Math.round(whole / 60) + " min";
  const hours = Math.floor(whole / 3600), minutes = Math.round(whole % 3600 / 60);
  if (hours < 48) return hours + " h " + minutes + " min";
  return Math.round(whole / 86400) + " days";
};

const moment = (time) => time ? new Date(1000 * time).toLocaleString("en-GB",
  { dateStyle: "medium", timeStyle: "medium" }) : "–";
const ago = (time) => {
  const seconds = Date.now() / 1000 - time;
  return seconds < 5 ? "now" : duration(seconds) + " ago";
};

const ACTIVE = ["validating_files", "queued", "running", "paused"];
const WORDS = { validating_files: "checking files" };
const chip = (status) => el("span", { class: "chip " + status }, WORDS[status] || status);

// A table, of "cards" on a phone if its class says so. Heads that begin with ">" are of numbers.
const table = (label, heads, rows, empty, classes = "scroll cards") => {
  if (!rows.length) return el("p", { class: "empty card" }, empty);
  const names = heads.map((head) => head.replace(/^>/, ""));
  const kinds = heads.map((head) => head.startsWith(">") ? "n" : null);
  return el("div", { class: classes }, el("table", { "aria-label": label },
    el("thead", {}, el("tr", {}, names.map((name, i) => el("th", { class: kinds[i] }, name)))),
    el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell, i) =>
      el("td", { class: kinds[i], "data-name": names[i] }, cell)))))));
};

const facts = (pairs) => el("dl", { class: "facts" },
  pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => el("div", { class: value.tagName === "CODE" && "long" },
      el("dt", {}, name), el("dd", {}, value))));

const tile = (title, value, note, lead) => el("div", { class: "tile" + (lead ? " lead" : "") },
  el("h3", {}, title), el("strong", {}, value), el("p", {}, note || ""));

const bar = (label, part, whole) => el("progress",
  whole ? { "aria-label": label, max: whole, value: part } : { "aria-label": label });

const button = (text, action, more = {}) =>
  el("button", { type: "button", onclick: doing(action), ...more }, text);

const jobLink = (job) => "#jobs/" + encodeURIComponent(job);
const nameOf = (job) => job.user_provided_suffix || job.id.slice(0, 14) + "…";

const isCheckpoint = (model) => model.includes(":ckpt-step-");

const timeLeft = (job) => job.status === "running" && job.estimated_finish
  ? duration(job.estimated_finish - Date.now() / 1000) + " left" : "";
// What a job without a step waits for.
const waitsFor = (job) => ({ running: "loading and compiling", queued: "waiting for devices" })[
  job.status] || "";
const stepsOf = (job) => job.steps ? count(job.step) + " / " + count(job.steps) : "";
const progressText = (job) => [stepsOf(job), timeLeft(job), !job.step && waitsFor(job)]
  .filter(Boolean).join(" · ") || WORDS[job.status] || "";

// Draws a chart as templates/charts.html does.
const SVG = "http://www.w3.org/2000/svg";
const path = (classes, drawn) => {
  const node = document.createElementNS(SVG, "path");
  node.setAttribute("class", classes);
  node.setAttribute("d", drawn);
  return node;
};
const placed = (node, places) => {
  for (const [side, at] of Object.entries(places)) node.style[side] = at + "%";
  return node;
};
const chart = (plot) => {
  const legend = plot.series.length > 1 && el("span", { class: "legend" },
    plot.series.map((s) => el("span", {}, el("i", { class: "key " + s.style + " c" + s.color }),
      s.name)));
  const figure = el("figure", { class: "chart" + (plot.wide ? " wide" : "") },
    el("figcaption", {}, el("b", {}, plot.title), " ", el("span", {}, plot.note), legend));
  if (!plot.shapes.length) {
    figure.append(el("p", { class: "empty" }, "No finite values."));
    return figure;
  }
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 1000 1000");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.append(path("grid", plot.grid), path("axis", "M0 1000H1000"),
    ...plot.shapes.map((shape) => path(shape.classes, shape.path)));
  const mark = plot.mark && placed(
    el("i", { class: "mark" + (plot.mark.x > 70 ? " left" : "") }, el("span", {}, plot.mark.text)),
    { left: plot.mark.x, top: plot.mark.y });
  const names = plot.series.map((s) => s.name).join(", ");
  const box = el("div", { class: "plot", tabindex: 0, role: "img",
    "aria-label": plot.title + ": " + names + " over steps" }, svg,
    plot.up.map((tick) => placed(el("i", { class: "y" }, tick.text), { top: tick.at })),
    plot.across.map((tick, i) => placed(el("i", { class: "x" + (i % 2 ? " odd" : "") }, tick.text),
      { left: tick.at })),
    el("i", { class: "x name" }, "step"), mark);
  showValues(box, plot.hover);
  figure.append(box);
  return figure;
};

// Saves a small file of the server.
const save = async (file) => {
  const response = await request("GET", paths.files + "/" + file.id + "/content");
  follow(URL.createObjectURL(await response.blob()), file.filename);
};
const follow = (url, name) => {
  const link = el("a", name ? { href: url, download: name } : { href: url });
  document.body.append(link);
  link.click();
  link.remove();
};

// Makes an export of a model, which may take minutes, and downloads it.
const FORMS = {
  adapter: ["Adapter", "in PEFT's format"],
  merged: ["Merged folder", "the model with its adapter in it"],
  model: ["Model folder", "as Hugging Face has it"],
};
const downloads = (model, forms, verb = "Download ") => forms.map((form) => {
  const [title, meaning] = FORMS[form];
  const text = verb ? verb + title.toLowerCase() : title;
  return button(text, async (event) => {
    const pressed = event.currentTarget;
    pressed.textContent = title + " is made…";
    try {
      const where = paths.own + "/exports";
      const query = "?model=" + encodeURIComponent(model) + "&form=" + form;
      let made = await post(where, { model, form });
      while (made.status === "making") {
        await pause(1);
        made = await get(where + query);
      }
      if (made.status === "failed") throw new Error("The export failed: " + made.message);
      follow(made.url, true);
    } finally {
      pressed.textContent = text;
    }
  }, { title: meaning, "aria-label": "Download " + title.toLowerCase() + " of " + model });
});
