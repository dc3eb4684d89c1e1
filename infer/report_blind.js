// Groups of clips that share reference, caption and seed; with names, or shuffled without them to be ranked.

const CRITERIA = ["motion", "text", "quality"];
const blind = { on: false, order: new Map(), ranks: {} };
const STORE = `motionlora ranking ${data.id}`;

function groupsOf(rows) {
  const groups = new Map();
  for (const row of rows) {
    const key = JSON.stringify([row.clip, row.caption, row.seed]);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(row);
  }
  return groups;
}

// What is ranked: every method that has a clip, no controls; a group of one cannot be ranked.
function rankable(rows) {
  const groups = groupsOf(rows.filter((row) => row.control === "none" && row.sheet !== null));
  return new Map([...groups].filter(([, members]) => members.length > 1));
}

function shuffled(key, members) {
  if (!blind.order.has(key)) {
    const order = members.map((row) => row.id);
    for (let i = order.length - 1; i > 0; i--) {
      const j = Math.floor(Math.random() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
    blind.order.set(key, order);
  }
  const order = blind.order.get(key);
  return members.slice().sort((a, b) => order.indexOf(a.id) - order.indexOf(b.id));
}

function drawGroups(rows) {
  players.forEach((player) => watcher.unobserve(player.canvas));
  players = [];
  const groups = blind.on ? rankable(rows) : groupsOf(rows);
  at("groups").classList.toggle("wide", data.sheets.some((sheet) => sheet.width > 128));
  at("groups").replaceChildren(...[...groups].map(([key, members]) => groupElement(key, members)));
  drawFrame();
}

function groupElement(key, members) {
  const first = members[0], source = data.sources[first.clip];
  const about = [first.clip, first.kind, `seed ${first.seed}`].filter((word) => word);
  const clips = [clipElement("reference", "reference", source.sheet, source.paths, null)];
  (blind.on ? shuffled(key, members) : members).forEach((row, index) => {
    const name = blind.on ? String.fromCharCode(65 + index % 26) : row.method;
    const below = blind.on ? rankElements(row, members.length) : [element("span", {}, caption(row))];
    const kind = row.status === "failed" ? "failed" : "made";
    clips.push(clipElement(name, kind, row.sheet, row.paths, below));
  });
  return element("section", { class: "group" }, element("h3", {}, first.caption),
    element("p", { class: "about" }, about.join(" \u00b7 ")), element("div", { class: "clips" }, ...clips));
}

function clipElement(name, kind, sheet, paths, below) {
  const made = element("figure", { class: kind });
  if (sheet !== null) {
    const player = new Player(sheet, paths, name);
    players.push(player);
    made.append(player.canvas);
  }
  made.append(element("figcaption", {}, element("b", {}, name), ...(below || [])));
  return made;
}

function caption(row) {
  if (row.status === "failed") return row.sentence;
  const measures = data.measures.filter((m) => m.name in row.values).slice(0, 5);
  return measures.map((m) => `${m.label} ${shown(row.values[m.name])}`).join(", ");
}

function rankElements(row, count) {
  return CRITERIA.map((criterion) => {
    const given = (blind.ranks[row.id] || {})[criterion] || "";
    const ranks = Array.from({ length: count }, (_, i) => String(i + 1));
    const select = element("select", { "data-criterion": criterion },
      ...["", ...ranks].map((rank) => element("option", { value: rank, selected: rank === String(given) }, rank || "rank")));
    select.addEventListener("change", () => {
      blind.ranks[row.id] = { ...blind.ranks[row.id], [criterion]: Number(select.value) || undefined };
      remember();
      drawProgress();
    });
    return element("label", {}, criterion, select);
  });
}

function complete() {
  return [...rankable(data.rows)].filter(([, members]) =>
    members.every((row) => CRITERIA.every((criterion) => (blind.ranks[row.id] || {})[criterion])));
}

function drawProgress() {
  at("progress").textContent = `${complete().length} of ${rankable(data.rows).size} groups ranked`;
}

// Methods are told by opaque numbers, so that the file does not unblind whoever opens it.
function exported() {
  const rankings = complete().map(([, members]) => members.map((row) => ({ cell: row.id, ...blind.ranks[row.id] })));
  return JSON.stringify({ format: "motionlora ranking 1", comparison: data.id, rater: at("rater").value.trim(),
    saved: new Date().toISOString(), rankings }, null, 1);
}

function save() {
  const text = exported();
  at("exported").hidden = false;
  at("exported").value = text;
  const link = element("a", { download: `ranking-${data.id}.json`, href: URL.createObjectURL(new Blob([text], { type: "application/json" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Ranks outlive a reload where the browser lets a local page keep them.
function remember() {
  try { localStorage.setItem(STORE, JSON.stringify(blind.ranks)); } catch { /* this browser keeps nothing */ }
}

function recall() {
  try { blind.ranks = JSON.parse(localStorage.getItem(STORE)) || {}; } catch { blind.ranks = {}; }
}

function drawAll() {
  const rows = rowsChosen();
  at("numbers").hidden = blind.on;
  at("filter-method").closest("label").hidden = blind.on;
  at("ranking").hidden = !blind.on;
  for (const place of ["summary", "gains", "cells", "costs", "learning"]) at(place).replaceChildren();
  if (!blind.on) {
    drawSummary(rows);
    drawGains();
    drawCells(rows);
    drawCosts(rows);
    drawLearning(rows);
  }
  drawGroups(rows);
  drawProgress();
}

function setBlind(on) {
  blind.on = on;
  at("blind").setAttribute("aria-pressed", String(on));
  at("blind").textContent = on ? "Show names" : "Blind mode";
  if (on) { chosen.method = ""; at("filter-method").value = ""; }
  at("facts").hidden = on;
  drawAll();
}

recall();
drawFacts();
fillFilters(drawAll);
at("blind").addEventListener("click", () => setBlind(!blind.on));
at("export").addEventListener("click", save);
startPlaying();
drawAll();
