// What the page says, from what the daemon says. Pure: no document, no network, no clock.

const NUMBER = new Intl.NumberFormat("en-US");
const SHORT = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });
const CLOCK = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };

export const OUTCOMES = ["inserted", "updated", "deleted", "rejected", "not_found", "unchanged"];
export const ENDED_WELL = ["succeeded", "skipped"];
export const ENDED_BADLY = ["failed", "refused"];

const REASONS = {
  key_syntax: "The key isn't written as balancesync would write it, as 007 for 7",
  key_ambiguous: "The key can be split into its columns in several ways",
  key_too_long: "The key is over 1,000 bytes",
  wrong_type: "The key holds another Redis type",
  value_too_large: "The value is over 64 kB",
  not_utf8: "A text that is no UTF-8",
  nul_byte: "A text with a NUL byte, which PostgreSQL can't hold",
  not_a_number: "The value is no number",
  out_of_range: "The number is too large for its column",
  too_many_decimals: "More decimals than the column holds; nothing is rounded",
  residue: "What INCRBYFLOAT leaves behind; the option tolerance takes such values",
  not_a_boolean: "The value is no boolean",
  not_a_uuid: "The value is no UUID",
  not_a_time: "The value is no time with an offset",
  text_too_long: "The text is longer than its column",
  not_json: "The value is no JSON object",
  missing_field: "A field is missing that can't be NULL",
  refused_by_table: "A constraint or trigger of the table says no",
};

export const count = (number) => NUMBER.format(number);
export const short = (number) => SHORT.format(number);
export const reason = (name) => REASONS[name] ?? "";

export function plural(number, one, many) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

// A duration: 42 ms, 9.3 s, 1 min 15 s, 2 h 1 min, 2 d 7 h.
export function span(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const parts = (unit, name, part, partName) =>
    `${Math.floor(whole / unit)} ${name} ${Math.floor((whole % unit) / part)} ${partName}`;
  if (whole >= 86400) return parts(86400, "d", 3600, "h");
  if (whole >= 3600) return parts(3600, "h", 60, "min");
  return parts(60, "min", 1, "s");
}

// How long ago, or until then: nobody needs its milliseconds.
export function about(seconds) {
  if (seconds < 60) return `${Math.max(Math.floor(seconds), 0)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  return span(seconds);
}

// A time of the viewer's day; the day too, if it's another one than `now`'s.
export function moment(text, now) {
  const at = new Date(text);
  const clock = at.toLocaleTimeString("en-GB", CLOCK);
  if (at.toDateString() === new Date(now).toDateString()) return clock;
  const year = at.getFullYear() === new Date(now).getFullYear() ? undefined : "numeric";
  const day = at.toLocaleDateString("en-GB", { day: "numeric", month: "short", year });
  return `${day}, ${clock}`;
}

export function nameOf(run) {
  const name = { dry_run: "dry run", verify: "verify" }[run.mode] ?? run.job;
  return run.mapping ? `${name} of ${run.mapping}` : name;
}

export function asked(trigger) {
  const [kind, name] = trigger.split(":");
  const by = {
    startup: "at the start", http: "over HTTP", sighup: "by SIGHUP", cli: "by a command",
    live: "by live mode", recovery: "for recovery",
  };
  return name ? `by schedule: ${name}` : (by[kind] ?? trigger);
}

export function live(status, now) {
  if (status.live === "off") return status.live_reason ?? "Changes are copied by the runs alone";
  const waiting = status.live_pending && plural(status.live_pending, "key waits", "keys wait");
  // An old lag is none that goes on.
  const at = status.live_copied_at && moment(status.live_copied_at, now);
  const up = at ? `The last changes took ${span(status.live_lag_s)} at ${at}` : "Changes are copied as they are made";
  const how = status.live === "up" ? up : status.live_reason;
  return capital([how, waiting].filter(Boolean).join("; "));
}

export function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}


// Whether a run's counts are keys of Redis, and not rows.
export const countsKeys = (run) => ["restore", "prune"].includes(run.job);

function compared(run) {
  const moving = run.moving ? `, ${plural(run.moving, "key", "keys")} changed at every look` : "";
  const none = run.scanned || run.moving ? "no drift" : "no keys to compare";
  return (run.drift ? plural(run.drift, "row differs", "rows differ") : none) + moving;
}

export function outcome(run) {
  if (run.mode === "verify") return compared(run);
  const did = OUTCOMES.filter((name) => run[name] && name !== "unchanged");
  const told = did.map((name) => `${count(run[name])} ${name.replace("_", " ")}`).join(", ");
  if (!told) return run.scanned ? "nothing to change" : countsKeys(run) ? "no rows" : "no keys";
  return countsKeys(run) ? `${told} (keys in Redis)` : told;
}

// What is said once, when a run has ended.
export function ended(run) {
  const name = capital(nameOf(run));
  if (run.status === "postponed") return `${name} postponed, it starts by itself when it can: ${run.error}`;
  const took = run.duration_s ? ` in ${span(run.duration_s)}` : "";
  return `${name} ${run.status}${took}${run.status === "succeeded" ? `: ${outcome(run)}` : ""}`;
}

// What a run's row doesn't say: { level, text }.
export function notes(run) {
  const found = run.error ? [{ level: ENDED_BADLY.includes(run.status) ? "bad" : "warn", text: run.error }] : [];
  found.push(...run.warnings.map((text) => ({ level: "warn", text })));
  if (run.drift) {
    found.push({ level: "warn", text: `Drift: ${plural(run.drift, "row differs", "rows differ")} between Redis and PostgreSQL; \`balancesync verify\` shows the first` });
  }
  if (countsKeys(run) && run.scanned) found.push({ level: "", text: "The counts are keys in Redis, not rows" });
  return found;
}

export function rejectsOf(status) {
  const rows = [];
  for (const [mapping, reasons] of Object.entries(status.rejects ?? {})) {
    for (const [name, number] of Object.entries(reasons)) rows.push({ mapping, name, number });
  }
  return rows.sort((a, b) => b.number - a.number);
}

// What there is to say where no reject is open, or none is known.
export function noRejects(status) {
  const away = status.health.checks.schema.status !== "ok";
  if (!status.rejects) return { known: false, short: "PostgreSQL hasn't told yet", long: "Not known yet." };
  if (away) return { known: false, short: "PostgreSQL can't tell now", long: "Not known: PostgreSQL can't tell now." };
  if (!status.last_success_at) return { known: false, short: "No sync has succeeded yet", long: "Not known yet." };
  return { known: true, short: "Every record read could be stored", long: "None: every record that the last runs read could be stored." };
}
