// Drawings beside the tables: quality against cost, losses and head maps of LoRAs.

const SVG = at("blank").namespaceURI;

function drawn(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function hueOf(index) {
  return `hsl(${(index * 137) % 360} 70% 50%)`;
}

// Lines or dots in a frame with the ends of both axes written on it. Series have label, points [[x, y], ...], dots.
function chart(series, xLabel, yLabel, logarithmic) {
  const [wide, high, left, low] = [340, 190, 46, 34];
  const points = series.flatMap((line) => line.points);
  const xOf = (x) => (logarithmic ? Math.log10(Math.max(x, 1e-3)) : x);
  const [x0, x1] = ends(points.map(([x]) => xOf(x))), [y0, y1] = ends(points.map(([, y]) => y));
  const place = ([x, y]) => [left + (wide - left - 12) * (xOf(x) - x0) / (x1 - x0), 10 + (high - low - 10) * (y1 - y) / (y1 - y0)];
  const text = (x, y, words, anchor) => drawn("text", { x, y, "text-anchor": anchor }, words);
  const back = logarithmic ? (x) => 10 ** x : (x) => x;
  const parts = [
    drawn("path", { d: `M${left} 10V${high - low}H${wide - 12}`, class: "axis" }),
    text(left - 4, 18, y1.toPrecision(2), "end"), text(left - 4, high - low, y0.toPrecision(2), "end"),
    text(left, high - low + 14, back(x0).toPrecision(3), "start"), text(wide - 12, high - low + 14, back(x1).toPrecision(3), "end"),
    text((left + wide) / 2, high - 4, `${yLabel} against ${xLabel}`, "middle"),
  ];
  series.forEach((line, index) => {
    const at = line.points.map(place), color = hueOf(index), title = drawn("title", {}, line.label);
    if (!line.dots) parts.push(drawn("polyline", { points: at.map((p) => p.join()).join(" "), fill: "none", stroke: color, "stroke-width": 1.5 }, title));
    else at.forEach(([cx, cy]) => parts.push(drawn("circle", { cx, cy, r: 4, fill: color }, title),
      cx > wide * 0.6 ? text(cx - 6, cy + 4, line.label, "end") : text(cx + 6, cy + 4, line.label, "start")));
  });
  return drawn("svg", { viewBox: `0 0 ${wide} ${high}`, class: "chart", role: "img", "aria-label": `${yLabel} against ${xLabel}` }, ...parts);
}

function ends(values) {
  const low = Math.min(...values), high = Math.max(...values);
  return low < high ? [low, high] : [low - 0.5, high + 0.5];
}

// Medians of the first headline measure by the seconds that a clip takes, tuning included.
function drawCosts(rows) {
  const measure = data.headlines.find((name) => rows.some((row) => name in row.values));
  const secondsOf = (row) => Object.entries(row.cost).filter(([name]) => name.startsWith("seconds")).reduce((sum, [, value]) => sum + value, 0);
  const series = [...new Set(rows.map((row) => row.method))].map((method) => {
    const own = rows.filter((row) => row.method === method && row.control === "none" && measure in row.values && secondsOf(row) > 0);
    return { label: method, dots: true, points: own.length ? [[median(own.map(secondsOf)), median(own.map((row) => row.values[measure]))]] : [] };
  }).filter((line) => line.points.length);
  const label = data.measures.filter((m) => m.name === measure).map((m) => m.label)[0];
  at("costs").replaceChildren(...(series.length ? [chart(series, "seconds a clip, tuning included", label, true)] : []));
}

// Every LoRA that a method uses: its losses by stage, and the heads that it was measured on.
function drawLearning(rows) {
  const clips = new Set(rows.map((row) => row.clip)), methods = new Set(rows.map((row) => row.method));
  const shown = data.loras.filter((lora) => clips.has(lora.clip) && methods.has(lora.method));
  at("learning").closest("details").hidden = shown.length === 0;
  at("learning").replaceChildren(...shown.map((lora) => {
    const stages = Object.entries(lora.curves).map(([label, points]) => ({ label, points }));
    const seconds = lora.seconds === null ? "" : `, ${lora.seconds.toFixed(0)} s of tuning`;
    return element("figure", {}, ...(stages.length ? [chart(stages, "step", "loss", false)] : []),
      ...(lora.heads ? [headMap(lora.heads)] : []),
      element("figcaption", {}, element("b", {}, `${lora.method}, ${lora.clip}`), `rank ${lora.rank}${seconds}`));
  }));
}

// A cell a head: blue leans to its own frame, vermillion to its own place over time; framed if the LoRA acts on it.
function headMap(heads) {
  const cell = 14, blocks = heads.scores.length, width = heads.scores[0].length;
  const cells = heads.scores.flatMap((row, block) => row.map(([spatial, temporal], head) => {
    const lean = Math.max(-1, Math.min(1, Math.log((temporal + 1e-9) / (spatial + 1e-9)) / Math.log(4)));
    const colour = lean > 0 ? "213 94 0" : "0 114 178";
    const title = drawn("title", {}, `block ${block}, head ${head}: spatial ${spatial.toFixed(3)}, temporal ${temporal.toFixed(3)}`);
    return drawn("rect", { x: head * cell + 1, y: block * cell + 1, width: cell - 3, height: cell - 3, class: heads.trained[block][head] ? "trained" : "head",
      fill: `rgb(${colour} / ${(0.15 + 0.85 * Math.abs(lean)).toFixed(2)})` }, title);
  }));
  return drawn("svg", { viewBox: `0 0 ${width * cell} ${blocks * cell}`, class: "heads", role: "img", style: `max-width:${width * cell * 1.5}px`,
    "aria-label": "heads by block: blue spatial, vermillion temporal, framed where the LoRA acts" }, ...cells);
}
