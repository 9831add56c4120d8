// Filters, sorts and draws the images of the page; everything is in the element #data.
"use strict";

const [{ sources }, ...entries] = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("filters");
const STEP = 60; // images drawn at a time
let shown = STEP;

function unique(values) {
  return [...new Set(values)].sort();
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function field(name, title, options) {
  const select = make("select", { name });
  for (const [value, text] of options) select.append(make("option", { value }, text));
  form.append(make("label", {}, title, select));
}

function choices(values) {
  return [["", "any"], ...unique(values).map((value) => [value, value])];
}

const categories = unique(entries.flatMap((entry) => Object.keys(entry.attributes)));
const scores = unique(entries.flatMap((entry) => Object.keys(entry.scores)));

field("label", "class", choices(entries.map((entry) => entry.label)));
if (entries.some((entry) => entry.reasons.length)) {
  field("verdict", "gate", [["", "any"], ["kept", "kept"], ["rejected", "rejected"]]);
}
for (const name of categories) {
  field(`attribute ${name}`, name, choices(entries.map((entry) => entry.attributes[name]).filter(Boolean)));
}
for (const name of scores) {
  const input = make("input", { name: `score ${name}`, type: "number", step: "any", placeholder: "any" });
  form.append(make("label", {}, `${name} at least`, input));
}
if (scores.length) {
  const orders = scores.flatMap((name) => [[`-${name}`, `${name}, best first`], [`+${name}`, `${name}, worst first`]]);
  field("order", "sort by", [["", "class and number"], ...orders]);
}

function wanted(entry, values) {
  for (const [key, value] of values) {
    if (!value) continue;
    const [kind, name] = [key.split(" ")[0], key.slice(key.indexOf(" ") + 1)];
    if (kind === "label" && entry.label !== value) return false;
    if (kind === "verdict" && (entry.reasons.length ? "rejected" : "kept") !== value) return false;
    if (kind === "attribute" && entry.attributes[name] !== value) return false;
    if (kind === "score" && !(entry.scores[name] >= Number(value))) return false;
  }
  return true;
}

function sorted(list, order) {
  if (!order) return list;
  const [sign, name] = [order[0] === "-" ? -1 : 1, order.slice(1)];
  const key = (entry) => entry.scores[name] ?? Infinity * sign;
  return [...list].sort((a, b) => sign * (key(a) - key(b)) || 0);
}

function card(entry) {
  const image = make("img", { src: entry.image, alt: `synthetic ${entry.label}` });
  image.onpointerenter = () => { image.src = entry.outlined; };
  image.onpointerleave = () => { image.src = entry.image; };
  const pair = make("div", { className: "pair" },
    make("figure", {}, image, make("figcaption", {}, `synthetic, seed ${entry.seed ?? "unknown"}`)));
  if (entry.source) {
    pair.append(make("figure", {}, make("img", { src: sources[entry.source], alt: `real ${entry.source_label}` }),
      make("figcaption", {}, `real, ${entry.source_label}: ${entry.source}`)));
  }
  const article = make("article", { className: entry.reasons.length ? "rejected" : "" }, pair,
    make("h2", {}, `${entry.label} · ${entry.name}`), make("p", {}, entry.text));
  const listed = Object.entries(entry.scores).map(([name, value]) => `${name} ${value}`).join(", ");
  if (listed) article.append(make("small", {}, listed));
  if (entry.reasons.length) article.append(make("p", { className: "reasons" }, `rejected: ${entry.reasons.join("; ")}`));
  return article;
}

function draw() {
  const values = [...new FormData(form)];
  const list = sorted(entries.filter((entry) => wanted(entry, values)), form.elements.order?.value);
  document.getElementById("count").value = `${list.length} of ${entries.length} images.`;
  document.getElementById("images").replaceChildren(...list.slice(0, shown).map(card));
  document.getElementById("more").hidden = list.length <= shown;
  const chosen = new URLSearchParams(values.filter(([, value]) => value)).toString();
  history.replaceState(null, "", `#${chosen}`); // a link to what is shown
}

for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
  if (form.elements[name]) form.elements[name].value = value;
}
form.oninput = () => { shown = STEP; draw(); };
form.onsubmit = (event) => event.preventDefault();
document.getElementById("more").onclick = () => { shown += STEP; draw(); };
draw();
