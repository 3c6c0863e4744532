// Elements, requests, and the view that is shown.

// Makes an element. Texts become text nodes: nothing that users wrote is ever read as markup.
const el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined)
      node.setAttribute(name, value);
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined
    && child !== false));
  return node;
};

const KEY = "jaxft.key";
const paths = {
  jobs: "/v1/fine_tuning/jobs",
  files: "/v1/files",
  own: "/v1/jaxft",
};

class Refused extends Error {
  constructor(status, error) {
    super(error.message || "The server answered " + status + ".");
    this.status = status;
    this.param = error.param;
  }
}

const authorization = () => {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: "Bearer " + key } : {};
};

let asked = null;  // the dialog that is open, whichever requests wait for it
const askForKey = () => {
  asked ??= new Promise((done) => {
    const dialog = document.getElementById("key");
    const form = dialog.querySelector("form"), input = dialog.querySelector("input");
    if (sessionStorage.getItem(KEY)) {
      document.getElementById("key-why").textContent = "The server does not know this API key.";
    }
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, input.value.trim());
      input.value = "";
      dialog.onclose = null;
      dialog.close();
      asked = null;
      done();
    };
    dialog.onclose = () => dialog.showModal();  // there is nothing to see without it
    dialog.showModal();
  });
  return asked;
};

const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

const errorOf = async (response) => {
  const body = await response.json().catch(() => ({}));
  return new Refused(response.status, body.error || {});
};

// Asks the server; `body` is sent as JSON. Without a key that it knows the page asks for one.
const request = async (method, path, body, signal) => {
  for (;;) {
    const response = await fetch(path, {
      method,
      signal,
      cache: "no-store",
      headers: { ...authorization(), ...(body ? { "Content-Type": "application/json" } : {}) },
      body: body ? JSON.stringify(body) : undefined,
    });
    const wait = response.status === 429 && Number(response.headers.get("retry-after"));
    if (response.status === 401) await askForKey();
    else if (wait) await pause(wait);
    else if (!response.ok) throw await errorOf(response);
    else return response;
  }
};
const get = async (path, signal) => (await request("GET", path, undefined, signal)).json();
const post = async (path, body, signal) => (await request("POST", path, body || {}, signal)).json();
const remove = (path) => request("DELETE", path);

// Yields the data of server-sent events.
const events = async function* (response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trim()).join("\n");
      if (data) yield data;
    }
  }
};

// Sends one piece of a form; fetch says nothing of how far it is.
const sendForm = (path, form, progress, signal) => new Promise((done, fail) => {
  const sent = new XMLHttpRequest();
  sent.open("POST", path);
  for (const [name, value] of Object.entries(authorization())) sent.setRequestHeader(name, value);
  sent.upload.onprogress = (event) => progress(event.loaded);
  sent.onerror = () => fail(new Error("The server cannot be reached."));
  sent.onabort = () => fail(new DOMException("", "AbortError"));
  sent.onload = () => {
    let body = {};
    try { body = JSON.parse(sent.responseText); } catch { /* such as from a proxy */ }
    if (sent.status < 300) done(body);
    else fail(new Refused(sent.status, body.error || {}));
  };
  signal?.addEventListener("abort", () => sent.abort());
  sent.send(form);
});

const PART = 64 * 2 ** 20;
// Stores a file on the server, a large one in parts; `progress` is told the share that is there.
const upload = async (file, progress, signal) => {
  await get(paths.files + "?limit=1", signal);  // a key is asked for before the long work
  const form = (name, content, more = {}) => {
    const made = new FormData();
    for (const [field, value] of Object.entries(more)) made.append(field, value);
    made.append(name, content, file.name);
    return made;
  };
  if (file.size <= 2 * PART) {
    return sendForm(paths.files, form("file", file, { purpose: "fine-tune" }),
      (sent) => progress(Math.min(1, sent / (file.size || 1))), signal);
  }
  const begun = await post("/v1/uploads", { bytes: file.size, filename: file.name,
    purpose: "fine-tune", mime_type: "application/jsonl" }, signal);
  const parts = [];
  for (let at = 0; at < file.size; at += PART) {
    const part = await sendForm("/v1/uploads/" + begun.id + "/parts",
      form("data", file.slice(at, at + PART)), (sent) => progress(Math.min(1, (at + sent) / file.size)), signal);
    parts.push(part.id);
  }
  return (await post("/v1/uploads/" + begun.id + "/complete", { part_ids: parts }, signal)).file;
};

// Calls a function again and again while its view is shown and the tab is seen.
const repeat = async (seconds, signal, call) => {
  while (!signal.aborted) {
    if (!document.hidden) {
      try {
        if (await call() === false) return;
      } catch (error) {
        if (!signal.aborted) notify(error);
      }
    }
    await pause(seconds);
  }
};

// Replaces what a box shows, unless that is what it shows already.
const paint = (box, key, make) => {
  const text = JSON.stringify(key);
  if (box.shown === text) return;
  box.shown = text;
  box.replaceChildren(...[make()].flat(9).filter(Boolean));
};

const trouble = (error) => el("p", { class: "trouble", role: "alert" }, messageOf(error));
const messageOf = (error) => error instanceof TypeError
  ? "The server cannot be reached." : error.message;

// Says an error above the view until something else is shown, or the next call succeeds.
const notify = (error) => {
  if (error.name === "AbortError") return;
  view.querySelector(":scope > .notice")?.remove();
  const notice = trouble(error);
  notice.classList.add("notice");
  view.prepend(notice);
};
const unnotify = () => view.querySelector(":scope > .notice")?.remove();

// Does what a button is for; it cannot be pressed again meanwhile.
const doing = (action) => async (event) => {
  const button = event.currentTarget;
  button.disabled = true;
  try {
    unnotify();
    await action(event);
  } catch (error) {
    notify(error);
  } finally {
    button.disabled = false;
  }
};

// Asks before something is lost; resolves to whether it is wished.
const confirmed = (title, text, verb) => new Promise((done) => {
  const dialog = document.getElementById("confirm");
  const [keep, go] = dialog.querySelectorAll("button");
  dialog.querySelector("h2").textContent = title;
  dialog.querySelector("p").textContent = text;
  go.textContent = verb;
  let wished = false;
  keep.onclick = () => dialog.close();
  dialog.querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    wished = true;
    dialog.close();
  };
  dialog.onclose = () => done(wished);
  dialog.showModal();
});

const view = document.getElementById("view");
const views = {};
let shown = new AbortController();

const partsOf = (hash) => {
  try {
    return hash.slice(1).split("/").map(decodeURIComponent);
  } catch {
    return [""];
  }
};

// Shows the view that the address names; what the last one waits for ends.
const show = () => {
  shown.abort();
  shown = new AbortController();
  const [name, ...rest] = partsOf(location.hash);
  const found = Object.hasOwn(views, name) ? name : "jobs";
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.hash === "#" + found;
    if (here) document.title = link.textContent + " · jaxft";
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const box = el("div");
  view.replaceChildren(box);
  views[found](box, shown.signal, ...rest);
};
