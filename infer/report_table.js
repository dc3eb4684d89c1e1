"use strict";
// The page's data, what is chosen of it, and its tables. Whatever comes from people is set as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const chosen = { method: "", clip: "", caption: "" };

function at(id) {
  return document.getElementById(id);
}

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function rowsChosen() {
  return data.rows.filter((row) => Object.entries(chosen).every(([name, value]) => value === "" || row[name] === value));
}

function median(values) {
  const sorted = values.slice().sort((a, b) => a - b);
  const middle = sorted.length / 2;
  return sorted.length % 2 ? sorted[Math.floor(middle)] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function figure(row, name) {
  return name in row.values ? row.values[name] : name in row.cost ? row.cost[name] : null;
}

// Columns have a label, a title, `get` (number, text or null) and perhaps `words` for text. Missing goes last.
function sortableTable(place, columns, rows, kindOf) {
  let sorted = null;
  const body = element("tbody");
  const heads = columns.map((column, index) =>
    element("th", { scope: "col", title: column.title || false, class: column.words ? "words" : false },
      element("button", { type: "button", onclick: () => sortBy(index) }, column.label)));
  function fill(list) {
    body.replaceChildren(...list.map((row) => element("tr", { class: kindOf(row) || false },
      ...columns.map((column) => element("td", { class: column.words ? "words" : false }, shown(column.get(row)))))));
  }
  function sortBy(index) {
    const falling = sorted && sorted.index === index ? !sorted.falling : !columns[index].words;
    sorted = { index, falling };
    heads.forEach((head, i) => head.removeAttribute("aria-sort"));
    heads[index].setAttribute("aria-sort", falling ? "descending" : "ascending");
    const get = columns[index].get;
    fill(rows.slice().sort((a, b) => compared(get(a), get(b), falling)));
  }
  fill(rows);
  place.replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body));
}

function compared(a, b, falling) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "number" ? a - b : String(a).localeCompare(String(b));
  return falling ? -order : order;
}

function shown(value) {
  if (value === null) return "\u2013";
  if (typeof value !== "number") return value;
  return Number.isInteger(value) ? String(value) : Math.abs(value) < 100 ? value.toFixed(2) : value.toPrecision(4);
}

function figureColumns(get) {
  const measures = data.measures.map((m) => ({ label: m.label, title: `${m.unit}; ${m.source}`, name: m.name }));
  const costs = data.costs.map((name) => ({ label: name.replace("_", " "), title: "measured when the clip was made", name }));
  const present = [...measures, ...costs].filter(({ name }) => data.rows.some((row) => figure(row, name) !== null));
  return present.map((column) => ({ ...column, get: (row) => get(row, column.name) }));
}

function drawSummary(rows) {
  const methods = [...new Set(rows.map((row) => row.method))].map((method) => {
    const own = rows.filter((row) => row.method === method);
    return { method, control: own[0].control, own, done: own.filter((row) => row.status === "done").length };
  });
  const medianOf = (line, name) => {
    const values = line.own.map((row) => figure(row, name)).filter((value) => value !== null);
    return values.length ? median(values) : null;
  };
  const columns = [{ label: "method", words: true, get: (line) => line.method }, { label: "cells", get: (line) => line.done }];
  sortableTable(at("summary"), [...columns, ...figureColumns(medianOf)], methods, (line) => line.control !== "none" && "control");
}

function drawGains() {
  const label = Object.fromEntries(data.measures.map((m) => [m.name, m.label]));
  const words = (name) => ({ label: name, words: true, get: (gain) => gain[name] });
  const number = (name, title) => ({ label: title || name, get: (gain) => gain[name] });
  const columns = [words("method"), words("against"), { label: "measure", words: true, get: (gain) => label[gain.measure] },
    number("mean", "gain"), number("low", "95 % from"), number("high", "to"), number("p_holm", "p (Holm)"), number("pairs")];
  sortableTable(at("gains"), columns, data.gains, () => "");
}

function drawCells(rows) {
  const words = (name) => ({ label: name, words: true, get: (row) => row[name] });
  const columns = [words("method"), words("clip"), words("caption"), { label: "seed", get: (row) => row.seed },
    ...figureColumns(figure), { label: "note", words: true, get: (row) => row.sentence || null }];
  sortableTable(at("cells"), columns, rows, (row) => (row.status === "failed" ? "failed" : row.control !== "none" && "control"));
}

function drawFacts() {
  at("facts").querySelector("dl").replaceChildren(
    ...Object.entries(data.heading).flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
}

function fillFilters(onchange) {
  for (const name of Object.keys(chosen)) {
    const select = at(`filter-${name}`);
    const values = [...new Set(data.rows.map((row) => row[name]))];
    select.replaceChildren(element("option", { value: "" }, "all"), ...values.map((value) => element("option", { value }, value)));
    select.addEventListener("change", () => { chosen[name] = select.value; onchange(); });
  }
}
