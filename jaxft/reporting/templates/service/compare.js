// Two models side by side: one prompt goes to both.

views.compare = async (box, signal, first, second) => {
  box.append(el("p", { class: "dim" }, PRODUCTION));
  const panes = el("div", { class: "panes" });
  const form = el("form", { class: "card prompt-form", "aria-label": "Prompt" });
  box.append(panes, form);
  let models;
  try {
    models = (await get(paths.own + "/models", signal)).data;
  } catch (error) {
    if (!signal.aborted) notify(error);
    return;
  }
  const names = models.map((model) => model.name);
  const sides = pairOf(models, first, second).map((name, i) =>
    pane("Model " + "AB"[i], names, name));
  panes.append(...sides.map((side) => side.element));

  const prompt = el("textarea", { rows: 2, required: true, "aria-label": "Prompt",
    placeholder: "Ask both" });
  const system = el("textarea", { rows: 2, "aria-label": "System prompt" });
  const temperature = el("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0.7 });
  const tokens = el("input", { type: "number", min: 1, max: 100000, step: 1, value: 256 });
  const send = el("button", { class: "main" }, "Send");
  const stop = el("button", { type: "button", disabled: true }, "Stop");
  const clear = el("button", { type: "button" }, "Clear");
  form.append(prompt,
    el("details", {}, el("summary", {}, "System prompt"), system),
    el("div", { class: "actions" },
      labelled("Temperature", temperature), labelled("Most tokens", tokens),
      el("span", { class: "room" }), clear, stop, send));

  let under = null;
  signal.addEventListener("abort", () => under?.abort());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = prompt.value.trim();
    if (!text || under) return;
    under = new AbortController();
    prompt.value = "";
    send.disabled = clear.disabled = true;
    stop.disabled = false;
    const options = { temperature: Number(temperature.value), max_tokens: Number(tokens.value) };
    await Promise.all(sides.map((side) => side.ask(text, system.value.trim(), options,
      under.signal)));
    under = null;
    send.disabled = clear.disabled = false;
    stop.disabled = true;
  });
  stop.addEventListener("click", () => under?.abort());
  clear.addEventListener("click", () => sides.forEach((side) => side.clear()));
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
};

// Two models that are worth comparing: a tuned one, the newest if none is named, and its base.
const pairOf = (models, first, second) => {
  if (second) return [first, second];
  const known = (name) => models.find((model) => model.name === name);
  const tuned = models.filter((model) => model.job);
  const newest = tuned.find((model) => !isCheckpoint(model.name)) || tuned[0];
  const one = known(first) || newest;
  const base = (known(one?.base) || models.find((model) => !model.job))?.name;
  return one?.job ? [base, one.name] : [one?.name ?? base, newest?.name ?? base];
};

const pane = (title, models, name) => {
  const select = el("select", { "aria-label": title },
    models.map((item) => option(item, item)));
  if (models.includes(name)) select.value = name;
  // A phone cuts long names in the box that they are chosen in.
  const whole = el("small", { class: "whole-name", "aria-hidden": "true" });
  const list = el("div", { class: "turns", role: "log", "aria-label": "Answers of " + title,
    tabindex: 0 });
  let turns = [];
  const clear = () => {
    turns = [];
    list.replaceChildren(el("p", { class: "empty" }, "Nothing said yet."));
  };
  const choose = () => {
    whole.textContent = select.title = select.value;
    clear();
  };
  select.addEventListener("change", choose);
  choose();

  const ask = async (text, system, options, signal) => {
    if (!turns.length) list.replaceChildren();
    turns.push({ role: "user", content: text });
    const answer = el("pre", { class: "turn assistant busy" });
    const note = el("small", {});
    list.append(el("pre", { class: "turn user" }, text), answer, note);
    const toEnd = () => { list.scrollTop = list.scrollHeight; };
    toEnd();
    const begun = performance.now();
    const given = system ? [{ role: "system", content: system }, ...turns] : turns;
    let pieces = 0;
    try {
      const response = await request("POST", "/v1/chat/completions",
        { model: select.value, messages: given, stream: true, ...options }, signal);
      for await (const data of events(response)) {
        if (data === "[DONE]") break;
        const { choices, error } = JSON.parse(data);
        if (error) throw new Refused(500, error);
        const piece = choices?.[0]?.delta?.content;
        if (!piece) continue;
        pieces += 1;
        const follows = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
        answer.append(piece);
        if (follows) toEnd();
      }
      note.textContent = ((performance.now() - begun) / 1000).toFixed(1) + " s";
    } catch (error) {
      note.textContent = error.name === "AbortError" ? "stopped" : messageOf(error);
      if (error.name !== "AbortError") note.classList.add("bad");
    }
    answer.classList.remove("busy");
    if (pieces) turns.push({ role: "assistant", content: answer.textContent });
    else {
      turns.pop();  // what was not answered is no part of the conversation
      answer.append(el("em", {}, "no answer"));
    }
    toEnd();
  };
  return {
    element: el("section", { class: "pane card" }, labelled(title, select), whole, list),
    ask,
    clear,
  };
};
