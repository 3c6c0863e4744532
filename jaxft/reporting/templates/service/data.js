// What a file holds, before a job is made of it.

const previewOf = (found) => {
  const data = found.data;
  const train = data.sets[0];
  const seconds = found.step_seconds * found.steps;
  return [
    el("div", { class: "tiles" },
      tile("Examples", count(found.examples), plural(found.rows, "row"), true),
      tile("Tokens", count(found.tokens),
        percent(found.trained_tokens / Math.max(1, found.tokens)) + " trained"),
      tile("Steps", count(found.steps), stepNote(found)),
      tile("Time", seconds ? "about " + duration(seconds) : "not known",
        seconds ? "and a minute to begin" : "shown once it runs")),
    el("p", { class: "fits" }, el("b", {}, "It fits. "), "Training takes " + found.takes + "."),
    data.sets.map((item) => notesOf(item, train)),
    el("h3", { class: "part" }, "The first examples"),
    el("p", { class: "dim legend-of-masks" }, el("span", { class: "trained" }, "trained tokens"),
      ", ", el("span", { class: "masked" }, "masked: read, but not learnt")),
    data.samples.map((sample) => el("article", { class: "sample" },
      el("h4", {}, sample.label ? sample.origin + ": " + sample.label : sample.origin),
      el("pre", {}, sample.runs.map((run) => el("span",
        { class: run.trained === null ? "left-out" : run.trained ? "trained" : "masked" },
        run.text))))),
    el("h3", { class: "part" }, "Counts"),
    countsOf(data.sets),
    el("div", { class: "histograms" }, data.sets.map(histogramOf)),
    el("details", {}, el("summary", {}, "How the files are read"),
      facts([["Tokenizer", data.tokenizer], ["Chat template", data.template],
        ...data.sets.map((item) => [item.name, item.formats.join("\n")])])),
  ];
};

const stepNote = (found) => plural(found.hyperparameters.n_epochs, "epoch") + ", batch "
  + found.hyperparameters.batch_size;

const notesOf = (item) => {
  const notes = [];
  if (item.refusal) notes.push(item.refusal);
  if (item.also_in_training) {
    notes.push(count(item.also_in_training) + " of " + count(item.documents) + " " + item.name
      + " examples are in the training file too. Figures on them are better than on new data.");
  }
  if (item.duplicates) {
    notes.push(item.name + ": " + plural(item.duplicates, "example") + " came before, word for "
      + "word.");
  }
  return notes.map((text) => el("p", { class: "remark" }, text));
};

const countsOf = (sets) => table("Counts", ["", ...sets.map((item) => ">" + item.name)],
  countRows(sets), "", "scroll counts");
const countRows = (sets) => [
  ["examples", (item) => count(item.documents)],
  ["bad rows left out", (item) => count(item.skipped)],
  ["exact duplicates", (item) => count(item.duplicates)],
  ["also in training", (item) => count(item.also_in_training)],
  ["tokens", (item) => count(item.tokens)],
  ["trained tokens", (item) => count(item.trained_tokens)],
  ["longest example", (item) => count(item.longest)],
].map(([title, value]) => [title, ...sets.map(value)]);

const histogramOf = (item) => {
  const most = Math.max(1, ...item.histogram.map((bin) => bin.count));
  return el("figure", { class: "chart histogram" },
    el("figcaption", {}, el("b", {}, "Tokens in an example"), " ", el("span", {}, item.name)),
    el("table", { "aria-label": "Tokens in an example: " + item.name }, el("tbody", {},
      item.histogram.map((bin) => {
        const filled = el("i");
        filled.style.width = 100 * bin.count / most + "%";
        const range = bin.from === bin.to ? count(bin.from) : count(bin.from) + " – "
          + count(bin.to);
        return el("tr", {}, el("th", { class: "n" }, range), el("td", {}, el("div",
          { class: "filled" }, filled)), el("td", { class: "n" }, count(bin.count)));
      }))));
};

const refusalOf = (error) => el("div", { class: "trouble", role: "alert" },
  el("b", {}, "It cannot be trained like this"), error.code && el("code", {}, error.code),
  el("pre", {}, error.message));
