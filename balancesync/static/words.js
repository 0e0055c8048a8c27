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

// What a verify found to differ.
export function drift(run) {
  return run.mode === "verify" ? run.inserted + run.updated + run.deleted : 0;
}

// Whether a run's counts are keys of Redis, and not rows.
export const countsKeys = (run) => ["restore", "prune"].includes(run.job);

export function outcome(run) {
  if (run.mode === "verify") return drift(run) ? plural(drift(run), "row differs", "rows differ") : "no drift";
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
  if (drift(run)) {
    found.push({ level: "warn", text: `Drift: ${outcome(run)} between Redis and PostgreSQL; \`balancesync verify\` shows the first` });
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
  return { known: true, short: "Every record could be stored", long: "None: every record that Redis holds could be stored." };
}

// Whether the balances are safe: { level: ok | warn | bad | wait, title, detail }.
export function verdict(status, now) {
  const found = judged(status, now);
  if (status.state !== "draining") return found;
  const run = status.current_run && status.current_run.trigger !== "cli";
  const ends = run ? "its run ends with the batch under way, and" : "";
  const detail = `This daemon is stopping: ${ends} nothing new is started. ${found.detail}`;
  return say(found.level === "ok" ? "warn" : found.level, found.title, detail.replace(/ +/g, " "));
}

function judged(status, now) {
  const until = status.safe_until && moment(status.safe_until, now);
  const kept = until && `Everything up to ${until} is in PostgreSQL`;
  const checks = status.health.checks;
  const last = status.last_run;
  const alone = "what has changed since is in Redis alone. ";
  if (!status.postgres.connected) {
    const since = kept ? `${kept}; ${alone}` : "";
    return status.redis.connected
      ? say("bad", "PostgreSQL doesn't answer", `${since}A sync starts when it's back.`)
      : say("bad", "Neither PostgreSQL nor Redis answers", `${since}A sync starts when both are back.`);
  }
  if (checks.schema?.status === "failed") {
    return say("bad", "balancesync's own tables can't be read", checks.schema.detail);
  }
  if (status.refusal) {
    const held = kept ? `${kept}, and stays as it is: nothing` : "Nothing";
    return say("bad", "Stopped: the guard refuses to follow Redis",
      `${held} is written until you decide.`);
  }
  if (!status.redis.connected) {
    const from = kept ? `${kept}, and balances are read from there; ${alone}` : "";
    return say("bad", "Redis doesn't answer", `${from}A sync starts when it's back.`);
  }
  if (!until) return never(status, last);
  const rejects = rejectsOf(status).reduce((sum, row) => sum + row.number, 0);
  if (rejects && checks.rejects?.status === "degraded") {
    return say("bad", `Not safe: ${plural(rejects, "record", "records")} can't be stored`,
      `${capital(checks.rejects.detail)}. All others, up to ${until}, are in PostgreSQL.`);
  }
  if (checks.last_success?.status === "failed") {
    return say("bad", `Not safe: nothing newer than ${until} is in PostgreSQL`,
      "The last success is older than two intervals of the schedule.");
  }
  if (status.without_keys.length) {
    return say("warn", `Redis had no key of ${status.without_keys.join(" and ")} at ${until}: is redis.url right?`,
      "If it is: either the application has made none yet, or they are written in another way than `key` says.");
  }
  return since(status, last, until, rejects);
}

function never(status, last) {
  if (status.current_run) {
    return say("wait", "The first sync is running", "Its balances are safe when it has succeeded.");
  }
  if (last && !ENDED_WELL.includes(last.status)) {
    return say("bad", `Not safe: no sync has succeeded, the last was ${last.status}`,
      last.error ?? "");
  }
  return say("wait", "No sync has succeeded yet", "Nothing is known to be safe before one of all mappings has.");
}

function since(status, last, until, rejects) {
  const exceptions = [
    rejects && plural(rejects, "reject", "rejects"),
    status.not_found && `${plural(status.not_found, "key", "keys")} without a row`,
  ].filter(Boolean);
  const but = exceptions.length ? `, but for ${exceptions.join(" and ")}` : "";
  const more = status.live === "up" ? "; what changes follows live" : "";
  const title = `Safe: everything up to ${until} is in PostgreSQL${but}${more}`;
  const worries = [];
  const differ = Object.values(status.drift).reduce((sum, number) => sum + number, 0);
  if (differ) {
    worries.push(`The last verify found drift: ${plural(differ, "row differs", "rows differ")} from Redis. \`balancesync verify\` shows the first as they are now.`);
  }
  if (["down", "catching up"].includes(status.live)) worries.push(`Live mode is ${status.live}.`);
  if (status.health.checks.postponed?.status === "degraded") {
    worries.push(`A run waits: ${status.health.checks.postponed.detail}.`);
  } else if (last?.job === "sync" && last.mode === "apply" && !ENDED_WELL.includes(last.status)) {
    // Another job can't leave PostgreSQL behind; what it failed of was told to whoever asked for it.
    worries.push(`The last sync ${unwell(last)}`);
  }
  return say(worries.length ? "warn" : "ok", title, worries.join(" "));
}

function unwell(run) {
  const { status, error } = run;
  if (error?.startsWith(status)) return `was ${error}.`;
  return `${status === "failed" ? "failed" : `was ${status}`}${error ? `: ${error}` : "."}`;
}

function say(level, title, detail) {
  return { level, title, detail };
}
