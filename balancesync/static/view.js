// Shows what the daemon says. Texts become text nodes: nothing is ever parsed as HTML.

import * as words from "./words.js";

const ICON = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><circle cx="8" cy="8" r="7" fill="COLOUR"/></svg>';
// One that gave up says no counts of what it had read.
const TIME = /\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ/g;
const CUT_OFF = ["cancelled", "interrupted", "postponed"];
const WRITTEN = ["inserted", "updated", "deleted"];
const COLOURS = { ok: "#17702f", warn: "#d99a00", bad: "#c01c28", wait: "#0a58a8" };

export const byId = (id) => document.getElementById(id);

// An element with these children; what isn't an element is text.
function make(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.map((child) => child ?? ""));
  return made;
}

// Only a change is announced, and only a change costs a layout. What is in `backticks` is code; with
// `now`, times are those of this browser's zone.
export function say(id, text, className, now) {
  const element = byId(id);
  if (element.said !== text) element.replaceChildren(...parts(text).flatMap((part) => (now ? timed(part, now) : [part])));
  element.said = text;
  if (className !== undefined) element.className = className;
}

function timed(part, now) {
  if (typeof part !== "string") return [part];
  const times = part.match(TIME) ?? [];
  return part.split(TIME).flatMap((piece, index) => (index < times.length ? [piece, time(times[index], now)] : [piece]));
}

function parts(text) {
  const pieces = text.split("`");
  if (pieces.length % 2 === 0) return [text];
  return pieces.map((piece, index) => (index % 2 ? make("code", "", ...command(piece)) : piece));
}

// Broken between its words alone: half an option is none.
function command(text) {
  return text.split(" ").flatMap((word, index) => [index ? " " : "", make("span", "", word)]);
}

function fill(body, rows) {
  body.replaceChildren(...rows);
}

function table(head, rows, right = []) {
  const cells = head.map((text, index) => {
    const cell = make("th", right.includes(index) ? "n" : "", text);
    cell.scope = "col";
    return cell;
  });
  return make("table", "", make("thead", "", make("tr", "", ...cells)), make("tbody", "", ...rows));
}

function pill(run) {
  const { status } = run;
  const ok = words.ENDED_WELL.includes(status);
  const level = ok ? "ok" : words.ENDED_BADLY.includes(status) ? "bad" : "warn";
  return run.drift ? make("span", "pill warn", "drift found") : make("span", `pill ${level}`, status);
}

function time(text, now) {
  const made = make("time", "", words.moment(text, now));
  made.dateTime = text;
  made.title = `${text.slice(0, 19)}Z`;
  return made;
}

// What the daemon has judged, as it is: { level, line, advice }. Only its times are put in this browser's zone.
export function showVerdict(found, now) {
  const level = { safe: "ok", look: "warn", act: "bad", wait: "wait" }[found.level];
  byId("verdict").dataset.level = level;
  say("verdict-title", words.capital(found.line), undefined, now);
  say("verdict-detail", found.advice.join(" "), undefined, now);
  // In live mode its time goes on and on: that isn't read out.
  say("verdict-said", words.capital(found.line.replace(TIME, "now")));
  const mark = { ok: "✓ Safe", warn: "! Look", bad: "✗ Act", wait: "… " }[level];
  document.title = `${mark} · balancesync`;
  byId("icon").href = `data:image/svg+xml,${encodeURIComponent(ICON.replace("COLOUR", COLOURS[level]))}`;
}

export function showState(status) {
  const levels = { idle: "", running: "run", standby: "", draining: "warn" };
  say("state", status.state, `pill ${levels[status.state]}`);
  const leads = status.leader && status.leader !== status.name;
  say("host", leads ? `${status.name}; ${status.leader} leads and runs` : status.name);
}

// What goes on with the time: ages, and the way to the next run.
export function showTimes(status, elapsed, now) {
  const age = status.last_success_age_s;
  say("age", age === null ? "none yet" : `${words.about(age + elapsed)} ago`);
  const next = status.next_run_at;
  const left = next ? (Date.parse(next) - now) / 1000 : 0;
  const due = left > 0 ? `in ${words.about(left)}, at ${next && words.moment(next, now)}` : "now";
  const owner = status.state === "standby" ? ` (${status.leader} runs it)` : "";
  const none = status.state === "draining" ? "none: it is stopping" : "none planned";
  say("next", next ? due + owner : none);
}

// `then`: when the daemon was heard last, if it isn't any more; null while it is.
export function showServers(status, now, then) {
  const show = then
    ? (id, text) => tile(id, "unknown", "", `${words.capital(text)} as of ${then}`)
    : tile;
  for (const name of ["redis", "postgres"]) {
    const server = status[name];
    const detail = server.connected
      ? `Version ${server.version}, answers in ${server.latency_ms.toFixed(1)} ms`
      : server.error;
    show(name, server.connected ? "up" : "down", server.connected ? "ok" : "bad", detail);
  }
  const level = { off: "", up: "ok", "catching up": "warn", down: "bad" }[status.live];
  show("live", status.live, level, words.live(status, now));
  byId("unshown").hidden = status.live === "off";
  const rows = words.rejectsOf(status);
  const sum = rows.reduce((total, row) => total + row.number, 0);
  const over = status.health.checks.rejects?.status === "degraded";
  const kinds = rows.length > 1 ? `${words.plural(rows.length, "kind", "kinds")}, most: ${rows[0].name}` : rows[0]?.name;
  const none = words.noRejects(status);
  show("open", sum || none.known ? words.count(sum) : "unknown", sum ? (over ? "bad" : "warn") : "", kinds ?? none.short);
}

function tile(id, text, level, detail) {
  const [, word, small] = byId(id).children;
  word.className = `pill ${level}`;
  if (word.textContent !== text) word.textContent = text;
  if (small.textContent !== detail) small.textContent = detail;
}

export function showRefusal(status, now) {
  byId("refusal").hidden = !status.refusal;
  const rows = (status.refusal ?? []).map((each) => {
    const since = each.refused_at ? [" Since ", time(each.refused_at, now), "."] : [];
    return make("li", "", make("b", "", each.mapping), `: ${each.reason}.`, ...since);
  });
  fill(byId("refused"), rows);
  byId("changed").hidden = !(status.refusal ?? []).some((each) => each.reason.includes("came back changed"));
}

// A run under way; `pace` is { perSecond, left } as far as it's known.
export function showCurrent(run, queued, pace) {
  if (!run && byId("current").contains(document.activeElement)) byId("sync").focus();
  byId("current").hidden = !run;
  if (!run) return;
  const waiting = queued ? `; ${words.plural(queued, "more waits", "more wait")}` : "";
  say("current-title", `Under way: ${words.nameOf(run)}, ${words.asked(run.trigger)}${waiting}`);
  byId("cancel").hidden = run.trigger === "cli";
  const progress = run.progress;
  const bar = byId("bar");
  if (progress?.ratio === null || progress?.ratio === undefined) bar.removeAttribute("value");
  else bar.value = progress.ratio;
  say("far", far(run, progress, pace));
}

function far(run, progress, pace) {
  if (!progress) return run.trigger === "cli" ? "A command runs it: end it there with Ctrl-C." : "Starting…";
  const doing = { scan: "Reading", compare: "Comparing", apply: "Writing" }[progress.phase] ?? progress.phase;
  const told = [`${doing} ${progress.mapping ?? ""}`.trim()];
  if (progress.total) told.push(`${words.count(progress.done)} of ${words.count(Math.max(progress.total, progress.done))}`);
  else if (progress.done) told.push(words.count(progress.done));
  if (pace.perSecond) told.push(`${words.short(pace.perSecond)}/s`);
  if (pace.left) told.push(`${words.about(pace.left)} left`);
  return told.join(" · ");
}

export function showRuns(runs, shown, now, knows) {
  const few = runs.slice(0, shown);
  byId("runs-none").hidden = runs.length > 0 && knows;
  say("runs-none", knows ? "Nothing has run yet." : "The runs before are in PostgreSQL's keeping: they show when it tells of them.");
  byId("runs").parentElement.hidden = runs.length === 0;
  byId("more").hidden = runs.length <= shown;
  fill(byId("runs").tBodies[0], few.flatMap((run) => runRows(run, now)));
}

function runRows(run, now) {
  const what = make("small", "", `${words.nameOf(run)} ${words.asked(run.trigger)}`);
  const took = run.duration_s === null ? "–" : words.span(run.duration_s);
  const number = (of) => (of ? words.count(of) : make("span", "soft", "0"));
  const none = () => make("span", "soft", "–");
  const row = make("tr", "", make("td", "", time(run.started_at, now), what),
    make("td", "", pill(run), make("small", "narrow", took)), make("td", "n wide", took),
    make("td", "n wide", run.scanned || !CUT_OFF.includes(run.status) ? words.count(run.scanned) : none()));
  for (const name of WRITTEN) row.append(make("td", "n wide", number(run[name])));
  const writes = run.mode === "apply" && !words.countsKeys(run);
  row.append(make("td", "n narrow", writes ? number(WRITTEN.reduce((sum, name) => sum + run[name], 0)) : none()));
  row.append(make("td", "n", number(run.rejected)));
  row.title = run.id;
  const notes = words.notes(run).map(({ level, text }) => make("small", level, ...parts(text)));
  if (!notes.length) return [row];
  const cell = make("td", "", ...notes);
  cell.colSpan = row.cells.length;
  row.className = "noted";
  return [row, make("tr", "", cell)];
}

// `shown`: the row whose samples are shown, if any.
export function showRejects(status, shown, onSamples) {
  const rows = words.rejectsOf(status);
  const held = byId("rejects-card").contains(document.activeElement) && document.activeElement;
  const label = held && held.getAttribute("aria-label");
  say("rejects-none", words.noRejects(status).long);
  byId("rejects-none").hidden = rows.length > 0;
  byId("rejects").parentElement.hidden = rows.length === 0;
  const open = rows.some((row) => row.mapping === shown?.mapping && row.name === shown.name);
  if (!open) byId("samples").hidden = true;
  fill(byId("rejects").tBodies[0], rows.map((row) => rejectRow(row, onSamples)));
  if (!held || (held.isConnected && !held.closest("[hidden]"))) return;
  // What had the focus is gone: it goes to what has come in its place.
  const again = [...byId("rejects").querySelectorAll("button")].find((each) => each.getAttribute("aria-label") === label);
  (again ?? byId("rejects-title")).focus();
}

function rejectRow(row, onSamples) {
  const button = make("button", "", "Samples");
  button.type = "button";
  button.setAttribute("aria-label", `Samples of ${row.name} in ${row.mapping}`);
  button.onclick = () => onSamples(row);
  return make("tr", "",
    make("td", "text", make("code", "", row.name), ` in ${row.mapping}`, make("small", "", words.reason(row.name))),
    make("td", "n", words.count(row.number)), make("td", "n", button));
}

export function showSamples(row, rejects, now) {
  const first = rejects.length < row.number ? `the newest ${rejects.length} of ${words.count(row.number)}` : `all ${rejects.length}`;
  say("samples-title", `${row.name} in ${row.mapping}: ${first}, as of ${words.moment(now, now)}`);
  byId("samples-all").hidden = rejects.length >= row.number;
  say("samples-all", `All of them: \`balancesync rejects --mapping ${row.mapping} --reason ${row.name} --limit ${row.number}\``);
  fill(byId("samples").querySelector("tbody"), rejects.map((each) => make("tr", "",
    make("td", "text", make("code", "", cut(each.key)), make("small", "", cut(each.detail))),
    make("td", "text", each.value === null ? make("span", "soft", "none") : make("code", "", cut(each.value))),
    make("td", "wide", time(each.first_seen, now)))));
  byId("samples").hidden = false;
  byId("samples-title").focus();
}

// What would break a line or turn its direction round is shown by its number, as in a terminal.
function cut(text) {
  const short = text.length > 120 ? `${text.slice(0, 120)}…` : text;
  return short.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu,
    (char) => `\\u${char.codePointAt(0).toString(16).padStart(4, "0")}`);
}

// The result of a dry run, with amounts as they came: exact texts.
export function showFound(run) {
  const body = byId("found-body");
  const title = run.status === "succeeded" ? "What a sync would do" : `The dry run was ${run.status}`;
  say("found-title", title);
  const found = run.error ? [make("p", "", ...parts(run.error))] : [countsTable(run)];
  for (const report of run.report ?? []) found.push(...reportParts(report, run));
  body.replaceChildren(...found);
  byId("found").hidden = false;
  byId("found-title").focus();
}

export function hideFound() {
  const panel = byId("found");
  if (panel.hidden) return;
  const held = panel.contains(document.activeElement);
  panel.hidden = true;
  if (held) byId("dry").focus();
}

// A table that scrolls, or on a phone has each row below the other, so that no amount is cut.
function scroll(inner, label) {
  inner.className = "stack";
  const heads = [...inner.tHead.rows[0].cells].map((cell) => cell.textContent);
  for (const row of inner.tBodies[0].rows) {
    for (const [index, cell] of [...row.cells].entries()) cell.dataset.head = heads[index];
  }
  const made = make("div", "scroll", inner);
  made.tabIndex = 0;
  made.setAttribute("role", "region");
  made.setAttribute("aria-label", label);
  return made;
}

function countsTable(run) {
  const names = ["scanned", ...words.OUTCOMES, "absent"];
  const rows = Object.entries(run.mappings).map(([name, counts]) =>
    make("tr", "", make("td", "", name), ...names.map((each) => make("td", "n", words.count(counts[each])))));
  const head = ["Mapping", ...names.map((name) => name.replace("_", " "))];
  return scroll(table(head, rows, names.map((_, index) => index + 1)), "Counts by mapping");
}

function reportParts(report, run) {
  const found = [];
  if (report.rows.length) {
    const keys = Object.keys(report.rows[0].key);
    const values = Object.keys(report.rows[0].new ?? report.rows[0].old);
    const rows = report.rows.map((row) => make("tr", "",
      make("td", "", row.op),
      ...keys.map((name) => make("td", "text", make("code", "", cut(row.key[name])))),
      ...values.map((name) => make("td", "n", make("span", "", ...move(row, name))))));
    const right = values.map((_, index) => 1 + keys.length + index);
    const counts = run.mappings[report.mapping];
    const all = counts.inserted + counts.updated + counts.deleted;
    const more = all > report.rows.length ? `: the first ${report.rows.length} of ${words.count(all)} rows` : "";
    found.push(make("h3", "", `${report.mapping}${more}`), scroll(table(["Change", ...keys, ...values], rows, right), `Rows of ${report.mapping}`));
  }
  for (const [column, total] of Object.entries(report.totals)) {
    const sign = total.startsWith("-") ? "" : "+";
    const moved = /[1-9]/.test(total) ? `would change by ${sign}${total}` : "would stay the same";
    found.push(make("p", "", `The total of ${column} in ${report.mapping} ${moved}.`));
  }
  return found;
}

function move(row, column) {
  const one = (side) => (row[side][column] === null ? make("span", "soft", "NULL") : make("code", "", cut(row[side][column])));
  if (!row.old) return [one("new")];
  if (!row.new) return [one("old"), " → gone"];
  return row.old[column] === row.new[column] ? [one("new")] : [one("old"), " → ", one("new")];
}
