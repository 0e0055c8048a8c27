// The daemon, over HTTP. The token is asked for when it's needed and kept for this tab alone.

const KEPT = "balancesync.token";
const PATIENCE_MS = 5000;
const PRINTABLE = /^[\x20-\x7e]*$/;
const base = new URL("sync-management/", document.baseURI);
const dialog = document.getElementById("token");
const needsToken = document.documentElement.dataset.token === "needed";

// What the daemon objects to; `code` is null if it didn't answer at all.
export class Problem extends Error {
  constructor(message, code = null) {
    super(message);
    this.code = code;
  }
}

// A document, and by how much this clock is behind the daemon's, in milliseconds.
export async function read(path) {
  const answer = await send(path, { signal: AbortSignal.timeout(PATIENCE_MS) });
  const theirs = Date.parse(answer.headers.get("Date"));
  return { document: await documentOf(answer), behind: theirs ? theirs - Date.now() : 0 };
}

// A document of those that want the token; null if the user doesn't give it.
export async function ask(path, method = "GET") {
  let problem = "";
  for (;;) {
    const kept = sessionStorage.getItem(KEPT);
    const token = needsToken ? kept ?? (await askToken(problem)) : "";
    if (token === null) return null;
    // What no header can carry is no token of the daemon's.
    const answer = PRINTABLE.test(token) ? await send(path, authorised(method, token)) : null;
    if (answer && answer.status !== 401) {
      if (token) sessionStorage.setItem(KEPT, token);
      return documentOf(answer);
    }
    sessionStorage.removeItem(KEPT);
    problem = kept === null ? "That isn't the token." : "";
  }
}

// Follow the events. `change` is told whether they flow: a connection that the daemon has refused
// isn't tried again by the browser, so it's tried again here.
export function follow(kinds, hear, change) {
  const source = new EventSource(new URL("events", base));
  source.onopen = () => change(true);
  source.onerror = () => {
    change(false);
    if (source.readyState === EventSource.CLOSED) {
      setTimeout(() => follow(kinds, hear, change), PATIENCE_MS);
    }
  };
  for (const kind of kinds) {
    source.addEventListener(kind, (event) => hear(kind, JSON.parse(event.data)));
  }
}

function authorised(method, token) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  return { method, headers, signal: AbortSignal.timeout(PATIENCE_MS) };
}

async function send(path, options) {
  try {
    return await fetch(new URL(path, base), { cache: "no-store", ...options });
  } catch {
    throw new Problem("the daemon doesn't answer");
  }
}

async function documentOf(answer) {
  let document;
  try {
    document = await answer.json();
  } catch {
    throw new Problem(`the daemon answers ${answer.status}, and no JSON`);
  }
  if (!answer.ok) throw new Problem(document.error.message, document.error.code);
  return document;
}

function askToken(problem) {
  const [form, field] = [dialog.querySelector("form"), dialog.querySelector("input")];
  document.getElementById("token-wrong").textContent = problem;
  field.value = "";
  field.setAttribute("aria-invalid", String(problem !== ""));
  return new Promise((resolve) => {
    let given = null;
    form.onsubmit = (event) => {
      event.preventDefault();
      given = field.value.trim();
      dialog.close();
    };
    dialog.querySelector("[data-no]").onclick = () => dialog.close();
    dialog.onclose = () => {
      field.value = "";
      resolve(given || null);
    };
    dialog.showModal();
  });
}
