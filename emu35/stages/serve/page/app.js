"use strict";
// The page talks to /v1/chat/completions like any client. An "entry" is one question with its
// answer: plain data, drawn anew whenever it changes, so that history needs nothing of its own.

const find = (id) => document.getElementById(id);
const TASK_NAMES = { t2i: "Image", x2i: "Edit", story: "Story", howto: "How-to", explore: "Explore", vla: "Robot", chat: "Chat" };
const SMALL = 420; // pixels across below which a picture is enlarged
const state = { model: null, references: [], entries: [], shown: null, running: null };

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// Settings

function task() {
  return document.querySelector("input[name=task]:checked")?.value ?? "t2i";
}

function buildTasks() {
  for (const name of Object.keys(TASK_NAMES)) {
    if (!state.model.tasks[name]) continue;
    if (name !== "chat" && !state.model.images && state.model.tasks[name].one_image) continue;
    const input = make("input", { type: "radio", name: "task", value: name });
    find("tasks").append(make("label", {}, input, make("span", { textContent: TASK_NAMES[name] })));
  }
  const first = document.querySelector("input[name=task]");
  if (first) first.checked = true;
  const ratio = find("ratio");
  ratio.append(make("option", { value: "", textContent: "as the model likes" }));
  for (const [name, shape] of Object.entries(state.model.ratios)) {
    if (!shape.length || name === "default") continue;
    if ((shape[0] + 1) * (shape[1] + 1) > state.model.max_model_len) continue;
    ratio.append(make("option", { value: name, textContent: name }));
  }
  ratio.append(make("option", { value: "custom", textContent: "rows \u00d7 columns" }));
  settle();
}

function settle() {
  const numbers = state.model?.tasks[task()];
  if (numbers) find("guidance").placeholder = String(numbers.guidance);
  const custom = find("ratio").value === "custom";
  find("custom").hidden = !custom;
  find("size").classList.toggle("wide", !custom);
  const entry = state.shown;
  find("follow-up").hidden = !(entry?.done && entry.ids.length && entry.finish !== "stopped" && !state.running);
}

function number(id) {
  const text = find(id).value.trim();
  return text === "" ? undefined : Number(text);
}

function settings() {
  const ratio = find("ratio").value;
  const sampling = { temperature: number("image_temperature"), top_k: number("image_top_k") };
  const body = {
    task: task(),
    guidance: number("guidance"),
    seed: number("seed"),
    max_tokens: number("max_tokens"),
    max_images: number("max_images"),
    temperature: number("temperature"),
    top_p: number("top_p"),
  };
  if (ratio === "custom") body.size = `${number("rows")}x${number("columns")}`;
  else if (ratio) body.ratio = ratio;
  if (sampling.temperature !== undefined || sampling.top_k !== undefined) body.image_sampling = sampling;
  return body;
}

// References

async function addFiles(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const url = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });
    state.references.push({ url, name: file.name });
  }
  drawReferences();
  const edit = document.querySelector("input[name=task][value=x2i]");
  if (edit && state.references.length && task() === "t2i") {
    edit.checked = true;
    settle();
  }
}

function drawReferences() {
  find("references").replaceChildren(
    ...state.references.map((reference, at) => {
      const remove = make("button", { type: "button", textContent: "\u00d7", title: `Remove ${reference.name}` });
      remove.onclick = (event) => {
        event.stopPropagation();
        state.references.splice(at, 1);
        drawReferences();
      };
      return make("figure", {}, make("img", { src: reference.url, alt: reference.name }), remove);
    }),
  );
}

// Asking

function newEntry() {
  const question = find("prompt").value.trim();
  const earlier = find("continue").checked && !find("follow-up").hidden ? state.shown : null;
  const images = state.references.map((reference) => ({ type: "image_url", image_url: { url: reference.url } }));
  const content = images.length ? [{ type: "text", text: question }, ...images] : question;
  const before = earlier ? [...earlier.messages, { role: "assistant", token_ids: earlier.ids }] : [];
  return {
    question,
    task: task(),
    messages: [...before, { role: "user", content }],
    settings: settings(),
    parts: [],
    thought: "",
    ids: [],
    tokens: 0,
    begun: performance.now(),
    seconds: 0,
    seed: null,
    finish: null,
    error: null,
    done: false,
  };
}

async function generate() {
  if (state.running) return;
  const entry = newEntry();
  state.entries.push(entry);
  state.shown = entry;
  const abort = new AbortController();
  state.running = { entry, abort };
  setRunning(true);
  draw();
  drawHistory();
  try {
    await stream(entry, abort.signal);
  } catch (error) {
    if (abort.signal.aborted) entry.finish = "stopped";
    else entry.error = error.message || String(error);
  }
  entry.seconds = (performance.now() - entry.begun) / 1000;
  entry.done = true;
  state.running = null;
  setRunning(false);
  draw();
  drawHistory();
  checkHealth();
}

function setRunning(running) {
  find("generate").disabled = running;
  find("stop").disabled = !running;
  find("generate").textContent = running ? "Generating..." : "Generate";
  settle();
}

function headers() {
  const key = find("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function stream(entry, signal) {
  const body = {
    ...entry.settings,
    messages: entry.messages,
    stream: true,
    stream_previews: true,
    return_token_ids: true,
  };
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers(),
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) {
    const found = await response.json().catch(() => null);
    throw new Error(found?.error?.message ?? `the server answered ${response.status}`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ") && event !== "data: [DONE]") take(entry, JSON.parse(event.slice(6)));
    }
    if (state.shown === entry) draw();
  }
  if (entry.finish === null) throw new Error("the connection ended before the answer did");
}

function take(entry, chunk) {
  if (chunk.error) throw new Error(chunk.error.message);
  entry.seed = chunk.seed ?? entry.seed;
  for (const choice of chunk.choices) {
    if (choice.token_ids) entry.ids.push(...choice.token_ids);
    entry.tokens = entry.ids.length;
    const delta = choice.delta;
    if (delta.reasoning_content) entry.thought += delta.reasoning_content;
    if (delta.content) addText(entry, delta.content);
    for (const part of delta.parts ?? []) addPart(entry, part);
    if (choice.finish_reason) entry.finish = choice.finish_reason;
    if (choice.problems) entry.problems = choice.problems;
  }
}

function addText(entry, text) {
  const last = entry.parts.at(-1);
  if (last?.kind === "text") last.text += text;
  else entry.parts.push({ kind: "text", text });
}

function addPart(entry, part) {
  let image = entry.parts.find((each) => each.kind === "image" && each.number === part.number);
  if (!image) {
    image = { kind: "image", number: part.number, rowsDone: 0 };
    entry.parts.push(image);
  }
  if (part.size) image.size = part.size.split("*").map(Number);
  if (part.type === "image_url") {
    image.url = part.image_url.url;
  } else {
    image.rows = part.rows;
    image.rowsDone = part.rows_done;
    if (part.preview) Object.assign(image, { preview: part.preview, previewRows: part.rows_done });
  }
}

// Drawing. Nodes of parts are kept, so that a picture does not flicker when text comes after it.

function draw() {
  settle();
  const entry = state.shown;
  if (!entry) return;
  const answer = find("answer");
  if (answer.entry !== entry) {
    answer.entry = entry;
    answer.replaceChildren(
      make("div", { className: "asked" }, make("p", { textContent: entry.question }), make("span", { className: "tag", textContent: TASK_NAMES[entry.task] })),
    );
    answer.body = answer.appendChild(make("div", { className: "side" }));
    answer.foot = answer.appendChild(make("div", { className: "facts" }));
    answer.nodes = [];
    answer.thought = null;
  }
  drawThought(answer, entry);
  entry.parts.forEach((part, at) => {
    answer.nodes[at] ??= answer.body.appendChild(part.kind === "text" ? make("p", { className: "words" }) : pictureNode());
    const last = at === entry.parts.length - 1;
    if (part.kind === "text") drawText(answer.nodes[at], part, !entry.done && last);
    else drawPicture(answer.nodes[at], part, entry);
  });
  drawEnd(answer, entry);
}

function drawThought(answer, entry) {
  if (!entry.thought) return;
  if (!answer.thought) {
    const text = make("p");
    answer.thought = make("details", { className: "thought" }, make("summary", { textContent: "Thoughts" }), text);
    answer.thought.text = text;
    answer.body.prepend(answer.thought);
  }
  answer.thought.text.textContent = entry.thought;
}

function drawText(node, part, writing) {
  node.textContent = part.text;
  node.classList.toggle("writing", writing);
}

function pictureNode() {
  const node = make("figure", { className: "picture" });
  node.image = make("img", { alt: "" });
  node.image.hidden = true;
  node.edge = make("div", { className: "edge" });
  node.canvas = make("div", { className: "canvas growing" }, node.image, node.edge);
  node.label = make("span");
  node.bar = make("progress", { max: 1, value: 0 });
  node.link = make("a", { textContent: "Download" });
  node.link.hidden = true;
  node.append(node.canvas, make("figcaption", {}, node.label, node.bar, node.link));
  return node;
}

function drawPicture(node, part, entry) {
  const [rows, columns] = part.size ?? [1, 1];
  const side = state.model?.pixels_per_code ?? 16;
  node.canvas.style.aspectRatio = `${columns} / ${rows}`;
  // Small pictures are shown large, and their pixels stay pixels.
  node.style.width = `${Math.max(SMALL, Math.min(640, columns * side))}px`;
  node.canvas.classList.toggle("small", columns * side < SMALL);
  const url = part.url ?? part.preview;
  if (url && node.image.getAttribute("src") !== url) node.image.src = url;
  node.image.hidden = !url;
  node.image.alt = `Image ${part.number + 1}: ${entry.question}`;
  const share = part.url ? 1 : (part.rowsDone ?? 0) / (part.rows || rows);
  node.image.style.height = part.url ? "100%" : `${(100 * (part.previewRows ?? 0)) / (part.rows || rows)}%`;
  node.canvas.classList.toggle("growing", !part.url && !entry.done);
  node.edge.hidden = Boolean(part.url) || entry.done;
  node.edge.style.top = `${100 * share}%`;
  node.bar.hidden = Boolean(part.url) || entry.done;
  node.bar.value = share;
  const pixels = `${columns * side} \u00d7 ${rows * side}`;
  node.label.textContent = part.url ? `${pixels} pixels` : `row ${part.rowsDone} of ${part.rows ?? rows}${entry.done ? ", unfinished" : ""}`;
  node.link.hidden = !part.url;
  if (part.url) {
    node.link.href = part.url;
    node.link.download = `emu35_${entry.seed}_${part.number}.png`;
  }
}

const ENDINGS = { stop: "complete", length: "cut at the token limit", abort: "ended by the server", stopped: "stopped" };

function drawEnd(answer, entry) {
  answer.error?.remove();
  if (entry.error) answer.error = answer.body.appendChild(make("p", { className: "error", textContent: entry.error }));
  else if (entry.problems?.length) answer.error = answer.body.appendChild(make("p", { className: "notice", textContent: entry.problems.join("; ") }));
  else if (!entry.done && !entry.parts.length && !entry.thought) answer.error = answer.body.appendChild(make("p", { className: "notice", textContent: "Waiting for the first token..." }));
  const seconds = entry.done ? entry.seconds : (performance.now() - entry.begun) / 1000;
  const facts = [entry.done ? (entry.error ? "failed" : ENDINGS[entry.finish]) : "generating", `${entry.tokens} tokens`, `${seconds.toFixed(1)} s`];
  if (entry.tokens) facts.push(`${(entry.tokens / Math.max(seconds, 0.001)).toFixed(0)} tokens/s`);
  if (entry.seed !== null) facts.push(`seed ${entry.seed}`);
  answer.foot.replaceChildren(...facts.map((fact) => make("span", { textContent: fact })));
  if (entry.done) {
    const again = make("button", { className: "ghost", type: "button", textContent: "Use again" });
    again.onclick = () => useAgain(entry);
    answer.foot.append(again);
  }
}

function useAgain(entry) {
  find("prompt").value = entry.question;
  if (entry.seed !== null) find("seed").value = entry.seed;
  const input = document.querySelector(`input[name=task][value=${entry.task}]`);
  if (input) input.checked = true;
  settle();
  find("prompt").focus();
}

function drawHistory() {
  const nav = find("history");
  nav.hidden = !state.entries.length;
  nav.replaceChildren(
    ...state.entries.map((entry) => {
      const picture = entry.parts.findLast((part) => part.kind === "image" && (part.url || part.preview));
      const cover = make("div", { className: "cover" });
      if (picture) {
        cover.style.backgroundImage = `url("${picture.url ?? picture.preview}")`;
        cover.classList.toggle("small", (picture.size?.[1] ?? 0) * (state.model?.pixels_per_code ?? 16) < SMALL);
      } else {
        cover.textContent = entry.error ? "failed" : (entry.parts.find((part) => part.kind === "text")?.text ?? "...").slice(0, 60);
      }
      const button = make("button", { type: "button" }, cover, make("span", { className: "title", textContent: entry.question }));
      button.setAttribute("aria-current", String(entry === state.shown));
      button.onclick = () => {
        state.shown = entry;
        draw();
        drawHistory();
      };
      return button;
    }),
  );
}

// The server

async function checkHealth() {
  const pill = find("health");
  try {
    const found = await (await fetch("/health")).json();
    pill.className = `pill ${found.status === "ok" ? "ok" : found.status === "unhealthy" ? "bad" : ""}`;
    pill.lastElementChild.textContent = found.status === "ok" ? "ready" : found.status;
    pill.title = found.reason ?? "";
    if (!state.model && found.status !== "starting") await loadModel();
  } catch {
    pill.className = "pill bad";
    pill.lastElementChild.textContent = "no connection";
  }
}

async function loadModel() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) {
    find("more").open = true;
    find("model").textContent = "needs an API key";
    return;
  }
  state.model = (await response.json()).data[0];
  find("model").textContent = state.model.id;
  find("drop").hidden = !state.model.images;
  buildTasks();
}

// Events

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
find("stop").onclick = () => state.running?.abort.abort();
find("composer").addEventListener("change", settle);
find("key").addEventListener("change", checkHealth);
find("dice").onclick = () => (find("seed").value = Math.floor(Math.random() * 2 ** 31));
find("theme").onclick = () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
});
const drop = find("drop");
drop.onclick = () => find("files").click();
drop.onkeydown = (event) => {
  if (event.target !== drop) return; // a reference's button
  if (event.key === " " || (event.key === "Enter" && !event.ctrlKey)) {
    event.preventDefault();
    find("files").click();
  }
};
find("files").onclick = (event) => event.stopPropagation();
find("files").onchange = async (event) => {
  await addFiles(event.target.files);
  event.target.value = "";
};
for (const kind of ["dragenter", "dragover"]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  addFiles(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) addFiles(event.clipboardData.files);
});
checkHealth();
setInterval(checkHealth, 5000);
