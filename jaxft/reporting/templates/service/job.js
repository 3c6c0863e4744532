// One job: how far it is, what it says, and what it made.

const showJob = (box, signal, id) => {
  const where = paths.own + "/jobs/" + encodeURIComponent(id);
  const parts = Object.fromEntries(
    ["head", "state", "made", "charts", "checkpoints", "settings", "events"]
      .map((name) => [name, el("section", { class: "job-" + name })]));
  parts.head.setAttribute("aria-live", "polite");
  box.append(el("p", { class: "back" }, el("a", { href: "#jobs" }, "← All jobs")),
    ...Object.values(parts));
  parts.head.append(el("p", { class: "empty" }, "Loading…"));
  const log = eventLog(parts.events);
  let job = null, wanted = true, drawnAt = -1;

  const look = async () => {
    job = await get(where, signal);
    unnotify();
    document.title = nameOf(job) + ", " + job.status + " · jaxft";
    paint(parts.head, [job.status, job.user_provided_suffix], () => headOf(job, look));
    paint(parts.state, [job, Math.floor(Date.now() / 5000)], () => stateOf(job));
    paint(parts.made, [job.fine_tuned_model, job.forms, job.has_report, job.result_files],
      () => madeOf(job));
    paint(parts.settings, [job, Math.floor(Date.now() / 5000)], () => settingsOf(job));
    const kept = await get(paths.jobs + "/" + encodeURIComponent(id) + "/checkpoints?limit=100",
      signal);
    paint(parts.checkpoints, kept, () => checkpointsOf(kept.data));
    // A chart that is looked at stays as it is.
    if (job.step !== drawnAt && !parts.charts.matches(":hover, :focus-within")) {
      const drawn = await get(where + "/charts", signal);
      paint(parts.charts, drawn, () => drawn.data.map(chart));
      parts.charts.classList.add("charts");
      drawnAt = job.step;
    }
  };

  // Events come as they happen; what else is shown is asked for after some, and not at each.
  const listen = async () => {
    const response = await request("GET",
      paths.jobs + "/" + encodeURIComponent(id) + "/events?stream=true", undefined, signal);
    log.clear();
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      log.add(JSON.parse(data));
      wanted = true;
    }
    wanted = true;
    return ACTIVE.includes((await get(where, signal)).status);
  };
  repeat(2, signal, async () => {
    try {
      return await listen();
    } catch (error) {
      if (error.status === 404) {
        parts.head.replaceChildren(trouble(error));
        return false;
      }
      throw error;
    }
  });
  let turns = 0;
  repeat(1.5, signal, async () => {
    turns += 1;
    if (!wanted && (turns % 4 || (job && !ACTIVE.includes(job.status) && drawnAt === job.step)))
      return;
    wanted = false;
    await look().catch((error) => { if (error.status !== 404) throw error; });
  });
};

const headOf = (job, look) => {
  const act = (verb) => async () => {
    await post(paths.jobs + "/" + encodeURIComponent(job.id) + "/" + verb);
    await look();
  };
  const cancel = async () => {
    const text = "Its run ends. The epochs that it has trained so far stay usable as checkpoints, but it "
      + "cannot be resumed.";
    if (await confirmed("Cancel " + nameOf(job) + "?", text, "Cancel the job"))
      await act("cancel")();
  };
  return el("div", { class: "head" },
    el("h2", {}, nameOf(job), " ", chip(job.status)),
    el("div", { class: "actions" },
      ["queued", "running"].includes(job.status) && button("Pause", act("pause")),
      job.status === "paused" && button("Resume", act("resume"), { class: "main" }),
      ACTIVE.includes(job.status) && button("Cancel", cancel, { class: "danger" })));
};

const stateOf = (job) => [
  el("p", { class: "about" }, el("b", {}, job.model), " · " + job.method + " on ",
    el("b", {}, job.training_name || job.training_file), job.validation_file && [", held out ",
      el("b", {}, job.validation_name || job.validation_file)]),
  job.error && job.error.message && el("div", { class: "trouble", role: "alert" },
    el("b", {}, "The job failed"), job.error.code && el("code", {}, job.error.code),
    el("pre", {}, job.error.message)),
  ACTIVE.includes(job.status) && el("div", { class: "progress large" },
    bar("Progress", job.step, job.steps),
    el("small", {}, progressText(job))),
];

const madeOf = (job) => {
  const report = async () => {
    const opened = window.open("", "_blank");  // while the press of the button is known
    try {
      const { url } = await post(paths.own + "/jobs/" + encodeURIComponent(job.id) + "/report");
      if (opened) { opened.opener = null; opened.location = url; } else follow(url);
    } catch (error) {
      opened?.close();
      throw error;
    }
  };
  const results = async () => {
    for (const id of job.result_files) await save(await get(paths.files + "/" + id));
  };
  const model = job.fine_tuned_model;
  if (!model && !job.has_report && !job.result_files.length) return [];
  return el("div", { class: "card made" },
    model && el("p", {}, "Tuned model ", el("code", {}, model)),
    el("div", { class: "actions" },
      model && el("a", { class: "button main", href: "#compare/" + encodeURIComponent(job.model)
        + "/" + encodeURIComponent(model) }, "Try it"),
      model && downloads(model, job.forms),
      job.has_report && button("Report", report),
      job.result_files.length > 0 && button("Results (CSV)", results)),
    model && el("p", { class: "dim" }, PRODUCTION));
};
const PRODUCTION = "This server is for trying and evaluating. For production, vLLM serves the "
  + "downloaded folder.";

const checkpointsOf = (kept) => kept.length ? [el("h2", {}, "Checkpoints"),
  table("Checkpoints", ["Model", ">Step", ">Training loss", ">Validation loss", ">Accuracy"],
    kept.map(({ step_number: step, fine_tuned_model_checkpoint: name, metrics }) => [
      el("code", {}, name), count(step), number(metrics.train_loss), number(metrics.valid_loss),
      percent(metrics.valid_mean_token_accuracy ?? metrics.train_mean_token_accuracy)]))] : [];

const TITLES = {
  n_epochs: "Epochs",
  batch_size: "Batch size",
  learning_rate_multiplier: "Learning rate multiplier",
  lora_rank: "LoRA rank (0: all weights)",
  beta: "Beta",
};
const settingsOf = (job) => [
  el("h2", {}, "Hyperparameters"),
  facts([...Object.entries(job.hyperparameters).map(([name, value]) =>
    [TITLES[name] || name, String(value)]), ["Seed", String(job.seed)]]),
  el("h2", {}, "Details"),
  facts([
    ["Trained tokens", job.trained_tokens && count(job.trained_tokens)],
    ["Created", moment(job.created_at)],
    ["Started", job.started_at && moment(job.started_at)],
    ["Finished", job.finished_at && moment(job.finished_at)],
    ["Expected finish", job.estimated_finish && moment(job.estimated_finish)],
    ["Took", job.started_at && job.finished_at && duration(job.finished_at - job.started_at)],
    ["Id", el("code", {}, job.id)],
    ...Object.entries(job.metadata || {}),
  ]),
];

const MOST_EVENTS = 500;
// The events of a job, newest first; figures, of which there are many, only if they are wished.
const eventLog = (section) => {
  const list = el("ol", { class: "events", "aria-live": "off" });
  const figures = el("input", { type: "checkbox" });
  figures.addEventListener("change", () => list.classList.toggle("all", figures.checked));
  section.append(el("div", { class: "head" }, el("h2", {}, "Events"),
    el("label", { class: "check" }, figures, " with the figures of steps")), list);
  return {
    clear: () => list.replaceChildren(),
    add: (event) => {
      list.prepend(el("li", { class: event.type + " " + event.level },
        el("time", {}, moment(event.created_at).replace(/^.*, /, "")),
        el("span", {}, event.message)));
      const old = list.querySelectorAll(".metrics");
      if (old.length > MOST_EVENTS) old[old.length - 1].remove();
    },
  };
};
