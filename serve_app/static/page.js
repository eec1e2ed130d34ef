"use strict";
const $ = (id) => document.getElementById(id);
const form = $("form");
let files = [];
let current = null;
let stream = null;

function headers(extra) {
  const key = form.elements.key.value.trim();
  return Object.assign(key ? { authorization: "Bearer " + key } : {}, extra || {});
}

async function call(method, url, options) {
  const answer = await fetch(url, Object.assign({ method, headers: headers() }, options || {}));
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  const problem = await answer.json().catch(() => ({ detail: "The service answered " + answer.status + "." }));
  throw new Error(problem.detail + (problem.hint ? " " + problem.hint : ""));
}

// Artifacts are fetched rather than linked, because a link cannot carry the API key.
async function blobUrl(url) {
  const answer = await fetch(url, { headers: headers() });
  if (!answer.ok) throw new Error("The service answered " + answer.status + ".");
  return URL.createObjectURL(await answer.blob());
}

function choose(list) {
  files = Array.from(list);
  const box = $("thumbs");
  box.replaceChildren();
  for (const file of files) {
    if (file.type.startsWith("image/")) {
      const image = document.createElement("img");
      image.src = URL.createObjectURL(file);
      image.alt = file.name;
      image.title = file.name;
      box.append(image);
    } else {
      const name = document.createElement("span");
      name.textContent = file.name;
      box.append(name);
    }
  }
  $("go").disabled = files.length === 0;
}

function options() {
  const e = form.elements;
  const value = { model: e.model.value, preset: e.preset.value, seed: Number(e.seed.value || 0) };
  if (e.target_faces.value) value.target_faces = Number(e.target_faces.value);
  if (e.texture_size.value) value.texture_size = Number(e.texture_size.value);
  value.formats = Array.from(e.formats.selectedOptions, (o) => o.value);
  if (e.rig.value) value.views = { rig: e.rig.value };
  return value;
}

async function submit(event) {
  event.preventDefault();
  $("form-error").textContent = "";
  $("go").disabled = true;
  const body = new FormData();
  for (const file of files) {
    const name = file.name.toLowerCase();
    body.append(name.endsWith(".zip") ? "archive" : name.endsWith(".json") ? "cameras" : "views", file);
  }
  body.append("options", JSON.stringify(options()));
  try {
    const key = crypto.randomUUID ? crypto.randomUUID() : String(Math.random()).slice(2);
    const job = await call("POST", "/v1/reconstructions", { body, headers: headers({ "idempotency-key": key }) });
    open(job.id);
  } catch (error) {
    $("form-error").textContent = error.message;
  }
  $("go").disabled = files.length === 0;
}

function open(id) {
  current = id;
  if (stream) stream.abort();
  $("job").hidden = false;
  $("picture").hidden = $("video").hidden = true;
  $("job-error").textContent = $("report").textContent = $("detail").textContent = "";
  $("downloads").replaceChildren();
  $("bar").value = 0;
  location.hash = id;
  $("curl").textContent =
    "curl -F views=@view_00.png -F views=@view_01.png \\\n     -F 'options=" + JSON.stringify(options()) + "' \\\n     " +
    location.origin + "/v1/reconstructions\ncurl -N " + location.origin + "/v1/reconstructions/" + id + "/events";
  refresh(id).then(() => follow(id, 0));
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
      if (answer.status !== 200) return;
      pause = 500;
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        text += value;
        const blocks = text.split("\n\n");
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
  if (kind === "progress") {
    $("bar").value = data.percent;
    $("status").textContent = data.stage + " " + data.step + " of " + data.steps;
    const parts = [];
    if (data.loss !== undefined) parts.push("loss " + data.loss.toPrecision(3));
    if (data.psnr !== undefined) parts.push("PSNR " + data.psnr.toFixed(1) + " dB");
    if (data.eta_s) parts.push(Math.round(data.eta_s) + " s left in this stage");
    $("detail").textContent = parts.join(" · ");
  } else if (kind === "preview") {
    show($("picture"), data.url, "the mesh after " + data.step + " steps");
  } else if (kind === "state") {
    $("status").textContent = data.state;
    list();
  } else if (kind === "done") {
    refresh(id);
  }
}

async function show(element, url, text) {
  try {
    const source = await blobUrl(url);
    if (element.src.startsWith("blob:")) URL.revokeObjectURL(element.src);
    element.src = source;
    element.alt = text;
    element.hidden = false;
  } catch (error) { /* the next preview comes soon */ }
}

async function refresh(id) {
  try {
    const job = await call("GET", "/v1/reconstructions/" + id);
    $("job-title").textContent = "Job " + id;
    $("status").textContent = job.state + (job.queue_position ? ", " + job.queue_position + " before it" : "");
    $("bar").value = job.percent;
    $("job-error").textContent = job.error ? job.error.message + " " + job.error.hint : "";
    $("report").textContent = job.report ? JSON.stringify(job.report, null, 2) : "";
    $("cancel").hidden = !job.links.cancel;
    const buttons = job.artifacts.map((artifact) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = artifact.name + " (" + Math.ceil(artifact.bytes / 1024) + " KiB)";
      button.addEventListener("click", async () => {
        const link = document.createElement("a");
        link.href = await blobUrl(artifact.url);
        link.download = artifact.name;
        link.click();
      });
      return button;
    });
    $("downloads").replaceChildren(...buttons);
    const named = (name) => job.artifacts.find((artifact) => artifact.name === name);
    if (named("thumbnail.png")) show($("picture"), named("thumbnail.png").url, "the finished mesh");
    if (named("turntable.mp4")) show($("video"), named("turntable.mp4").url, "the mesh turning");
  } catch (error) {
    $("job-error").textContent = error.message;
  }
}

async function list() {
  try {
    const page = await call("GET", "/v1/reconstructions?limit=20");
    const rows = page.items.map((job) => {
      const row = document.createElement("tr");
      const texts = [new Date(job.created_at).toLocaleString(), job.model + (job.kind === "export" ? " (export)" : ""), job.state];
      for (const text of texts) row.append(Object.assign(document.createElement("td"), { textContent: text }));
      const button = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: "open" });
      button.setAttribute("aria-label", "open job " + job.id);
      button.addEventListener("click", () => open(job.id));
      const cell = document.createElement("td");
      cell.append(button);
      row.append(cell);
      return row;
    });
    $("list").replaceChildren(...rows);
  } catch (error) {
    $("list").replaceChildren();
  }
}

async function models() {
  const found = await call("GET", "/v1/models").catch(() => ({ models: [] }));
  const select = $("model");
  select.append(new Option("auto", "auto"));
  for (const model of found.models) {
    const option = new Option(model.name + (model.ready ? "" : " (not installed)"), model.name);
    option.disabled = !model.ready;
    option.title = model.ready ? model.description + " Licence: " + model.licence : model.reason + " " + model.hint;
    select.append(option);
  }
}

form.addEventListener("submit", submit);
form.elements.key.addEventListener("change", list);
$("files").addEventListener("change", (event) => choose(event.target.files));
$("cancel").addEventListener("click", () => call("POST", "/v1/reconstructions/" + current + "/cancel").then(() => refresh(current)));
$("remove").addEventListener("click", () => call("DELETE", "/v1/reconstructions/" + current).then(() => { $("job").hidden = true; current = null; location.hash = ""; list(); }));
const drop = $("drop");
for (const kind of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") choose(event.dataTransfer.files);
  });
}
models();
list();
if (/^#[0-9a-f-]{36}$/.test(location.hash)) open(location.hash.slice(1));
