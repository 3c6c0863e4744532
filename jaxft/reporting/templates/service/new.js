// A new job: a file, what it holds, and the start.

const FIELDS = {
  n_epochs: ["Epochs", "number of passes over the data"],
  batch_size: ["Batch size", "examples in a step"],
  learning_rate_multiplier: ["Learning rate multiplier", "factor of the base rate"],
  lora_rank: ["LoRA rank", "width of the adapter; 0 trains all weights"],
  max_length: ["Longest example", "in tokens"],
  beta: ["Beta", "DPO: how much it stays near its start"],
};

views.new = async (box, signal, file) => {
  const form = el("form", { class: "card new-form", "aria-label": "New job" });
  const preview = el("section", { class: "new-preview", "aria-live": "polite" });
  box.append(el("div", { class: "split" }, form, preview));
  form.addEventListener("submit", (event) => event.preventDefault());
  preview.append(el("p", { class: "empty card" }, "Choose a training file: a preview of what it "
    + "holds comes here, before anything is started."));
  try {
    const [models, files] = await Promise.all([get(paths.own + "/models", signal),
      get(paths.files + "?purpose=fine-tune&limit=1000", signal)]);
    fillForm(form, preview, signal, models.data, files.data, file);
  } catch (error) {
    if (!signal.aborted) preview.replaceChildren(trouble(error));
  }
};

const valueOf = (text) => {
  const word = text.trim();
  if (word === "true" || word === "false") return word === "true";
  return word !== "" && !isNaN(Number(word)) ? Number(word) : word;
};
const keysOf = (text) => Object.fromEntries(text.split("\n").filter((line) => line.trim())
  .map((line) => line.split(/=(.*)/, 2)).map(([key, value]) => [key.trim(), valueOf(value || "")]));

const labelled = (text, input, hint) => el("label", { class: "field" }, el("span", {}, text),
  input, hint && el("small", {}, hint));
const option = (value, text) => el("option", { value }, text);

const fillForm = (form, preview, signal, models, files, given) => {
  const bases = models.filter((model) => !model.job), tuned = models.filter((model) => model.job);
  const model = el("select", { name: "model" }, bases.map(({ name }) => option(name, name)),
    tuned.length > 0 && el("optgroup", { label: "Tuned, to be trained further" },
      tuned.map(({ name }) => option(name, name))));
  const method = el("select", { name: "method" }, option("supervised", "Supervised"),
    option("dpo", "DPO, from preferences"));
  const inputs = Object.fromEntries(Object.entries(FIELDS).map(([name, [, hint]]) =>
    [name, el("input", { name, inputmode: "decimal", autocomplete: "off", placeholder: "auto",
      title: hint })]));
  const beta = labelled(FIELDS.beta[0], inputs.beta);
  const suffix = el("input", { name: "suffix", maxlength: 64, autocomplete: "off",
    placeholder: "a word in the model's name" });
  const config = el("textarea", { name: "config", rows: 2, spellcheck: "false",
    placeholder: "data.bad_rows=skip" });
  const start = el("button", { type: "button", class: "main", disabled: true }, "Start");
  const training = filePicker("Training file", files, signal, (file) => chosen(file), true);
  const validation = filePicker("Validation file", files, signal, () => changed());

  const bodyOf = () => {
    const names = Object.keys(inputs).filter((name) => name !== "beta" || method.value === "dpo");
    const set = names.filter((name) => inputs[name].value.trim());
    const hyperparameters = Object.fromEntries(
      set.map((name) => [name, valueOf(inputs[name].value)]));
    const further = keysOf(config.value);
    if (Object.keys(further).length) hyperparameters.config = further;
    return {
      model: model.value,
      training_file: training.value,
      ...(validation.value ? { validation_file: validation.value } : {}),
      ...(suffix.value.trim() ? { suffix: suffix.value.trim() } : {}),
      method: { type: method.value, [method.value]: { hyperparameters } },
    };
  };

  // What is looked at is what is started: each change is looked at anew.
  let turn = 0, timer = 0;
  const changed = () => {
    beta.hidden = method.value !== "dpo";
    start.disabled = true;
    turn += 1;
    clearTimeout(timer);
    if (training.value) timer = setTimeout(() => look(turn), 400);
  };
  const look = async (mine) => {
    const busy = el("p", { class: "empty card busy", role: "status" }, "Looking at the data…");
    preview.replaceChildren(busy);
    const begun = Date.now();
    try {
      let found = await post(paths.own + "/previews", bodyOf(), signal);
      while (found.status === "waiting" && mine === turn) {
        await pause(0.3);
        if (Date.now() - begun > 5000 && !busy.querySelector("small")) {
          busy.append(el("small", {}, " The first look since the server began loads its libraries; "
            + "large files take their time."));
        }
        found = await get(paths.own + "/previews/" + found.id, signal);
      }
      if (mine !== turn) return;
      const { result } = found;
      preview.replaceChildren(...[result.error ? refusalOf(result.error) : previewOf(result)]
        .flat(9));
      for (const [name, input] of Object.entries(inputs)) {
        const resolved = result.hyperparameters?.[name];
        input.placeholder = resolved === undefined ? "auto" : "auto: " + resolved;
      }
      start.disabled = Boolean(result.error);
    } catch (error) {
      if (mine === turn && !signal.aborted) preview.replaceChildren(trouble(error));
    }
  };
  const chosen = async (file) => {
    if (file instanceof File) method.value = await holdsPreferences(file) ? "dpo" : "supervised";
    changed();
  };

  start.addEventListener("click", doing(async () => {
    const job = await post(paths.jobs, bodyOf(), signal);
    location.hash = jobLink(job.id);
  }));
  form.append(
    el("h2", {}, "New job"),
    training.element,
    labelled("Base model", model),
    el("details", {}, el("summary", {}, "Validation, method, settings"),
      validation.element,
      labelled("Method", method),
      el("div", { class: "fields" }, Object.entries(inputs).map(([name, input]) =>
        name === "beta" ? beta : labelled(FIELDS[name][0], input))),
      labelled("Further keys of the run, one a line", config),
      labelled("Name", suffix)),
    el("div", { class: "actions" }, start));
  for (const input of [model, method, ...Object.values(inputs), config, suffix])
    input.addEventListener("change", changed);
  beta.hidden = true;
  if (given) {
    training.value = given;
    changed();
  }
};

// Returns whether the first line of a file holds a preference.
const holdsPreferences = async (file) => {
  try {
    const [first] = (await file.slice(0, 1 << 20).text()).split("\n", 1);
    return "preferred_output" in JSON.parse(first);
  } catch {
    return false;
  }
};

// A file that the server has, or one that is chosen or dropped here and uploaded.
const filePicker = (title, files, signal, changed, large) => {
  const select = el("select", { "aria-label": title + " of the server" },
    option("", large ? "or one that is here already…" : "none"), files.map((file) =>
      option(file.id, file.filename + " · " + size(file.bytes) + " · " + ago(file.created_at))));
  const input = el("input", { type: "file", accept: ".jsonl,.json", "aria-label": title });
  const state = el("small", { role: "status" }, "JSON Lines");
  const drop = el("label", { class: "drop" + (large ? " large" : "") }, input,
    el("span", {}, el("b", {}, "Choose a file"), " or drop it here"), state);
  const send = async (file) => {
    const progress = bar("Upload of " + file.name, 0, 1);
    state.replaceChildren(file.name + " ", progress);
    try {
      const stored = await upload(file, (share) => { progress.value = share; }, signal);
      select.append(option(stored.id, stored.filename + " · " + size(stored.bytes)));
      select.value = stored.id;
      state.replaceChildren(stored.filename + " is here");
      changed(file);
    } catch (error) {
      state.replaceChildren(messageOf(error));
      state.classList.add("bad");
    }
  };
  const take = (list) => {
    state.classList.remove("bad");
    if (list.length > 1) state.replaceChildren("One file, please");
    else if (list.length) send(list[0]);
  };
  input.addEventListener("change", () => take(input.files));
  for (const kind of ["dragenter", "dragover"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(event.dataTransfer.files);
  });
  select.addEventListener("change", () => {
    state.replaceChildren("JSON Lines");
    changed(select.value);
  });
  return {
    element: el("div", { class: "picker" }, el("span", { class: "title" }, title), drop,
      (large ? files.length > 0 : true) && select),
    get value() { return select.value; },
    set value(id) { select.value = id; },
  };
};
