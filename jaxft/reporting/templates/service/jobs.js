// All jobs.

views.jobs = (box, signal, id) => id ? showJob(box, signal, id) : showJobs(box, signal);

const showJobs = (box, signal) => {
  const list = el("div", {}, el("p", { class: "empty" }, "Loading…"));
  box.append(list);
  let limit = 20;
  const look = async () => {
    const found = await get(paths.own + "/jobs?limit=" + limit, signal);
    unnotify();
    paint(list, [found, limit, Math.floor(Date.now() / 10000)], () => [
      found.data.length ? jobsTable(found.data) : welcome(),
      found.has_more && limit < 200 && button("Show more", async () => {
        limit = Math.min(200, limit + 60);
        await look();
      }),
    ]);
  };
  repeat(2, signal, look);
};

const jobsTable = (jobs) => table("Jobs",
  ["Job", "Model", "Status", "Progress", ">Tokens"],
  jobs.map((job) => [
    [el("a", { href: jobLink(job.id) }, nameOf(job)), el("small", {}, ago(job.created_at))],
    job.model,
    chip(job.status),
    progressOf(job),
    count(job.trained_tokens),
  ]));

const progressOf = (job) => {
  if (!job.steps && !ACTIVE.includes(job.status)) return "–";
  return el("div", { class: "progress" },
    job.status !== "failed" && bar("Progress of " + nameOf(job), job.step, job.steps),
    el("small", {}, progressText(job)));
};

const welcome = () => el("div", { class: "card welcome" },
  el("h2", {}, "No jobs yet"),
  el("p", {}, "A job tunes a model on a file of examples. Choose one, look at what it holds, and "
    + "start."),
  el("a", { class: "button main", href: "#new" }, "New job"),
  el("p", { class: "dim" }, "Or from a script: OpenAI(base_url=\"" + location.origin
    + "/v1\") and client.fine_tuning.jobs.create(…)"));
