// Wires the daemon to the page: what is asked when, and what a button does.

import { ask, follow, Problem, read } from "./daemon.js";
import * as view from "./view.js";
import * as words from "./words.js";

const POLL_MS = 5000;
const SOON_MS = 150;
const NEWS_MS = 60000;
const KEPT_RUNS = 16;
const FEW_RUNS = 8;
const SAMPLES = 20;
const ENDED = (run) => !["queued", "running"].includes(run.status);

const state = {
  status: null,
  readAt: 0, // of performance.now()
  heard: 0, // when the daemon answered last, by its own clock
  behind: 0,
  runs: new Map(), // by id; the newest KEPT_RUNS that have ended
  knows: false, // whether no run can have been missed since they were read
  read: false, // whether the runs before this page were ever read
  shown: FEW_RUNS,
  lost: null, // since when the daemon doesn't answer
  flows: false, // whether the events come
  pace: null,
  dryRun: null, // the dry run that was asked for here, to be shown when it has ended
  found: null, // the dry run that is shown
  busy: null, // what is being asked for, and not yet answered
  silence: 0,
  level: "wait", // of the verdict, as the daemon has it
  cheers: false, // whether what is said is good news
  samples: null, // the kind of rejects whose samples are shown
  drawn: {}, // what was shown last, by its part
  due: 0,
};

const now = () => Date.now() + state.behind;

// --- reading ---------------------------------------------------------------------------------

// Read soon, once for all that happens meanwhile.
function soon() {
  state.due ||= setTimeout(refresh, SOON_MS);
}

async function refresh() {
  clearTimeout(state.due);
  state.due = -1;
  try {
    await load();
    state.lost = null;
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (state.lost === null) tell("");
    state.lost ??= now();
  } finally {
    state.due = 0;
    render();
  }
}

async function load() {
  const { document: status, behind } = await read("status");
  Object.assign(state, { status, behind, readAt: performance.now() });
  state.heard = now();
  // A run of another process tells of itself by the records alone, and may not be the only one.
  const unheard = status.last_run && !state.runs.has(status.last_run.id);
  if (status.last_run) take(status.last_run);
  const readable = status.health.checks.schema?.status === "ok";
  if (readable && (!state.knows || unheard)) await loadRuns();
  if (state.dryRun && state.runs.has(state.dryRun)) await showDryRun();
}

async function loadRuns() {
  const { document } = await read(`runs?limit=${KEPT_RUNS}&brief=true`);
  document.runs.forEach(take);
  state.knows = state.read = true;
}

function take(run) {
  if (!ENDED(run) || run.job === "live") return;
  state.runs.set(run.id, run);
  // An id sorts by the time it was made.
  if (state.found && run.id > state.found && wrote(run)) closeFound();
  for (const id of [...state.runs.keys()].sort().slice(0, -KEPT_RUNS)) state.runs.delete(id);
}

// Whether what a dry run found before is no longer so.
function wrote(run) {
  return run.mode === "apply" && (run.status === "succeeded" || run.inserted + run.updated + run.deleted > 0);
}

function closeFound() {
  state.found = null;
  view.hideFound();
}

function newest() {
  return [...state.runs.values()].sort((a, b) => (a.id < b.id ? 1 : -1));
}

// --- events ----------------------------------------------------------------------------------

const HEARD = {
  run_queued: soon,
  run_started: (run) => {
    state.pace = null;
    if (state.status) Object.assign(state.status, { current_run: { ...run, progress: null } });
    soon();
  },
  run_progress: (progress) => {
    const run = state.status?.current_run;
    if (run?.id !== progress.run_id) return soon();
    run.progress = progress;
    showCurrent();
  },
  run_finished: (run) => {
    take(run);
    announce(run);
    soon();
  },
  redis: soon,
  postgres: soon,
  leader: soon,
  live: soon,
};

function hear(kind, document) {
  HEARD[kind](document);
}

function announce(run) {
  if (run.mode === "dry_run" && run.id === state.dryRun) return;
  tell(words.ended(run), words.ENDED_BADLY.includes(run.status) || run.drift > 0);
  state.cheers = words.ENDED_WELL.includes(run.status) && !run.drift;
}

// Said once; what is a minute old is no news.
function tell(text, bad = false) {
  view.say("said", text, bad ? "bad" : "");
  state.cheers = false;
  clearTimeout(state.silence);
  state.silence = setTimeout(() => view.say("said", ""), NEWS_MS);
}

// How fast it goes in this phase, and how long it will take at that.
function pace(progress) {
  const at = performance.now();
  const name = `${progress.run_id} ${progress.phase} ${progress.mapping}`;
  if (state.pace?.name !== name) state.pace = { name, at, done: progress.done };
  const seconds = (at - state.pace.at) / 1000;
  const perSecond = seconds > 1 ? (progress.done - state.pace.done) / seconds : 0;
  const left = perSecond && progress.total ? (progress.total - progress.done) / perSecond : 0;
  return { perSecond, left };
}

// --- showing ---------------------------------------------------------------------------------

function render() {
  const { status } = state;
  document.body.classList.toggle("lost", state.lost !== null);
  showConnection();
  if (status) {
    showSafety();
    view.showState(status);
    if (state.lost !== null) view.say("state", "unknown", "pill");
    view.showServers(status, now(), state.lost === null ? null : words.moment(state.heard, now()));
    if (isNew("refusal", status.refusal)) view.showRefusal(status, now());
    if (isNew("rejects", [status.rejects, words.noRejects(status)])) {
      view.showRejects(status, state.samples, (row) => act("samples", () => samples(row)));
    }
    showRuns();
    showCurrent();
    tick();
  }
  allow();
}

// Whether a part has changed since it was drawn: what hasn't keeps its focus and its place.
function isNew(part, value) {
  const mark = JSON.stringify(value);
  const before = state.drawn[part];
  state.drawn[part] = mark;
  return before !== mark;
}

function showSafety() {
  const { status, lost, heard } = state;
  if (lost === null) {
    const found = status.verdict;
    // What went well before is no comfort.
    if (state.cheers && found.level === "act" && state.level !== "act") tell("");
    state.level = found.level;
    return view.showVerdict(found, now());
  }
  const until = status.safe_until;
  const kept = until ? `: everything up to ${words.moment(until, now())} was in PostgreSQL` : "";
  const was = status.state === "draining" ? "the daemon was stopping" : "the daemon doesn't answer";
  const told = `What is shown is as of ${words.moment(heard, now())}${kept}. How it stands now isn't known.`;
  view.showVerdict({ level: "act", line: `connection lost: ${was}`, advice: [told] }, now());
}

function showConnection() {
  const [text, level] =
    state.lost !== null
      ? ["Connection lost, trying again", "bad"]
      : state.flows ? ["Connected", "ok"] : [`Every ${POLL_MS / 1000} s`, "wait"];
  view.say("connection", text);
  view.byId("connection").dataset.level = level;
}

function showRuns() {
  const runs = newest();
  const today = new Date(now()).toDateString();
  if (!isNew("runs", [runs.length, runs[0]?.id, state.shown, today, state.read])) return;
  view.showRuns(runs, state.shown, now(), state.read);
  const writing = runs.filter((run) => run.mode === "apply" && run.job === "sync").reverse();
  view.byId("charts").hidden = writing.length === 0;
  if (!writing.length) return;
  // By far the largest part, and not needed for the first words. What didn't come is asked for again.
  import("./chart.js").then(({ draw }) => draw(writing, now()), () => delete state.drawn.runs);
}

function showCurrent() {
  const run = state.lost === null ? state.status.current_run : null;
  const progress = run?.progress;
  view.showCurrent(run, state.status.queued_runs.length, progress ? pace(progress) : {});
}

function tick() {
  if (!state.status) return;
  view.showTimes(state.status, (performance.now() - state.readAt) / 1000, now());
  if (state.lost !== null) view.say("next", "unknown");
}

// --- acting ----------------------------------------------------------------------------------

function allow() {
  const { status, lost, busy } = state;
  const leads = status && !["standby", "draining"].includes(status.state);
  for (const id of ["sync", "dry", "cancel"]) {
    view.byId(id).disabled = !leads || lost !== null;
    // One that is disabled would lose the focus.
    view.byId(id).setAttribute("aria-disabled", String(busy !== null));
  }
  const elsewhere = status?.state === "standby" && lost === null;
  view.say("off", elsewhere ? `The buttons are off here: ${status.leader} leads, ask there.` : "");
}

// Do what a button asks for, one thing at a time; say what came of it.
async function act(name, work) {
  if (state.busy) return;
  state.busy = name;
  allow();
  try {
    const said = await work();
    if (said) tell(said);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    tell(words.capital(problem.message), true);
  } finally {
    state.busy = null;
    allow();
  }
}

async function start(path, name) {
  const accepted = await ask(path, "POST");
  if (!accepted) return "";
  soon();
  if (name === "dry run") state.dryRun = accepted.run_id;
  // Its end may be heard before this answer, and is the later word.
  if (state.runs.has(accepted.run_id)) return "";
  return accepted.state === "queued" ? `The ${name} waits for the run under way` : `The ${name} has started`;
}

async function cancel() {
  const run = state.status.current_run;
  if (!run || !(await ask(`runs/${run.id}`, "DELETE"))) return "";
  return "It ends at its next batch";
}

async function samples(row) {
  const query = new URLSearchParams({ limit: SAMPLES, mapping: row.mapping, reason: row.name });
  const found = await ask(`rejects?${query}`);
  if (!found) return "";
  state.samples = row;
  view.showSamples(row, found.rejects, now());
  return "";
}

async function showDryRun() {
  const id = state.dryRun;
  state.dryRun = null;
  await act("dry run", async () => {
    const run = await ask(`runs/${id}`);
    if (!run) return "";
    state.found = id;
    view.showFound(run);
    return `The dry run ${run.status}`;
  });
}

function wire() {
  const on = (id, work) => view.byId(id).addEventListener("click", work);
  on("sync", () => act("sync", () => start("force-sync", "sync")));
  on("dry", () => act("dry run", () => start("force-sync?dry_run=true", "dry run")));
  on("cancel", () => act("cancel", cancel));
  on("found-close", closeFound);
  on("more", () => {
    state.shown = KEPT_RUNS;
    showRuns();
  });
  follow(Object.keys(HEARD), hear, (flows) => {
    state.flows = flows;
    // What happened meanwhile wasn't heard.
    if (!flows) state.knows = false;
    soon();
  });
  setInterval(() => document.hidden || soon(), POLL_MS);
  setInterval(tick, 1000);
  document.addEventListener("visibilitychange", () => document.hidden || soon());
}

const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
view.say("zone", `Times are this browser's (${zone})`);
view.say("version", `balancesync ${document.documentElement.dataset.version}`);
wire();
refresh();
