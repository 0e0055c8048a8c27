// The two charts of the last runs: how long each took, and what became of its records.

import uPlot from "./uplot.js";
import { ENDED_BADLY, ENDED_WELL, OUTCOMES, count, moment, nameOf, outcome, short, span } from "./words.js";

const HEIGHT = 190;
// Stacked from the baseline up. Unchanged records are most of all, and would hide the others.
const hidden = new Set(["unchanged"]);
const byId = (id) => document.getElementById(id);
const host = { durations: byId("durations"), outcomes: byId("outcomes") };
const plots = {};
let runs = [];
let now = 0;

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function statusColour(run) {
  if (ENDED_BADLY.includes(run.status)) return colour("bad");
  return colour(ENDED_WELL.includes(run.status) ? "c-run" : "warn");
}

// Show these runs, the newest last.
export function draw(shown, at) {
  runs = shown;
  now = at;
  for (const [name, data] of Object.entries({ durations: durations(), outcomes: outcomes() })) {
    if (plots[name]) plots[name].setData(data);
    else plots[name] = make(name, data);
  }
  describe();
}

function xs() {
  return runs.map((_, index) => index);
}

function durations() {
  return [xs(), runs.map((run) => run.duration_s ?? 0)];
}

function visible() {
  return OUTCOMES.filter((name) => !hidden.has(name));
}

// The sum up to and with each outcome; drawn from the largest down, each over the one before.
function outcomes() {
  const sums = runs.map(() => 0);
  const rows = OUTCOMES.map((name) =>
    runs.map((run, index) => (sums[index] += hidden.has(name) ? 0 : run[name])),
  );
  return [xs(), ...rows.reverse()];
}

function make(name, data) {
  const bars = uPlot.paths.bars({ size: [0.7, 26], radius: name === "durations" ? 0.15 : 0 });
  const coloured = uPlot.paths.bars({
    size: [0.7, 26],
    radius: 0.15,
    disp: { fill: { unit: 3, values: () => runs.map(statusColour) } },
  });
  const series =
    name === "durations"
      ? [{ paths: coloured, fill: colour("c-run"), width: 0, points: { show: false } }]
      : [...OUTCOMES].reverse().map((each) => ({
          paths: bars, fill: colour(`c-${each}`), width: 0, points: { show: false },
        }));
  const plot = new uPlot(options(name, series), data, host[name]);
  new ResizeObserver(() => plot.setSize({ width: host[name].clientWidth, height: HEIGHT })).observe(host[name]);
  return plot;
}

function options(name, series) {
  const figure = name === "durations" ? (value) => (value ? span(value) : "0") : short;
  const axis = { stroke: colour("soft"), font: "12px system-ui, sans-serif", ticks: { show: false } };
  return {
    width: host[name].clientWidth,
    height: HEIGHT,
    padding: [10, 4, 0, 0],
    legend: { show: false },
    cursor: { y: false, points: { show: false }, drag: { x: false, y: false }, sync: { key: "runs" } },
    scales: {
      x: { time: false, range: () => [-0.6, Math.max(runs.length, 10) - 0.4] },
      y: { range: (_, low, high) => [0, (high || 1) * 1.08] },
    },
    axes: [
      {
        ...axis, grid: { show: false }, space: 90, size: 28,
        incrs: [1, 2, 5, 10, 20],
        values: (_, places) => places.map((place) => tick(place)),
      },
      {
        ...axis, size: 62, space: 36, grid: { stroke: colour("line"), width: 1 },
        incrs: name === "durations" ? undefined : [1, 2, 5].flatMap((n) => [...Array(13)].map((_, e) => n * 10 ** e)).sort((a, b) => a - b),
        values: (_, values) => values.map(figure),
      },
    ],
    series: [{}, ...series],
    hooks: { setCursor: [(plot) => tell(plot.cursor.idx)] },
  };
}

function tick(place) {
  const run = runs[place];
  return run ? moment(run.started_at, now).replace(/:\d\d$/, "") : "";
}

// The run under the cursor; the legend when there's none.
function tell(index) {
  const run = runs[index ?? -1];
  byId("reading").textContent = run
    ? `${moment(run.started_at, now)} · ${nameOf(run)} ${run.status} in ${span(run.duration_s ?? 0)}`
    : "Each bar is a sync that writes, the newest on the right";
  for (const button of byId("legend").querySelectorAll("button")) {
    const name = button.dataset.name;
    button.lastChild.data = run ? `${label(name)} ${count(run[name])}` : label(name);
  }
}

function label(name) {
  return name.replace("_", " ");
}

function describe() {
  const last = runs.at(-1);
  host.durations.setAttribute("aria-label", `Durations of the last ${runs.length} syncs, the latest ${span(last.duration_s ?? 0)}. The table below has the last runs.`);
  host.outcomes.setAttribute("aria-label", `Records of the last ${runs.length} syncs by outcome, of the latest: ${outcome(last)}. The table below has the last runs.`);
}

function legend() {
  for (const name of OUTCOMES) {
    const button = document.createElement("button");
    const box = document.createElement("i");
    box.className = `c-${name}`;
    button.type = "button";
    button.dataset.name = name;
    button.append(box, document.createTextNode(label(name)));
    button.setAttribute("aria-pressed", String(!hidden.has(name)));
    button.onclick = () => {
      if (!hidden.delete(name)) hidden.add(name);
      button.setAttribute("aria-pressed", String(!hidden.has(name)));
      plots.outcomes.setData(outcomes());
    };
    byId("legend").append(button);
  }
}

legend();
tell(null);
// The colours are those of the scheme at the time.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const name of Object.keys(plots)) {
    plots[name].destroy();
    delete plots[name];
  }
  if (runs.length) draw(runs, now);
});
