// Models and files.

views.models = (box, signal) => {
  const models = el("div", {}, el("p", { class: "empty" }, "Loading…")), files = el("div");
  box.append(el("h2", { class: "first" }, "Models"), models, el("h2", {}, "Files"), files);
  const look = async () => {
    const [known, stored] = await Promise.all([get(paths.own + "/models", signal),
      get(paths.files + "?limit=200", signal)]);
    unnotify();
    paint(models, known.data, () => modelsTable(known.data, look));
    paint(files, stored, () => [filesTable(stored.data, look),
      stored.has_more && el("p", { class: "dim" }, "The newest 200 are shown.")]);
  };
  repeat(5, signal, look);
};

const erase = (kind, name, path, text, look) => button("Delete", async () => {
  if (!await confirmed("Delete " + name + "?", text, "Delete the " + kind)) return;
  await remove(path);
  await look();
}, { class: "danger", "aria-label": "Delete " + name });

const modelsTable = (models, look) => table("Models", ["Model", "Of", "Created", ""],
  models.map((model) => [
    el("code", {}, model.name),
    model.job ? el("a", { href: jobLink(model.job) }, "step " + count(model.step) + " of a job")
      : "this server",
    el("span", { class: "time" }, model.job ? ago(model.created_at) : "–"),
    el("div", { class: "actions" },
      el("a", { class: "button", href: "#compare/" + encodeURIComponent(model.name) },
        "Try"),
      model.job && downloads(model.name, model.forms, ""),
      model.job && erase("model", model.name, "/v1/models/" + encodeURIComponent(model.name),
        isCheckpoint(model.name) ? "It is no longer served by this name."
          : "Its checkpoints and downloads go with it.", look)),
  ]), "No models.");

const LARGEST_SAVED = 256 * 2 ** 20;  // bytes that a tab holds at once
const filesTable = (files, look) => table("Files", ["File", ">Size", "Purpose", "Created", ""],
  files.map((file) => [
    [el("span", { class: "long" }, file.filename), el("small", {}, el("code", {}, file.id))],
    size(file.bytes),
    file.purpose + (file.status === "processed" ? "" : ", " + file.status),
    [el("span", { class: "time" }, ago(file.created_at)), file.expires_at && el("small", {}, "expires "
      + moment(file.expires_at))],
    el("div", { class: "actions" },
      file.purpose === "fine-tune" && el("a", { class: "button",
        href: "#new/" + encodeURIComponent(file.id) }, "New job"),
      file.bytes <= LARGEST_SAVED && button("Save", () => save(file)),
      erase("file", file.filename, paths.files + "/" + file.id,
        "It is gone then; what was trained on it stays.", look)),
  ]), "No files. A new job uploads one.");
