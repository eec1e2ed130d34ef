"use strict";
// A reader for OpenAPI that needs no library: routes, parameters, bodies, answers, and the schemas that they name.
function element(tag, text, ...children) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

function named(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.type === "array") return "list of " + (named(schema.items) || "values");
  if (schema.anyOf) return schema.anyOf.map(named).join(" or ");
  return schema.enum ? schema.enum.join(" | ") : schema.type || "";
}

function table(head, rows) {
  const body = rows.map((row) => element("tr", "", ...row.map((text) => element("td", text))));
  return element("table", "", element("thead", "", element("tr", "", ...head.map((text) => element("th", text)))), element("tbody", "", ...body));
}

function properties(schema) {
  return table(["field", "type", "meaning"], Object.entries(schema.properties || {}).map(([name, value]) => [name, named(value), value.description || ""]));
}

function route(path, method, operation) {
  const head = element("h2");
  head.append(Object.assign(element("span", method.toUpperCase()), { className: "method" }), path);
  const box = element("section", "", head, element("p", operation.summary || ""));
  const parameters = operation.parameters || [];
  if (parameters.length) {
    box.append(table(["parameter", "in", "type", "meaning"], parameters.map((p) => [p.name, p.in, named(p.schema), p.description || ""])));
  }
  for (const [type, value] of Object.entries((operation.requestBody || {}).content || {})) {
    box.append(element("p", "Body: " + type), value.schema.properties ? properties(value.schema) : element("p", named(value.schema)));
  }
  const answers = Object.entries(operation.responses || {}).map(([status, value]) => [status, Object.keys(value.content || {}).join(", "), value.description || ""]);
  box.append(element("details", "", element("summary", "Answers"), table(["status", "type", "meaning"], answers)));
  return box;
}

fetch("/openapi.json").then((answer) => answer.json()).then((document_) => {
  const found = [];
  for (const [path, methods] of Object.entries(document_.paths)) {
    for (const [method, operation] of Object.entries(methods)) found.push(route(path, method, operation));
  }
  for (const [name, schema] of Object.entries(document_.components.schemas)) {
    found.push(element("section", "", element("h2", name), element("p", schema.description || ""), properties(schema)));
  }
  document.getElementById("routes").replaceChildren(...found);
});
