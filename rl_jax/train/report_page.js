"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = document.getElementById("mark").namespaceURI;
const by = id => document.getElementById(id);

/** An element with attributes and children; strings become text, never markup. */
function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") for (const [key, set] of Object.entries(value)) element.style.setProperty(key, set);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}

/** A number as a person reads it: four digits at most, "-" where there is none. */
function figure(value, unit = "") {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value === "NaN" ? "NaN" : value.replace("Infinity", "∞");
  if (unit === "share") return (100 * value).toFixed(Math.abs(value) < 0.0995 && value !== 0 ? 2 : 1) + " %";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

function scaled(value, unit) {
  const names = ["", "k", "M", "G", "T", "P", "E"];
  let power = 0;
  for (let base = unit === "B" ? 1024 : 1000; Math.abs(value) >= base && power < 6; power++) value /= base;
  const name = unit === "B" && power ? names[power].toUpperCase() + "iB" : names[power] + unit;
  return Number(value.toPrecision(3)).toLocaleString("en") + " " + name;
}

// ---- heading

function heading() {
  by("name").textContent = data.name;
  by("subtitle").textContent = data.subtitle;
  for (const tile of data.tiles) {
    by("tiles").append(make("div", {class: "tile"}, make("div", {class: "label"}, tile.label),
      make("div", {class: "value"}, tile.value), make("div", {class: "detail"}, tile.detail)));
  }
  by("notes").hidden = !data.notes.length;
  by("notes").append(...data.notes.map(note => make("li", {}, note)));
}

function evaluation() {
  const counts = data.evaluation.filter(row => row.name.startsWith("count/"));
  const rows = data.evaluation.filter(row => !row.name.startsWith("count/"));
  by("evaluation").hidden = !rows.length;
  const table = by("evaluation").querySelector("table");
  table.append(make("tr", {}, make("th", {}, "estimate"), make("th", {class: "number"}, "value"),
    make("th", {class: "number"}, "standard error"), make("th", {}, "0 to 100 %, ± 1 standard error")));
  for (const row of rows) {
    table.append(make("tr", {}, make("td", {}, row.name), make("td", {class: "number"}, figure(row.value, "share")),
      make("td", {class: "number"}, figure(row.stderr, "share")), make("td", {class: "whisker"}, whisker(row))));
  }
  by("evaluation").querySelector(".aside").textContent = counts.filter(row => row.value).map(row =>
    row.name.slice(6).replace(/^left_out@/, "problems left out of pass@").replace(/^failed$/, "verifications failed")
    + ": " + figure(row.value)).join(" · ");
}

function whisker(row) {
  const svg = draw("svg", {viewBox: "0 0 100 8", preserveAspectRatio: "none"},
    draw("rect", {x: 0, y: 2.5, width: 100, height: 3, rx: 1, style: {fill: "var(--line)"}}));
  if (typeof row.value !== "number") return svg;
  const error = typeof row.stderr === "number" ? row.stderr : 0;
  const low = 100 * Math.max(0, row.value - error), high = 100 * Math.min(1, row.value + error);
  svg.append(draw("rect", {x: 0, y: 2.5, width: 100 * row.value, height: 3, style: {fill: "var(--accent)"}}),
    draw("rect", {x: low, y: 1, width: Math.max(high - low, .4), height: 6, rx: .6,
      style: {fill: "var(--accent)", opacity: .45}}));
  return svg;
}

// ---- learning curves

const view = {axis: "step", smoothing: 0, cursor: null};
const PAD = {left: 48, right: 10, top: 16, bottom: 22};
const HEIGHT = 190;

const position = row => view.axis === "step" ? row.step : row.time_s / 60;

/** Gaussian mean over the neighbours in the same phase; `width` is its standard deviation in points. */
function smoothed(points, width) {
  const reach = Math.ceil(3 * width);
  const weights = Array.from({length: reach + 1}, (_, i) => Math.exp(-.5 * (i / width) ** 2));
  return points.map((point, i) => {
    let sum = 0, mass = 0;
    for (let j = Math.max(0, i - reach); j <= Math.min(points.length - 1, i + reach); j++) {
      if (points[j].phase !== point.phase) continue;
      sum += weights[Math.abs(i - j)] * points[j].y;
      mass += weights[Math.abs(i - j)];
    }
    return {...point, y: sum / mass};
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough * .999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n <= high / step + 1e-9; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

/** Powers of ten when there are enough of them, otherwise 1, 2, 5 times those; as logarithms. */
function logTicks(low, high) {
  const inside = factors => {
    const found = [];
    for (let p = Math.floor(low); p <= high; p++) found.push(...factors.map(f => p + Math.log10(f)));
    return found.filter(level => level >= low && level <= high);
  };
  const powers = inside([1]), every = Math.ceil(powers.length / 5);
  return powers.length > 2 ? powers.filter((_, i) => i % every === 0) : inside(high - low > 1.4 ? [1, 3] : [1, 2, 5]);
}

class Curve {
  constructor(chart) {
    this.chart = chart;
    this.legend = make("div", {class: "legend"});
    this.svg = draw("svg", {role: "img", "aria-label": chart.title});
    const unit = chart.unit && chart.unit !== "share" ? " " + chart.unit : "";
    this.element = make("div", {class: "chart"}, make("h3", {}, chart.title, make("span", {}, unit)),
      chart.note ? make("p", {class: "note"}, chart.note) : null, this.legend, this.svg);
    this.series = chart.series.map((name, i) => this.read(name, `var(--s${i % 6})`));
    this.svg.addEventListener("pointermove", event => this.point(event));
    this.svg.addEventListener("pointerleave", () => { view.cursor = null; curves.forEach(curve => curve.mark()); });
  }

  read(name, colour) {
    const points = [], missing = [];
    for (const row of data.rows) {
      const y = row[name], error = row[name + "_stderr"];
      if (typeof y === "number") points.push({row, y, phase: row.phase, error: typeof error === "number" ? error : 0});
      else if (y !== undefined) missing.push(row);
    }
    return {name, colour, points, missing, banded: points.some(point => point.error)};
  }

  /** Scales: x is shared by all charts, so that phases line up. */
  frame() {
    const width = this.svg.clientWidth || 350, xs = data.rows.map(position);
    let x0 = Math.min(...xs), x1 = Math.max(...xs);
    if (x0 === x1) { x0 -= .5; x1 += .5; }
    const values = this.series.flatMap(s => s.points.flatMap(p => s.banded ? [p.y - p.error, p.y + p.error] : [p.y]));
    let y0 = Math.min(...values), y1 = Math.max(...values);
    this.log = this.chart.log && y0 > 0 && y1 / y0 > 10;
    if (this.log) { y0 = Math.log10(y0); y1 = Math.log10(y1); }
    if (!values.length) { y0 = 0; y1 = 1; }
    const room = (y1 - y0) * .06 || Math.abs(y0) * .1 || .5;
    const floor = !this.log && y0 >= 0 && y0 - room < 0 ? 0 : y0 - room;
    const span = {x0, x1, y0: floor, y1: y1 + room};
    if (this.chart.unit === "share" && y1 <= 1) span.y1 = Math.min(span.y1, 1.02);
    this.x = v => PAD.left + (v - x0) / (x1 - x0) * (width - PAD.left - PAD.right);
    this.y = v => HEIGHT - PAD.bottom
      - ((this.log ? Math.log10(v) : v) - span.y0) / (span.y1 - span.y0) * (HEIGHT - PAD.top - PAD.bottom);
    return {...span, width};
  }

  render() {
    const frame = this.frame();
    this.svg.setAttribute("viewBox", `0 0 ${frame.width} ${HEIGHT}`);
    this.svg.replaceChildren(...this.phases(frame), ...this.axes(frame), ...this.series.flatMap(s => this.lines(s)));
    this.cursor = draw("g");
    this.svg.append(this.cursor);
    this.mark();
  }

  phases(frame) {
    const ends = data.phases.map(phase => view.axis === "step"
      ? [phase.first - .5, phase.last + .5] : [phase.start_s / 60, phase.end_s / 60]);
    return data.phases.flatMap((phase, i) => {
      const left = this.x(Math.max(i ? ends[i][0] : -Infinity, frame.x0));
      const right = this.x(Math.min(i + 1 < ends.length ? ends[i + 1][0] : Infinity, frame.x1));
      const shade = i % 2 || right <= left ? [] : [draw("rect", {class: "phase", x: left, y: PAD.top, width: right - left,
        height: HEIGHT - PAD.top - PAD.bottom})];
      const named = data.phases.length > 1 && right - left > 7 * phase.name.length
        ? [draw("text", {x: left + 3, y: PAD.top - 5}, phase.name)] : [];
      return [...shade, ...named];
    });
  }

  axes(frame) {
    const bottom = HEIGHT - PAD.bottom, marks = [];
    const levels = this.log ? logTicks(frame.y0, frame.y1) : ticks(frame.y0, frame.y1, 5);
    for (const level of levels) {
      const value = this.log ? 10 ** level : level, y = this.y(value);
      marks.push(draw("line", {class: "grid", x1: PAD.left, x2: frame.width - PAD.right, y1: y, y2: y}),
        draw("text", {x: PAD.left - 7, y: y + 4, "text-anchor": "end"}, this.tick(value)));
    }
    for (const at of ticks(frame.x0, frame.x1, Math.max(2, frame.width / 65))) {
      if (view.axis === "step" && at % 1) continue;
      marks.push(draw("text", {x: this.x(at), y: bottom + 16, "text-anchor": "middle"}, scaled(at, "").replace(" ", "")));
    }
    return marks;
  }

  tick(value) {
    if (this.chart.unit === "share") return Number((100 * value).toPrecision(6)) + " %";
    if (Math.abs(value) >= 1e4) return scaled(value, "").replace(" ", "");
    return figure(Number(value.toPrecision(6))).replace(/\.?0+e/, "e");
  }

  lines(series) {
    const {points, colour} = series, found = [], few = points.length < 30;
    const weight = series.banded || !this.chart.smooth ? 0 : view.smoothing * points.length;
    const smooth = weight ? smoothed(points, weight) : points;
    if (series.banded) {
      for (const run of this.runs(points)) {
        const edge = [...run.map(p => [p, p.y + p.error]), ...run.reverse().map(p => [p, p.y - p.error])];
        found.push(draw("polygon", {class: "band", style: {fill: colour},
          points: edge.map(([p, y]) => this.at(p, y)).join(" ")}));
      }
    }
    if (weight) found.push(...this.runs(points).map(run => this.line(run, "raw", colour)));
    found.push(...this.runs(smooth).map(run => this.line(run, "smooth", colour)));
    if (few) found.push(...points.map(p => draw("circle", {cx: this.x(position(p.row)), cy: this.y(p.y), r: 2.6,
      style: {fill: colour, opacity: weight ? .45 : 1}})));
    found.push(...series.missing.map(row => draw("path", {class: "missing",
      d: `M${this.x(position(row))} ${HEIGHT - PAD.bottom - 7} l4 7 h-8 z`})));
    return found;
  }

  at(point, y = point.y) { return `${this.x(position(point.row)).toFixed(1)},${this.y(y).toFixed(1)}`; }

  line(run, kind, colour) {
    return draw("polyline", {class: kind, style: {stroke: colour}, points: run.map(p => this.at(p)).join(" ")});
  }

  runs(points) {
    const found = [];
    points.forEach((p, i) => { if (!i || p.phase !== points[i - 1].phase) found.push([]); found.at(-1).push(p); });
    return found;
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    let best = null, least = Infinity;
    for (const row of data.rows) {
      const away = Math.abs(this.x(position(row)) - (event.clientX - box.left));
      if (away < least) { least = away; best = row; }
    }
    view.cursor = best;
    curves.forEach(curve => curve.mark());
  }

  /** What tells a series from the others: the part after the slash, or all of it. */
  label(name) {
    const short = other => other.split("/").slice(1).join("/");
    return this.series.filter(s => short(s.name) === short(name)).length > 1 ? name : short(name);
  }

  /** The legend says the value under the cursor, or the one before it where there is none; without cursor, the last. */
  mark() {
    const row = view.cursor;
    this.cursor.replaceChildren();
    if (row) {
      const x = this.x(position(row));
      this.cursor.append(draw("line", {class: "cursor", x1: x, x2: x, y1: PAD.top, y2: HEIGHT - PAD.bottom}));
    }
    this.legend.replaceChildren(...this.series.map(s => this.entry(s, row)));
  }

  entry(series, row) {
    const missing = row && series.missing.includes(row);
    const point = missing ? undefined : row ? series.points.findLast(p => p.row.step <= row.step) : series.points.at(-1);
    if (row && point) this.cursor.append(draw("circle",
      {cx: this.x(position(point.row)), cy: this.y(point.y), r: 3.4, style: {fill: series.colour}}));
    const label = this.series.length > 1 ? this.label(series.name) + " " : "";
    const at = point ? point.row : row;
    const where = !at ? "" : row ? ` at step ${at.step.toLocaleString("en")}` : " last";
    return make("div", {}, make("i", {style: {background: series.colour}}), make("span", {}, label),
      make("b", {}, figure(missing ? row[series.name] : point?.y, this.chart.unit)),
      point?.error ? ` ± ${figure(point.error, this.chart.unit)}` : "", make("span", {}, where));
  }
}

const curves = data.charts.map(chart => new Curve(chart));

function drawCurves() {
  view.smoothing = Number(by("smoothing").value);
  view.axis = by("axis").value;
  curves.forEach(curve => curve.render());
}

function learning() {
  by("curves").hidden = !curves.length;
  by("charts").append(...curves.map(curve => curve.element));
  by("smoothing").value = data.rows.length < 30 ? 0 : .02;
  by("curves-aside").textContent = (data.per_point > 1 ? `Each point is the mean of ${data.per_point} steps. ` : "")
    + "Thin lines are the raw values, thick lines their running mean; a triangle at the bottom marks a value that is not finite.";
  for (const id of ["smoothing", "axis"]) by(id).addEventListener("input", drawCurves);
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.round(entry.contentRect.width) !== width) {
      width = Math.round(entry.contentRect.width);
      requestAnimationFrame(drawCurves);
    }
  }).observe(by("charts"));
}

// ---- sampled groups

const numeric = data.groups.flatMap(step => step.groups.flatMap(group => group.samples.map(s => s.reward)))
  .filter(value => typeof value === "number");
const worst = numeric.reduce((a, b) => Math.min(a, b), 0), best = numeric.reduce((a, b) => Math.max(a, b), 1);
const chosen = {step: Math.max(0, data.groups.length - 1), group: 0};

/** From bad to good by reward; grey where there is none. */
function tone(sample) {
  if (sample.failed || typeof sample.reward !== "number") return "var(--s5)";
  return `color-mix(in oklab, var(--good) ${(100 * (sample.reward - worst) / (best - worst)).toFixed(0)}%, var(--bad))`;
}

function byReward(samples) {
  const key = s => typeof s.reward === "number" ? s.reward : -Infinity;
  return by("order").value === "reward" ? [...samples].sort((a, b) => key(b) - key(a) || 0) : samples;
}

function signed(value) { return (typeof value === "number" && value > 0 ? "+" : "") + figure(value); }

function card(sample) {
  const top = make("div", {class: "top"},
    make("span", {class: "reward"}, sample.failed ? "not scored" : "reward " + figure(sample.reward)),
    sample.advantage === null || sample.advantage === undefined ? null
      : make("span", {class: "credit"}, "advantage " + signed(sample.advantage)),
    sample.failed ? make("span", {class: "badge bad"}, "verifier failed") : null,
    sample.finished === false ? make("span", {class: "badge"}, "cut off") : null);
  const facts = [["score", figure(sample.score)],
    ...Object.entries(sample.parts || {}).map(([name, value]) => [name, figure(value)]),
    ["tokens", figure(sample.tokens)], ["log p", figure(sample.logp_sum)], ["per token", figure(sample.logp_mean)],
    ["entropy", figure(sample.entropy)]];
  const list = make("dl", {}, ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  return make("div", {class: "sample", style: {"--tone": tone(sample)}}, top,
    make("pre", {}, String(sample.completion ?? "")), list);
}

function showGroups() {
  const step = data.groups[chosen.step];
  chosen.group = Math.min(chosen.group, step.groups.length - 1);
  by("step").value = chosen.step;
  by("step-name").textContent = `${step.phase} step ${step.step.toLocaleString("en")}`;
  by("earlier").disabled = chosen.step === 0;
  by("later").disabled = chosen.step === data.groups.length - 1;
  by("picks").replaceChildren(...step.groups.map((group, i) => {
    const pick = make("button", {type: "button", "aria-pressed": i === chosen.group}, `group ${i + 1}`,
      make("span", {class: "dots"}, ...byReward(group.samples).slice(0, 32).map(s => make("i", {style: {"--tone": tone(s)}}))));
    pick.addEventListener("click", () => { chosen.group = i; showGroups(); by("picks").children[i].focus(); });
    return pick;
  }));
  const group = step.groups[chosen.group];
  by("group").replaceChildren(
    make("div", {class: "prompt"}, make("div", {class: "heading"}, "prompt"), make("pre", {}, String(group.prompt))),
    make("div", {class: "samples"}, ...byReward(group.samples).map(card)));
}

function browser() {
  by("groups").hidden = !data.groups.length;
  if (!data.groups.length) return;
  by("step").max = data.groups.length - 1;
  const go = to => { chosen.step = Math.min(Math.max(to, 0), data.groups.length - 1); showGroups(); };
  by("step").addEventListener("input", () => go(Number(by("step").value)));
  by("earlier").addEventListener("click", () => go(chosen.step - 1));
  by("later").addEventListener("click", () => go(chosen.step + 1));
  by("order").addEventListener("input", showGroups);
  by("groups-aside").textContent = "Log-probabilities and entropies in nats, under the distribution that sampled."
    + (data.group_steps_left_out ? ` ${data.group_steps_left_out} further steps are in rollouts.jsonl.` : "");
  showGroups();
}

// ---- costs and configuration

function plan() {
  by("plan").hidden = !data.plan.length;
  if (!data.plan.length) return;
  const columns = [...new Set(data.plan.flatMap(Object.keys))];
  const shown = (name, value) => typeof value !== "number" ? String(value ?? "–")
    : /bytes/.test(name) ? scaled(value, "B") : /flop/.test(name) ? scaled(value, "FLOP") : figure(value);
  const numberly = name => data.plan.some(row => typeof row[name] === "number") ? "number" : "";
  by("plan").querySelector("table").append(
    make("tr", {}, ...columns.map(name => make("th", {class: numberly(name)}, name.replaceAll("_", " ")))),
    ...data.plan.map(row => make("tr", {}, ...columns.map(name => make("td", {class: numberly(name)}, shown(name, row[name]))))));
}

const nested = value => value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length > 0;

/** Leaves of a nested mapping, with dotted names. */
function leaves(mapping, prefix = "") {
  return Object.entries(mapping).flatMap(([key, value]) =>
    nested(value) ? leaves(value, `${prefix}${key}.`) : [[prefix + key, value]]);
}

function setting(title, entries) {
  return make("div", {class: "setting"}, make("h3", {}, title), make("dl", {}, ...entries.flatMap(([name, value]) =>
    [make("dt", {}, name), make("dd", {}, typeof value === "string" ? value : JSON.stringify(value))])));
}

function configuration() {
  const entries = Object.entries(data.config), plain = entries.filter(([, value]) => !nested(value));
  by("config").hidden = !entries.length;
  if (plain.length) by("settings").append(setting("run", plain));
  by("settings").append(...entries.filter(([, value]) => nested(value)).map(([name, value]) => setting(name, leaves(value))));
}

heading(); evaluation(); learning(); browser(); plan(); configuration();
