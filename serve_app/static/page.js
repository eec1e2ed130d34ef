"use strict";
const $ = (id) => document.getElementById(id);
const form = $("form");
const BUSY_MS = 2000, IDLE_MS = 15000;
let files = [];
let current = null; // the id of the job that is shown
let stream = null;
let viewer = null;
let models = [];

// --- the API ---------------------------------------------------------------------------------------------------------

const key = () => form.elements.key.value.trim();
const headers = (extra) => Object.assign(key() ? { authorization: "Bearer " + key() } : {}, extra || {});

async function ask(method, url, options) {
  let answer;
  try {
    answer = await fetch(url, Object.assign({ method, headers: headers() }, options || {}));
  } catch (error) {
    throw new Error("The service cannot be reached.");
  }
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({ detail: "The service answered " + answer.status + "." }));
  throw new Error(problem.detail + (problem.hint ? " " + problem.hint : ""));
}

async function call(method, url, options) {
  const answer = await ask(method, url, options);
  return answer.status === 204 ? null : answer.json();
}

// A plain link or src cannot carry an API key; with one, files are fetched.
async function source(url) {
  return key() ? URL.createObjectURL(await (await ask("GET", url)).blob()) : url;
}

async function show(media, url, text) {
  try {
    const found = await source(url);
    if (media.src.startsWith("blob:")) URL.revokeObjectURL(media.src);
    media.src = found;
    media.hidden = false;
    if (text) media.setAttribute(media.tagName === "IMG" ? "alt" : "aria-label", text);
  } catch (error) { media.hidden = true; }
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// --- a new job -------------------------------------------------------------------------------------------------------

function fieldOf(file) {
  const name = file.name.toLowerCase();
  if (name.endsWith(".zip")) return "archive";
  if (name.endsWith(".json")) return "cameras";
  return /^depth/.test(name) ? "depth" : /^mask/.test(name) ? "masks" : "views";
}

function choose(list) {
  files = Array.from(list);
  const shown = files.slice(0, 24).map((file) => {
    if (!file.type.startsWith("image/")) return element("span", { textContent: file.name });
    return element("img", { src: URL.createObjectURL(file), alt: file.name, title: file.name, onload: (e) => URL.revokeObjectURL(e.target.src) });
  });
  if (files.length > shown.length) shown.push(element("span", { textContent: "and " + (files.length - shown.length) + " more" }));
  $("thumbs").replaceChildren(...shown);
  $("form-error").textContent = "";
  $("go").disabled = files.length === 0;
}

const formats = (of) => Array.from(of.querySelectorAll(".formats input:checked"), (box) => box.value);

function options() {
  const e = form.elements;
  const value = { model: e.model.value, preset: e.preset.value, seed: Number(e.seed.value || 0), formats: formats(form) };
  if (e.target_faces.value) value.target_faces = Number(e.target_faces.value);
  if (e.texture_size.value) value.texture_size = Number(e.texture_size.value);
  const views = { rig: e.rig.value || null, mask: e.mask.value, cameras: e.cameras.value };
  if (views.rig || views.mask !== "auto" || views.cameras !== "auto") value.views = views;
  return value;
}

const once = () => headers({ "idempotency-key": crypto.randomUUID ? crypto.randomUUID() : String(Math.random()).slice(2) });

async function submit(event) {
  event.preventDefault();
  $("form-error").textContent = "";
  $("go").disabled = true;
  $("go").textContent = "Sending …";
  const body = new FormData();
  for (const file of files) body.append(fieldOf(file), file);
  body.append("options", JSON.stringify(options()));
  try {
    const job = await call("POST", "/v1/reconstructions", { body, headers: once() });
    open(job.id, true);
  } catch (error) {
    $("form-error").textContent = error.message;
  }
  $("go").textContent = "Reconstruct";
  $("go").disabled = files.length === 0;
}

async function exportAgain(event) {
  event.preventDefault();
  const e = $("export").elements;
  const wanted = { formats: formats($("export")) };
  if (e.target_faces.value) wanted.target_faces = Number(e.target_faces.value);
  if (e.texture_size.value) wanted.texture_size = Number(e.texture_size.value);
  $("export-error").textContent = "";
  try {
    const job = await call("POST", "/v1/reconstructions/" + current + "/exports", {
      body: JSON.stringify(wanted), headers: Object.assign(once(), { "content-type": "application/json" }),
    });
    open(job.id, true);
  } catch (error) {
    $("export-error").textContent = error.message;
  }
}

// --- the job that is shown -------------------------------------------------------------------------------------------

async function open(id, focus) {
  close();
  current = id;
  location.hash = id;
  $("job").hidden = false;
  $("job-title").textContent = "Job " + id.slice(-8);
  $("job-title").title = id;
  for (const name of ["state", "status", "detail", "notes", "job-error", "export-error", "report"]) $(name).textContent = "";
  for (const name of ["viewer", "picture", "video", "results", "export", "cancel"]) $(name).hidden = true;
  for (const media of [$("picture"), $("video")]) media.removeAttribute("src");
  $("facts").replaceChildren();
  $("remove").textContent = "Delete";
  $("bar").value = 0;
  $("curl").textContent = "curl -N " + location.origin + "/v1/reconstructions/" + id + "/events\n" +
    "curl -OJ " + location.origin + "/v1/reconstructions/" + id + "/artifacts/mesh.glb";
  if (focus) {
    $("job-title").focus({ preventScroll: true });
    $("job").scrollIntoView({ block: "start" });
  }
  const job = await refresh(id);
  if (job && current === id && job.links.cancel) follow(id, 0);
}

function close() {
  if (stream) stream.abort();
  if (viewer) viewer.clear();
  current = stream = null;
  $("job").hidden = true;
  history.replaceState(null, "", location.pathname);
}

// EventSource cannot send an API key, so the stream is read by fetch; it is taken up again where it broke.
async function follow(id, last) {
  const abort = (stream = new AbortController());
  let pause = 500;
  while (current === id && !abort.signal.aborted) {
    try {
      const answer = await fetch("/v1/reconstructions/" + id + "/events", {
        headers: headers({ "last-event-id": String(last) }), signal: abort.signal,
      });
      if (answer.status === 204 || answer.status === 404) return void refresh(id);
      if (answer.status !== 200) throw new Error();
      pause = 500;
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let text = ""; ;) {
        const { done, value } = await reader.read();
        if (done) break;
        const blocks = (text + value).split("\n\n");
        text = blocks.pop();
        for (const block of blocks) {
          const fields = Object.fromEntries(block.split("\n").filter((l) => l && !l.startsWith(":")).map((l) => l.split(/: (.*)/s)));
          if (!fields.data) continue;
          last = Number(fields.id);
          told(id, fields.event, JSON.parse(fields.data));
          if (fields.event === "done") return;
        }
      }
    } catch (error) {
      if (abort.signal.aborted) return;
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(8000, pause * 2);
  }
}

function told(id, kind, data) {
  if (current !== id) return;
  if (kind === "progress") progress(data);
  else if (kind === "preview") show($("picture"), data.url, "the mesh after " + data.step + " steps");
  else if (kind === "state") { if (data.state === "running") state(data.state); list(); } // an end is told by done
  else if (kind === "done") { refresh(id); list(); }
}

const duration = (s) => (s < 90 ? Math.max(1, Math.round(s)) + " s" : s < 5400 ? Math.round(s / 60) + " min" : (s / 3600).toFixed(1) + " h");

function state(name) {
  $("state").textContent = name;
  $("state").dataset.state = name;
}

function progress(data) {
  $("bar").value = data.percent;
  const parts = [data.stage + (data.steps > 1 ? " " + data.step + " of " + data.steps : ""), Math.round(data.percent) + " %"];
  if (data.loss !== undefined) parts.push("loss " + data.loss.toPrecision(3));
  if (data.psnr !== undefined) parts.push("PSNR " + data.psnr.toFixed(1) + " dB");
  if (data.eta_s) parts.push("about " + duration(data.eta_s) + " left in this stage");
  $("detail").textContent = parts.join(" · ");
}

async function refresh(id) {
  let job;
  try {
    job = await call("GET", "/v1/reconstructions/" + id);
  } catch (error) {
    if (current === id) $("job-error").textContent = error.message;
    return null;
  }
  if (current !== id) return null;
  const over = !job.links.cancel;
  state(job.state);
  const why = job.chosen_because ? ", because " + job.chosen_because : "";
  const waits = job.state === "queued" && job.queue_position ? "; " + job.queue_position + " before it" : "";
  $("status").textContent = (job.kind === "export" ? "export of " : "") + job.model + why + waits;
  $("cancel").hidden = over;
  $("bar").hidden = over;
  $("detail").hidden = over;
  if (job.stage) progress(job);
  $("job-error").textContent = job.error ? job.error.message + " " + job.error.hint : "";
  $("report").textContent = job.report ? JSON.stringify(job.report, null, 2) : "No report yet.";
  $("results").hidden = !over || job.artifacts.length === 0;
  $("export").hidden = !job.links.exports;
  const first = (artifact) => (artifact.name === "mesh.glb" ? 0 : artifact.name.startsWith("mesh") ? 1 : 2);
  const sorted = [...job.artifacts].sort((a, b) => first(a) - first(b));
  $("downloads").replaceChildren(...sorted.map((artifact) => element("li", {}, download(artifact))));
  const named = (name) => job.artifacts.find((artifact) => artifact.name === name);
  if (!over) {
    if (named("preview.png")) show($("picture"), named("preview.png").url + "?step=" + job.step, "the mesh so far");
    return job;
  }
  if (job.report) facts(job);
  $("picture").hidden = true;
  const turning = await mesh(id, named("mesh.glb"));
  if (current !== id) return null;
  if (!turning && named("thumbnail.png")) show($("picture"), named("thumbnail.png").url, "the finished mesh");
  if (!turning && named("turntable.mp4")) show($("video"), named("turntable.mp4").url, "the mesh turning");
  return job;
}

function download(artifact) {
  const size = artifact.bytes < 2 ** 20 ? Math.ceil(artifact.bytes / 1024) + " KiB" : (artifact.bytes / 2 ** 20).toFixed(1) + " MiB";
  const link = element("a", { href: artifact.url, download: artifact.name, textContent: artifact.name + " " });
  link.append(element("span", { className: "soft", textContent: size }));
  link.addEventListener("click", async (event) => {
    if (!key()) return;
    event.preventDefault();
    try {
      element("a", { href: await source(artifact.url), download: artifact.name }).click();
    } catch (error) { $("job-error").textContent = error.message; }
  });
  return link;
}

async function mesh(id, artifact) {
  if (!artifact) return false;
  try {
    const bytes = await (await ask("GET", artifact.url)).arrayBuffer();
    if (current !== id) return true;
    $("viewer").hidden = false;
    viewer = viewer || new Viewer($("viewer"));
    await viewer.show(bytes);
    return true;
  } catch (error) { // no WebGL 2, or a GLB that the viewer does not know: pictures do as well
    $("viewer").hidden = true;
    return false;
  }
}

function facts(job) {
  const r = job.report, rows = [];
  const add = (name, value) => { if (value !== undefined && value !== null && value !== "") rows.push(element("dt", { textContent: name }), element("dd", { textContent: value })); };
  add("faces", r.faces === undefined ? null : r.faces.toLocaleString("en"));
  add("watertight", r.watertight === undefined ? null : r.watertight ? "yes" : "no");
  add("parts", r.components);
  add("texture", r.texture_size && r.texture_size + " × " + r.texture_size);
  if (r.quality) {
    add("PSNR", r.quality.psnr_db.toFixed(1) + " dB");
    add("SSIM", r.quality.ssim.toFixed(3));
    add("mask IoU", r.quality.mask_iou === null ? null : r.quality.mask_iou.toFixed(3));
    add("against", r.quality.views + " of the input views");
  }
  if (job.started_at && job.finished_at) add("took", duration((Date.parse(job.finished_at) - Date.parse(job.started_at)) / 1000));
  add("kept until", job.expires_at && new Date(job.expires_at).toLocaleString());
  $("facts").replaceChildren(...rows);
  $("notes").textContent = [...(r.warnings || []), ...(r.licence_notes || [])].join(" ");
}

async function act(method, url, after) {
  try {
    await call(method, url);
    await after();
  } catch (error) { $("job-error").textContent = error.message; }
  list();
}

// --- all jobs --------------------------------------------------------------------------------------------------------

let older = 1; // pages that are shown
let timer = null;

async function list() {
  clearTimeout(timer);
  let busy = false;
  try {
    let items = [], next = "";
    for (let page = 0; page < older && next !== null; page++) {
      const found = await call("GET", "/v1/reconstructions?limit=20" + (next && "&cursor=" + next));
      items = items.concat(found.items);
      next = found.next;
    }
    const had = new Map(Array.from($("list").children, (row) => [row.dataset.id, row]));
    $("list").replaceChildren(...items.map((job) => fill(had.get(job.id) || line(job), job)));
    $("list-note").textContent = items.length ? "" : "None yet.";
    $("more").hidden = next === null;
    busy = items.some((job) => job.links.cancel);
  } catch (error) {
    $("list-note").textContent = error.message;
  }
  timer = setTimeout(list, busy ? BUSY_MS : IDLE_MS);
}

function line(job) {
  const row = element("li", {});
  row.dataset.id = job.id;
  const what = element("span", { className: "what" }, element("span", {}), element("span", { className: "soft" }));
  const button = element("button", { type: "button" }, element("span", { className: "blank" }), what, element("span", { className: "state" }));
  button.addEventListener("click", () => open(job.id, true));
  row.append(button);
  return row;
}

function fill(row, job) {
  const [picture, what, end] = row.firstChild.children;
  what.children[0].textContent = (job.kind === "export" ? "export · " : "") + job.model + " · " + job.options.preset;
  what.children[1].textContent = new Date(job.created_at).toLocaleString();
  end.textContent = job.state === "running" ? Math.round(job.percent) + " %" : job.state;
  end.dataset.state = job.state;
  row.firstChild.setAttribute("aria-current", String(job.id === current));
  const thumbnail = job.artifacts.find((artifact) => artifact.name === "thumbnail.png");
  if (thumbnail && picture.tagName !== "IMG") {
    const image = element("img", { alt: "", loading: "lazy" });
    picture.replaceWith(image);
    show(image, thumbnail.url);
  }
  return row;
}

// --- the start -------------------------------------------------------------------------------------------------------

let asking = null;
const starting = (model) => !model.ready && model.reason.includes("is starting"); // jobs wait for it

async function listModels() {
  clearTimeout(asking);
  const found = await call("GET", "/v1/models").catch(() => null);
  if (found && JSON.stringify(found.models) !== JSON.stringify(models)) {
    models = found.models;
    const chosen = $("model").value;
    const made = models.map((model) => element("option", {
      value: model.name, disabled: !model.ready && !starting(model), title: model.reason,
      textContent: model.name + (model.ready ? "" : starting(model) ? " (starting)" : " (not ready)"),
    }));
    $("model").replaceChildren(new Option("auto", "auto"), ...made);
    $("model").value = chosen;
    describe();
  }
  if (!found || models.some((model) => !model.ready)) asking = setTimeout(listModels, models.some(starting) ? BUSY_MS : IDLE_MS);
}

function describe() {
  const model = models.find((one) => one.name === $("model").value);
  const why = (one) => one.name + ": " + [one.reason, one.hint].filter(Boolean).join(" ");
  const waiting = models.filter((one) => !one.ready && (!model || one === model)).map(why);
  const what = model ? model.description + " Licence: " + model.licence + "." : "auto goes by what is given and installed.";
  $("model-note").textContent = [what, ...waiting].join(" ");
}

for (const box of document.querySelectorAll(".formats")) {
  const chosen = box.closest("form") === form ? ["glb", "obj", "ply"] : ["glb"];
  for (const name of ["glb", "obj", "ply", "stl", "usdz"]) {
    box.append(element("label", {}, element("input", { type: "checkbox", value: name, checked: chosen.includes(name) }), name));
  }
}
form.addEventListener("submit", submit);
$("export").addEventListener("submit", exportAgain);
$("model").addEventListener("change", describe);
form.elements.key.addEventListener("change", () => { list(); listModels(); });
$("files").addEventListener("change", (event) => choose(event.target.files));
$("close").addEventListener("click", () => { close(); list(); });
$("more").addEventListener("click", () => { older += 1; list(); });
$("cancel").addEventListener("click", () => act("POST", "/v1/reconstructions/" + current + "/cancel", () => refresh(current)));
$("remove").addEventListener("click", () => {
  if ($("remove").textContent === "Delete") return void ($("remove").textContent = "Delete for good?");
  act("DELETE", "/v1/reconstructions/" + current, close);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") choose(event.dataTransfer.files);
  });
}
function visit() {
  const id = location.hash.slice(1);
  if (/^[0-9a-f-]{36}$/.test(id) && id !== current) open(id);
}
window.addEventListener("hashchange", visit);
listModels();
list();
visit();
